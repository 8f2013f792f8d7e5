//! What KVM keeps for the whole machine: interrupt controllers, the timer chip, and the clock that it shows guests.

use anyhow::{Context, ensure};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// What is kept of them.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipsState {
    /// Both PICs and the I/O APIC.
    irqchips: [Box<kvm_irqchip>; 3],
    pit: kvm_pit_state2,
    /// Nanoseconds of kvmclock.
    clock_ns: u64,
}

impl ChipsState {
    /// The state of the chips of `vm`.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save(vm: &VmFd) -> anyhow::Result<Self> {
        // First, because the CPUs' TSCs have just been read.
        let clock_ns = vm.get_clock().context("KVM_GET_CLOCK")?.clock;
        let mut irqchips = CHIPS.map(|chip_id| Box::new(kvm_irqchip { chip_id, ..Default::default() }));
        irqchips.iter_mut().try_for_each(|chip| vm.get_irqchip(chip)).context("KVM_GET_IRQCHIP")?;
        Ok(Self { irqchips, pit: vm.get_pit2().context("KVM_GET_PIT2")?, clock_ns })
    }

    /// Make the chips of `vm` what was saved.
    ///
    /// # Errors
    /// KVM refuses a part of the state.
    pub fn restore(&self, vm: &VmFd) -> anyhow::Result<()> {
        let Self { irqchips, pit, clock_ns: _ } = self;
        for (chip, id) in irqchips.iter().zip(CHIPS) {
            ensure!(chip.chip_id == id, "an interrupt controller with number {}", chip.chip_id);
            vm.set_irqchip(chip).context("KVM_SET_IRQCHIP")?;
        }
        vm.set_pit2(pit).context("KVM_SET_PIT2")
    }

    /// Let the clock go on. The CPUs' TSCs are set right after, so that both tell guests the same.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn restore_clock(&self, vm: &VmFd) -> anyhow::Result<()> {
        // Without flags: the guest's time goes on from there, as its TSC does.
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        vm.set_clock(&clock).context("KVM_SET_CLOCK")
    }
}
