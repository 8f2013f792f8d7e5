//! `echo-tcp`, `echo-udp`: traffic with a checked payload, over every queue.
//!
//! Which queues a connection uses is decided by hashes that the guest can't foretell (the RSS key is random, and so is
//! a socket's transmit hash), but as a rule it stays the same for the connection. So each new connection is tried with a few
//! packets, the driver's per-queue counters tell where they went, and those that reach a queue that has not carried
//! its share yet carry it.

use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::net;

/// Longest silence of the other end.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a datagram's echo may take before it counts as lost.
const DATAGRAM_SILENCE: Duration = Duration::from_secs(5);
/// Messages that show a new connection's queues, and their size.
const TRIAL: (usize, usize) = (6, 64);
/// Fewest packets on a queue that are taken for the trial's and not for background noise.
const TRIAL_PACKETS: u64 = 5;
/// Ports that are tried for a connection.
const TRIES: u32 = 8;
/// Ports of ours that connections come from.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 40_000;
/// Largest write.
const CHUNK: usize = 64 * 1024;

/// A stream of bytes that the other end can't guess: xorshift64.
pub(super) struct Pattern(u64);

impl Pattern {
    pub(super) fn new(seed: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ (seed + 1))
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What both commands are told.
struct Target {
    interface: String,
    host: SocketAddr,
}

impl Target {
    /// `HOST [--port 7] [--interface NAME]`; HOST `peer` is the one known from DHCP.
    fn from(arguments: &mut Arguments) -> Result<Self> {
        let port = arguments.opt_value_from_str("--port")?.unwrap_or(7);
        let interface = net::choose(arguments.opt_value_from_str("--interface")?)?;
        let host: String = arguments.opt_free_from_str()?.unwrap_or_else(|| "peer".to_owned());
        let host: IpAddr = match host.as_str() {
            "peer" => net::peer(&interface)?.into(),
            address => address.parse().with_context(|| format!("'{address}' is no address"))?,
        };
        Ok(Self { interface, host: (host, port).into() })
    }

    fn socket(&self, kind: Type) -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(self.host), kind, None)?;
        socket.bind_device(Some(self.interface.as_bytes()))?;
        Ok(socket)
    }

    /// A connection from a port of its own choice. Those that the kernel takes in turn differ in a few low bits, and
    /// Toeplitz is linear: with an unlucky key all of them would hash to the same queues.
    fn connect(&self, seed: u64) -> Result<TcpStream> {
        let any: IpAddr = match self.host {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let mut tries = 0;
        let socket = loop {
            let socket = self.socket(Type::STREAM)?;
            socket.set_reuse_address(true)?;
            // A keyed hash: what is linear too would be of no help.
            let port = FIRST_PORT + (RandomState::new().hash_one(seed) % u64::from(PORTS)) as u16;
            let bound = socket.bind(&SocketAddr::from((any, port)).into());
            bound.with_context(|| format!("port {port}"))?;
            tries += 1;
            match socket.connect_timeout(&self.host.into(), SILENCE) {
                Ok(()) => break socket,
                // The port's last connection to this host has not been forgotten yet.
                Err(error) if error.kind() == ErrorKind::AddrNotAvailable && tries < TRIES => {}
                Err(error) => return Err(error).with_context(|| format!("connect to {}", self.host)),
            }
        };
        socket.set_tcp_nodelay(true)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        Ok(stream)
    }
}

/// `echo-tcp [HOST] [--bytes 1M] [--attempts N] [--port 7] [--interface NAME]`: until each receive and each transmit
/// queue has carried `--bytes`, in at most `--attempts` connections.
pub fn tcp(arguments: &mut Arguments) -> Result<Value> {
    let bytes =
        size(&arguments.opt_value_from_str::<_, String>("--bytes")?.unwrap_or_else(|| "1M".to_owned()))?;
    let attempts: Option<u64> = arguments.opt_value_from_str("--attempts")?;
    let target = Target::from(arguments)?;
    let (rx, tx) = net::queues(&target.interface);
    let mut carried = Carried { rx: vec![0; rx], tx: vec![0; tx] };
    // Twice the mean of drawing each of n queues at least once, n (ln n + 1), and some.
    let attempts = attempts.unwrap_or(20 + 12 * rx.max(tx) as u64);
    let start = Instant::now();
    let mut connections = 0;
    while !carried.everywhere() {
        ensure!(
            connections < attempts,
            "after {connections} connections queues are without traffic: {carried:?}"
        );
        carried.add(&target, connections, bytes).with_context(|| format!("connection {connections}"))?;
        connections += 1;
    }
    Ok(json!({
        "host": target.host.to_string(), "bytes": bytes, "connections": connections,
        "rx_bytes": carried.rx, "tx_bytes": carried.tx, "duration_ms": start.elapsed().as_millis() as u64,
    }))
}

/// Bytes that each queue has carried.
#[derive(Debug)]
struct Carried {
    rx: Vec<usize>,
    tx: Vec<usize>,
}

impl Carried {
    fn everywhere(&self) -> bool {
        self.rx.iter().chain(&self.tx).all(|&bytes| bytes > 0)
    }

