//! `cpu-offline N...`, `cpu-online N...`: take CPUs from the kernel and give them back.

use std::fs;

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

const CPUS: &str = "/sys/devices/system/cpu";

/// The kernel moves what runs on them, and their interrupts, elsewhere.
pub fn offline(arguments: &mut Arguments) -> Result<Value> {
    switch(arguments, "0")
}

/// They take part again; interrupts stay where they are.
pub fn online(arguments: &mut Arguments) -> Result<Value> {
    switch(arguments, "1")
}

fn switch(arguments: &mut Arguments, state: &str) -> Result<Value> {
    let mut chosen: Vec<u32> = Vec::new();
    while let Some(cpu) = arguments.opt_free_from_str()? {
        chosen.push(cpu);
    }
    ensure!(!chosen.is_empty(), "which CPUs?");
    for cpu in chosen {
        let file = format!("{CPUS}/cpu{cpu}/online");
        fs::write(&file, state).with_context(|| format!("write {state} to {file}"))?;
    }
    let online = fs::read_to_string(format!("{CPUS}/online"))?;
    Ok(json!({ "online": online.trim() }))
}
