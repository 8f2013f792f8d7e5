//! The values of `--cpus`, `--memory`, `--netdev`, `--device`, `--disk` and `--pcap`.

use std::collections::HashSet;
use std::path::PathBuf;

use mana_device::config::{DeviceConfig, MAX_QUEUES_PER_VPORT, MAX_VPORTS, MSIX_TABLE_SIZES, VportConfig};

use mana_device::host::{Chance, Hostility, Profile, Where};

use crate::config::{DiskConfig, Lies, ManaNic, Netdev, NetdevKind, Slot, Topology, VirtioNic};
use crate::keyval::{KeyValues, OptionError};

const NETDEV: &str = "--netdev";
const DEVICE: &str = "--device";
/// Linux names as many with one letter, and nested runs pass them on by these names.
const MAX_DISKS: usize = 16;
/// More would need APIC ids above 254, hence x2APIC and interrupt remapping.
pub const MAX_CPUS: u64 = 254;
/// Guest RAM is dealt out to nodes in pieces of this size.
const MEMORY_GRANULE: u64 = 2 << 20;
/// A Debian kernel with a small initramfs boots in this much.
const MIN_MEMORY: u64 = 64 << 20;
const MAX_MEMORY: u64 = 1 << 40;
/// Locally administered, from QEMU's customary range.
const FIRST_MAC: u64 = 0x5254_0012_3456;
/// Smallest and largest IP packet of the device: IPv4's minimum (RFC 791), and what `adapter_mtu`, which counts
/// the Ethernet header, can say for the jumbo frames that mana knows.
const MTU: std::ops::RangeInclusive<u64> = 68..=9216;
/// Threads of one device: more than there are queues on a port are never of use.
const WORKERS: std::ops::RangeInclusive<u64> = 1..=MAX_QUEUES_PER_VPORT as u64;

/// `--cpus`: QEMU's `-smp`, except that `sockets` counts those of one node.
///
/// What is missing is derived as QEMU derives it: one socket a node, one thread a core, as many cores as it takes.
pub(super) fn cpus(text: &str) -> Result<Topology, OptionError> {
    const OPTION: &str = "--cpus";
    let mut options = KeyValues::parse(OPTION, "cpus", text)?;
    let mut take = |key| options.take_number::<u32>(key, 1..=MAX_CPUS);
    let (cpus, threads, cores) = (take("cpus")?, take("threads")?, take("cores")?);
    let (sockets, nodes) = (take("sockets")?.unwrap_or(1), take("nodes")?.unwrap_or(1));
    options.finish()?;

    let threads = threads.unwrap_or(1);
    let packages = nodes * sockets;
    let cores = cores.unwrap_or_else(|| cpus.map_or(1, |cpus| (cpus / (packages * threads)).max(1)));
    let product = [packages, cores, threads].into_iter().map(u64::from).product::<u64>();
    let cpus = cpus.map_or(product, u64::from);
    if cpus != product {
        let sum =
            format!("{nodes} nodes x {sockets} sockets x {cores} cores x {threads} threads are {product}");
        return Err(OptionError::new(OPTION, format!("{sum} CPUs, not cpus={cpus}")));
    }
    if cpus > MAX_CPUS {
        return Err(OptionError::new(OPTION, format!("{cpus} CPUs are more than {MAX_CPUS}")));
    }
    Ok(Topology { cpus: cpus as u32, threads, cores, sockets: packages, nodes })
}

/// `--memory`: a number with K, M, G or T behind it; without, MiB as in QEMU.
pub(super) fn memory(text: &str, topology: &Topology) -> Result<u64, OptionError> {
    let bytes = size("--memory", text)?;
    let granule = MEMORY_GRANULE * u64::from(topology.nodes);
    if !bytes.is_multiple_of(granule) {
        let reason = format!("`{text}` is not a multiple of 2M for each of {} nodes", topology.nodes);
        return Err(OptionError::new("--memory", reason));
    }
    Ok(bytes)
}

/// Whether `bytes` are the size of a machine's RAM.
pub fn is_memory(bytes: u64, topology: &Topology) -> bool {
    let granule = MEMORY_GRANULE * u64::from(topology.nodes);
    (MIN_MEMORY..=MAX_MEMORY).contains(&bytes) && bytes.is_multiple_of(granule)
}

