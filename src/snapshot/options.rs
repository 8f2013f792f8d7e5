//! What a machine was booted with, as far as its guest depends on it.

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use crate::cli;
use crate::config::{ManaNic, Netdev, NetdevKind, Topology, VirtioNic, VmConfig};

/// The part of a [`VmConfig`] that a restored machine must have again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// CPUs.
    pub topology: Topology,
    /// Bytes of RAM.
    pub memory: u64,
    /// The command that runs in the guest.
    pub exec: Option<String>,
    /// MANA functions.
    pub nics: Vec<ManaNic>,
    /// What they are plugged into.
    pub netdevs: Vec<Netdev>,
    /// virtio-net.
    pub virtio_nics: Vec<VirtioNic>,
    /// Disks, in order: whether each is only read. Where they are the command line says.
    pub disks: Vec<bool>,
}

/// Most functions and most netdevs: more than any machine has places for.
const MANY: usize = 256;

impl Options {
    /// Those of `config`.
    pub fn of(config: &VmConfig) -> Self {
        let netdevs = config.netdevs.iter().map(|netdev| Netdev { pcap: None, ..netdev.clone() });
        Self {
            topology: config.topology,
            memory: config.memory,
            exec: config.exec.clone(),
            nics: config.nics.clone(),
            netdevs: netdevs.collect(),
            virtio_nics: config.virtio_nics.clone(),
            disks: config.disks.iter().map(|disk| disk.read_only).collect(),
        }
    }

    /// Whether the command line could have said so.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> anyhow::Result<()> {
        let Topology { cpus, threads, cores, sockets, nodes } = self.topology;
        let all = [sockets, cores, threads].into_iter().try_fold(1_u32, u32::checked_mul);
        let even = nodes > 0 && sockets > 0 && sockets.is_multiple_of(nodes);
        ensure!(
            all == Some(cpus) && (1..=cli::MAX_CPUS).contains(&u64::from(cpus)) && even,
            "its {sockets} sockets x {cores} cores x {threads} threads on {nodes} nodes are not {cpus} CPUs"
        );
        ensure!(cli::is_memory(self.memory, &self.topology), "{} bytes are no --memory", self.memory);
        let lengths = [self.nics.len(), self.netdevs.len(), self.virtio_nics.len(), self.disks.len()];
        ensure!(lengths.into_iter().all(|length| length <= MANY), "it has more devices than fit");
        Ok(())
    }

    /// A netdev that is plugged into something of this machine's, which a state may not name.
    pub fn foreign_netdev(&self) -> Option<&Netdev> {
        self.netdevs.iter().find(|netdev| {
            !matches!(
                netdev.kind,
                NetdevKind::Peer
                    | NetdevKind::Null
                    | NetdevKind::Loopback { .. }
                    | NetdevKind::Switch { path: None, .. }
            )
        })
    }
}
