//! Paravirtual devices: a disk, and the NIC that the MANA function is measured against.
//!
//! ```text
//!  configuration space, BAR ──► VirtioPci ──► registers, features, status
//!  ioeventfd ──► worker ──────► Backend::run ──► Ring (available, used) ──► Msix
//!  cable ─────► worker ──────► Backend::deliver ──┘
//! ```
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, of which these are "modern" devices without legacy interface. The
//! rings are read with the `virtio-queue` crate.

pub mod block;
pub mod net;
pub mod pci;
pub mod ring;
pub mod state;

use std::sync::Arc;

use anyhow::Context;
use kvm_ioctls::VmFd;
use mana_device::Ran;
use mana_device::doors::{Clock, Memory};

use crate::config::{DiskConfig, VirtioNic, VmConfig};
use crate::irq::MsiRoutes;
use crate::net::{Cable, Exchange, Frame};
use crate::pci_host::PciFunction;
use crate::workers::{Mailboxes, Workers};
use pci::{Host, Queues, VirtioPci};
use state::{FunctionState, Saved};

/// Worker threads beyond this many bring a NIC with one queue each way nothing.
const MAX_NIC_WORKERS: usize = 2;

/// What sort of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device ID (virtio 1.2, 5).
    pub device: u16,
    /// PCI class code: base class, sub-class, interface.
    pub class: u32,
}

/// A kind of device, behind the transport that all kinds share.
///
/// [`run`](Self::run) and [`deliver`](Self::deliver) are called by workers, the rest by vCPUs.
pub trait Backend: Send + Sync {
    /// What it is. Constant.
    fn identity(&self) -> Identity;
    /// Feature bits of this kind of device that are offered. Constant.
    fn features(&self) -> u64;
    /// Largest size of each queue, a power of 2. Constant.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Read the device configuration; what is not there is 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// The driver is ready, with these of the features.
    fn activate(&self, features: u64);
    /// Do up to `budget` requests of `queue`.
    fn run(&self, queues: &Queues, queue: usize, budget: usize) -> Ran;
    /// Frames from the device's cable.
    fn deliver(&self, queues: &Queues, frames: &[Frame<'_>]) {
        let _there_is_no_cable = (queues, frames);
    }
}

/// Copy what of `image` is at `offset`; zero elsewhere.
fn read_image(image: &[u8], offset: usize, data: &mut [u8]) {
    let bytes = image.iter().copied().skip(offset).chain(std::iter::repeat(0));
    data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
}

/// What virtio devices need of the machine.
pub struct Surroundings<'a> {
    /// Where interrupts go and doorbells are placed.
    pub vm: &'a Arc<VmFd>,
    /// Guest RAM.
    pub memory: &'a Memory,
    /// Time.
    pub clock: &'a Arc<dyn Clock>,
    /// Where cables come from.
    pub cables: &'a Exchange,
}

/// A running device.
pub struct Running {
    function: Arc<dyn Saved>,
    workers: Workers,
    /// What was lost, in words.
    report: Box<dyn Fn() -> String>,
}

impl Running {
    /// Start all virtio devices of `config`, disks first.
    ///
    /// # Errors
    /// One sentence that names the option, what is wrong and what would help.
    pub fn start_all(config: &VmConfig, around: &Surroundings<'_>) -> anyhow::Result<Vec<Self>> {
        let disks = config.disks.iter().enumerate().map(|(index, disk)| Self::disk(disk, index, around));
        let nics =
            config.virtio_nics.iter().enumerate().map(|(index, nic)| Self::nic(nic, index, config, around));
        disks.chain(nics).collect()
    }

    fn disk(disk: &DiskConfig, index: usize, around: &Surroundings<'_>) -> anyhow::Result<Self> {
        let backend = block::Disk::open(&disk.path, disk.read_only, index)?;
        let function = function(backend, &format!("disk{index}"), 1, around)?;
        let workers = function.1.start(&function.0, Vec::new(), around.clock)?;
        let counted = function.0.clone();
        let report = move || format!("disk {index}: {} requests made no sense", counted.bad_requests());
        Ok(Self { function: function.0, workers, report: Box::new(report) })
    }

    fn nic(
        nic: &VirtioNic,
        index: usize,
        config: &VmConfig,
        around: &Surroundings<'_>,
    ) -> anyhow::Result<Self> {
        let at = config.netdevs.iter().position(|netdev| netdev.id == nic.netdev);
        let at = at.with_context(|| format!("--device: there is no --netdev with id={}", nic.netdev))?;
        let cable: Arc<dyn Cable> = around.cables.open(&config.netdevs[at], at, nic.mtu)?;
        let host = std::thread::available_parallelism().map_or(1, usize::from);
        let workers =
            nic.workers.map_or(MAX_NIC_WORKERS.min(host).min(config.topology.cpus as usize), usize::from);
        let backend = net::Nic::new(nic.clone(), cable.clone());
        let function = function(backend, &format!("virtio-net{index}"), workers, around)?;
        let workers = function.1.start(&function.0, vec![cable], around.clock)?;
        let counted = function.0.clone();
        let report = move || {
            let (no_buffer, cable) = counted.backend().dropped();
            let bad = counted.bad_requests();
            format!(
                "virtio-net {index}: {no_buffer} frames found no buffer, {cable} no room on the cable, {bad} requests made no sense"
            )
        };
        Ok(Self { function: function.0, workers, report: Box::new(report) })
    }

    /// The PCI function.
    pub fn function(&self) -> Arc<dyn PciFunction> {
        self.function.clone()
    }

    /// What is kept of the function, whose workers are paused.
    pub fn save(&self) -> FunctionState {
        self.function.save()
    }

    /// Become `state`; the workers are paused.
    ///
    /// # Errors
    /// No driver can have brought it about.
    pub fn load(&self, state: &FunctionState) -> anyhow::Result<()> {
        self.function.load(state)
    }

    /// Go on from a state that was loaded.
    pub fn go_on(&self) {
        self.function.go_on();
        self.resume();
    }

    /// The workers do nothing until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.workers.pause();
    }

    /// They go on.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Stop the workers.
    ///
    /// # Errors
    /// A worker had failed.
    pub fn finish(self) -> anyhow::Result<()> {
        self.workers.stop()?;
        log::info!("{}", (self.report)());
        Ok(())
    }
}

fn function<B: Backend>(
    backend: B,
    name: &str,
    workers: usize,
    around: &Surroundings<'_>,
) -> anyhow::Result<(Arc<VirtioPci<B>>, Arc<Mailboxes>)> {
    let workers = Mailboxes::named(name, workers)?;
    let host = Host {
        memory: around.memory.clone(),
        msi: Arc::new(MsiRoutes::new(around.vm.clone())),
        doorbells: around.vm.clone(),
        workers: workers.clone(),
        clock: around.clock.clone(),
    };
    Ok((Arc::new(VirtioPci::new(backend, host)?), workers))
}

#[cfg(test)]
mod tests;
