//! A virtual machine of one page table, one CPU and a handful of instructions.
//!
//! It starts in 64-bit long mode with paging, goes through [`STEPS`] and reports each with an `out`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::Unusable;

/// What the guest does, in order; a failure is named after the first step that was not reached.
pub const STEPS: [&str; 6] = [
    "the first instruction in 64-bit long mode",
    "control registers and MSRs (mov cr3, wrmsr, swapgs)",
    "an interrupt (int)",
    "an interrupt return to the kernel (iretq)",
    "an interrupt return to user mode (iretq)",
    "an interrupt from user mode",
];

/// Where the guest reports: an unused port of a PC.
const PORT: u16 = 0x510;

// Guest-physical addresses of what lies in the one 64 KiB slot; paging maps it one to one.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const CODE: u64 = 0x8000;
const STACK_TOP: u64 = 0xa000;
const USER_STACK_TOP: u64 = 0xb000;
const INTERRUPT_STACK_TOP: u64 = 0xc000;
const MEMORY: usize = 0x10000;

const KERNEL_CS: u16 = 0x08;
const KERNEL_DS: u16 = 0x10;
const USER_CS: u16 = 0x18 | 3;
const USER_DS: u16 = 0x20 | 3;
const TSS_SELECTOR: u16 = 0x28;

/// Vector that returns to where it came from, and vector by which user mode ends the probe.
const VECTOR_RETURN: u64 = 0x20;
const VECTOR_END: u64 = 0x21;

// Position-independent, so that it runs where it is copied to. `dx` holds the port throughout.
std::arch::global_asm!(
    ".pushsection .rodata.accel_probe, \"a\"",
    "accel_probe_start:",
    "    mov al, 1",
    "    out dx, al",
    "    mov rax, cr3",
    "    mov cr3, rax",
    "    mov r8d, edx",
    "    mov ecx, 0xc0000102", // MSR_KERNEL_GS_BASE
    "    xor eax, eax",
    "    xor edx, edx",
    "    wrmsr",
    "    swapgs",
    "    mov edx, r8d",
    "    mov al, 2",
    "    out dx, al",
    "    int {vector_return}",
    "    mov al, 4",
    "    out dx, al",
    "    push {user_ds}",
    "    push {user_stack}",
    "    push {user_flags}",
    "    push {user_cs}",
    "    lea rax, [rip + accel_probe_user]",
    "    push rax",
    "    iretq",
    "accel_probe_user:",
    "    mov al, 5",
    "    out dx, al",
    "    int {vector_end}",
    "accel_probe_gate_return:",
    "    mov al, 3",
    "    out dx, al",
    "    iretq",
    "accel_probe_gate_end:",
    "    mov al, 6",
    "    out dx, al",
    "    hlt",
    "accel_probe_stop:",
    ".popsection",
    vector_return = const VECTOR_RETURN,
    vector_end = const VECTOR_END,
    user_ds = const USER_DS,
    user_cs = const USER_CS,
    user_stack = const USER_STACK_TOP,
    user_flags = const 0x3002, // I/O from user mode (IOPL 3), for `out`
);

unsafe extern "C" {
    #[link_name = "accel_probe_start"]
    static START: u8;
    #[link_name = "accel_probe_gate_return"]
    static GATE_RETURN: u8;
    #[link_name = "accel_probe_gate_end"]
    static GATE_END: u8;
    #[link_name = "accel_probe_stop"]
    static STOP: u8;
}

/// The guest's code, and where in it the two interrupt handlers begin.
fn code() -> (&'static [u8], u64, u64) {
    let start = &raw const START;
    let offset = |label: *const u8| label.addr() - start.addr();
    // SAFETY: the labels enclose one read-only section of the executable.
    let code = unsafe { std::slice::from_raw_parts(start, offset(&raw const STOP)) };
    (code, offset(&raw const GATE_RETURN) as u64, offset(&raw const GATE_END) as u64)
}

/// Runs the probe on `kvm`, for at most `patience`.
pub(super) fn run(kvm: Kvm, patience: Duration) -> Result<(), Unusable> {
    let reached = Arc::new(AtomicUsize::new(0));
    let progress = Arc::clone(&reached);
    let (tell, outcome) = mpsc::channel();
    let _ = register_signal_handler(SIGRTMIN(), ignore);
    let thread = thread::spawn(move || {
        // The receiver may have lost patience.
        let _ = tell.send(Machine::new(&kvm).and_then(|mut machine| machine.run(&progress)));
    });
    outcome.recv_timeout(patience).unwrap_or_else(|_| {
        // Gets it out of KVM_RUN; a thread that stays in the kernel all the same ends with the process.
        let _ = thread.kill(SIGRTMIN());
        Err(Unusable::Hangs { step: step_after(reached.load(Ordering::Relaxed)) })
    })
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The step that a guest which has got through `reached` of them is at.
fn step_after(reached: usize) -> &'static str {
    STEPS.get(reached).copied().unwrap_or("the end")
}