    /// One connection: a trial, and the full load if it uses a queue that has had none.
    fn add(&mut self, target: &Target, seed: u64, bytes: usize) -> Result<()> {
        let mut stream = target.connect(seed)?;
        let before = net::queue_packets(&target.interface)?;
        for message in 0..TRIAL.0 {
            exchange(&mut stream, seed + message as u64, TRIAL.1)?;
        }
        let after = net::queue_packets(&target.interface)?;
        let rx = busiest(&before.0, &after.0).context("no receive queue counted the packets")?;
        let tx = busiest(&before.1, &after.1).context("no transmit queue counted the packets")?;
        if self.rx[rx] > 0 && self.tx[tx] > 0 {
            return Ok(());
        }
        exchange(&mut stream, seed, bytes)?;
        let loaded = net::queue_packets(&target.interface)?;
        ensure!(busiest(&after.0, &loaded.0) == Some(rx), "the connection left receive queue {rx}");
        self.rx[rx] += bytes;
        // After a retransmission the guest draws a new transmit hash (sk_rethink_txhash, include/net/sock.h).
        if busiest(&after.1, &loaded.1) == Some(tx) {
            self.tx[tx] += bytes;
        }
        Ok(())
    }
}

/// The queue with most new packets, if they are more than noise.
fn busiest(before: &[u64], after: &[u64]) -> Option<usize> {
    let new = before.iter().zip(after).map(|(before, after)| after - before).enumerate();
    let (queue, packets) = new.max_by_key(|&(_, packets)| packets)?;
    (packets >= TRIAL_PACKETS).then_some(queue)
}

/// Sends `bytes` and checks that they come back; both directions at once.
fn exchange(stream: &mut TcpStream, seed: u64, bytes: usize) -> Result<()> {
    let mut writer = stream.try_clone()?;
    thread::scope(|scope| {
        let sending = scope.spawn(move || send(&mut writer, seed, bytes));
        let received = receive(stream, seed, bytes);
        let sent = sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?;
        received.and(sent)
    })
}

fn send(stream: &mut TcpStream, seed: u64, bytes: usize) -> Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK)];
        pattern.fill(chunk);
        stream.write_all(chunk).with_context(|| format!("send, {left} bytes left"))?;
        left -= chunk.len();
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, seed: u64, bytes: usize) -> Result<()> {
    let mut pattern = Pattern::new(seed);
    let (mut expected, mut buffer) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut left = bytes;
    while left > 0 {
        let length = left.min(CHUNK);
        pattern.fill(&mut expected[..length]);
        stream.read_exact(&mut buffer[..length]).with_context(|| format!("receive, {left} bytes left"))?;
        let differs = buffer.iter().zip(&expected[..length]).position(|(got, sent)| got != sent);
        if let Some(offset) = differs {
            bail!("byte {} of the echo differs", bytes - left + offset);
        }
        left -= length;
    }
    Ok(())
}

/// `echo-udp [HOST] [--count 100] [--bytes 1400] [--port 7] [--interface NAME]`: datagrams, one at a time.
pub fn udp(arguments: &mut Arguments) -> Result<Value> {
    let count: u64 = arguments.opt_value_from_str("--count")?.unwrap_or(100);
    let bytes: usize = arguments.opt_value_from_str("--bytes")?.unwrap_or(1400);
    let target = Target::from(arguments)?;
    let socket = UdpSocket::from(target.socket(Type::DGRAM)?);
    socket.connect(target.host)?;
    socket.set_read_timeout(Some(DATAGRAM_SILENCE))?;
    let (mut sent, mut received) = (vec![0; bytes], vec![0; bytes + 1]);
    for number in 0..count {
        Pattern::new(number).fill(&mut sent);
        socket.send(&sent).with_context(|| format!("datagram {number}"))?;
        let length = socket.recv(&mut received).with_context(|| format!("echo of datagram {number}"))?;
        ensure!(received[..length] == sent[..], "the echo of datagram {number} differs");
    }
    Ok(json!({ "host": target.host.to_string(), "datagrams": count, "bytes": bytes }))
}

/// A number with K or M for powers of 1024.
pub(super) fn size(text: &str) -> Result<usize> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        _ => (text, 1),
    };
    let number: usize = number.parse().with_context(|| format!("--bytes: '{text}' is no size"))?;
    number.checked_mul(unit).context("--bytes: too large")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("17").unwrap(), 17);
        assert_eq!(size("64K").unwrap(), 65536);
        assert_eq!(size("1M").unwrap(), 1 << 20);
        assert!(size("M").is_err());
    }

    #[test]
    fn a_queue_is_busy_when_it_has_more_than_noise() {
        assert_eq!(busiest(&[10, 10, 10], &[11, 18, 14]), Some(1));
        assert_eq!(busiest(&[10, 10], &[11, 12]), None);
    }

    #[test]
    fn the_pattern_depends_on_the_seed_only() {
        let bytes = |seed: u64, cuts: &[usize]| {
            let mut pattern = Pattern::new(seed);
            let parts = cuts.iter().map(|&length| {
                let mut part = vec![0; length];
                pattern.fill(&mut part);
                part
            });
            parts.collect::<Vec<_>>().concat()
        };
        assert_eq!(bytes(1, &[16, 8]), bytes(1, &[8, 16]));
        assert_ne!(bytes(1, &[24]), bytes(2, &[24]));
    }
}
