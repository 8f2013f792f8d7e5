//! `reload [N]`: the driver's modules out and in again, N times.

use anyhow::{Context, Result};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::rebind::bring_up;
use crate::function::{self, timed};
use crate::init::{self, Orders};
use crate::sys;

/// Each time the function is bound again and its links come up.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let times: u32 = arguments.opt_free_from_str()?.unwrap_or(1);
    let orders = Orders::read()?;
    let mut cycles = Vec::new();
    for number in 1..=times {
        let cycle = cycle(&orders.driver).with_context(|| format!("cycle {number} of {times}"))?;
        cycles.push(cycle);
    }
    Ok(json!({ "cycles": cycles }))
}

fn cycle(files: &[String]) -> Result<Value> {
    let unload = timed(|| files.iter().rev().try_for_each(|file| unload(file)))?;
    let load = timed(|| load(files))?;
    let link = timed(|| function::all().iter().try_for_each(bring_up))?;
    Ok(json!({ "unload_ms": unload, "load_ms": load, "link_ms": link }))
}

/// Loads the modules in `files`, one after another.
pub fn load(files: &[String]) -> Result<()> {
    files.iter().try_for_each(|file| init::load_file(file).context("load"))
}

/// Unloads the module of `file`.
pub fn unload(file: &str) -> Result<()> {
    let name = init::module_name(file);
    sys::unload_module(&name).with_context(|| format!("unload {name}"))
}
