//! The driver's network interfaces: up, carrier, addresses, counters.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Error;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};

use crate::function;

/// Longest wait for a carrier: machines inside machines are slow.
const LINK_TIMEOUT: Duration = Duration::from_secs(60);
/// Where the DHCP script leaves the server's and router's address.
const PEERS: &str = "/run/peers";

// linux/ethtool.h
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const GSSET_INFO: u32 = 0x37;
const SS_STATS: u32 = 1;
const STRING: usize = 32;

/// Names of the entries of a sysfs folder, sorted.
pub fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Interfaces of all MANA functions.
pub fn mana_interfaces() -> Vec<String> {
    function::all().iter().flat_map(function::Function::interfaces).collect()
}

/// Interfaces of all other devices.
pub fn other_interfaces() -> Vec<String> {
    let folder = Path::new("/sys/class/net");
    let mana = mana_interfaces();
    let mut names = names_in(folder);
    names.retain(|name| folder.join(name).join("device").exists() && !mana.contains(name));
    names
}

/// The one that is named, else the first MANA interface, else the first of another device.
pub fn choose(name: Option<String>) -> Result<String> {
    let first = || mana_interfaces().into_iter().chain(other_interfaces()).next();
    name.or_else(first).context("there is no network interface")
}

fn attribute(interface: &str, name: &str) -> String {
    let path = Path::new("/sys/class/net").join(interface).join(name);
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Is there a carrier? False also while the interface is down.
pub fn has_carrier(interface: &str) -> bool {
    attribute(interface, "carrier") == "1"
}

/// Receive and transmit queues in use.
pub fn queues(interface: &str) -> (usize, usize) {
    let names = names_in(&Path::new("/sys/class/net").join(interface).join("queues"));
    let count = |kind| names.iter().filter(|name| name.starts_with(kind)).count();
    (count("rx-"), count("tx-"))
}

/// Name, MAC address, MTU, carrier, queues and peer.
pub fn describe(interface: &str) -> Value {
    let (rx, tx) = queues(interface);
    json!({
        "interface": interface,
        "mac": attribute(interface, "address"),
        "mtu": attribute(interface, "mtu").parse::<u32>().ok(),
        "carrier": has_carrier(interface),
        "rx_queues": rx,
        "tx_queues": tx,
        "address": address(interface).map(|address| address.to_string()),
        "peer": peer(interface).ok().map(|peer| peer.to_string()),
    })
}

/// Up, carrier, and an address if one is asked for.
pub fn bring_up(interface: &str, dhcp: bool) -> Result<()> {
    set_up(interface)?;
    wait_for_carrier(interface)?;
    if dhcp { ask_for_address(interface) } else { Ok(()) }
}

/// Waits for the carrier.
pub fn wait_for_carrier(interface: &str) -> Result<()> {
    let start = Instant::now();
    while !has_carrier(interface) {
        if start.elapsed() > LINK_TIMEOUT {
            bail!("{interface} has no carrier after {} s", LINK_TIMEOUT.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn socket() -> Result<Socket> {
    Ok(Socket::new(Domain::IPV4, Type::DGRAM, None)?)
}

/// An `ifreq` that names `interface`.
pub fn request(interface: &str) -> libc::ifreq {
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

/// ioctl(2) on a socket of the calling thread's network; what it returns if that is no error.
pub fn ioctl(number: u64, request: &mut libc::ifreq) -> Result<libc::c_int> {
    let socket = socket()?;
    // SAFETY: the socket is open, and the numbers used in this program's network files take an ifreq.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), number as _, &raw mut *request) };
    if result < 0 { Err(Error::last_os_error().into()) } else { Ok(result) }
}

/// Sets IFF_UP.
pub fn set_up(interface: &str) -> Result<()> {
    let mut request = request(interface);
    let flags = flags(interface)?;
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(libc::SIOCSIFFLAGS, &mut request).with_context(|| format!("{interface}: up"))?;
    Ok(())
}

/// Is it up, with a carrier? For interfaces that sysfs does not show, in other namespaces.
pub fn is_running(interface: &str) -> Result<bool> {
    Ok(flags(interface)? & libc::IFF_RUNNING as libc::c_short != 0)
}

fn flags(interface: &str) -> Result<libc::c_short> {
    let mut request = request(interface);
    ioctl(libc::SIOCGIFFLAGS, &mut request).with_context(|| format!("{interface}: flags"))?;
    // SAFETY: SIOCGIFFLAGS wrote the flags.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

/// The IPv4 address, if it has one.
pub fn address(interface: &str) -> Option<Ipv4Addr> {
    let mut request = request(interface);
    ioctl(libc::SIOCGIFADDR, &mut request).ok()?;
    // SAFETY: SIOCGIFADDR wrote an address.
    let address = unsafe { request.ifr_ifru.ifru_addr };
    // struct sockaddr_in: family, port, then the address.
    let octets: [u8; 4] = std::array::from_fn(|index| address.sa_data[2 + index] as u8);
    Some(octets.into())
}

/// Runs DHCP on `interface` with busybox's udhcpc, which calls [`leased`].
pub fn ask_for_address(interface: &str) -> Result<()> {
    let output = Command::new("/bin/busybox")
        .args(["udhcpc", "-i", interface, "-n", "-q", "-f", "-t", "10", "-T", "1", "-A", "1"])
        .args(["-s", "/bin/udhcpc-script"])
        .stdin(Stdio::null())
        .output()
        .context("udhcpc")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{interface} got no address: {}", text.trim().replace('\n', "; "));
    }
    Ok(())
}

/// udhcpc's script: its variables are the lease.
pub fn leased(event: &str) -> Result<()> {
    if !["bound", "renew"].contains(&event) {
        return Ok(());
    }
    let variable = |name: &str| std::env::var(name).with_context(|| format!("the lease has no '{name}'"));
    let interface = variable("interface")?;
    let address = format!("{}/{}", variable("ip")?, variable("mask")?);
    ip(&["addr", "replace", &address, "broadcast", "+", "dev", &interface])?;
    let router = variable("router").ok().and_then(|list| list.split(' ').next().map(str::to_owned));
    if let Some(router) = &router {
        // A second interface's default route is not wanted.
        let _ = ip(&["route", "add", "default", "via", router, "dev", &interface]);
    }
    let peer = router.map_or_else(|| variable("serverid"), Ok)?;
    fs::create_dir_all(PEERS)?;
    Ok(fs::write(Path::new(PEERS).join(interface), peer + "\n")?)
}

/// Runs busybox's `ip` in the calling thread's network.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("/bin/busybox").arg("ip").args(arguments).output().context("ip")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())
}

/// The host at the other end of the cable, known from DHCP.
pub fn peer(interface: &str) -> Result<Ipv4Addr> {
    let file: PathBuf = Path::new(PEERS).join(interface);
    let text = fs::read_to_string(&file).with_context(|| format!("{interface} has no lease"))?;
    text.trim().parse().with_context(|| format!("'{}' in {}", text.trim(), file.display()))
}

fn ethtool(interface: &str, command: &mut [u64]) -> Result<()> {
    let mut request = request(interface);
    request.ifr_ifru.ifru_data = command.as_mut_ptr().cast();
    ioctl(libc::SIOCETHTOOL, &mut request).with_context(|| format!("{interface}: ethtool"))?;
    Ok(())
}

/// Buffer of an ethtool command: two 32-bit words, then 64-bit words.
fn command(number: u32, argument: u32, words: usize) -> Vec<u64> {
    let mut buffer = vec![0; 1 + words];
    buffer[0] = u64::from(number) | u64::from(argument) << 32;
    buffer
}

/// The driver's counters (`ethtool -S`).
pub fn counters(interface: &str) -> Result<BTreeMap<String, u64>> {
    let mut info = command(GSSET_INFO, 0, 2);
    info[1] = 1 << SS_STATS;
    ethtool(interface, &mut info)?;
    let count = info[2] as u32;

    // struct ethtool_gstrings has three 32-bit words before the strings.
    let mut strings = command(GSTRINGS, SS_STATS, 1 + count as usize * STRING / 8);
    strings[1] = count.into();
    ethtool(interface, &mut strings)?;
    let names: Vec<u8> = strings.iter().flat_map(|word| word.to_le_bytes()).skip(12).collect();

    let mut values = command(GSTATS, count, count as usize);
    ethtool(interface, &mut values)?;
    let name =
        |bytes: &[u8]| CStr::from_bytes_until_nul(bytes).unwrap_or_default().to_string_lossy().into_owned();
    Ok(names.chunks_exact(STRING).map(name).zip(values.into_iter().skip(1)).collect())
}

/// Counters that each queue has, summed over the queues: `rx_3_packets` and its like as `rx_packets`.
pub fn totals(counters: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let mut totals = BTreeMap::new();
    for (name, value) in counters {
        let parts: Vec<&str> = name.splitn(3, '_').collect();
        let [kind @ ("rx" | "tx"), queue, rest] = parts[..] else { continue };
        if queue.parse::<usize>().is_ok() {
            *totals.entry(format!("{kind}_{rest}")).or_default() += value;
        }
    }
    totals
}

/// Packets of each queue of a MANA interface, wherever sysfs shows it: `(receive, transmit)`.
pub fn mana_packets(counters: &BTreeMap<String, u64>) -> (Vec<u64>, Vec<u64>) {
    let of = |kind: &str| {
        let value = |queue: usize| counters.get(&format!("{kind}_{queue}_packets")).copied();
        (0..).map_while(value).collect()
    };
    (of("rx"), of("tx"))
}

/// What drivers call the packets of a queue: mana, virtio_net before 6.4, virtio_net since.
fn counter_names(kind: &str, queue: usize) -> [String; 3] {
    [
        format!("{kind}_{queue}_packets"),
        format!("{kind}_queue_{queue}_packets"),
        format!("{kind}{queue}_packets"),
    ]
}

/// A counter of the interface itself, such as `tx_packets`.
pub fn statistic(interface: &str, name: &str) -> Result<u64> {
    let text = attribute(interface, &format!("statistics/{name}"));
    text.parse().with_context(|| format!("{interface} has no statistic {name}"))
}

/// Packets of each queue: `(receive, transmit)`.
pub fn queue_packets(interface: &str) -> Result<(Vec<u64>, Vec<u64>)> {
    let counters = counters(interface)?;
    let (rx, tx) = queues(interface);
    let packets = |kind: &str, count: usize| -> Result<Vec<u64>> {
        let value = |index: usize| {
            let names = counter_names(kind, index);
            let found = names.iter().find_map(|name| counters.get(name).copied());
            // virtio_net tells ethtool nothing of packets since 6.10; what its only queue carried is known all the same.
            let only =
                || if count == 1 { statistic(interface, &format!("{kind}_packets")).ok() } else { None };
            found.or_else(only).with_context(|| format!("no counter {}", names[0]))
        };
        (0..count).map(value).collect()
    };
    Ok((packets("rx", rx)?, packets("tx", tx)?))
}

/// The number of an interface.
pub fn index(interface: &str) -> Result<u32> {
    let name = CString::new(interface)?;
    // SAFETY: a terminated string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 { Err(Error::last_os_error()).with_context(|| interface.to_owned()) } else { Ok(index) }
}
