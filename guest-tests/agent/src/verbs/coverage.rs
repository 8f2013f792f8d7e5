//! `coverage`: which of the driver's functions were executed since it was loaded first, by the kernel's function tracer.
//!
//! [`start`] is called before the driver is loaded. A process of its own reads the tracer's pipe and takes each function
//! that it has seen out of the tracing, so that the busy ones cost nothing and push nobody out of the buffer.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::sys;

const TRACING: &str = "/sys/kernel/tracing";
/// Names of the driver's functions that the tracer knows.
const ALL: &str = "/run/functions";
/// Those that were seen.
const SEEN: &str = "/run/coverage";
/// Traced besides the driver: without any function the filter would be empty, and let everything through.
const NEVER_CALLED: &str = "kernel_halt";
const DRIVER: &str = "*:mod:mana";
/// How often we look whether the driver has gone, which takes it out of the filter.
const CADENCE: Duration = Duration::from_millis(100);

/// Is it wanted? The kernel makes what it doesn't know on its command line its init's environment.
pub fn is_wanted() -> bool {
    std::env::var_os("MANA_COVERAGE").is_some()
}

/// Starts the tracer and the process that reads it.
pub fn start() -> Result<()> {
    sys::mount(c"tracefs", c"/sys/kernel/tracing").context("tracefs")?;
    set("set_ftrace_filter", NEVER_CALLED)?;
    add("set_ftrace_filter", DRIVER)?;
    set("current_tracer", "function")?;
    Command::new("/init")
        .arg("coverage-collect")
        .stdin(Stdio::null())
        .spawn()
        .context("the tracer's reader")?;
    Ok(())
}

/// Once the driver is loaded: keeps the names of its functions.
pub fn keep_names() -> Result<()> {
    let names = fs::read_to_string(Path::new(TRACING).join("available_filter_functions"))?;
    let of_driver = |line: &&str| line.ends_with("[mana]");
    let names: Vec<&str> =
        names.lines().filter(of_driver).filter_map(|line| line.split_whitespace().next()).collect();
    Ok(fs::write(ALL, names.join("\n"))?)
}

/// `coverage`.
pub fn run() -> Result<Value> {
    let names = |file: &str| -> BTreeSet<String> {
        fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
    };
    let (all, seen) = (names(ALL), names(SEEN));
    ensure!(!all.is_empty(), "the function tracer was not started with the guest, or knows nothing of mana");
    let reached: Vec<&String> = all.intersection(&seen).collect();
    Ok(json!({ "reached": reached, "all": all }))
}

/// `coverage-collect`: reads the tracer's pipe, for ever.
pub fn collect() -> Result<Value> {
    thread::spawn(|| {
        let is_loaded = || Path::new("/sys/module/mana").exists();
        let mut was_loaded = false;
        loop {
            if was_loaded && !is_loaded() {
                // It may be back already; then there is nothing to wait for.
                let _ = add("set_ftrace_filter", DRIVER);
            }
            was_loaded = is_loaded();
            thread::sleep(CADENCE);
        }
    });
    let pipe = BufReader::new(File::open(Path::new(TRACING).join("trace_pipe"))?);
    let mut seen = BTreeSet::new();
    let mut file = File::create(SEEN)?;
    for line in pipe.lines() {
        let line = line?;
        let Some(name) = function(&line) else { continue };
        if seen.insert(name.to_owned()) {
            writeln!(file, "{name}")?;
            // A function that has gone with its module is no longer traced anyway.
            let _ = add("set_ftrace_notrace", name);
        }
    }
    Ok(Value::Null)
}

/// The function that a line of the tracer is about: `modprobe-61 [000] ..... 1.25: mana_gd_probe <-local_pci_probe`.
fn function(line: &str) -> Option<&str> {
    line.split_once(": ")?.1.split_once(" <-")?.0.split_whitespace().next()
}

fn set(file: &str, text: &str) -> Result<()> {
    fs::write(Path::new(TRACING).join(file), text).with_context(|| format!("{file}: {text}"))
}

fn add(file: &str, text: &str) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(Path::new(TRACING).join(file))?;
    Ok(file.write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_the_tracers_lines() {
        let line = "        modprobe-61      [000] .....     1.253113: mana_gd_probe <-local_pci_probe";
        assert_eq!(function(line), Some("mana_gd_probe"));
        let line = "  <idle>-0  [001] d.h1.  1.3: mana_gd_intr [mana] <-__handle_irq_event_percpu";
        assert_eq!(function(line), Some("mana_gd_intr"));
        assert_eq!(function("CPU:0 [LOST 12 EVENTS]"), None);
    }
}
