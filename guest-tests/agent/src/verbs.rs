//! The commands, one file each. What they find goes to standard output as one JSON object.

mod bench;
pub mod coverage;
mod cpus;
mod datagrams;
mod echo;
mod establish_again;
mod ethtool;
mod functions;
mod host;
mod log_check;
mod namespace;
mod offloads;
mod power;
mod rebind;
mod reload;
mod scenario;
mod super_frames;
mod sweep;
mod topology;
mod transfer;
mod vectors;
mod xdp;

use anyhow::{Result, bail};
use pico_args::Arguments;
use serde_json::Value;

use crate::init::Orders;
use crate::net;

/// Runs the command `name`.
pub fn run(name: &str, mut arguments: Arguments) -> Result<()> {
    let report = match name {
        "bench-net" => bench::run(&mut arguments),
        "begin-scenario" => scenario::begin(&mut arguments),
        "bind" => rebind::bind(&mut arguments),
        "coverage" => coverage::run(),
        "coverage-collect" => coverage::collect(),
        "cpu-offline" => cpus::offline(&mut arguments),
        "cpu-online" => cpus::online(&mut arguments),
        "datagrams" => datagrams::run(&mut arguments),
        "dhcp" => each_interface(&mut arguments, net::ask_for_address),
        "echo-tcp" => echo::tcp(&mut arguments),
        "echo-udp" => echo::udp(&mut arguments),
        "end-scenario" => scenario::end(&mut arguments),
        "establish-again" => establish_again::run(&mut arguments),
        "ethtool" => ethtool::run(&mut arguments),
        "flr" => rebind::flr(&mut arguments),
        "functions" => functions::run(),
        "host" => return host::run(arguments),
        "link-up" => each_interface(&mut arguments, link_up),
        "link-wait" => each_interface(&mut arguments, net::wait_for_carrier),
        "log-check" => log_check::run(&mut arguments),
        "namespace" => namespace::run(&mut arguments),
        "offloads" => offloads::run(&mut arguments),
        "queues" => queues(&mut arguments),
        "rebind" => functions::rebind(&mut arguments),
        "reload" => reload::run(&mut arguments),
        "super-frames" => super_frames::run(&mut arguments),
        "suspend" => power::suspend(&mut arguments),
        "sweep" => sweep::run(&mut arguments),
        "topology" => topology::run(),
        "transfer" => transfer::run(&mut arguments),
        "udhcpc-script" => return net::leased(&arguments.free_from_str::<String>()?),
        "unbind" => rebind::unbind(&mut arguments),
        "vectors" if arguments.contains("--table") => return vectors::table(),
        "vectors" => vectors::run(),
        "xdp" => xdp::run(&mut arguments),
        _ => bail!("there is no such command"),
    }?;
    println!("{report}");
    let rest = arguments.finish();
    if rest.is_empty() { Ok(()) } else { bail!("not understood: {rest:?}") }
}

/// `[INTERFACE]`: `action` on one interface or on all, then a description of each.
fn each_interface(arguments: &mut Arguments, action: fn(&str) -> Result<()>) -> Result<Value> {
    let chosen: Option<String> = arguments.opt_free_from_str()?;
    let interfaces = chosen.map_or_else(net::mana_interfaces, |name| vec![name]);
    if interfaces.is_empty() {
        bail!("there is no MANA interface");
    }
    interfaces.iter().try_for_each(|name| action(name))?;
    Ok(interfaces.iter().map(|name| net::describe(name)).collect())
}

/// An interface that has just appeared, made ready as after boot.
fn link_up(interface: &str) -> Result<()> {
    net::bring_up(interface, Orders::read()?.dhcp)
}

/// `[INTERFACE]`: description and the driver's counters.
fn queues(arguments: &mut Arguments) -> Result<Value> {
    let interface = net::choose(arguments.opt_free_from_str()?)?;
    let mut report = net::describe(&interface);
    let (rx, tx) = net::queue_packets(&interface)?;
    report["rx_packets"] = rx.into();
    report["tx_packets"] = tx.into();
    report["counters"] = serde_json::to_value(net::counters(&interface)?)?;
    Ok(report)
}
