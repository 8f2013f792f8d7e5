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

fn complaints<'a>(log: &'a str, allowed: &[String]) -> Vec<&'a str> {
    let is_complaint = |line: &&str| COMPLAINTS.iter().any(|text| line.contains(text));
    let is_allowed = |line: &&str| allowed.iter().any(|text| line.contains(text.as_str()));
    log.lines().filter(is_complaint).filter(|line| !is_allowed(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
