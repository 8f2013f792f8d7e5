//! The PCI transport: a function with configuration space, registers in one BAR, and a queue's doorbell in a page that
//! KVM watches for us.
//!
//! Source: virtio 1.2, 4.1. There is no INTx: a driver without MSI-X polls.

pub(super) mod layout;
pub(super) mod queues;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use mana_device::doors::{Clock, Memory, MsiSink};
use mana_device::observe::Tracer;
use mana_device::pci::msix::Msix;
use mana_device::{AccessError, Bar, ConfigEffect, Ran};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use layout::{COMMAND_MASTER, COMMAND_MEMORY, bar, bar_address, config_space, register};
pub use queues::Queues;
use queues::Slot;

use super::ring::{Layout, Ring};
use super::{Backend, read_image};
use crate::net::Frame;
use crate::pci_host::PciFunction;
use crate::pci_host::config_space::ConfigSpace;
use crate::warn_limited;
use crate::workers::{Function, Mailboxes, Piece};

/// Vector number of who has none (VIRTIO_MSI_NO_VECTOR).
pub(super) const NO_VECTOR: u16 = 0xffff;
pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub(super) const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
/// What every device here offers.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Most queues: what MSI-X table and doorbells have room for.
const MAX_QUEUES: usize = 255;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets a file be written by the guest's stores to an address, without an exit to us.
pub trait Doorbells: Send + Sync {
    /// From now on a store to `address` writes `file`.
    ///
    /// # Errors
    /// The host refuses it: then the store comes to the BAR.
    fn place(&self, address: u64, file: &EventFd) -> io::Result<()>;
    /// No longer.
    ///
    /// # Errors
    /// It was not placed.
    fn remove(&self, address: u64, file: &EventFd) -> io::Result<()>;
}

