//! Save and restore: what is kept of a virtio function.
//!
//! Rings and buffers are in guest memory; what is not there is how far the device has come in each ring. A state is
//! believed as little as a driver: what no driver could have set up is refused.

use std::sync::atomic::Ordering;

use anyhow::{Context, ensure};
use mana_device::pci::msix::state::MsixState;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;

use super::Backend;
use super::pci::layout::{COMMAND_MASTER, register};
use super::pci::queues::Slot;
use super::pci::{DRIVER_OK, FEATURES_OK, NEEDS_RESET, NO_VECTOR, Registers, VirtioPci, lock};
use super::ring::{Layout, Position, Ring};
use crate::pci_host::PciFunction;

/// A virtio function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    config: Vec<u8>,
    msix: MsixState,
    status: u8,
    config_vector: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueState {
    layout: Layout,
    enabled: bool,
    vector: u16,
    /// While it is in use.
    position: Option<Position>,
}

/// A function that can be saved.
pub trait Saved: PciFunction {
    /// What is kept. Its workers do nothing meanwhile.
    fn save(&self) -> FunctionState;
    /// Become `state`. Its workers do nothing meanwhile.
    ///
    /// # Errors
    /// No driver can have brought it about on this device; the function is as it was.
    fn load(&self, state: &FunctionState) -> anyhow::Result<()>;
    /// Go on after [`load`](Self::load): what was held back is sent, and all queues are looked at.
    fn go_on(&self);
}

impl<B: Backend> Saved for VirtioPci<B> {
    fn save(&self) -> FunctionState {
        let registers = lock(&self.registers);
        let queue = |(slot, &(layout, enabled)): (&Slot, &(Layout, bool))| QueueState {
            layout,
            enabled,
            vector: slot.vector.load(Ordering::Relaxed),
            position: lock(&slot.ring).as_ref().map(Ring::position),
        };
        FunctionState {
            config: lock(&self.config).save(),
            msix: self.queues.msix.save(),
            status: self.queues.status.load(Ordering::SeqCst),
            config_vector: self.queues.config_vector.load(Ordering::Relaxed),
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: self.queues.slots.iter().zip(&registers.queues).map(queue).collect(),
        }
    }

    fn load(&self, state: &FunctionState) -> anyhow::Result<()> {
        let sizes = self.backend().queue_sizes();
        ensure!(state.queues.len() == sizes.len(), "it has {} virtqueues", state.queues.len());
        let agreed = state.status & FEATURES_OK != 0;
        let ready = state.status & DRIVER_OK != 0;
        let features = state.driver_features;
        ensure!(agreed || !ready, "a virtio driver that is ready has agreed on features");
        let offered = features & !self.features() == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0;
        ensure!(!agreed || offered, "a virtio driver took features {features:#x}");
        let vectors =
            state.queues.iter().map(|queue| queue.vector).chain([state.config_vector]).collect::<Vec<_>>();
        let known = vectors.iter().all(|&vector| vector == NO_VECTOR || self.vector(vector) == vector);
        ensure!(known, "a virtqueue has a vector that is not in the table");
        self.queues.msix.check(&state.msix)?;
        let memory = self.host.memory.memory();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = Vec::new();
        for (queue, most) in state.queues.iter().zip(sizes) {
            let size = queue.layout.size;
            ensure!(size.is_power_of_two() && size <= most, "a virtqueue of {size} entries");
            ensure!(queue.position.is_none() || queue.enabled && ready, "a virtqueue is in use too early");
            let ring = queue.position.map(|position| Ring::at(&queue.layout, event_idx, &memory, position));
            rings.push(ring.transpose().context("a virtqueue")?);
        }
        let broken = ready && state.queues.iter().any(|queue| queue.enabled && queue.position.is_none());
        ensure!(!broken || state.status & NEEDS_RESET != 0, "a virtqueue is not in use, for no reason");
        let mut config = self.power_on.clone();
        config.load(&state.config)?;

        let mut registers = lock(&self.registers);
        self.reset_device(&mut registers);
        let command = config.u16(register::COMMAND.into());
        let control = config.u16(usize::from(register::MSIX) + 2);
        *lock(&self.config) = config;
        self.queues.bus_master.store(command & COMMAND_MASTER != 0, Ordering::SeqCst);
        self.queues.msix.load(&state.msix, control);
        *registers = Registers {
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            driver_features: features,
            queue_select: state.queue_select,
            queues: state.queues.iter().map(|queue| (queue.layout, queue.enabled)).collect(),
            placed: None,
        };
        self.queues.config_vector.store(state.config_vector, Ordering::Relaxed);
        for ((slot, queue), ring) in self.queues.slots.iter().zip(&state.queues).zip(rings) {
            slot.vector.store(queue.vector, Ordering::Relaxed);
            *lock(&slot.ring) = ring;
        }
        self.queues.status.store(state.status, Ordering::SeqCst);
        if ready {
            self.backend().activate(features);
        }
        self.place_doorbells(&mut registers);
        Ok(())
    }

    fn go_on(&self) {
        self.queues.msix.replay();
        self.ring_all();
    }
}
