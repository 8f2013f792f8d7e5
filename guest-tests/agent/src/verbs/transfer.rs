//! `transfer ADDRESS --there [NAMESPACE/]INTERFACE [--here INTERFACE] [--bytes 32K] [--connections 16] [--until FILE]`:
//! TCP between two interfaces of this guest, in both directions at once.
//!
//! The interface `--there` is in another network namespace and has ADDRESS, so that the data can only get there over
//! the cable. Each end computes a checksum of what it sends and of what it receives, and they must agree. Connections
//! are made in rounds until every queue of both ends has carried packets in both directions; with `--until`, until
//! FILE is there, whatever becomes of the queues meanwhile.
//!
//! With `--queues 0,2` these of this end's queues must be used, and no other receive queue: the driver sends by the RSS
//! table too (`mana_get_tx_queue`), but a connection keeps the transmit queue that it had. `--rises COUNTER` names a
//! counter that must have risen at both ends, without its queue's number: `tx_tso_packets`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use super::echo::{Pattern, size};
use crate::{namespace, net};

/// Longest silence of the other end; a change of the interface's queues is a long one.
const SILENCE: Duration = Duration::from_secs(60);
/// Largest read and write.
const CHUNK: usize = 64 * 1024;
/// Rounds in which every queue must have been used.
const MAX_ROUNDS: u64 = 12;
/// Fewest packets that show a queue in use.
const IN_USE: u64 = 5;
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 40_000;

/// An interface and the namespace that it is in.
#[derive(Clone, Debug)]
pub struct Place {
    /// As the command `namespace` knows it.
    pub namespace: String,
    /// The interface.
    pub interface: String,
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (namespace, interface) = text.split_once('/').unwrap_or((namespace::OWN, text));
        Ok(Self { namespace: namespace.to_owned(), interface: interface.to_owned() })
    }
}

impl Place {
    /// The driver's counters.
    pub fn counters(&self) -> Result<BTreeMap<String, u64>> {
        namespace::within(&self.namespace, || net::counters(&self.interface))
    }

    /// TCP segments and UDP datagrams that the namespace has dropped for their checksum.
    pub fn checksum_errors(&self) -> Result<u64> {
        let text = namespace::within(&self.namespace, || {
            fs::read_to_string("/proc/thread-self/net/snmp").context("/proc/net/snmp")
        })?;
        Ok(["Tcp", "Udp"].iter().filter_map(|protocol| snmp(&text, protocol, "InCsumErrors")).sum())
    }
}

/// A number of /proc/net/snmp: a line of names, then one of numbers.
fn snmp(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(": ")).filter(|(key, _)| *key == protocol);
    let index = lines.next()?.1.split(' ').position(|word| word == name)?;
    lines.next()?.1.split(' ').nth(index)?.parse().ok()
}

/// Who talks to whom, and how much.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Of the other end.
    pub address: IpAddr,
    /// The end that connects.
    pub here: Place,
    /// The end that listens.
    pub there: Place,
    /// In each direction of a connection.
    pub bytes: usize,
    /// At once.
    pub connections: u64,
    /// Queues of this end that must be used, and no other receive queue; all if none are named.
    pub queues: Vec<usize>,
    /// Counters that must rise at both ends.
    pub rises: Vec<String>,
}

impl Plan {
    /// ADDRESS and options.
    pub fn from(arguments: &mut Arguments) -> Result<Self> {
        let text: Option<String> = arguments.opt_value_from_str("--bytes")?;
        Ok(Self {
            bytes: size(text.as_deref().unwrap_or("32K"))?,
            connections: arguments.opt_value_from_str("--connections")?.unwrap_or(16),
            there: arguments.value_from_str("--there")?,
            here: match arguments.opt_value_from_str("--here")? {
                Some(place) => place,
                None => net::choose(None)?.parse()?,
            },
            queues: match arguments.opt_value_from_str::<_, String>("--queues")? {
                Some(list) => list.split(',').map(|queue| Ok(queue.parse()?)).collect::<Result<_>>()?,
                None => Vec::new(),
            },
            rises: arguments.values_from_str("--rises")?,
            address: arguments.free_from_str()?,
        })
    }
}

