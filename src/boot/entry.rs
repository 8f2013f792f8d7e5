//! Registers: of the boot CPU at the 64-bit entry point (long mode, flat segments, the first GiB identity-mapped), and
//! what firmware would have set on all.

use anyhow::{Context, ensure};
use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Flat descriptors, as boot.rst asks for: null, unused, `__BOOT_CS`, `__BOOT_DS`.
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
const GDT_ADDRESS: GuestAddress = GuestAddress(0x500);
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

const PML4: GuestAddress = GuestAddress(0x9000);
const PDPT: GuestAddress = GuestAddress(0xa000);
const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
const PTE_PRESENT_WRITABLE: u64 = 0x3;
const PTE_2MIB: u64 = 1 << 7;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 0x700;
const APIC_MODE_NMI: u32 = 0x400;

/// How the boot CPU begins.
pub struct EntryState {
    rip: GuestAddress,
    zero_page: GuestAddress,
}

impl EntryState {
    /// Begin at `entry`, with `zero_page` in RSI. Writes page tables and the GDT to `memory`.
    pub(super) fn new(
        memory: &GuestMemoryMmap,
        entry: GuestAddress,
        zero_page: GuestAddress,
    ) -> anyhow::Result<Self> {
        let tables = || -> Result<(), vm_memory::GuestMemoryError> {
            memory.write_obj(GDT, GDT_ADDRESS)?;
            memory.write_obj(PDPT.0 | PTE_PRESENT_WRITABLE, PML4)?;
            memory.write_obj(PAGE_DIRECTORY.0 | PTE_PRESENT_WRITABLE, PDPT)?;
            for index in 0..512 {
                let entry = index << 21 | PTE_2MIB | PTE_PRESENT_WRITABLE;
                memory.write_obj(entry, GuestAddress(PAGE_DIRECTORY.0 + index * 8))?;
            }
            Ok(())
        };
        tables().context("no room for page tables")?;
        Ok(Self { rip: entry, zero_page })
    }

    /// Set the registers of `vcpu`.
    pub(crate) fn apply(&self, vcpu: &VcpuFd) -> anyhow::Result<()> {
        let regs = kvm_regs {
            rflags: RFLAGS_RESERVED,
            rip: self.rip.0,
            rsi: self.zero_page.0,
            ..Default::default()
        };
        vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
        // What FNINIT and a reset of MXCSR leave.
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        vcpu.set_fpu(&fpu).context("KVM_SET_FPU")?;
        set_system_registers(vcpu)?;
        set_virtual_wire(vcpu)
    }
}

fn set_system_registers(vcpu: &VcpuFd) -> anyhow::Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let code = flat_segment(BOOT_CS, 0xb, true);
    let data = flat_segment(BOOT_DS, 0x3, false);
    (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (code, data, data, data, data, data);
    sregs.gdt.base = GDT_ADDRESS.0;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PML4.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")
}

/// A segment of [`GDT`] in its decoded form.
fn flat_segment(selector: u16, kind: u8, long_code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        l: u8::from(long_code),
        db: u8::from(!long_code),
        ..Default::default()
    }
}

/// What firmware sets on every CPU, the ones that sleep until their SIPI too: kernels complain of differences.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> anyhow::Result<()> {
    let entries = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).context("too many MSRs")?;
    let written = vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
    ensure!(written == entries.len(), "KVM takes only {written} of {} MSRs", entries.len());
    Ok(())
}

/// The PIC's interrupts come through LINT0, NMIs through LINT1: virtual wire mode, as a BIOS leaves it.
fn set_virtual_wire(vcpu: &VcpuFd) -> anyhow::Result<()> {
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    for (register, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
        let bytes = mode.to_le_bytes().map(|byte| byte as libc::c_char);
        lapic.regs[register..register + bytes.len()].copy_from_slice(&bytes);
    }
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}
