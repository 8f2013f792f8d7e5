//! `bench-net [--peer NAME] [--null NAME] [--seconds 3] [--only MEASURE]`: what an interface carries, and what that costs
//! in exits.
//!
//! `--null` names an interface whose cable takes everything, for the cost of sending alone; `--peer` one whose other end
//! has echo, discard and chargen, at the address that DHCP has left.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::{channel, net};

const ECHO: u16 = 7;
const DISCARD: u16 = 9;
const CHARGEN: u16 = 19;
/// Payload of the datagrams that are counted: with headers a 60-byte frame, Ethernet's shortest.
const DATAGRAM: [u8; 18] = [0x5a; 18];
/// All hosts: a datagram to it needs nobody's address.
const EVERYBODY: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
/// Longest silence of the other end.
const SILENCE: Duration = Duration::from_secs(30);
const BUFFER: usize = 64 * 1024;

/// Runs what the interfaces allow.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let seconds: f64 = arguments.opt_value_from_str("--seconds")?.unwrap_or(3.0);
    let time = Duration::from_secs_f64(seconds);
    let null: Option<String> = arguments.opt_value_from_str("--null")?;
    let peer: Option<String> = arguments.opt_value_from_str("--peer")?;
    let only: Option<String> = arguments.opt_value_from_str("--only")?;
    let mut report = json!({});
    for (name, to_peer, work) in MEASURES {
        let interface = if to_peer { &peer } else { &null };
        let Some(interface) =
            interface.as_deref().filter(|_| only.as_deref().is_none_or(|only| only == name))
        else {
            continue;
        };
        report[name] = measure(interface, || work(interface, time))?;
    }
    ensure!(report != json!({}), "there is nothing to measure: --null or --peer, and --only one that it has");
    Ok(report)
}

/// A measure: of an interface, for a time; a result with a name of its own.
type Work = fn(&str, Duration) -> Result<(&'static str, f64)>;
/// What there is to measure, and whether it takes a peer.
const MEASURES: [(&str, bool, Work); 4] = [
    ("udp_send", false, flood),
    ("round_trip", true, round_trips),
    ("tcp_send", true, tcp_send),
    ("tcp_receive", true, tcp_receive),
];

/// Runs `work`, whose answer is a result with a name of its own, and adds packets and exits.
fn measure(interface: &str, work: impl FnOnce() -> Result<(&'static str, f64)>) -> Result<Value> {
    let packets = || -> Result<u64> {
        Ok(net::statistic(interface, "tx_packets")? + net::statistic(interface, "rx_packets")?)
    };
    let (before, start, exits) = (packets()?, Instant::now(), channel::exits());
    let (name, value) = work()?;
    let (after, took, later) = (channel::exits(), start.elapsed(), packets()?);
    let passed = later - before;
    let mut report =
        json!({ "packets": passed, "packets_per_s": (passed as f64 / took.as_secs_f64()).round() });
    report[name] = value.into();
    if let Some(((vmm, all), (vmm_later, all_later))) = exits.zip(after) {
        report["vmm_exits_per_packet"] = per_packet(vmm_later - vmm, passed);
        if let Some((all, all_later)) = all.zip(all_later) {
            report["exits_per_packet"] = per_packet(all_later - all, passed);
        }
    }
    Ok(report)
}

fn per_packet(exits: u64, packets: u64) -> Value {
    ((1000.0 * exits as f64 / packets.max(1) as f64).round() / 1000.0).into()
}

fn bound(interface: &str, kind: Type) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind, None)?;
    socket.bind_device(Some(interface.as_bytes()))?;
    Ok(socket)
}

/// Small datagrams as fast as they go: how many were sent in a second.
fn flood(interface: &str, time: Duration) -> Result<(&'static str, f64)> {
    // The socket must not be what bounds the rate: it waits for room in the queue.
    let socket = UdpSocket::from(bound(interface, Type::DGRAM)?);
    let to = SocketAddr::from((EVERYBODY, DISCARD));
    let (start, mut sent) = (Instant::now(), 0_u64);
    while start.elapsed() < time {
        for _ in 0..64 {
            if socket.send_to(&DATAGRAM, to).is_ok() {
                sent += 1;
            }
        }
    }
    Ok(("datagrams_per_s", (sent as f64 / start.elapsed().as_secs_f64()).round()))
}

/// Echoes of small datagrams, one at a time: the median, in microseconds.
fn round_trips(interface: &str, time: Duration) -> Result<(&'static str, f64)> {
    let socket = UdpSocket::from(bound(interface, Type::DGRAM)?);
    socket.connect((net::peer(interface)?, ECHO))?;
    socket.set_read_timeout(Some(SILENCE))?;
    let mut buffer = [0; 64];
    let mut took = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        let sent = Instant::now();
        socket.send(&DATAGRAM)?;
        socket.recv(&mut buffer).context("echo")?;
        took.push(sent.elapsed());
    }
    took.sort();
    Ok(("median_us", took[took.len() / 2].as_micros() as f64))
}

fn connect(interface: &str, port: u16) -> Result<TcpStream> {
    let socket = bound(interface, Type::STREAM)?;
    socket.connect_timeout(&SocketAddr::from((net::peer(interface)?, port)).into(), SILENCE)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(stream)
}

/// Mbit/s of a TCP stream out.
fn tcp_send(interface: &str, time: Duration) -> Result<(&'static str, f64)> {
    let mut stream = connect(interface, DISCARD)?;
    let buffer = vec![0x5a; BUFFER];
    transfer(time, || stream.write(&buffer))
}

/// Mbit/s of a TCP stream in.
fn tcp_receive(interface: &str, time: Duration) -> Result<(&'static str, f64)> {
    let mut stream = connect(interface, CHARGEN)?;
    let mut buffer = vec![0; BUFFER];
    transfer(time, || stream.read(&mut buffer))
}

fn transfer(time: Duration, mut step: impl FnMut() -> std::io::Result<usize>) -> Result<(&'static str, f64)> {
    let (start, mut bytes) = (Instant::now(), 0);
    while start.elapsed() < time {
        bytes += step()?;
    }
    let megabits = bytes as f64 * 8.0 / 1e6 / start.elapsed().as_secs_f64();
    Ok(("mbit_per_s", (megabits * 10.0).round() / 10.0))
}
