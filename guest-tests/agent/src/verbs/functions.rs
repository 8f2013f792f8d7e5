//! `functions`: each function with its driver, interfaces, queues and vectors; `rebind`: each away and back.

use anyhow::Result;
use pico_args::Arguments;
use serde_json::{Value, json};

use super::vectors;
use crate::function;
use crate::init::Orders;
use crate::net;

/// All functions, by address.
pub fn run() -> Result<Value> {
    let vectors = vectors::run()?;
    let of = |address: &str| -> Value {
        let all = vectors.as_array().into_iter().flatten();
        all.filter(|vector| vector["function"] == address).cloned().collect()
    };
    let functions = function::all();
    Ok(functions
        .iter()
        .map(|function| {
            json!({
                "address": function.address,
                "bound": function.is_bound(),
                "interfaces": function.interfaces().iter().map(|name| net::describe(name)).collect::<Value>(),
                "vectors": of(&function.address),
            })
        })
        .collect())
}

/// `rebind [ADDRESS]`: takes one function or all from the driver and offers it again, bound or not; the interfaces of
/// those that it takes come up.
pub fn rebind(arguments: &mut Arguments) -> Result<Value> {
    let chosen: Option<String> = arguments.opt_free_from_str()?;
    let dhcp = Orders::read()?.dhcp;
    let mut bound = Vec::new();
    for function in function::all() {
        if chosen.as_ref().is_some_and(|address| *address != function.address) {
            continue;
        }
        if function.is_bound() {
            function.unbind()?;
        }
        // One that the driver refuses is told from the others by what it has afterwards.
        if function.bind().is_ok() {
            function.interfaces().iter().try_for_each(|interface| net::bring_up(interface, dhcp))?;
            bound.push(function.address);
        }
    }
    Ok(json!({ "bound": bound }))
}
