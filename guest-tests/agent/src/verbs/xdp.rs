//! `xdp INTERFACE drop|tx|redirect --port N [--out INTERFACE --to MAC]`, `xdp INTERFACE off`: an XDP program that the
//! driver runs on UDP datagrams over IPv4 to port N, and lets everything else pass.

use anyhow::{Context, Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use crate::bpf::{self, Action};
use crate::net;

/// Loads and attaches, or takes away.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let port: Option<u16> = arguments.opt_value_from_str("--port")?;
    let out: Option<String> = arguments.opt_value_from_str("--out")?;
    let to: Option<String> = arguments.opt_value_from_str("--to")?;
    let interface: String = arguments.free_from_str()?;
    let action: String = arguments.free_from_str()?;
    let action = match action.as_str() {
        "off" => None,
        "drop" => Some(Action::Drop),
        "tx" => Some(Action::Tx),
        "redirect" => {
            let out = out.context("redirect needs --out INTERFACE")?;
            let to = to.context("redirect needs --to MAC")?;
            Some(Action::Redirect(net::index(&out)?, address(&to)?))
        }
        other => bail!("'{other}' is neither drop, tx, redirect nor off"),
    };
    let program = match action {
        Some(action) => Some(bpf::load(action, port.context("--port is missing")?)?),
        None => None,
    };
    bpf::attach(net::index(&interface)?, program.as_ref()).with_context(|| interface.clone())?;
    Ok(json!({ "interface": interface, "attached": program.is_some() }))
}

/// `52:54:00:12:34:56`.
fn address(text: &str) -> Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|word| u8::from_str_radix(word, 16)).collect();
    bytes
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .with_context(|| format!("'{text}' is no Ethernet address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(address("52:54:00:12:34:56").unwrap(), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert!(address("52:54:00").is_err());
        assert!(address("52:54:00:12:34:5g").is_err());
    }
}
