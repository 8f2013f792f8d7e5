//! Interrupts into the guest: lines of the in-kernel irqchip, and messages (MSI).
//!
//! Messages go out by KVM_SIGNAL_MSI, which carries address and data itself: no GSI route to keep in step with the
//! guest's MSI-X table, and a message for a vector that was changed a moment ago can't take the old way. The other
//! way, an irqfd behind a route for each vector, interrupts no faster and makes each change of a vector slow:
//! `src/benches/msi.rs` says 7 to 9 us a message for either on the one emulated CPU of a nested run, but 0.1 us against
//! 500 us for a change with 64 vectors in use, since KVM waits for all readers of the old routes.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use anyhow::Context;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_msi, kvm_pit_config};
use kvm_ioctls::VmFd;
use mana_device::doors::{MsiMessage, MsiSink};
use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{layout, warn_limited};

/// PICs, I/O APIC, local APICs and PIT, all inside KVM.
///
/// # Errors
/// KVM has no such thing.
pub fn create_irqchip(vm: &VmFd) -> anyhow::Result<()> {
    let tss = layout::KVM_PAGES + 0x1000;
    vm.set_identity_map_address(layout::KVM_PAGES).context("KVM_SET_IDENTITY_MAP_ADDR")?;
    vm.set_tss_address(tss as usize).context("KVM_SET_TSS_ADDR")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    // The speaker's port 0x61 belongs to the PIT's channel 2, which guests poll.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).context("KVM_CREATE_PIT2")
}

/// An edge-triggered pin of the I/O APIC.
pub struct IrqLine {
    event: EventFd,
}

impl IrqLine {
    /// The pin with number `gsi`.
    ///
    /// # Errors
    /// KVM or the host refuses the irqfd.
    pub fn new(vm: &VmFd, gsi: u32) -> anyhow::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK).context("no event descriptor")?;
        vm.register_irqfd(&event, gsi).with_context(|| format!("KVM_IRQFD for GSI {gsi}"))?;
        Ok(Self { event })
    }

    /// The same pin.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn try_clone(&self) -> anyhow::Result<Self> {
        Ok(Self { event: self.event.try_clone().context("no event descriptor")? })
    }
}

impl Trigger for IrqLine {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.event.write(1)
    }
}

/// A level-triggered pin of the I/O APIC.
pub struct LevelLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl LevelLine {
    /// The pin with number `gsi`.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

/// Drives a level-triggered interrupt.
pub trait Level: Send + Sync {
    /// Assert or deassert the interrupt.
    fn set(&self, asserted: bool);
}

impl Level for LevelLine {
    fn set(&self, asserted: bool) {
        if let Err(error) = self.vm.set_irq_line(self.gsi, asserted) {
            warn_limited!("GSI {}: KVM_IRQ_LINE: {error}", self.gsi);
        }
    }
}

/// The messages of one function's MSI-X vectors.
pub struct MsiRoutes {
    vm: Arc<VmFd>,
    /// What each vector sends; only vectors that were unmasked once are here.
    messages: RwLock<BTreeMap<u16, MsiMessage>>,
}

impl MsiRoutes {
    /// No vector sends anything yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, messages: RwLock::default() }
    }
}

impl MsiSink for MsiRoutes {
    fn route(&self, vector: u16, message: MsiMessage) {
        if let Ok(mut messages) = self.messages.write() {
            messages.insert(vector, message);
        }
    }

    fn fire(&self, vector: u16) {
        let message = self.messages.read().ok().and_then(|messages| messages.get(&vector).copied());
        let Some(message) = message else { return };
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // Not delivered means that no CPU has the APIC id the guest wrote: on hardware too the message is lost.
        if let Err(error) = self.vm.signal_msi(msi) {
            warn_limited!("vector {vector}: KVM_SIGNAL_MSI of {message:x?}: {error}");
        }
    }
}
