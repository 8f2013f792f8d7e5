//! What the driver made of each function's limits, by what the guest shows and what the device saw.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::model::queues::{Share, share};
use crate::model::{self, Generation, Limits, Topology};
use crate::trace::Trace;

/// One function of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Combination {
    /// Its limits, as the `--device` value has them.
    pub device: String,
    /// The machine's `--cpus`.
    pub cpus: String,
    /// What the model expects.
    pub expected: Share,
    /// Vectors that the guest has.
    pub vectors: usize,
    /// Vectors without an event queue.
    pub idle: usize,
    /// What is not as the model says.
    pub problem: Option<String>,
}

impl Combination {
    /// For the report.
    pub fn describe(&self) -> Value {
        json!({
            "device": self.device,
            "cpus": self.cpus,
            "expected_vectors": self.expected.vectors,
            "queues": self.expected.queues,
            "vectors": self.vectors,
            "idle": self.idle,
            "problem": self.problem,
        })
    }
}

/// Compares what `functions` printed in the guest, and the trace, with the model's rules for `generation`.
///
/// # Errors
/// The report is none, or holds another number of functions.
pub fn check(
    report: &Value,
    trace: &Trace,
    generation: Generation,
    cpus: &str,
    devices: &[String],
) -> Result<Vec<Combination>> {
    let topology = Topology::parse(cpus)?;
    let functions = report.as_array().context("no list of functions")?;
    ensure!(functions.len() == devices.len(), "{} functions, not {}", functions.len(), devices.len());
    let one = |(index, (function, device)): (usize, (&Value, &String))| {
        let limits = Limits::parse(device)?;
        let expected = share(generation, topology, limits);
        let used = used_vectors(trace, index);
        let shown: Vec<&Value> = function["vectors"].as_array().into_iter().flatten().collect();
        let problem = check_guest(function, &shown, generation, topology, limits)
            .and_then(|()| check_trace(trace, index, generation, &expected))
            .err()
            .map(|error| format!("{error:#}"));
        Ok(Combination {
            device: device.clone(),
            cpus: cpus.to_owned(),
            idle: shown.len().saturating_sub(1 + used.len()),
            vectors: shown.len(),
            expected,
            problem,
        })
    };
    functions.iter().zip(devices).enumerate().map(one).collect()
}

fn check_guest(
    function: &Value,
    shown: &[&Value],
    generation: Generation,
    topology: Topology,
    limits: Limits,
) -> Result<()> {
    let expected = share(generation, topology, limits);
    let bound = function["bound"] == true;
    let takes = expected.vectors > 0;
    ensure!(bound == takes, "the driver {} it", if bound { "takes" } else { "does not take" });
    model::check_hints(shown, &model::hints(generation, topology, limits))?;
    if !takes {
        return Ok(());
    }
    let interfaces = function["interfaces"].as_array().context("no interfaces")?;
    ensure!(interfaces.len() == limits.ports, "{} interfaces, not {}", interfaces.len(), limits.ports);
    for interface in interfaces {
        let queues = [&interface["rx_queues"], &interface["tx_queues"]];
        ensure!(
            queues.iter().all(|number| **number == expected.queues),
            "{} has {} and {} queues, not {}",
            interface["interface"],
            queues[0],
            queues[1],
            expected.queues
        );
    }
    Ok(())
}

/// Events of the last time that the driver took device `index` and kept it.
fn check_trace(trace: &Trace, index: usize, generation: Generation, expected: &Share) -> Result<()> {
    if expected.vectors == 0 {
        return Ok(());
    }
    let device = format!("device={index}");
    let unmasked = trace.fields(&format!("msix.unmask {device}"), "vector")?;
    let mut first = Vec::new();
    for vector in unmasked {
        if !first.contains(&vector) {
            first.push(vector);
        }
    }
    let in_order: Vec<u64> = (0..expected.vectors as u64).collect();
    ensure!(
        first == in_order,
        "the device sees vectors {first:?} unmasked, not {in_order:?} one after another"
    );
    let event_queues = trace.fields(&format!("queue.create kind=eq id>=1 {device}"), "msix")?;
    let expected_queues: Vec<u64> = expected.event_queues.iter().map(|&vector| vector as u64).collect();
    let opened = event_queues.get(..expected_queues.len()).unwrap_or(&event_queues);
    ensure!(opened == expected_queues, "event queues are on vectors {opened:?}, not {expected_queues:?}");
    let establish = trace.position(&format!("smc.request type=ESTABLISH_HWC {device}"))?;
    let early = trace.position(&format!("msix.unmask vector>=1 {device}"))?;
    let is_early = early < establish;
    ensure!(
        is_early != generation.grows(),
        "vectors are taken {} the channel is established",
        if is_early { "before" } else { "after" }
    );
    Ok(())
}

/// Vectors that had an event queue, without the channel's.
fn used_vectors(trace: &Trace, index: usize) -> BTreeSet<u64> {
    let pattern = format!("queue.create kind=eq id>=1 device={index}");
    trace.fields(&pattern, "msix").unwrap_or_default().into_iter().collect()
}
