//! `offloads ADDRESS4 ADDRESS6 --there [NAMESPACE/]INTERFACE [--here INTERFACE] [--bytes 32K] [--connections 16]`:
//! `transfer` over IPv4 and IPv6 with all offloads that the driver lets be changed on, with each of them off at this
//! end, and with all of them off at both. Data flows both ways, so that an end with an offload and one without it meet
//! as sender and as receiver.
//!
//! The driver's counters show that an offload is in use exactly when it is on.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::transfer::{Place, Plan, on_every_queue};
use crate::ethtool::{self, Feature};
use crate::namespace;

/// What is tried, as far as the driver offers it.
const OFFLOADS: [&str; 9] = [
    TX_CHECKSUM[0],
    TX_CHECKSUM[1],
    "rx-checksum",
    TSO[0],
    TSO[1],
    "tx-generic-segmentation",
    "rx-gro",
    "rx-hashing",
    "tx-scatter-gather",
];
/// Of IPv4 and IPv6.
const TX_CHECKSUM: [&str; 2] = ["tx-checksum-ipv4", "tx-checksum-ipv6"];
const TSO: [&str; 2] = ["tx-tcp-segmentation", "tx-tcp6-segmentation"];

/// The command.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let plan = Plan::from(arguments)?;
    let second: IpAddr = arguments.free_from_str()?;
    let plans = [plan.clone(), Plan { address: second, ..plan.clone() }];
    let offered: Vec<&str> = features(&plan.here)?
        .iter()
        .filter(|feature| feature.changeable)
        .filter_map(|feature| OFFLOADS.into_iter().find(|name| *name == feature.name))
        .collect();
    ensure!(!offered.is_empty(), "{} lets no offload be changed", plan.here.interface);

    let ends = [&plan.here, &plan.there];
    switch(&ends, &offered, true)?;
    let mut runs = vec![attempt(&plans, "none")?];
    for name in &offered {
        switch(&ends[..1], &[name], false)?;
        runs.push(attempt(&plans, name)?);
        // Others may have gone off with it.
        switch(&ends[..1], &offered, true)?;
    }
    switch(&ends, &offered, false)?;
    runs.push(attempt(&plans, "all at both ends")?);
    switch(&ends, &offered, true)?;
    Ok(json!({ "offered": offered, "runs": runs }))
}

fn features(place: &Place) -> Result<Vec<Feature>> {
    namespace::within(&place.namespace, || ethtool::features(&place.interface))
}

/// Turns `names` on or off at `ends`, and makes sure of it.
fn switch(ends: &[&Place], names: &[&str], on: bool) -> Result<()> {
    let changes: Vec<(String, bool)> = names.iter().map(|name| ((*name).to_owned(), on)).collect();
    for end in ends {
        namespace::within(&end.namespace, || ethtool::set_features(&end.interface, &changes))?;
        let now = features(end)?;
        for name in names {
            let is = now.iter().any(|feature| feature.name == *name && feature.active);
            ensure!(is == on, "{}: {name} is {}", end.interface, if is { "still on" } else { "still off" });
        }
    }
    Ok(())
}

/// Both address families, or the one that it is about, with `off` off.
fn attempt(plans: &[Plan; 2], off: &str) -> Result<Value> {
    let now = [features(&plans[0].here)?, features(&plans[0].there)?];
    let mut report = json!({ "off": off });
    for (family, plan) in plans.iter().enumerate() {
        if [TX_CHECKSUM[1 - family], TSO[1 - family]].contains(&off) {
            continue;
        }
        let result = on_every_queue(plan).with_context(|| format!("off: {off}, to {}", plan.address))?;
        for (end, features) in ["here", "there"].iter().zip(&now) {
            check(&result[*end], features, family)
                .with_context(|| format!("off: {off}, {end}, to {}", plan.address))?;
        }
        report[["ipv4", "ipv6"][family]] = json!({
            "connections": result["connections"],
            "tso_packets": [&result["here"]["tso_packets"], &result["there"]["tso_packets"]],
            "csum_partial": [&result["here"]["csum_partial"], &result["there"]["csum_partial"]],
        });
    }
    Ok(report)
}

/// Is an offload of sending in use exactly when it is on?
fn check(counted: &Value, features: &[Feature], family: usize) -> Result<()> {
    let is_on = |name: &str| features.iter().any(|feature| feature.name == name && feature.active);
    for (name, counter) in [(TX_CHECKSUM[family], "csum_partial"), (TSO[family], "tso_packets")] {
        let value = counted[counter].as_u64().with_context(|| format!("there is no {counter}"))?;
        ensure!(
            (value > 0) == is_on(name),
            "{name} is {}, but {counter} rose by {value}",
            if is_on(name) { "on" } else { "off" }
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_must_fit_what_is_on() {
        let feature = |name: &str, active| Feature { name: name.to_owned(), active, changeable: true };
        let features = [feature("tx-checksum-ipv6", true), feature("tx-tcp6-segmentation", false)];
        let counted =
            |checksums: u64, segmented: u64| json!({ "csum_partial": checksums, "tso_packets": segmented });
        check(&counted(3, 0), &features, 1).unwrap();
        assert!(check(&counted(0, 0), &features, 1).is_err());
        assert!(check(&counted(3, 1), &features, 1).is_err());
        check(&counted(0, 0), &features, 0).unwrap();
    }
}