/// The command.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let until: Option<PathBuf> = arguments.opt_value_from_str("--until")?;
    let plan = Plan::from(arguments)?;
    let Some(until) = until else { return on_every_queue(&plan) };
    let (start, mut rounds) = (Instant::now(), 0);
    while !until.exists() {
        round(&plan)?;
        rounds += 1;
    }
    let bytes = rounds * plan.connections * plan.bytes as u64;
    Ok(
        json!({ "rounds": rounds, "bytes_each_way": bytes, "duration_ms": start.elapsed().as_millis() as u64 }),
    )
}

/// Rounds until every queue has been used, and what the drivers counted meanwhile.
pub fn on_every_queue(plan: &Plan) -> Result<Value> {
    let ends = [&plan.here, &plan.there];
    let before = [plan.here.counters()?, plan.there.counters()?];
    let errors = plan.here.checksum_errors()? + plan.there.checksum_errors()?;
    for rounds in 1..=MAX_ROUNDS {
        round(plan)?;
        let (mut all_used, mut lacking) = (true, Vec::new());
        let mut report = json!({
            "connections": rounds * plan.connections,
            "bytes_each_way": rounds * plan.connections * plan.bytes as u64,
        });
        for (index, name) in ["here", "there"].into_iter().enumerate() {
            let used = Used::between(&before[index], &ends[index].counters()?);
            let chosen: &[usize] = if index == 0 { &plan.queues } else { &[] };
            all_used &= used.everywhere(chosen);
            report[name] = used.report();
            let still = |counter: &&String| used.totals.get(*counter).is_none_or(|&value| value == 0);
            lacking.extend(
                plan.rises.iter().filter(still).map(|counter| format!("{name}: {counter} has not risen")),
            );
            ensure!(used.nowhere_else(chosen), "packets came to other receive queues: {report}");
        }
        let new_errors = plan.here.checksum_errors()? + plan.there.checksum_errors()? - errors;
        ensure!(new_errors == 0, "{new_errors} packets came with a wrong checksum");
        if all_used {
            ensure!(lacking.is_empty(), "{}", lacking.join("; "));
            return Ok(report);
        }
        ensure!(rounds < MAX_ROUNDS, "after {rounds} rounds there are queues without packets: {report}");
    }
    bail!("no rounds")
}

/// What an interface has carried.
struct Used {
    rx: Vec<u64>,
    tx: Vec<u64>,
    totals: BTreeMap<String, u64>,
}

impl Used {
    fn between(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Self {
        let new: BTreeMap<String, u64> = after
            .iter()
            .map(|(name, value)| (name.clone(), value.saturating_sub(before.get(name).copied().unwrap_or(0))))
            .collect();
        let (rx, tx) = net::mana_packets(&new);
        Self { rx, tx, totals: net::totals(&new) }
    }

    /// The queues that are chosen, or all.
    fn everywhere(&self, chosen: &[usize]) -> bool {
        let is_chosen = |queue: usize| chosen.is_empty() || chosen.contains(&queue);
        let used = |(queue, &packets): (usize, &u64)| !is_chosen(queue) || packets >= IN_USE;
        self.rx.iter().enumerate().all(used) && self.tx.iter().enumerate().all(used)
    }

    /// Only the receive queues that are chosen; a packet may have been under way when they were.
    fn nowhere_else(&self, chosen: &[usize]) -> bool {
        let mut others = self.rx.iter().enumerate().filter(|(queue, _)| !chosen.contains(queue));
        chosen.is_empty() || others.all(|(_, &packets)| packets < IN_USE)
    }

    fn report(&self) -> Value {
        let total = |name: &str| self.totals.get(name).copied();
        json!({
            "rx_packets": self.rx, "tx_packets": self.tx,
            "tso_packets": total("tx_tso_packets"), "csum_partial": total("tx_csum_partial"),
            "long_pkt_fmt": total("tx_long_pkt_fmt"),
        })
    }
}

/// What an end has sent and received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sums {
    sent: u64,
    received: u64,
}