/// The bytes that a size of memory stands for.
pub(super) fn size(option: &'static str, text: &str) -> Result<u64, OptionError> {
    let error = |reason: String| OptionError::new(option, reason);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(error(format!("`{text}` is not a size such as 512M or 2G"))),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    let bytes = bytes.ok_or_else(|| error(format!("`{text}` is not a size such as 512M or 2G")))?;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        return Err(error(format!("`{text}` is not between 64M and 1T")));
    }
    Ok(bytes)
}

/// `--netdev`, all of them. A loopback's other end is a netdev too, whether or not it is written as one.
pub(super) fn netdevs(texts: &[String]) -> Result<Vec<Netdev>, OptionError> {
    let error = |reason: String| OptionError::new(NETDEV, reason);
    let mut netdevs = Vec::<Netdev>::new();
    for text in texts {
        let netdev = netdev(text)?;
        if netdevs.iter().any(|other| other.id == netdev.id) {
            return Err(error(format!("id `{}` is given twice", netdev.id)));
        }
        netdevs.push(netdev);
    }
    for (id, peer) in loopbacks(&netdevs) {
        let kind = NetdevKind::Loopback { peer: id.clone() };
        match netdevs.iter().find(|netdev| netdev.id == peer) {
            None => netdevs.push(Netdev { id: peer, kind, pcap: None }),
            Some(netdev) if netdev.kind == kind && id != peer => {}
            Some(_) => {
                return Err(error(format!(
                    "loopback `{id}` needs a peer of its own, and `{peer}` is something else already; an id that is \
                     not taken becomes its other end"
                )));
            }
        }
    }
    Ok(netdevs)
}

/// Id and peer of each loopback.
fn loopbacks(netdevs: &[Netdev]) -> Vec<(String, String)> {
    let ends = netdevs.iter().filter_map(|netdev| match &netdev.kind {
        NetdevKind::Loopback { peer } => Some((netdev.id.clone(), peer.clone())),
        _ => None,
    });
    ends.collect()
}

fn netdev(text: &str) -> Result<Netdev, OptionError> {
    let mut options = KeyValues::parse(NETDEV, "type", text)?;
    let missing = |key: &str| OptionError::new(NETDEV, format!("`{text}` needs {key}"));
    let kind = match options.take("type")?.as_deref() {
        Some("peer") => NetdevKind::Peer,
        Some("null") => NetdevKind::Null,
        Some("tap") => NetdevKind::Tap {
            ifname: options
                .take_with("ifname", "an interface's name, 1 to 15 bytes long", interface_name)?
                .ok_or_else(|| missing("ifname=NAME"))?,
        },
        Some("stream") => stream(text, &mut options)?,
        Some("loopback") => {
            NetdevKind::Loopback { peer: options.take("peer")?.ok_or_else(|| missing("peer=ID"))? }
        }
        Some("switch") => switch(&mut options)?,
        _ => {
            let reason = format!("`{text}` is none of peer, tap, stream, loopback, switch and null");
            return Err(OptionError::new(NETDEV, reason));
        }
    };
    let id = options.take("id")?.ok_or_else(|| missing("id=NAME"))?;
    options.finish()?;
    Ok(Netdev { id, kind, pcap: None })
}

/// `path=` or, as QEMU has it, `addr.type=unix,addr.path=`.
fn stream(text: &str, options: &mut KeyValues) -> Result<NetdevKind, OptionError> {
    let kind = options.take("addr.type")?;
    if kind.as_ref().is_some_and(|kind| kind != "unix") {
        return Err(options.error("addr.type", "must be unix: other sockets are not supported"));
    }
    let (path, qemu_path) = (
        options.take_with("path", SOCKET_PATH, socket_path)?,
        options.take_with("addr.path", SOCKET_PATH, socket_path)?,
    );
    let path = match (path, qemu_path) {
        (Some(_), Some(_)) => {
            return Err(options.error("path", "and addr.path mean the same; give one of them"));
        }
        (path, qemu_path) => path.or(qemu_path),
    };
    let path = path.ok_or_else(|| {
        OptionError::new(NETDEV, format!("`{text}` needs path=SOCKET, a Unix socket's path"))
    })?;
    Ok(NetdevKind::Stream { path, server: options.take_switch("server")?.unwrap_or(false) })
}

