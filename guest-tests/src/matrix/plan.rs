//! Which combinations of limits are tried, and in which guest.
//!
//! The combinations of all values are put in such an order that the first few already hold nearly every pair of values;
//! a run of the default suite takes those, `--full` takes all.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::model::Topology;

/// `[matrix]` of a scenario: the axes, and how they are dealt out to guests.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Axes {
    /// Values of `max-msix`: a number, `cpus` or `cpus+1`.
    pub max_msix: Vec<toml::Value>,
    /// Values of `msix-table`.
    pub table: Vec<toml::Value>,
    /// Values of `max-queues`.
    pub max_queues: Vec<toml::Value>,
    /// Values of `max-eq`.
    pub max_eq: Vec<toml::Value>,
    /// Numbers of vPorts.
    pub ports: Vec<toml::Value>,
    /// Functions in one guest.
    pub functions: usize,
    /// Guests in the default suite; `--full` has as many as all combinations need.
    pub guests: usize,
}

/// Limits of one function, which are one value of each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Combination([usize; 5]);

impl Combination {
    const MAX_MSIX: usize = 0;
    const TABLE: usize = 1;
    const MAX_QUEUES: usize = 2;
    const MAX_EQ: usize = 3;
    const PORTS: usize = 4;

    /// Its pairs of values, each with the axes that they are of.
    fn pairs(self) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let Self(values) = self;
        (0..values.len()).flat_map(move |a| (a + 1..values.len()).map(move |b| (a, values[a], b, values[b])))
    }
}

/// One guest's functions and their cables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// `--device` values.
    pub devices: Vec<String>,
    /// `--netdev` values.
    pub netdevs: Vec<String>,
}

impl Axes {
    /// The guests of a machine with `cpus`. A guest's functions are on the nodes in turn, those on no node first.
    ///
    /// # Errors
    /// An axis holds something else than numbers.
    pub fn guests(&self, cpus: &str, full: bool) -> Result<Vec<Plan>> {
        let topology = Topology::parse(cpus)?;
        let combinations = spread(&self.combinations(topology.cpus)?);
        let chunks = combinations.chunks(self.functions.max(1));
        let number = if full { chunks.len() } else { self.guests };
        Ok(chunks.take(number).map(|chunk| plan(chunk, topology)).collect())
    }

    fn combinations(&self, cpus: usize) -> Result<Vec<Combination>> {
        let axis = |values: &[toml::Value]| {
            values.iter().map(|value| number(value, cpus)).collect::<Result<BTreeSet<_>>>()
        };
        // In the order of the constants of `Combination`.
        let axes = [
            axis(&self.max_msix)?,
            axis(&self.table)?,
            axis(&self.max_queues)?,
            axis(&self.max_eq)?,
            axis(&self.ports)?,
        ];
        let mut all = vec![Combination([0; 5])];
        for (place, values) in axes.iter().enumerate() {
            let with = |combination: Combination| {
                values.iter().map(move |&value| {
                    let Combination(mut chosen) = combination;
                    chosen[place] = value;
                    Combination(chosen)
                })
            };
            all = all.into_iter().flat_map(with).collect();
        }
        Ok(all)
    }
}

fn number(value: &toml::Value, cpus: usize) -> Result<usize> {
    match value {
        toml::Value::Integer(number) => usize::try_from(*number).context("a negative number in [matrix]"),
        toml::Value::String(text) if text == "cpus" => Ok(cpus),
        toml::Value::String(text) if text == "cpus+1" => Ok(cpus + 1),
        other => bail!("'{other}' in [matrix] is no number"),
    }
}

/// All of them, each time the one with the most pairs that none before it has.
fn spread(combinations: &[Combination]) -> Vec<Combination> {
    let mut rest = combinations.to_vec();
    let mut seen = BTreeSet::new();
    let mut ordered = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let gain =
            |combination: &Combination| combination.pairs().filter(|pair| !seen.contains(pair)).count();
        // Of equals, one from the middle: neighbours differ in one value only.
        let gains: Vec<usize> = rest.iter().map(gain).collect();
        let best = gains.iter().max().copied().unwrap_or_default();
        if best == 0 {
            // The order of what is left makes no difference.
            ordered.append(&mut rest);
            break;
        }
        let equals: Vec<usize> = (0..rest.len()).filter(|&index| gains[index] == best).collect();
        let chosen = rest.remove(equals[equals.len() / 2]);
        seen.extend(chosen.pairs());
        ordered.push(chosen);
    }
    ordered
}

fn plan(chunk: &[Combination], topology: Topology) -> Plan {
    let node =
        |index: usize| if topology.nodes > 1 { (index % (topology.nodes + 1)).checked_sub(1) } else { None };
    let mut placed: Vec<_> =
        chunk.iter().enumerate().map(|(index, &combination)| (node(index), combination)).collect();
    // In the order in which a guest finds them.
    placed.sort_by_key(|(node, _)| *node);
    let mut plan = Plan { devices: Vec::new(), netdevs: Vec::new() };
    for (index, (node, Combination(values))) in placed.into_iter().enumerate() {
        let mut device = format!(
            "mana,max-msix={},msix-table={},max-queues={},max-eq={}",
            values[Combination::MAX_MSIX],
            values[Combination::TABLE],
            values[Combination::MAX_QUEUES],
            values[Combination::MAX_EQ]
        );
        for port in 0..values[Combination::PORTS] {
            let id = format!("f{index}p{port}");
            device += &format!(",netdev={id}");
            plan.netdevs.push(format!("null,id={id}"));
        }
        if let Some(node) = node {
            device += &format!(",node={node}");
        }
        plan.devices.push(device);
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes(functions: usize, guests: usize) -> Axes {
        toml::from_str(&format!(
            "max_msix = [1, 2, 'cpus', 'cpus+1', 64]\ntable = [2, 8, 64]\nmax_queues = [1, 64]\nmax_eq = [64]\nports = [1, 2]\n\
             functions = {functions}\nguests = {guests}"
        ))
        .unwrap()
    }

    #[test]
    fn equal_values_count_once_and_full_takes_all() {
        let axes = axes(8, 1);
        assert_eq!(axes.guests("2", false).unwrap().len(), 1);
        // 1, 2, 3, 64 for two CPUs: "cpus" is there already.
        let all: usize = axes.guests("2", true).unwrap().iter().map(|plan| plan.devices.len()).sum();
        assert_eq!(all, 4 * 3 * 2 * 2);
    }

    #[test]
    fn the_first_few_hold_every_pair() {
        let all = axes(1, 1).combinations(4).unwrap();
        let ordered = spread(&all);
        assert_eq!(ordered.len(), all.len());
        let pairs = |some: &[Combination]| some.iter().flat_map(|one| one.pairs()).collect::<BTreeSet<_>>();
        assert_eq!(pairs(&ordered[..18]), pairs(&all));
    }

    #[test]
    fn functions_are_in_the_order_of_their_nodes() {
        let plans = axes(4, 1).guests("threads=2,nodes=2", false).unwrap();
        let nodes: Vec<_> =
            plans[0].devices.iter().map(|device| device.split_once("node=").map(|(_, n)| n)).collect();
        assert_eq!(nodes, [None, None, Some("0"), Some("1")]);
        assert!(plans[0].netdevs.iter().all(|netdev| netdev.starts_with("null,id=f")));
    }
}
