//! A CPU's state, as KVM keeps it.
//!
//! The order of [`restore`](CpuState::restore) matters: the local APIC's address and mode (in the special registers) come
//! before its registers, and those before the MSRs. Time is set at the end, for all CPUs and the machine's clock at once. A
//! CPU's events are last, since registers change what may be pending.

use anyhow::{Context, bail, ensure};
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// `IA32_TSC` (arch/x86/include/asm/msr-index.h).
const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_APIC_BASE`, which the special registers have too.
const MSR_APIC_BASE: u32 = 0x1b;

/// What is kept of a CPU. CPUID is not: it follows from the topology.
#[derive(Serialize, Deserialize)]
pub struct CpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Box<kvm_xsave>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    /// Numbers and values.
    msrs: Vec<(u32, u64)>,
    tsc: u64,
    /// Zero while no timer runs against the TSC.
    tsc_deadline: u64,
}

/// The MSRs that KVM says make up a CPU's state.
///
/// # Errors
/// KVM does not say.
pub fn msr_list(kvm: &Kvm) -> anyhow::Result<Vec<u32>> {
    let mut list = kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?.as_slice().to_vec();
    // These have their own moments and places.
    list.retain(|index| ![MSR_TSC, MSR_TSC_DEADLINE, MSR_APIC_BASE].contains(index));
    Ok(list)
}

impl CpuState {
    /// The state of the CPU `fd`, which stands between two instructions, with those of the MSRs `list` that it has.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save(fd: &VcpuFd, list: &[u32]) -> anyhow::Result<Self> {
        // First of all, because it lets KVM take over what has been sent to the CPU and not yet arrived.
        let mp_state = fd.get_mp_state().context("KVM_GET_MP_STATE")?;
        Ok(Self {
            regs: fd.get_regs().context("KVM_GET_REGS")?,
            sregs: fd.get_sregs().context("KVM_GET_SREGS")?,
            xcrs: fd.get_xcrs().context("KVM_GET_XCRS")?,
            xsave: Box::new(fd.get_xsave().context("KVM_GET_XSAVE")?),
            debug_regs: fd.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
            lapic: fd.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: read_msrs(fd, list)?,
            events: fd.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
            mp_state,
            tsc: 0,
            tsc_deadline: 0,
        })
    }

    /// Add the time of the CPU `fd`, at about the moment at which the machine's clock is read.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save_time(&mut self, fd: &VcpuFd) -> anyhow::Result<()> {
        let times = read_msrs(fd, &[MSR_TSC_DEADLINE, MSR_TSC])?;
        let of = |wanted| times.iter().find(|(index, _)| *index == wanted).map_or(0, |&(_, value)| value);
        (self.tsc, self.tsc_deadline) = (of(MSR_TSC), of(MSR_TSC_DEADLINE));
        Ok(())
    }

    /// Let the time of the CPU `fd` go on, at about the moment at which the machine's clock does. KVM takes TSCs that
    /// are set to nearly the same within a second for the same, so each is set once.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn restore_tsc(&self, fd: &VcpuFd) -> anyhow::Result<()> {
        write_msr(fd, MSR_TSC, self.tsc)
    }

    /// Let the timer of the CPU `fd` go on, once its TSC does.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn restore_deadline(&self, fd: &VcpuFd) -> anyhow::Result<()> {
        if self.tsc_deadline == 0 { Ok(()) } else { write_msr(fd, MSR_TSC_DEADLINE, self.tsc_deadline) }
    }

    /// Make the CPU `fd`, which is new and has its CPUID, what was saved. `list` has the MSRs that there are.
    ///
    /// # Errors
    /// KVM refuses a part of the state, as no CPU can be in it.
    pub fn restore(&self, fd: &VcpuFd, list: &[u32]) -> anyhow::Result<()> {
        let Self { regs, sregs, xcrs, xsave, debug_regs, lapic, mp_state, events, msrs, .. } = self;
        ensure!(msrs.len() <= list.len(), "{} MSRs", msrs.len());
        fd.set_sregs(&as_loaded(sregs)).context("KVM_SET_SREGS")?;
        fd.set_xcrs(xcrs).context("KVM_SET_XCRS")?;
        // SAFETY: no feature of XSAVE is enabled for this process that would make KVM read beyond this structure.
        unsafe { fd.set_xsave(xsave) }.context("KVM_SET_XSAVE")?;
        fd.set_debug_regs(debug_regs).context("KVM_SET_DEBUGREGS")?;
        fd.set_lapic(lapic).context("KVM_SET_LAPIC")?;
        for &(index, value) in msrs {
            ensure!(list.contains(&index), "MSR {index:#x} is none that this machine's KVM has");
            write_msr(fd, index, value)?;
        }
        fd.set_regs(regs).context("KVM_SET_REGS")?;
        fd.set_mp_state(*mp_state).context("KVM_SET_MP_STATE")?;
        fd.set_vcpu_events(events).context("KVM_SET_VCPU_EVENTS")
    }
}

/// KVM for AMD reports the task register's segment as busy, which is what hardware makes of it. TCG leaves it as it was
/// loaded, and lets a program use ports only if it finds it so (`helper_check_io` of QEMU's target/i386/tcg).
fn as_loaded(sregs: &kvm_sregs) -> kvm_sregs {
    const BUSY: u8 = 1 << 1;
    let mut sregs = *sregs;
    let signature = std::arch::x86_64::__cpuid(0x4000_0000);
    if [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes).concat() == *b"TCGTCGTCGTCG" {
        sregs.tr.type_ &= !BUSY;
    }
    sregs
}

fn one(index: u32, data: u64) -> anyhow::Result<Msrs> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).context("no room for an MSR")
}

/// Those of `list` that can be read; KVM lists some that only other CPUs have.
fn read_msrs(fd: &VcpuFd, list: &[u32]) -> anyhow::Result<Vec<(u32, u64)>> {
    let mut found = Vec::with_capacity(list.len());
    let mut rest = list;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).context("no room for MSRs")?;
        let read = fd.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
        found.extend(msrs.as_slice().iter().take(read).map(|entry| (entry.index, entry.data)));
        // The one that stopped it is left out.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// What can't be written is no loss if the CPU has that value already.
fn write_msr(fd: &VcpuFd, index: u32, value: u64) -> anyhow::Result<()> {
    if fd.set_msrs(&one(index, value)?).context("KVM_SET_MSRS")? == 1 {
        return Ok(());
    }
    let mut msrs = one(index, 0)?;
    let read = fd.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
    match msrs.as_slice() {
        [now] if read == 1 && now.data == value => Ok(()),
        _ => bail!("MSR {index:#x} can't be {value:#x}"),
    }
}
