//! `log-check [--allow TEXT]...`: does the kernel's log hold a complaint?

use anyhow::{Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use crate::sys;

/// What kernels write when they find something wrong with themselves. Every WARN begins with the line that asks to cut
/// there; `WARNING:` alone is also in plain advice.
const COMPLAINTS: [&str; 17] = [
    "[ cut here ]",
    "WARNING: possible ",
    "WARNING: suspicious ",
    "WARNING: inconsistent ",
    "BUG:",
    "Oops",
    "] RIP: ",
    "Call Trace:",
    "general protection fault",
    "Kernel panic",
    "INFO: task ",
    "soft lockup",
    "detected stalls on CPUs",
    "ref_tracker: ",
    "unreferenced object 0x",
    "Trying to free already-free IRQ",
    "NETDEV WATCHDOG",
];

/// Fails with the lines in question; `--allow` lets those with TEXT pass.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let allowed: Vec<String> = arguments.values_from_str("--allow")?;
    let log = sys::kernel_log()?;
    let complaints = complaints(&log, &allowed);
    if complaints.is_empty() {
        return Ok(json!({ "lines": log.lines().count(), "complaints": 0 }));
    }
    bail!("{} lines in the kernel's log:\n{}", complaints.len(), complaints.join("\n"))
}

/// Complaints that the log holds now, as [`run`] finds them.
pub fn complaints_now(allowed: &[String]) -> Result<Vec<String>> {
    Ok(complaints(&sys::kernel_log()?, allowed).into_iter().map(str::to_owned).collect())
}

/// What `fresh` complaints of the log are about, in a line: each kind once, and the driver's function.
pub fn summary(fresh: &[String]) -> Result<String> {
    Ok(summarize(&sys::kernel_log()?, fresh))
}

fn summarize(log: &str, fresh: &[String]) -> String {
    const MOST: usize = 3;
    let Some(start) = fresh.first().and_then(|first| log.lines().position(|line| line == first)) else {
        return fresh.join("; ");
    };
    let lines: Vec<&str> = log.lines().skip(start).collect();
    let says_more = |line: &&&str| ["WARNING", "kernel BUG", "BUG:"].iter().any(|text| line.contains(text));
    let mut kinds: Vec<&str> = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        if !fresh.iter().any(|complaint| complaint == line)
            || line.contains("Trace:")
            || line.contains("RIP:")
        {
            continue;
        }
        // What is wrong stands a line or two below the one that asks to cut.
        let below = lines[index..].iter().take(4).find(says_more).filter(|_| line.contains("[ cut here ]"));
        let kind = without_stamp(below.unwrap_or(line));
        let is_new = !kinds.iter().any(|known| known.split(' ').take(3).eq(kind.split(' ').take(3)));
        if is_new && kinds.len() < MOST {
            kinds.push(kind);
        }
    }
    let is_place = |line: &&&str| line.contains("[mana]") && line.contains("+0x");
    let is_said = kinds.iter().any(|kind| kind.contains("[mana]"));
    let place = lines.iter().find(is_place).filter(|_| !is_said).map(|line| without_stamp(line));
    let place = place.map(|place| format!(" in {}", place.trim_start_matches("RIP: 0010:").trim()));
    kinds.join("; ") + &place.unwrap_or_default()
}

/// A line of the log without `<4>[   12.345678] `.
fn without_stamp(line: &str) -> &str {
    line.split_once("] ").map_or(line, |(_, rest)| rest).trim()
}

fn complaints<'a>(log: &'a str, allowed: &[String]) -> Vec<&'a str> {
    let is_complaint = |line: &&str| COMPLAINTS.iter().any(|text| line.contains(text));
    let is_allowed = |line: &&str| allowed.iter().any(|text| line.contains(text.as_str()));
    log.lines().filter(is_complaint).filter(|line| !is_allowed(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_in_a_line() {
        let log = "<6>[ 1.0] mana: up\n<4>[ 2.0] ------------[ cut here ]------------\n<4>[ 2.0] Missing register\n\
                   <4>[ 2.0] WARNING: CPU: 0 PID: 1 at net/core/xdp.c:136 unreg+0x3f/0x60\n\
                   <4>[ 2.0] Modules linked in: mana\n<4>[ 2.1] RIP: 0010:unreg+0x3f/0x60\n\
                   <4>[ 2.1] Call Trace:\n<4>[ 2.1]  mana_destroy_rxq+0x46/0x400 [mana]\n\
                   <1>[ 2.2] BUG: Bad page state in process a\n<1>[ 2.2] BUG: Bad page state in process b\n";
        assert_eq!(
            summarize(log, &complaints(log, &[]).into_iter().map(str::to_owned).collect::<Vec<_>>()),
            "WARNING: CPU: 0 PID: 1 at net/core/xdp.c:136 unreg+0x3f/0x60; BUG: Bad page state in process a \
             in mana_destroy_rxq+0x46/0x400 [mana]"
        );
    }

    #[test]
    fn finds_complaints_but_not_the_allowed_ones() {
        let log = "<6>[ 1.0] mana: up\n<4>[ 2.0] ------------[ cut here ]------------\n<3>[ 3.0] BUG: b\n";
        assert_eq!(complaints(log, &[]).len(), 2);
        assert_eq!(
            complaints(log, &["BUG: b".to_owned()]),
            ["<4>[ 2.0] ------------[ cut here ]------------"]
        );
    }
}
