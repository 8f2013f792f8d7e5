//! `end-scenario [--allow TEXT]...`, `begin-scenario NAME`: one scenario is over, and another begins in the same guest.
//!
//! At the end the driver is unloaded, if it still is loaded, and the kernel must have nothing to say against it. At the
//! beginning the kernel's log and the host's trace are marked, so that they can be cut there, and the driver is loaded as
//! after boot.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::reload::{load, unload};
use super::{log_check, rebind};
use crate::channel;
use crate::function;
use crate::init::{Orders, module_name};
use crate::sys;

/// Unloads the driver.
pub fn end(arguments: &mut Arguments) -> Result<Value> {
    let allowed: Vec<String> = arguments.values_from_str("--allow")?;
    let files = Orders::read()?.driver;
    let is_loaded = |file: &&String| Path::new("/sys/module").join(module_name(file)).exists();
    files.iter().rev().filter(is_loaded).map(String::as_str).try_for_each(unload)?;
    let complaints = log_check::complaints_now(&allowed)?;
    if !complaints.is_empty() {
        bail!("the kernel's log says, now that the driver is unloaded:\n{}", complaints.join("\n"));
    }
    Ok(json!({}))
}

/// Loads the driver. Whether it works is what the scenario finds out.
pub fn begin(arguments: &mut Arguments) -> Result<Value> {
    let name: String = arguments.free_from_str()?;
    fs::write("/dev/kmsg", format!("<4>{}{name}", sys::SCENARIO)).context("/dev/kmsg")?;
    channel::ask_host(&["mark".to_owned(), format!("scenario {name}")])?;
    let begun =
        load(&Orders::read()?.driver).and_then(|()| function::all().iter().try_for_each(rebind::bring_up));
    Ok(json!({ "scenario": name, "error": begun.err().map(|error| format!("{error:#}")) }))
}
