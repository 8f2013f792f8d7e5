//! The device's trace, as `mana-vmm boot --trace` writes it, and checks on the order of its events.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::scenario::TraceCheck;

/// Detail of the `host.event` with which `mana-vmm serve` begins to take down what a client has left.
const CLIENT_LEFT: &str = "the client has left";

/// Events in the order in which they happened.
#[derive(Debug, Default)]
pub struct Trace(Vec<Map<String, Value>>);

impl Trace {
    /// Reads JSON lines; no file is no events. A run that was cut off may end in half a line.
    pub fn read(file: &Path) -> Result<Self> {
        let Ok(opened) = File::open(file) else { return Ok(Self::default()) };
        let lines: Vec<String> =
            BufReader::new(opened).lines().collect::<Result<_, _>>().context("read the trace")?;
        let mut events = Vec::with_capacity(lines.len());
        for (number, line) in lines.iter().enumerate() {
            match serde_json::from_str(line) {
                Ok(event) => events.push(event),
                Err(_) if number + 1 == lines.len() => break,
                Err(error) => bail!("line {} of the trace: {error}", number + 1),
            }
        }
        Ok(Self(events))
    }

    /// Did the driver touch the device at all?
    pub fn shows_driver(&self) -> bool {
        self.0.iter().any(|event| event["event"] == "reg.read")
    }

    /// Kinds of objects that are alive at the end, with their numbers; of every device if there are several.
    pub fn live_at_end(&self) -> Result<Vec<String>> {
        live(self.0.iter())
    }

    /// The same before anybody but the guest itself cleans up: a server says when it begins to.
    pub fn left_by_guest(&self) -> Result<Vec<String>> {
        let mut gone = BTreeSet::new();
        live(self.0.iter().filter(|event| {
            let device = event.get("device").and_then(Value::as_u64);
            if event.get("detail").is_some_and(|detail| detail == CLIENT_LEFT) {
                gone.insert(device);
            }
            !gone.contains(&device)
        }))
    }

    /// Holds `check`?
    pub fn check(&self, check: &TraceCheck) -> Result<()> {
        match check {
            TraceCheck::Order { order } => self.check_order(order),
            TraceCheck::Count { count, min, max } => {
                let number = self.matches(count)?.len();
                ensure!(
                    (*min..=*max).contains(&number),
                    "'{count}' happens {number} times, not {min} to {max}"
                );
                Ok(())
            }
            TraceCheck::NotBefore { none, before } => {
                let wanted = self.first(before)?;
                let early = self.matches(none)?.into_iter().find(|&at| at < wanted);
                ensure!(early.is_none(), "'{none}' happens before '{before}': {}", self.show(early));
                Ok(())
            }
            TraceCheck::NotAfter { none, after } => {
                let end = self.first(after)?;
                let late = self.matches(none)?.into_iter().find(|&at| at > end);
                ensure!(late.is_none(), "'{none}' happens after '{after}': {}", self.show(late));
                Ok(())
            }
        }
    }

    fn check_order(&self, order: &[String]) -> Result<()> {
        let mut next = 0;
        for (index, text) in order.iter().enumerate() {
            let pattern = Pattern::parse(text)?;
            let found = self.0[next..].iter().position(|event| pattern.matches(event));
            let previous = index.checked_sub(1).map_or("the start", |index| &order[index]);
            next += found.with_context(|| format!("'{text}' doesn't happen after '{previous}'"))? + 1;
        }
        Ok(())
    }

    fn matches(&self, pattern: &str) -> Result<Vec<usize>> {
        let pattern = Pattern::parse(pattern)?;
        Ok(self.0.iter().enumerate().filter(|(_, event)| pattern.matches(event)).map(|(at, _)| at).collect())
    }

    fn first(&self, pattern: &str) -> Result<usize> {
        self.matches(pattern)?.first().copied().with_context(|| format!("'{pattern}' doesn't happen"))
    }

    /// The numbers in field `name` of the events that match `pattern`.
    pub fn fields(&self, pattern: &str, name: &str) -> Result<Vec<u64>> {
        let found = self.matches(pattern)?;
        Ok(found.into_iter().filter_map(|at| self.0[at].get(name)?.as_u64()).collect())
    }

    /// Where the first event is that matches `pattern`.
    pub fn position(&self, pattern: &str) -> Result<usize> {
        self.first(pattern)
    }

    /// The command that the first fault after `mark` struck, or what else the trace says of the fault.
    pub fn struck(&self, mark: &str) -> Option<String> {
        let named = |event: &Map<String, Value>| {
            event["event"] == "mark" && event.get("name").is_some_and(|name| name == mark)
        };
        // The last: a sweep may come to one point twice, in the run without a fault too.
        let at = self.0.iter().rposition(named)?;
        let after = &self.0[at + 1..];
        let end = after.iter().position(|event| event["event"] == "mark").unwrap_or(after.len());
        let fault = after[..end].iter().position(|event| event["event"] == "fault")?;
        let commands = after[..=fault].iter().rev().chain(&after[fault + 1..end]);
        let command =
            commands.filter(|event| event["event"] == "hwc.request").find_map(|event| event.get("command"));
        command.and_then(Value::as_str).map(str::to_owned)
    }

