//! `topology`: CPUs, caches' neighbours, nodes and the functions' places, as sysfs shows them.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::function;
use crate::net::names_in;

/// CPUs by number, nodes by number, functions by address.
pub fn run() -> Result<Value> {
    let cpus: Map<_, _> =
        numbered("/sys/devices/system/cpu", "cpu").map(|(number, path)| (number, cpu(&path))).collect();
    let nodes: Map<_, _> =
        numbered("/sys/devices/system/node", "node").map(|(number, path)| (number, node(&path))).collect();
    let functions: Map<_, _> =
        function::all().iter().map(|function| (function.address.clone(), place(function))).collect();
    Ok(json!({ "cpus": cpus, "nodes": nodes, "functions": functions }))
}

/// Entries of `folder` that are `prefix` and a number.
fn numbered(folder: &str, prefix: &str) -> impl Iterator<Item = (String, std::path::PathBuf)> {
    let names = names_in(Path::new(folder)).into_iter();
    names.filter_map(move |name| {
        let number = name.strip_prefix(prefix)?.parse::<u32>().ok()?;
        Some((number.to_string(), Path::new(folder).join(&name)))
    })
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn number(path: &Path) -> Option<i64> {
    text(path).parse().ok()
}

fn cpu(path: &Path) -> Value {
    let topology = path.join("topology");
    let node = names_in(path).iter().find_map(|name| name.strip_prefix("node")?.parse::<i64>().ok());
    json!({
        "core": number(&topology.join("core_id")),
        "package": number(&topology.join("physical_package_id")),
        "threads": text(&topology.join("thread_siblings_list")),
        "package_cpus": text(&topology.join("core_siblings_list")),
        "node": node,
        "last_level_cache_cpus": last_level_cache(path),
    })
}

fn last_level_cache(path: &Path) -> String {
    let caches = path.join("cache");
    let last = names_in(&caches).into_iter().rfind(|name| name.starts_with("index"));
    last.map(|index| text(&caches.join(index).join("shared_cpu_list"))).unwrap_or_default()
}

fn node(path: &Path) -> Value {
    let distance: Vec<i64> =
        text(&path.join("distance")).split(' ').filter_map(|word| word.parse().ok()).collect();
    json!({ "cpus": text(&path.join("cpulist")), "distance": distance })
}

fn place(function: &function::Function) -> Value {
    json!({
        "numa_node": number(&function.path.join("numa_node")),
        "local_cpus": function.attribute("local_cpulist"),
    })
}