impl Doorbells for VmFd {
    fn place(&self, address: u64, file: &EventFd) -> io::Result<()> {
        Ok(self.register_ioevent(file, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
    fn remove(&self, address: u64, file: &EventFd) -> io::Result<()> {
        Ok(self.unregister_ioevent(file, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}

/// What a function needs of the machine.
pub struct Host {
    /// Guest memory.
    pub memory: Memory,
    /// Where interrupts go.
    pub msi: Arc<dyn MsiSink>,
    /// Where doorbells are placed.
    pub doorbells: Arc<dyn Doorbells>,
    /// The workers that run the queues.
    pub workers: Arc<Mailboxes>,
    /// The machine's clock.
    pub clock: Arc<dyn Clock>,
}

/// Registers that the driver sets up the device with.
#[derive(Clone, Debug, Default)]
pub(super) struct Registers {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    /// Layout of each queue, and whether it is enabled.
    pub(super) queues: Vec<(Layout, bool)>,
    /// Address of the first doorbell, while they are placed.
    pub(super) placed: Option<u64>,
}

/// A virtio function.
///
/// Lock order: registers, configuration space, then a queue's ring.
pub struct VirtioPci<B> {
    backend: B,
    pub(super) queues: Queues,
    pub(super) host: Host,
    pub(super) config: Mutex<ConfigSpace>,
    pub(super) power_on: ConfigSpace,
    pub(super) registers: Mutex<Registers>,
}

impl<B: Backend> VirtioPci<B> {
    /// A function in its power-on state.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new(backend: B, host: Host) -> anyhow::Result<Self> {
        let sizes = backend.queue_sizes();
        anyhow::ensure!(sizes.len() <= MAX_QUEUES, "a virtio device with {} queues", sizes.len());
        let vectors = sizes.len() as u16 + 1;
        let bus_master = Arc::new(AtomicBool::new(false));
        let tracer = Tracer::new(host.clock.clone(), None);
        let msix = Msix::new(vectors, host.msi.clone(), bus_master.clone(), tracer, Arc::default());
        let slot = |_| {
            let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("no eventfd for a virtio queue")?;
            Ok(Slot { ring: Mutex::default(), vector: AtomicU16::new(NO_VECTOR), bell })
        };
        let queues = Queues {
            slots: sizes.iter().map(slot).collect::<anyhow::Result<_>>()?,
            memory: host.memory.clone(),
            bus_master,
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            status: AtomicU8::new(0),
            bad_requests: AtomicU64::new(0),
        };
        let power_on = config_space(&backend, vectors);
        let registers = Mutex::new(fresh_registers(&sizes));
        Ok(Self { backend, queues, host, config: Mutex::new(power_on.clone()), power_on, registers })
    }

    /// What is behind the transport.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Requests that made no sense, so far.
    pub fn bad_requests(&self) -> u64 {
        self.queues.bad_requests()
    }

    pub(super) fn features(&self) -> u64 {
        self.backend.features() | RING_FEATURES
    }

    /// All registers of the common configuration, as they read now (4.1.4.3).
    fn common(&self) -> [u8; 0x38] {
        let registers = lock(&self.registers);
        let half = |bits: u64, select: u32| match select {
            0 => bits as u32,
            1 => (bits >> 32) as u32,
            _ => 0,
        };
        let index = usize::from(registers.queue_select);
        let (layout, enabled) = registers.queues.get(index).copied().unwrap_or_default();
        let vector =
            self.queues.slots.get(index).map_or(NO_VECTOR, |slot| slot.vector.load(Ordering::Relaxed));
        let mut image = [0; 0x38];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &registers.device_feature_select.to_le_bytes());
        put(0x04, &half(self.features(), registers.device_feature_select).to_le_bytes());
        put(0x08, &registers.driver_feature_select.to_le_bytes());
        put(0x0c, &half(registers.driver_features, registers.driver_feature_select).to_le_bytes());
        put(0x10, &self.queues.config_vector.load(Ordering::Relaxed).to_le_bytes());
        put(0x12, &(self.queues.slots.len() as u16).to_le_bytes());
        put(0x14, &[self.queues.status.load(Ordering::SeqCst), 0]);
        put(0x16, &registers.queue_select.to_le_bytes());
        put(0x18, &layout.size.to_le_bytes());
        put(0x1a, &vector.to_le_bytes());
        put(0x1c, &u16::from(enabled).to_le_bytes());
        put(0x1e, &registers.queue_select.to_le_bytes());
        put(0x20, &layout.descriptors.to_le_bytes());
        put(0x28, &layout.available.to_le_bytes());
        put(0x30, &layout.used.to_le_bytes());
        image
    }

    /// Write a register of the common configuration. What is read-only, or changes while it must not, is ignored.
    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let registers = &mut *lock(&self.registers);
        let index = usize::from(registers.queue_select);
        let status = self.queues.status.load(Ordering::SeqCst);
        match (offset, data.len()) {
            (0x00, 4) => registers.device_feature_select = value as u32,
            (0x08, 4) => registers.driver_feature_select = value as u32,
            (0x0c, 4) if status & FEATURES_OK == 0 => {
                let shift = match registers.driver_feature_select {
                    select @ 0..=1 => 32 * select,
                    _ => return,
                };
                registers.driver_features =
                    registers.driver_features & !(0xffff_ffff << shift) | value << shift;
            }
            (0x10, 2) => self.queues.config_vector.store(self.vector(value as u16), Ordering::Relaxed),
            (0x14, 1) => self.write_status(registers, value as u8),
            (0x16, 2) => registers.queue_select = value as u16,
            (0x1a, 2) => {
                if let Some(slot) = self.queues.slots.get(index) {
                    slot.vector.store(self.vector(value as u16), Ordering::Relaxed);
                }
            }
            _ if status & DRIVER_OK == 0 => self.write_queue(registers, index, offset, data.len(), value),
            _ => {}
        }
    }

    fn write_queue(&self, registers: &mut Registers, index: usize, offset: u64, len: usize, value: u64) {
        let Some((layout, enabled)) = registers.queues.get_mut(index) else { return };
        let most = self.backend.queue_sizes()[index];
        match (offset, len) {
            (0x18, 2) if (value as u16).is_power_of_two() && value as u16 <= most => {
                layout.size = value as u16;
            }
            (0x1c, 2) if value == 1 => *enabled = true,
            _ => {
                let (register, at) = match offset {
                    0x20..0x28 => (&mut layout.descriptors, offset - 0x20),
                    0x28..0x30 => (&mut layout.available, offset - 0x28),
                    0x30..0x38 => (&mut layout.used, offset - 0x30),
                    _ => return,
                };
                match (at, len) {
                    (0, 8) => *register = value,
                    (0, 4) => *register = *register & !0xffff_ffff | value,
                    (4, 4) => *register = *register & 0xffff_ffff | value << 32,
                    _ => {}
                }
            }
        }
    }

    /// A vector that the table has, or none.
    pub(super) fn vector(&self, wanted: u16) -> u16 {
        if wanted < self.queues.msix.table_size() { wanted } else { NO_VECTOR }
    }

    fn write_status(&self, registers: &mut Registers, status: u8) {
        if status == 0 {
            return self.reset_device(registers);
        }
        let before = self.queues.status.load(Ordering::SeqCst);
        let mut status = status | before & NEEDS_RESET;
        if status & FEATURES_OK != 0 && before & FEATURES_OK == 0 {
            let wanted = registers.driver_features;
            if wanted & !self.features() != 0 || wanted & 1 << VIRTIO_F_VERSION_1 == 0 {
                status &= !FEATURES_OK;
            }
        }
        // A driver that is ready without having agreed on features is not (3.1.1).
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.queues.status.store(status, Ordering::SeqCst);
        if status & DRIVER_OK != 0 && before & DRIVER_OK == 0 {
            self.start(registers);
        }
    }

    /// The driver is ready.
    fn start(&self, registers: &mut Registers) {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let memory = self.host.memory.memory();
        self.backend.activate(registers.driver_features);
        for (index, (slot, (layout, enabled))) in self.queues.slots.iter().zip(&registers.queues).enumerate()
        {
            if !*enabled {
                continue;
            }
            match Ring::new(layout, event_idx, &memory) {
                Ok(ring) => *lock(&slot.ring) = Some(ring),
                Err(error) => {
                    warn_limited!("virtio: queue {index}: {error}; the device needs a reset");
                    self.queues.break_down();
                }
            }
        }
        self.place_doorbells(registers);
        self.ring_all();
    }

    /// Let all queues be looked at.
    pub(super) fn ring_all(&self) {
        (0..self.queues.slots.len() as u32)
            .for_each(|queue| self.host.workers.ring_once(Piece::Queue(queue)));
    }

    pub(super) fn reset_device(&self, registers: &mut Registers) {
        self.queues.stop();
        self.remove_doorbells(registers);
        self.queues.config_vector.store(NO_VECTOR, Ordering::Relaxed);
        self.queues.status.store(0, Ordering::SeqCst);
        *registers = fresh_registers(&self.backend.queue_sizes());
    }

    /// Where the doorbells are now, if anywhere.
    fn doorbell_base(&self) -> Option<u64> {
        let config = lock(&self.config);
        (config.u16(register::COMMAND.into()) & COMMAND_MEMORY != 0)
            .then(|| bar_address(&config) + bar::NOTIFY.start)
    }

    /// See that the doorbells of a running device are where the BAR is. Those that KVM refuses still work, by exits.
    pub(super) fn place_doorbells(&self, registers: &mut Registers) {
        let running = self.queues.status.load(Ordering::SeqCst) & DRIVER_OK != 0;
        let base = self.doorbell_base().filter(|_| running);
        if registers.placed == base {
            return;
        }
        self.remove_doorbells(registers);
        if let Some(base) = base {
            for (slot, address) in
                self.queues.slots.iter().zip((base..).step_by(bar::NOTIFY_MULTIPLIER as usize))
            {
                if let Err(error) = self.host.doorbells.place(address, &slot.bell) {
                    warn_limited!("virtio: no doorbell at {address:#x}: {error}");
                }
            }
        }
        registers.placed = base;
    }

    fn remove_doorbells(&self, registers: &mut Registers) {
        let Some(base) = registers.placed.take() else { return };
        for (slot, address) in self.queues.slots.iter().zip((base..).step_by(bar::NOTIFY_MULTIPLIER as usize))
        {
            let _was_refused = self.host.doorbells.remove(address, &slot.bell);
        }
    }

    /// Where the configuration access capability points to (4.1.4.9), for an access of `len` bytes.
    fn access_window(&self, len: usize) -> Option<(u8, u64)> {
        let config = lock(&self.config);
        let at = usize::from(register::ACCESS);
        let (bar, offset, length) =
            (config.u8(at + 4), u64::from(config.u32(at + 8)), config.u32(at + 12) as usize);
        let fits = bar == 0
            && length == len
            && offset + length as u64 <= bar::SIZE
            && offset.is_multiple_of(len as u64);
        fits.then_some((bar, offset))
    }
}

fn fresh_registers(sizes: &[u16]) -> Registers {
    let queues = sizes.iter().map(|&size| (Layout { size, ..Layout::default() }, false)).collect();
    Registers { queues, ..Registers::default() }
}

impl<B: Backend> PciFunction for VirtioPci<B> {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        if register == register::ACCESS_DATA
            && let Some((bar, offset)) = self.access_window(data.len())
        {
            let _all_ones = self.bar_read(bar, offset, data);
            return;
        }
        lock(&self.config).read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        if register == register::ACCESS_DATA {
            if let Some((bar, offset)) = self.access_window(data.len()) {
                let _dropped = self.bar_write(bar, offset, data);
            }
            return ConfigEffect { bars_changed: false };
        }
        let mut registers = lock(&self.registers);
        let mut config = lock(&self.config);
        let state = |config: &ConfigSpace| (config.u16(register::COMMAND.into()), bar_address(config));
        let before = state(&config);
        config.write(register, data);
        let after = state(&config);
        let control = config.u16(usize::from(register::MSIX) + 2);
        drop(config);
        let bars_changed = before.1 != after.1 || (before.0 ^ after.0) & COMMAND_MEMORY != 0;
        if bars_changed {
            self.place_doorbells(&mut registers);
        }
        drop(registers);
        if (before.0 ^ after.0) & COMMAND_MASTER != 0 {
            self.queues.bus_master.store(after.0 & COMMAND_MASTER != 0, Ordering::SeqCst);
            self.queues.msix.replay();
            self.ring_all();
        }
        let written = register..register.saturating_add(data.len() as u16);
        if written.contains(&(register::MSIX + 3)) {
            self.queues.msix.set_control(control);
        }
        ConfigEffect { bars_changed }
    }

    fn bars(&self) -> Vec<Bar> {
        let address = bar_address(&lock(&self.config));
        vec![Bar { index: 0, address, size: bar::SIZE, prefetchable: false }]
    }

    fn memory_enabled(&self) -> bool {
        lock(&self.config).u16(register::COMMAND.into()) & COMMAND_MEMORY != 0
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let within =
            |range: &std::ops::Range<u64>| range.start <= offset && offset + data.len() as u64 <= range.end;
        let dwords = |start: u64, data: &mut [u8], read: &dyn Fn(u32) -> u32| {
            for (dword, at) in data.chunks_exact_mut(4).zip(((offset - start) as u32..).step_by(4)) {
                dword.copy_from_slice(&read(at).to_le_bytes());
            }
        };
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        if within(&bar::COMMON) {
            read_image(&self.common(), offset as usize, data);
        } else if within(&bar::ISR) {
            // Only INTx has a status to read.
            data.fill(0);
        } else if within(&bar::DEVICE) {
            self.backend.read_config((offset - bar::DEVICE.start) as usize, data);
        } else if within(&bar::MSIX_TABLE) && aligned {
            dwords(bar::MSIX_TABLE.start, data, &|at| self.queues.msix.read_table(at));
        } else if within(&bar::MSIX_PBA) && aligned {
            dwords(bar::MSIX_PBA.start, data, &|at| self.queues.msix.read_pending(at));
        } else {
            data.fill(0xff);
            return Err(AccessError { bar, offset, size: data.len() });
        }
        Ok(())
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let within =
            |range: &std::ops::Range<u64>| range.start <= offset && offset + data.len() as u64 <= range.end;
        if within(&bar::COMMON) && data.len() <= 8 {
            self.write_common(offset, data);
        } else if within(&bar::NOTIFY) {
            // KVM writes the doorbell's file itself, unless it could not be placed.
            let queue = (offset - bar::NOTIFY.start) / bar::NOTIFY_MULTIPLIER;
            if queue < self.queues.slots.len() as u64 {
                self.host.workers.ring_once(Piece::Queue(queue as u32));
            }
        } else if within(&bar::MSIX_TABLE)
            && matches!(data.len(), 4 | 8)
            && offset.is_multiple_of(data.len() as u64)
        {
            for (dword, at) in
                data.chunks_exact(4).zip(((offset - bar::MSIX_TABLE.start) as u32..).step_by(4))
            {
                let value = u32::from_le_bytes(dword.try_into().unwrap_or_default());
                self.queues.msix.write_table(at, value);
            }
        } else if within(&bar::ISR) || within(&bar::DEVICE) || within(&bar::MSIX_PBA) {
            // Nothing there can be written.
        } else {
            return Err(AccessError { bar, offset, size: data.len() });
        }
        Ok(())
    }

    fn reset(&self) {
        let mut registers = lock(&self.registers);
        self.reset_device(&mut registers);
        self.queues.bus_master.store(false, Ordering::SeqCst);
        self.queues.msix.reset();
        lock(&self.config).clone_from(&self.power_on);
    }
}

impl<B: Backend> Function for VirtioPci<B> {
    fn run(&self, piece: Piece, budget: usize) -> Ran {
        match piece {
            Piece::Queue(queue) => self.backend.run(&self.queues, queue as usize, budget),
            Piece::Control | Piece::Timers => Ran::Idle,
        }
    }

    fn deliver(&self, _port: usize, frames: &[Frame<'_>]) {
        self.backend.deliver(&self.queues, frames);
    }

    fn doorbells(&self) -> Vec<(u32, EventFd)> {
        let clone = |(queue, slot): (u32, &Slot)| Some((queue, slot.bell.try_clone().ok()?));
        (0..).zip(&self.queues.slots).filter_map(clone).collect()
    }
}