/// All connections once, at the same time.
fn round(plan: &Plan) -> Result<()> {
    let listener = namespace::within(&plan.there.namespace, || listen(plan.address))?;
    let to = SocketAddr::from((plan.address, listener.local_addr()?.port()));
    let there: Mutex<HashMap<u64, Sums>> = Mutex::default();
    let served = |stream: TcpStream| -> Result<()> {
        let (seed, sums) = serve(stream, plan.bytes)?;
        there.lock().map_err(|_| anyhow!("a thread panicked"))?.insert(seed, sums);
        Ok(())
    };
    let (served, listener) = (&served, &listener);
    let here = thread::scope(|scope| {
        let serving = scope.spawn(move || {
            let mut workers = Vec::new();
            for _ in 0..plan.connections {
                let stream = accept(listener)?;
                workers.push(scope.spawn(move || served(stream)));
            }
            workers.into_iter().try_for_each(joined)
        });
        let seeds = (0..plan.connections).map(|number| RandomState::new().hash_one(number));
        let clients: Vec<_> = seeds
            .map(|seed| {
                let call = move || namespace::within(&plan.here.namespace, || call(to, seed, plan.bytes));
                (seed, scope.spawn(call))
            })
            .collect();
        let sums: Result<Vec<(u64, Sums)>> =
            clients.into_iter().map(|(seed, client)| Ok((seed, joined(client)?))).collect();
        let served = joined(serving);
        sums.and_then(|sums| served.map(|()| sums))
    })?;
    let there = there.into_inner().map_err(|_| anyhow!("a thread panicked"))?;
    for (seed, sums) in here {
        let other = there.get(&seed).context("a connection is known at one end only")?;
        ensure!(sums.sent == other.received, "what was sent and what arrived there have different checksums");
        ensure!(sums.received == other.sent, "what was sent there and what arrived have different checksums");
    }
    Ok(())
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// A port of our own choice: see `echo-tcp`.
fn port(seed: u64) -> u16 {
    FIRST_PORT + (RandomState::new().hash_one(seed) % u64::from(PORTS)) as u16
}

fn any(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A socket bound to a port that nobody has.
fn bound(address: IpAddr) -> Result<Socket> {
    for attempt in 0..8 {
        let to = SocketAddr::from((any(address), port(attempt)));
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        match socket.bind(&to.into()) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            result => return Ok(result.map(|()| socket)?),
        }
    }
    bail!("no port is free")
}

fn listen(address: IpAddr) -> Result<TcpListener> {
    let socket = bound(address)?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// The next connection; none for a long time is an error.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && start.elapsed() < SILENCE => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("no connection arrived"),
        }
    }
}

fn patient(stream: TcpStream) -> Result<TcpStream> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn call(to: SocketAddr, seed: u64, bytes: usize) -> Result<Sums> {
    let mut stream = patient(connect(to)?)?;
    stream.write_all(&seed.to_le_bytes())?;
    exchange(&mut stream, seed, bytes).context("here")
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    for _ in 0..8 {
        let socket = bound(to.ip())?;
        match socket.connect_timeout(&to.into(), SILENCE) {
            // Ports may be shared; what tells connections apart is all of their addresses and ports.
            Err(error) if [ErrorKind::AddrInUse, ErrorKind::AddrNotAvailable].contains(&error.kind()) => {}
            result => return result.map(|()| socket.into()).with_context(|| format!("connect to {to}")),
        }
    }
    bail!("connect to {to}: no port is free")
}

