//! What the user asked for, checked: the one description of a virtual machine that everything is built from.

use std::path::PathBuf;
use std::time::Duration;

use mana_device::config::DeviceConfig;
use serde::{Deserialize, Serialize};

use crate::seccomp;

/// CPUs and how the guest sees them: `nodes` × `sockets` × `cores` × `threads`.
///
/// `sockets` counts the packages of the whole machine and is a multiple of `nodes`, or the nodes split a package
/// evenly; `cpus == sockets * cores * threads`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// All logical CPUs.
    pub cpus: u32,
    /// Threads of a core.
    pub threads: u32,
    /// Cores of a package.
    pub cores: u32,
    /// Packages.
    pub sockets: u32,
    /// NUMA nodes; CPUs and memory are dealt out to them in order, in equal parts.
    pub nodes: u32,
}

/// How guest code is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// This machine's KVM if it can run a guest, else nested.
    Auto,
    /// This machine's KVM or nothing.
    Kvm,
    /// KVM of a machine that QEMU emulates, with the same VMM inside it.
    Nested,
}

/// What a network device is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetdevKind {
    /// The built-in host: DHCP, ARP/ND, ping, echo, discard, chargen.
    Peer,
    /// A tap interface of the host.
    Tap {
        /// The interface's name.
        ifname: String,
    },
    /// A stream socket with QEMU's framing.
    Stream {
        /// The socket.
        path: PathBuf,
        /// Listen there instead of connecting.
        server: bool,
    },
    /// Another netdev of this machine.
    Loopback {
        /// Its id.
        peer: String,
    },
    /// A learning switch.
    Switch {
        /// The switch's name; ports of one name are on one switch.
        name: String,
        /// The socket where machines with the same switch meet. Then the name counts for nothing.
        path: Option<PathBuf>,
    },
    /// Takes everything, sends nothing.
    Null,
}

/// One `--netdev`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netdev {
    /// Name that `--device mana,netdev=` refers to.
    pub id: String,
    /// The other end.
    pub kind: NetdevKind,
    /// pcap file for everything that passes (`--pcap ID=FILE`).
    pub pcap: Option<PathBuf>,
}

/// Where the function sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slot {
    /// Directly on the root bus.
    Root,
    /// Behind a root port, which gives it a slot (kernels 6.13 to 6.19 oops without one).
    Port,
}

/// One `--device mana`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManaNic {
    /// Limits and identities for the device model.
    pub device: DeviceConfig,
    /// Netdev ids, one a vPort.
    pub netdevs: Vec<String>,
    /// NUMA node of the function, if it has one.
    pub node: Option<u32>,
    /// Root bus or root port.
    pub slot: Slot,
    /// Threads that run the queues; as many as are of use if not given.
    pub workers: Option<u16>,
    /// End the run with exit code 4 when the driver breaks a rule of the device.
    pub strict: bool,
}

/// One `--device virtio-net`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNic {
    /// The netdev's id.
    pub netdev: String,
    /// MAC address in transmission order.
    pub mac: [u8; 6],
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// Threads that run the queues; as many as are of use if not given.
    pub workers: Option<u16>,
}

/// One `--disk`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// The file or block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
}

/// A whole virtual machine: `mana-vmm boot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// bzImage or vmlinux.
    pub kernel: PathBuf,
    /// The user's own initramfs; without one it is made from `modules` and the agent.
    pub initrd: Option<PathBuf>,
    /// `lib/modules/VERSION` folder of the kernel.
    pub modules: Option<PathBuf>,
    /// Folder whose `mana.ko` (and `mana_ib.ko`) replace the kernel's own.
    pub driver: Option<PathBuf>,
    /// Added to the kernel command line.
    pub append: String,
    /// Shell command for the guest, after which it powers off.
    pub exec: Option<String>,
    /// CPUs.
    pub topology: Topology,
    /// Bytes of guest RAM, a multiple of 2 MiB a node.
    pub memory: u64,
    /// KVM here or nested.
    pub accel: Accel,
    /// Cables.
    pub netdevs: Vec<Netdev>,
    /// MANA functions.
    pub nics: Vec<ManaNic>,
    /// virtio NICs.
    pub virtio_nics: Vec<VirtioNic>,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Trace file (JSON lines).
    pub trace: Option<PathBuf>,
    /// Guest console goes here instead of the terminal.
    pub console: Option<PathBuf>,
    /// End the run with exit code 3 after this long.
    pub timeout: Option<Duration>,
    /// End with exit code 3 if the guest's agent does not run after this long.
    pub boot_timeout: Option<Duration>,
    /// Socket for requests to the simulated host.
    pub control: Option<PathBuf>,
    /// Go on with the machine in this file instead of booting a kernel.
    pub restore: Option<PathBuf>,
    /// Run it many times, under a host that lies.
    pub lies: Option<Lies>,
    /// Filters of system calls.
    pub seccomp: seccomp::Mode,
}

/// What the host of a machine lies about, time after time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lies {
    /// Seed of the first time; each further time has the next.
    pub first: u64,
    /// Seed of the last time.
    pub last: u64,
    /// One in so many is a lie.
    pub rate: u32,
    /// Where, as `hostile` takes it; nowhere is the usual.
    pub at: Vec<String>,
    /// Only these lies, as `hostile list` names them; all, if there is none.
    pub only: Vec<String>,
    /// Milliseconds that the machine runs each time at most, if not the usual.
    pub span_ms: Option<u64>,
    /// Find the shortest list of lies that crashes the guest.
    pub minimise: bool,
}

impl Lies {
    /// How long the machine runs each time: 2 s from where it was saved, a minute if it boots.
    pub fn span(&self, restored: bool) -> Duration {
        let usual = if restored { 2_000 } else { 60_000 };
        Duration::from_millis(self.span_ms.unwrap_or(usual))
    }

    /// The words for the simulated host: the lies of `seed`, or `only` these of them.
    pub fn words(&self, seed: u64, only: &[String]) -> Vec<String> {
        let at = self.at.iter().map(|place| format!("at={place}"));
        let only = only.iter().map(|lie| format!("only={lie}"));
        let head = ["hostile".to_owned(), seed.to_string(), format!("rate={}", self.rate)];
        head.into_iter().chain(at).chain(only).collect()
    }

    /// The part of the option that stands behind the seeds, as far as it says how the host lies.
    pub fn how(&self) -> String {
        let at: Vec<_> = self.at.iter().map(|place| format!(",at={place}")).collect();
        let span = self.span_ms.map_or_else(String::new, |ms| format!(",for={ms}"));
        format!(",rate={}{span}{}", self.rate, at.concat())
    }
}

/// Functions for other VMMs: `mana-vmm serve`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeConfig {
    /// Where the n-th function is served.
    pub sockets: Vec<PathBuf>,
    /// Cables.
    pub netdevs: Vec<Netdev>,
    /// MANA functions.
    pub nics: Vec<ManaNic>,
    /// Trace file (JSON lines).
    pub trace: Option<PathBuf>,
    /// End when the first client of each function has left.
    pub once: bool,
    /// End with exit code 3 after this long.
    pub timeout: Option<Duration>,
    /// Socket for requests to the simulated host.
    pub control: Option<PathBuf>,
    /// Filters of system calls.
    pub seccomp: seccomp::Mode,
}