    fn show(&self, at: Option<usize>) -> String {
        at.map(|at| Value::Object(self.0[at].clone()).to_string()).unwrap_or_default()
    }
}

/// What the last ledger of each device among `events` holds.
fn live<'a>(events: impl Iterator<Item = &'a Map<String, Value>>) -> Result<Vec<String>> {
    let ledgers = events.filter(|event| event["event"] == "ledger");
    let last: BTreeMap<Option<u64>, _> =
        ledgers.map(|event| (event.get("device").and_then(Value::as_u64), event)).collect();
    ensure!(!last.is_empty(), "the trace has no ledger");
    let counts = last.values().flat_map(|ledger| ledger.iter());
    let live = counts.filter(|(name, value)| {
        !["event", "t_ns", "device"].contains(&name.as_str()) && value.as_u64() != Some(0)
    });
    Ok(live.map(|(name, value)| format!("{name} {value}")).collect())
}

/// An event's name, and conditions on its fields.
struct Pattern<'a> {
    event: &'a str,
    conditions: Vec<(&'a str, Comparison, &'a str)>,
}

#[derive(Clone, Copy)]
enum Comparison {
    Equal,
    AtLeast,
    AtMost,
}

impl<'a> Pattern<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let mut words = text.split_whitespace();
        let event = words.next().context("an empty pattern")?;
        let conditions = words.map(|word| {
            let split =
                |sign, comparison| word.split_once(sign).map(|(name, value)| (name, comparison, value));
            let found = split(">=", Comparison::AtLeast).or_else(|| split("<=", Comparison::AtMost));
            found
                .or_else(|| split("=", Comparison::Equal))
                .with_context(|| format!("'{word}' in pattern '{text}'"))
        });
        Ok(Self { event, conditions: conditions.collect::<Result<_>>()? })
    }

    fn matches(&self, event: &Map<String, Value>) -> bool {
        let holds = |&(name, comparison, wanted): &(&str, Comparison, &str)| {
            // An only device has no number.
            let only = Value::from(0);
            let Some(value) = event.get(name).or_else(|| (name == "device").then_some(&only)) else {
                return false;
            };
            match (comparison, value.as_u64(), wanted.parse::<u64>()) {
                (Comparison::AtLeast, Some(value), Ok(wanted)) => value >= wanted,
                (Comparison::AtMost, Some(value), Ok(wanted)) => value <= wanted,
                (Comparison::Equal, _, _) => {
                    let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                    shown == wanted
                }
                _ => false,
            }
        };
        event.get("event").is_some_and(|name| name == self.event) && self.conditions.iter().all(holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn trace() -> Trace {
        let events = [
            json!({"event": "msix.enable", "masked": true}),
            json!({"event": "msix.program", "vector": 0}),
            json!({"event": "smc.request", "type": "ESTABLISH_HWC"}),
            json!({"event": "msix.program", "vector": 1}),
            json!({"event": "ledger", "t_ns": 5, "queues": 0, "regions": 2}),
        ];
        Trace(events.into_iter().map(|event| event.as_object().unwrap().clone()).collect())
    }

    fn check(text: &str) -> Result<()> {
        let check: TraceCheck = toml::from_str(text).unwrap();
        trace().check(&check)
    }

    #[test]
    fn order() {
        check(
            "order = ['msix.enable masked=true', 'smc.request type=ESTABLISH_HWC', 'msix.program vector>=1']",
        )
        .unwrap();
        let error = check("order = ['smc.request', 'msix.program vector=0']").unwrap_err().to_string();
        assert_eq!(error, "'msix.program vector=0' doesn't happen after 'smc.request'");
    }

    #[test]
    fn counts() {
        check("count = 'msix.program vector<=1'\nmin = 2\nmax = 2").unwrap();
        assert!(check("count = 'msix.program'\nmax = 1").is_err());
        assert!(check("count = 'msix.fire'\nmin = 1").is_err());
    }

    #[test]
    fn before_and_after() {
        check("none = 'msix.program vector>=1'\nbefore = 'smc.request'").unwrap();
        assert!(check("none = 'msix.program vector=0'\nbefore = 'smc.request'").is_err());
        check("none = 'msix.program vector=0'\nafter = 'smc.request'").unwrap();
        assert!(check("none = 'msix.program'\nafter = 'smc.request'").is_err());
        // What never happens has no before and after.
        assert!(check("none = 'msix.program'\nbefore = 'pci.flr'").is_err());
    }

    #[test]
    fn the_ledger_lists_what_is_left() {
        assert_eq!(trace().live_at_end().unwrap(), ["regions 2"]);
        assert!(Trace::default().live_at_end().is_err());
    }

    #[test]
    fn what_a_server_takes_down_was_left_by_the_guest() {
        let events = [
            json!({"event": "ledger", "device": 0, "queues": 1}),
            json!({"event": "ledger", "device": 1, "queues": 0}),
            json!({"event": "host.event", "device": 0, "detail": CLIENT_LEFT}),
            json!({"event": "ledger", "device": 0, "queues": 0}),
        ];
        let trace = Trace(events.into_iter().map(|event| event.as_object().unwrap().clone()).collect());
        assert_eq!(trace.left_by_guest().unwrap(), ["queues 1"]);
        assert!(trace.live_at_end().unwrap().is_empty());
    }
}