/// Of this machine alone, by `name=`, or of several that meet at `path=`.
fn switch(options: &mut KeyValues) -> Result<NetdevKind, OptionError> {
    let valid = |name: &str| (!name.starts_with('/')).then(|| name.to_owned());
    let name = options.take_with("name", "a word without a slash in front (a socket is path=)", valid)?;
    let path = options.take_with("path", SOCKET_PATH, socket_path)?;
    if name.is_some() && path.is_some() {
        let reason = "is for a switch of this machine alone; where machines meet, path= names the switch";
        return Err(options.error("name", reason));
    }
    Ok(NetdevKind::Switch { name: name.unwrap_or_default(), path })
}

const SOCKET_PATH: &str = "a Unix socket's path, at most 107 bytes long";

/// `sun_path` has 108 bytes, the last of which is zero (unix(7)).
fn socket_path(path: &str) -> Option<PathBuf> {
    (path.len() < 108).then(|| path.into())
}

/// IFNAMSIZ counts the final zero byte.
fn interface_name(name: &str) -> Option<String> {
    let fits = (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(['/', ' ']);
    fits.then(|| name.to_owned())
}

/// `--device`, all of them. A device without a netdev gets a peer of its own, which is added to `netdevs`.
pub(super) fn devices(
    texts: &[String],
    netdevs: &mut Vec<Netdev>,
    topology: &Topology,
) -> Result<(Vec<ManaNic>, Vec<VirtioNic>), OptionError> {
    let mut next_mac = FIRST_MAC;
    let (mut nics, mut virtio_nics) = (Vec::new(), Vec::new());
    for text in texts {
        let mut options = KeyValues::parse(DEVICE, "driver", text)?;
        match options.take("driver")?.as_deref() {
            Some("mana") => nics.push(mana(options, netdevs, topology, &mut next_mac)?),
            Some("virtio-net") => virtio_nics.push(virtio_net(options, netdevs, &mut next_mac)?),
            _ => return Err(OptionError::new(DEVICE, format!("`{text}` is neither mana nor virtio-net"))),
        }
    }
    let mut plugged = HashSet::new();
    let of_virtio = virtio_nics.iter().map(|nic| &nic.netdev);
    for id in nics.iter().flat_map(|nic| &nic.netdevs).chain(of_virtio) {
        if !plugged.insert(id) {
            return Err(OptionError::new(DEVICE, format!("netdev `{id}` can be plugged into one port only")));
        }
    }
    for netdev in netdevs.iter().filter(|netdev| !plugged.contains(&netdev.id)) {
        log::warn!("--netdev {}: no --device uses it", netdev.id);
    }
    Ok((nics, virtio_nics))
}

/// `--disk`, all of them: QEMU's `-drive`, as far as it goes.
pub(super) fn disks(texts: &[String]) -> Result<Vec<DiskConfig>, OptionError> {
    const OPTION: &str = "--disk";
    let mut disks = Vec::new();
    for text in texts {
        let mut options = KeyValues::parse(OPTION, "file", text)?;
        let path = options
            .take("file")?
            .ok_or_else(|| OptionError::new(OPTION, format!("`{text}` names no file")))?;
        let read_only = options.take_switch("readonly")?.unwrap_or(false);
        options.finish()?;
        disks.push(DiskConfig { path: path.into(), read_only });
    }
    if disks.len() > MAX_DISKS {
        return Err(OptionError::new(OPTION, format!("{} disks are more than {MAX_DISKS}", disks.len())));
    }
    Ok(disks)
}

fn virtio_net(
    mut options: KeyValues,
    netdevs: &mut Vec<Netdev>,
    next_mac: &mut u64,
) -> Result<VirtioNic, OptionError> {
    let mac = take_mac(&mut options)?;
    let mtu = options.take_number("mtu", MTU)?;
    let workers = options.take_number("workers", WORKERS)?;
    let netdev = options.take("netdev")?;
    options.finish()?;
    if let Some(id) = netdev.as_ref().filter(|id| netdevs.iter().all(|netdev| netdev.id != **id)) {
        return Err(no_netdev(id));
    }
    *next_mac = mac.unwrap_or(*next_mac);
    Ok(VirtioNic {
        netdev: netdev.unwrap_or_else(|| add_peer(netdevs)),
        mac: mac_bytes(std::mem::replace(next_mac, *next_mac + 1)),
        mtu: mtu.unwrap_or(DeviceConfig::default().mtu),
        workers,
    })
}

fn take_mac(options: &mut KeyValues) -> Result<Option<u64>, OptionError> {
    options.take_with("mac", "a unicast address such as 52:54:00:12:34:56", unicast_mac)
}

fn no_netdev(id: &str) -> OptionError {
    OptionError::new(DEVICE, format!("there is no --netdev with id={id}"))
}

fn mana(
    mut options: KeyValues,
    netdevs: &mut Vec<Netdev>,
    topology: &Topology,
    next_mac: &mut u64,
) -> Result<ManaNic, OptionError> {
    let defaults = DeviceConfig::default();
    let table_sizes = u64::from(*MSIX_TABLE_SIZES.start())..=u64::from(*MSIX_TABLE_SIZES.end());
    let max_msix = options.take_number("max-msix", table_sizes.clone())?;
    let msix_table_size = options.take_number("msix-table", table_sizes)?;
    let max_queues = options.take_number("max-queues", 1..=u64::from(MAX_QUEUES_PER_VPORT))?;
    let max_eq = options.take_number::<u32>("max-eq", 0..=u32::MAX.into())?;
    let mtu = options.take_number("mtu", MTU)?;
    let mac = take_mac(&mut options)?;
    let rdma = options.take_switch("rdma")?;
    let strict = options.take_switch("strict")?;
    let workers = options.take_number("workers", WORKERS)?;
    let node = options.take_number("node", 0..=u64::from(topology.nodes - 1))?;
    let slot = options.take_with("slot", "root or port", |slot| match slot {
        "root" => Some(Slot::Root),
        "port" => Some(Slot::Port),
        _ => None,
    })?;
    let profile = options.take("profile")?.map(|name| profile(&name)).transpose()?;
    let hostile = hostile(&mut options)?;
    let mut ids = options.take_all("netdev");
    options.finish()?;

    if let Some(id) = ids.iter().find(|id| netdevs.iter().all(|netdev| netdev.id != **id)) {
        return Err(no_netdev(id));
    }
    if ids.len() > MAX_VPORTS {
        return Err(OptionError::new(DEVICE, format!("{} netdevs are more than {MAX_VPORTS}", ids.len())));
    }
    if ids.is_empty() {
        ids.push(add_peer(netdevs));
    }
    *next_mac = mac.unwrap_or(*next_mac);
    let vports = ids.iter().map(|_| VportConfig {
        mac: mac_bytes(std::mem::replace(next_mac, *next_mac + 1)),
        max_queues: max_queues.unwrap_or(MAX_QUEUES_PER_VPORT),
    });
    let mut profile = profile.unwrap_or_default();
    let no_such_limit = max_eq.is_some_and(|max_eq| !profile.limit("max-eq", max_eq));
    debug_assert!(!no_such_limit, "the host has a limit of that name");
    let device = DeviceConfig {
        vports: vports.collect(),
        max_msix: max_msix.unwrap_or(defaults.max_msix),
        msix_table_size: msix_table_size.unwrap_or(defaults.msix_table_size),
        mtu: mtu.unwrap_or(defaults.mtu),
        rdma: rdma.unwrap_or(defaults.rdma),
        profile,
        hostile,
        ..defaults
    };
    let (slot, strict) = (slot.unwrap_or(Slot::Port), strict.unwrap_or(false));
    Ok(ManaNic { device, netdevs: ids, node, slot, workers, strict })
}

/// `hostile=SEED[,rate=N][,at=WHERE]...`.
fn hostile(options: &mut KeyValues) -> Result<Option<Hostility>, OptionError> {
    let seed = options.take_number("hostile", 0..=u64::MAX)?;
    let rate = options.take_number("rate", 1..=u32::MAX.into())?;
    let at = options.take_all("at");
    let Some(seed) = seed else {
        return match (rate, at.first()) {
            (None, None) => Ok(None),
            _ => Err(options.error("hostile", "is missing: rate and at say how the host lies")),
        };
    };
    let mut hostility = Hostility::new(seed);
    hostility.rate = rate.unwrap_or(hostility.rate);
    if !at.is_empty() {
        let place = |text: &String| {
            let reason = format!("must be completions, events, messages or registers, not `{text}`");
            Where::parse(text).ok_or_else(|| options.error("at", &reason))
        };
        hostility.at = at.iter().map(place).collect::<Result<_, _>>()?;
    }
    Ok(Some(hostility))
}

/// `--lies FIRST[-LAST][,rate=N][,at=WHERE]...[,for=MS][,only=LIE]...`.
pub fn lies(text: &str, minimise: bool) -> Result<Lies, OptionError> {
    let mut options = KeyValues::parse("--lies", "seeds", text)?;
    let seeds = options.take_with("seeds", "a number, or FIRST-LAST", |seeds| {
        let (first, last) = seeds.split_once('-').unwrap_or((seeds, seeds));
        let seeds = (first.parse().ok()?, last.parse().ok()?);
        (seeds.0 <= seeds.1).then_some(seeds)
    })?;
    let (first, last) = seeds.ok_or_else(|| options.error("seeds", "is missing: FIRST or FIRST-LAST"))?;
    let rate = options.take_number("rate", 1..=u32::MAX.into())?.unwrap_or(Hostility::RATE);
    let span_ms = options.take_number("for", 1..=3_600_000)?;
    let (at, only) = (options.take_all("at"), options.take_all("only"));
    if let Some(wrong) = at.iter().find(|text| Where::parse(text).is_none()) {
        let reason = format!("must be completions, events, messages or registers, not `{wrong}`");
        return Err(options.error("at", &reason));
    }
    if let Some(wrong) = only.iter().find(|text| Chance::parse(text).is_none()) {
        return Err(options.error("only", &format!("must be a lie, cqe:5:17 for one, not `{wrong}`")));
    }
    options.finish()?;
    Ok(Lies { first, last, rate, at, only, span_ms, minimise })
}

/// A profile that comes with the card, or a file.
fn profile(name: &str) -> Result<Profile, OptionError> {
    crate::control::profile(name).map_err(|error| OptionError::new(DEVICE, format!("profile: {error}")))
}

/// A new peer with the first id of the form `peerN` that is free.
fn add_peer(netdevs: &mut Vec<Netdev>) -> String {
    let taken = |id: &String| netdevs.iter().any(|netdev| netdev.id == *id);
    let id = (0..).map(|number| format!("peer{number}")).find(|id| !taken(id)).unwrap_or_default();
    netdevs.push(Netdev { id: id.clone(), kind: NetdevKind::Peer, pcap: None });
    id
}

/// The address as a number, so that a device's ports can count up from it.
fn unicast_mac(text: &str) -> Option<u64> {
    let mut bytes = [0; 8];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes[2..] {
        *byte =
            parts.next().filter(|part| part.len() == 2).and_then(|part| u8::from_str_radix(part, 16).ok())?;
    }
    let (multicast, zero) = (bytes[2] & 1 != 0, bytes == [0; 8]);
    (parts.next().is_none() && !multicast && !zero).then(|| u64::from_be_bytes(bytes))
}

fn mac_bytes(mac: u64) -> [u8; 6] {
    let [_, _, bytes @ ..] = mac.to_be_bytes();
    bytes
}

/// `--pcap ID=FILE`, all of them.
pub(super) fn pcaps(texts: &[String], netdevs: &mut [Netdev]) -> Result<(), OptionError> {
    let error = |reason: String| OptionError::new("--pcap", reason);
    for text in texts {
        let (id, file) = text
            .split_once('=')
            .filter(|(_, file)| !file.is_empty())
            .ok_or_else(|| error(format!("`{text}` is not of the form ID=FILE")))?;
        let netdev = netdevs
            .iter_mut()
            .find(|netdev| netdev.id == id)
            .ok_or_else(|| error(format!("there is no --netdev with id={id}")))?;
        if netdev.pcap.replace(file.into()).is_some() {
            return Err(error(format!("netdev `{id}` is given twice")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lies_have_seeds_and_ways() {
        let all =
            lies("7-9,rate=20,at=events,at=messages,for=500,only=cqe:5:17,only=command:0:2", true).unwrap();
        assert_eq!((all.first, all.last, all.rate, all.span_ms, all.minimise), (7, 9, 20, Some(500), true));
        let words = "hostile 8 rate=20 at=events at=messages only=cqe:5:17";
        assert_eq!(all.words(8, &all.only[..1]).join(" "), words);
        assert_eq!(all.how(), ",rate=20,for=500,at=events,at=messages");
        let one = lies("3", false).unwrap();
        assert_eq!((one.first, one.last, one.rate, one.span_ms), (3, 3, Hostility::RATE, None));
        for (wrong, reason) in [
            ("9-7", "FIRST-LAST"),
            ("x", "FIRST-LAST"),
            ("rate=3", "seeds is missing"),
            ("1,rate=0", "rate must be"),
            ("1,at=home", "not `home`"),
            ("1,only=cqe:5", "not `cqe:5`"),
            ("1,for=0", "for must be"),
            ("1,often=yes", "no `often`"),
        ] {
            let error = lies(wrong, false).unwrap_err().to_string();
            assert!(error.starts_with("--lies") && error.contains(reason), "{wrong}: {error}");
        }
    }

    #[test]
    fn missing_cpu_levels_are_derived() {
        let of = |text| cpus(text).map(|t| (t.cpus, t.threads, t.cores, t.sockets, t.nodes)).unwrap();
        assert_eq!(of("4"), (4, 1, 4, 1, 1));
        assert_eq!(of("cpus=8,threads=2"), (8, 2, 4, 1, 1));
        assert_eq!(of("cpus=8,nodes=2"), (8, 1, 4, 2, 2));
        assert_eq!(of("8,threads=2,cores=2,sockets=1,nodes=2"), (8, 2, 2, 2, 2));
        assert_eq!(of("threads=2,cores=3"), (6, 2, 3, 1, 1));
        assert_eq!(of("254"), (254, 1, 254, 1, 1));
    }

    #[test]
    fn cpus_that_do_not_multiply_out_are_refused() {
        let message = |text| cpus(text).unwrap_err().to_string();
        assert_eq!(
            message("cpus=8,sockets=2,cores=2,threads=2,nodes=2"),
            "--cpus: 2 nodes x 2 sockets x 2 cores x 2 threads are 16 CPUs, not cpus=8"
        );
        assert!(message("cpus=2,nodes=4").contains("not cpus=2"));
        assert!(message("nodes=254,sockets=254,cores=254,threads=254").contains("more than 254"));
        assert!(message("255").contains("1 to 254"));
        assert!(message("eight").contains("not `eight`"));
    }

    #[test]
    fn memory_sizes() {
        let one = cpus("1").unwrap();
        assert_eq!(memory("512", &one).unwrap(), 512 << 20);
        assert_eq!(memory("512M", &one).unwrap(), 512 << 20);
        assert_eq!(memory("5g", &one).unwrap(), 5 << 30);
        for bad in ["", "G", "1.5G", "65537K", "99999999999T", "1M", "-1G", "1GB"] {
            assert!(memory(bad, &one).is_err(), "{bad}");
        }
        assert!(memory("70M", &cpus("cpus=4,nodes=4").unwrap()).is_err());
    }

    #[test]
    fn addresses_count_up_over_ports_and_devices() {
        let texts = ["mana".to_owned(), "mana,mac=02:00:00:00:00:ff".to_owned(), "mana".to_owned()];
        let mut cables = Vec::new();
        let (nics, _) = devices(&texts, &mut cables, &cpus("1").unwrap()).unwrap();
        let macs: Vec<u8> = nics.iter().map(|nic| nic.device.vports[0].mac[5]).collect();
        assert_eq!(macs, [0x56, 0xff, 0x00]);
        assert_eq!(cables.len(), 3);
    }
}
