//! `datagrams ADDRESS --port N [--from NAMESPACE] [--at NAMESPACE] [--count 64] [--bytes 1000]`: UDP to a port, and
//! what becomes of it.
//!
//! Those that come back to the sender are its echo; those that arrive at the port in the namespace `--at` are counted
//! too. Contents are checked.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::echo::Pattern;
use crate::namespace;

/// Datagrams under way at once: few enough for any ring and socket buffer.
const WINDOW: u64 = 16;
/// How long nothing must come before we believe that nothing will.
const SILENCE: Duration = Duration::from_millis(1500);

/// Sends and counts.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let port: u16 = arguments.value_from_str("--port")?;
    let from: Option<String> = arguments.opt_value_from_str("--from")?;
    let at: Option<String> = arguments.opt_value_from_str("--at")?;
    let count: u64 = arguments.opt_value_from_str("--count")?.unwrap_or(64);
    let bytes: usize = arguments.opt_value_from_str("--bytes")?.unwrap_or(1000);
    let address: IpAddr = arguments.free_from_str()?;
    let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let open =
        |namespace: &str, port: u16| namespace::within(namespace, || Ok(UdpSocket::bind((any, port))?));

    let sender = open(from.as_deref().unwrap_or(namespace::OWN), 0)?;
    let to = SocketAddr::from((address, port));
    let receiver = at.map(|namespace| open(&namespace, port)).transpose()?;
    let (mut echoed, mut arrived) = (0, 0);
    for first in (0..count).step_by(WINDOW as usize) {
        let numbers = first..count.min(first + WINDOW);
        let expected = numbers.end - first;
        for number in numbers {
            sender.send_to(&datagram(number, bytes), to).with_context(|| format!("datagram {number}"))?;
        }
        match &receiver {
            Some(receiver) => arrived += collect(receiver, expected, bytes)?,
            None => echoed += collect(&sender, expected, bytes)?,
        }
    }
    Ok(json!({ "sent": count, "echoed": echoed, "arrived": arrived }))
}

/// Its number, then what follows from it.
fn datagram(number: u64, bytes: usize) -> Vec<u8> {
    let mut datagram = vec![0; bytes.max(8)];
    Pattern::new(number).fill(&mut datagram);
    datagram[..8].copy_from_slice(&number.to_le_bytes());
    datagram
}

/// How many come, up to `expected`.
fn collect(socket: &UdpSocket, expected: u64, bytes: usize) -> Result<u64> {
    socket.set_read_timeout(Some(SILENCE))?;
    let mut buffer = vec![0; 65_536];
    let mut come = 0;
    while come < expected {
        let length = match socket.recv(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            // An ICMP error tells that nobody listens; the next read tells of data again.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
            result => result?,
        };
        let number = buffer.first_chunk().map(|number| u64::from_le_bytes(*number));
        if number.is_none_or(|number| buffer[..length] != datagram(number, bytes)) {
            bail!("a datagram came back changed");
        }
        come += 1;
    }
    Ok(come)
}
