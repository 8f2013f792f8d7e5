//! `unbind`, `bind`, `flr`: take the function from the driver, reset it, give it back.

use anyhow::{Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use crate::function::{self, Function, timed};
use crate::init::Orders;
use crate::net;

/// `unbind [ADDRESS]`.
pub fn unbind(arguments: &mut Arguments) -> Result<Value> {
    let function = chosen(arguments)?;
    let duration = timed(|| function.unbind())?;
    Ok(json!({ "address": function.address, "duration_ms": duration }))
}

/// `bind [ADDRESS]`: and the links are up again afterwards.
pub fn bind(arguments: &mut Arguments) -> Result<Value> {
    let function = chosen(arguments)?;
    let duration = timed(|| function.bind())?;
    bring_up(&function)?;
    Ok(json!({ "address": function.address, "duration_ms": duration, "interfaces": function.interfaces() }))
}

/// `flr [ADDRESS]`: function-level reset, the way a user asks for it.
pub fn flr(arguments: &mut Arguments) -> Result<Value> {
    let function = chosen(arguments)?;
    let methods = function.attribute("reset_method");
    ensure!(methods.split(' ').any(|method| method == "flr"), "reset methods are '{methods}', without flr");
    function.set("reset_method", "flr")?;
    let duration = timed(|| function.set("reset", "1"))?;
    Ok(json!({ "address": function.address, "duration_ms": duration }))
}

fn chosen(arguments: &mut Arguments) -> Result<Function> {
    let address: Option<String> = arguments.opt_free_from_str()?;
    function::choose(address.as_deref())
}

/// Brings up all interfaces of `function`, of which there must be one at least.
pub fn bring_up(function: &Function) -> Result<()> {
    let interfaces = function.interfaces();
    ensure!(!interfaces.is_empty(), "{} has no interface", function.address);
    let dhcp = Orders::read()?.dhcp;
    interfaces.iter().try_for_each(|interface| net::bring_up(interface, dhcp))
}
