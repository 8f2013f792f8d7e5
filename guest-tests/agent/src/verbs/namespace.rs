//! `namespace NAME INTERFACE [ADDRESS/LENGTH]...`: an interface in a network namespace, up and with addresses.
//!
//! The name `-` is the namespace that the command itself runs in: the interface stays where it is.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use crate::{namespace, net};

const LINK_TIMEOUT: Duration = Duration::from_secs(60);

/// Moves, brings up and addresses.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let name: String = arguments.free_from_str()?;
    let interface: String = arguments.free_from_str()?;
    let mut addresses: Vec<String> = Vec::new();
    while let Some(address) = arguments.opt_free_from_str()? {
        addresses.push(address);
    }
    namespace::make(&name)?;
    namespace::take_in(&name, &interface)?;
    namespace::within(&name, || {
        // Nobody else has our addresses, and to make sure of it would take a second.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{interface}/accept_dad"), "0");
        // An interface whose queues are made anew is deaf for a while, on a busy host for longer than neighbours are asked.
        for family in ["ipv4", "ipv6"] {
            let _ = fs::write(format!("/proc/sys/net/{family}/neigh/{interface}/mcast_solicit"), "60");
        }
        net::set_up(&interface)?;
        for address in &addresses {
            net::ip(&["addr", "add", address, "dev", &interface])?;
        }
        wait_for_link(&interface)
    })?;
    Ok(json!({ "namespace": name, "interface": interface, "addresses": addresses }))
}

fn wait_for_link(interface: &str) -> Result<()> {
    let start = Instant::now();
    while !net::is_running(interface)? {
        if start.elapsed() > LINK_TIMEOUT {
            bail!("{interface} has no carrier after {} s", LINK_TIMEOUT.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
