//! `super-frames BYTES [INTERFACE]`: the longest super-frame that the stack hands to the driver, by IPv4 and by IPv6.
//!
//! More than 64 KiB is BIG TCP, which a driver must have allowed (`netif_set_tso_max_size`); what it allows is what is
//! set at most, and the kernel refuses more.

use anyhow::{Context, Result};
use pico_args::Arguments;
use serde_json::{Value, json};

use crate::net;
use crate::netlink::{self, attribute};

/// linux/if_link.h.
const IFLA_GSO_MAX_SIZE: u16 = 41;
const IFLA_GSO_IPV4_MAX_SIZE: u16 = 63;

/// Sets both.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let bytes: u32 = arguments.free_from_str()?;
    let interface = net::choose(arguments.opt_free_from_str()?)?;
    let index = net::index(&interface)?;
    for kind in [IFLA_GSO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE] {
        netlink::set_link(index, &attribute(kind, &bytes.to_ne_bytes()))
            .with_context(|| format!("super-frames of {bytes} bytes by {interface}"))?;
    }
    Ok(json!({ "interface": interface, "bytes": bytes }))
}
