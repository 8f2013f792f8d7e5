//! `coverage`: which of the driver's functions were executed since it was loaded first, by the kernel's function tracer.
//!
//! [`start`] is called before the driver is loaded. A process of its own reads the tracer's pipe and takes each function
//! that it has seen out of the tracing, so that the busy ones cost nothing and push nobody out of the buffer. A driver
//! that is being unloaded is gone before the last lines are read, which then hold addresses in place of names: they are
//! looked up in what the kernel said of the driver's functions while it was loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

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
/// Where the driver's code lies.
const CODE: &str = "/sys/module/mana/sections/.text";
/// The reader is through when it has seen nothing new for so long, and is not waited for longer than that.
const QUIET: (Duration, Duration) = (Duration::from_millis(700), Duration::from_secs(10));
/// Names of the driver's functions by address, of every place where it was loaded.
static PLACES: Mutex<BTreeMap<u64, String>> = Mutex::new(BTreeMap::new());

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
    wait_for_reader();
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
    thread::spawn(watch_driver);
    let pipe = BufReader::new(File::open(Path::new(TRACING).join("trace_pipe"))?);
    let (mut seen, mut unnamed) = (BTreeSet::new(), BTreeSet::new());
    let mut file = File::create(SEEN)?;
    for line in pipe.lines() {
        let line = line?;
        let Some(word) = function(&line) else { continue };
        unnamed.extend(address(word));
        let mut names: Vec<String> = unnamed.iter().filter_map(|&address| name_of(address)).collect();
        unnamed.retain(|&address| name_of(address).is_none());
        if address(word).is_none() {
            names.push(word.to_owned());
        }
        for name in names {
            if seen.contains(&name) {
                continue;
            }
            writeln!(file, "{name}")?;
            // A function that has gone with its module is no longer traced anyway.
            let _ = add("set_ftrace_notrace", &name);
            seen.insert(name);
        }
    }
    Ok(Value::Null)
}

/// Puts the driver back into the filter when it was loaded again, and learns where its functions are, for ever.
fn watch_driver() {
    let (mut was_loaded, mut place) = (false, String::new());
    loop {
        let now = fs::read_to_string(CODE).unwrap_or_default();
        let is_loaded = !now.is_empty();
        if was_loaded && !is_loaded {
            // It may be back already; then there is nothing to wait for.
            let _ = add("set_ftrace_filter", DRIVER);
        }
        if is_loaded && now != place {
            let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
            PLACES.lock().unwrap_or_else(PoisonError::into_inner).extend(functions(&symbols));
            place = now;
        }
        was_loaded = is_loaded;
        thread::sleep(CADENCE);
    }
}

/// The driver's symbols of code in /proc/kallsyms: `ffffffffc0412340 t mana_gd_probe\t[mana]`.
fn functions(symbols: &str) -> impl Iterator<Item = (u64, String)> + '_ {
    symbols.lines().filter(|line| line.ends_with("[mana]")).filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let is_code = words.next()?.eq_ignore_ascii_case("t");
        is_code.then_some((address, words.next()?.to_owned()))
    })
}

/// The last of the driver's functions that begins at `address`, or a few bytes before it, where the tracer's call is.
fn name_of(address: u64) -> Option<String> {
    const CALL: u64 = 16;
    let places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
    places.range(address.saturating_sub(CALL)..=address).next_back().map(|(_, name)| name.clone())
}

/// The address in place of a name.
fn address(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

/// Waits until the tracer's reader has caught up.
fn wait_for_reader() {
    let start = Instant::now();
    let length = || fs::metadata(SEEN).map_or(0, |file| file.len());
    let (mut last, mut since) = (length(), Instant::now());
    while since.elapsed() < QUIET.0 && start.elapsed() < QUIET.1 {
        thread::sleep(CADENCE);
        let now = length();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
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
        let gone = "           rmmod-75      [001] .....     3.1: 0xffffffffc0412344 <-0xffffffffc0412388";
        assert_eq!(function(gone).and_then(address), Some(0xffff_ffff_c041_2344));
    }

    #[test]
    fn functions_of_a_driver_that_has_gone() {
        let symbols = "ffffffff81000000 T _text\nffffffffc0412340 t mana_gd_remove\t[mana]\n\
                       ffffffffc0412400 d mana_driver\t[mana]\n";
        PLACES.lock().unwrap().extend(functions(symbols));
        assert_eq!(name_of(0xffff_ffff_c041_2344).as_deref(), Some("mana_gd_remove"));
        assert_eq!(name_of(0xffff_ffff_c041_2400), None);
    }
}