fn serve(stream: TcpStream, bytes: usize) -> Result<(u64, Sums)> {
    let mut stream = patient(stream)?;
    let mut seed = [0; 8];
    stream.read_exact(&mut seed).context("first bytes of a connection")?;
    let seed = u64::from_le_bytes(seed);
    Ok((seed, exchange(&mut stream, seed ^ 1 << 63, bytes).context("there")?))
}

/// Sends and receives `bytes`, both at once.
fn exchange(stream: &mut TcpStream, seed: u64, bytes: usize) -> Result<Sums> {
    let mut writer = stream.try_clone()?;
    thread::scope(|scope| {
        let sending = scope.spawn(move || send(&mut writer, seed, bytes));
        let received = receive(stream, bytes);
        let sent = joined(sending);
        Ok(Sums { received: received?, sent: sent? })
    })
}

fn send(stream: &mut TcpStream, seed: u64, bytes: usize) -> Result<u64> {
    let mut pattern = Pattern::new(seed);
    in_chunks(bytes, |chunk| {
        pattern.fill(chunk);
        stream.write_all(chunk).context("send")
    })
}

fn receive(stream: &mut TcpStream, bytes: usize) -> Result<u64> {
    in_chunks(bytes, |chunk| stream.read_exact(chunk).context("receive"))
}

/// Checksum of `bytes` bytes that pass in chunks.
fn in_chunks(bytes: usize, mut pass: impl FnMut(&mut [u8]) -> Result<()>) -> Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let (mut sum, mut left) = (Fnv::default(), bytes);
    while left > 0 {
        let chunk = &mut buffer[..left.min(CHUNK)];
        pass(chunk)?;
        sum.add(chunk);
        left -= chunk.len();
    }
    Ok(sum.0)
}

/// FNV-1a over 64-bit words.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_tells_any_byte_and_any_order() {
        let of = |bytes: &[u8]| {
            let mut sum = Fnv::default();
            sum.add(bytes);
            sum.0
        };
        assert_ne!(of(b"0123456789"), of(b"0123456798"));
        assert_ne!(of(b"01234567abcdefgh"), of(b"abcdefgh01234567"));
        assert_eq!(of(b""), Fnv::default().0);
    }

    #[test]
    fn places() {
        let place: Place = "b/eth1".parse().unwrap();
        assert_eq!((place.namespace.as_str(), place.interface.as_str()), ("b", "eth1"));
        assert_eq!("eth0".parse::<Place>().unwrap().namespace, namespace::OWN);
    }

    #[test]
    fn numbers_of_snmp() {
        let text = "Tcp: RtoMin InCsumErrors\nTcp: 200 3\nUdp: InCsumErrors\nUdp: 4\n";
        assert_eq!(snmp(text, "Tcp", "InCsumErrors"), Some(3));
        assert_eq!(snmp(text, "Udp", "InCsumErrors"), Some(4));
        assert_eq!(snmp(text, "Udp", "RtoMin"), None);
    }

    #[test]
    fn both_ends_agree_over_a_real_connection() {
        let here: Place = "lo".parse().unwrap();
        let plan = Plan {
            address: Ipv4Addr::LOCALHOST.into(),
            there: here.clone(),
            here,
            bytes: 100_001,
            connections: 3,
            queues: Vec::new(),
            rises: Vec::new(),
        };
        round(&plan).unwrap();
    }

    #[test]
    fn queues_that_must_be_used_and_others_that_must_not() {
        let after = |rx: [u64; 2]| {
            let names = ["rx_0_packets", "rx_1_packets", "tx_0_packets"].map(str::to_owned);
            Used::between(&BTreeMap::new(), &names.into_iter().zip([rx[0], rx[1], 50]).collect())
        };
        assert!(after([50, 50]).everywhere(&[]) && !after([50, 0]).everywhere(&[]));
        assert!(after([50, 0]).everywhere(&[0]) && after([50, 0]).nowhere_else(&[0]));
        assert!(!after([50, 50]).nowhere_else(&[0]) && after([50, 50]).nowhere_else(&[]));
    }
}