struct Machine {
    vcpu: VcpuFd,
    // The slot's memory and the machine live as long as the CPU.
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Machine {
    fn new(kvm: &Kvm) -> Result<Self, Unusable> {
        let vm = kvm.create_vm().map_err(at("KVM_CREATE_VM"))?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|error| Unusable::Setup { step: "64 KiB of memory", error: io::Error::other(error) })?;
        fill(&memory).map_err(|error| Unusable::Setup {
            step: "filling its memory",
            error: io::Error::other(error),
        })?;
        let host = memory
            .get_host_address(GuestAddress(0))
            .map_err(|error| Unusable::Setup { step: "64 KiB of memory", error: io::Error::other(error) })?;
        let slot = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: host as u64,
            ..Default::default()
        };
        // SAFETY: the region is mapped for as long as `memory` lives, which is as long as the VM does.
        unsafe { vm.set_user_memory_region(slot) }.map_err(at("KVM_SET_USER_MEMORY_REGION"))?;
        // Kernels that use hardware task switching need it on Intel; it changes nothing elsewhere.
        let _ = vm.set_tss_address(0xfffb_d000);
        let vcpu = vm.create_vcpu(0).map_err(at("KVM_CREATE_VCPU"))?;
        let machine = Self { vcpu, _vm: vm, _memory: memory };
        machine.enter_long_mode(kvm)?;
        Ok(machine)
    }

    fn enter_long_mode(&self, kvm: &Kvm) -> Result<(), Unusable> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(at("KVM_GET_SUPPORTED_CPUID"))?;
        self.vcpu.set_cpuid2(&cpuid).map_err(at("KVM_SET_CPUID2"))?;
        let mut sregs = self.vcpu.get_sregs().map_err(at("KVM_GET_SREGS"))?;
        sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
        sregs.cr3 = PML4;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
        sregs.cs = segment(KERNEL_CS, 0xb, true);
        let data = segment(KERNEL_DS, 0x3, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SELECTOR,
            type_: 0xb, // busy 64-bit TSS
            present: 1,
            ..Default::default()
        };
        sregs.gdt = kvm_dtable { base: GDT, limit: 0x37, ..Default::default() };
        sregs.idt = kvm_dtable { base: IDT, limit: 0x0fff, ..Default::default() };
        self.vcpu.set_sregs(&sregs).map_err(at("KVM_SET_SREGS"))?;
        let mut regs = self.vcpu.get_regs().map_err(at("KVM_GET_REGS"))?;
        regs.rip = CODE;
        regs.rsp = STACK_TOP;
        regs.rdx = u64::from(PORT);
        regs.rflags = 2;
        self.vcpu.set_regs(&regs).map_err(at("KVM_SET_REGS"))
    }

    /// Runs until the last step, counting them in `progress`.
    fn run(&mut self, progress: &AtomicUsize) -> Result<(), Unusable> {
        loop {
            let reached = progress.load(Ordering::Relaxed);
            let how = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[step])) if usize::from(step) == reached + 1 => {
                    progress.store(reached + 1, Ordering::Relaxed);
                    if reached + 1 == STEPS.len() {
                        return Ok(());
                    }
                    continue;
                }
                Ok(exit) => format!("KVM returns {exit:?}"),
                Err(error) => format!("KVM_RUN: {error}"),
            };
            return Err(Unusable::Step { step: step_after(reached), how });
        }
    }
}

fn at(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Unusable {
    move |error| Unusable::Setup { step, error: error.into() }
}

/// A flat segment; `type_` as in its descriptor, already accessed.
fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l: code.into(),
        db: (!code).into(),
        g: 1,
        ..Default::default()
    }
}

/// Page tables, descriptors and code.
fn fill(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    const TABLE: u64 = 0x7; // present, writable, user
    const LARGE_PAGE: u64 = 0x87; // and 2 MiB
    put(memory, PML4, PDPT | TABLE)?;
    put(memory, PDPT, PAGE_DIRECTORY | TABLE)?;
    put(memory, PAGE_DIRECTORY, LARGE_PAGE)?;

    let descriptors =
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];
    for (at, descriptor) in (GDT..).step_by(8).zip(descriptors) {
        put(memory, at, descriptor)?;
    }
    // A 64-bit TSS descriptor takes two places; the upper half of its base is 0.
    put(memory, GDT + u64::from(TSS_SELECTOR), 0x0000_8b00_0000_0067 | TSS << 16)?;
    put(memory, TSS + 4, INTERRUPT_STACK_TOP)?;

    let (code, gate_return, gate_end) = code();
    memory.write_slice(code, GuestAddress(CODE))?;
    gate(memory, VECTOR_RETURN, CODE + gate_return)?;
    gate(memory, VECTOR_END, CODE + gate_end)
}

/// A 64-bit interrupt gate that user mode may call.
fn gate(memory: &GuestMemoryMmap, vector: u64, target: u64) -> Result<(), GuestMemoryError> {
    let low = target & 0xffff | u64::from(KERNEL_CS) << 16 | 0xee00 << 32 | (target >> 16 & 0xffff) << 48;
    put(memory, IDT + vector * 16, low)?;
    put(memory, IDT + vector * 16 + 8, target >> 32)
}

fn put(memory: &GuestMemoryMmap, at: u64, value: u64) -> Result<(), GuestMemoryError> {
    memory.write_obj(value, GuestAddress(at))
}
