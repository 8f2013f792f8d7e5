//! `next-scenario NAME [--allow TEXT]...`: the scenario so far is over, and one of that name begins in the same guest.
//!
//! The driver is unloaded, if it still is loaded, and the kernel must have nothing to say against it. Then the log, the
//! host's trace and the output are marked, so that they can be cut there, and the driver is loaded as after boot. Whether
//! it works is the new scenario's own matter.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::reload::{load, module_name, unload};
use super::{log_check, rebind};
use crate::channel;
use crate::function;
use crate::init::Orders;
use crate::sys;

/// Ends one scenario and begins the next; an error is about the end of the one.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let allowed: Vec<String> = arguments.values_from_str("--allow")?;
    let name: String = arguments.free_from_str()?;
    let files = Orders::read()?.driver;
    let loaded = files.iter().rev().filter(|file| Path::new("/sys/module").join(module_name(file)).exists());
    let unloaded = loaded.map(String::as_str).try_for_each(unload);
    let complaints = log_check::complaints_now(&allowed)?;
    fs::write("/dev/kmsg", format!("<4>{}{name}", sys::SCENARIO)).context("/dev/kmsg")?;
    channel::ask_host(&["mark".to_owned(), format!("scenario {name}")])?;
    let begun = load(&files).and_then(|()| function::all().iter().try_for_each(rebind::bring_up));
    unloaded?;
    if !complaints.is_empty() {
        bail!("as the driver was unloaded, the kernel's log said:\n{}", complaints.join("\n"));
    }
    Ok(json!({ "scenario": name, "error": begun.err().map(|error| format!("{error:#}")) }))
}
