//! vCPUs: one thread each, which runs guest code and hands its accesses to the bus.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use kvm_bindings::{CpuId, kvm_mp_state};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::{self, EntryState};
use crate::bus::Bus;
use crate::doorbells::Doorbells;
use crate::seccomp::{self, Role};
use crate::stop::{Outcome, Stop};

/// A CPU that was between two runs when it was kicked is kicked again after this long.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// How often each CPU has come out of the guest to us, for others to read while it runs.
#[derive(Debug)]
pub struct ExitCounts(Box<[AtomicU64]>);

impl ExitCounts {
    /// For `cpus` CPUs.
    pub fn new(cpus: u32) -> Arc<Self> {
        Arc::new(Self((0..cpus).map(|_| AtomicU64::new(0)).collect()))
    }

    /// All CPUs' together.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn bump(&self, cpu: u32) {
        if let Some(count) = self.0.get(cpu as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A CPU that has not run yet.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    exits: Exits,
    counts: Arc<ExitCounts>,
    doorbells: Arc<Doorbells>,
}

/// How often a CPU came out of the guest, and what for: each time costs as much as thousands of its instructions.
#[derive(Debug, Default)]
struct Exits {
    port_reads: u64,
    port_writes: u64,
    mmio_reads: u64,
    mmio_writes: u64,
    others: u64,
}

impl Exits {
    fn count(&mut self, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) {
        let counter = match exit {
            Ok(VcpuExit::IoIn(..)) => &mut self.port_reads,
            Ok(VcpuExit::IoOut(..)) => &mut self.port_writes,
            Ok(VcpuExit::MmioRead(..)) => &mut self.mmio_reads,
            Ok(VcpuExit::MmioWrite(..)) => &mut self.mmio_writes,
            _ => &mut self.others,
        };
        *counter += 1;
    }
}

impl Vcpu {
    /// CPU number `index`, which the guest identifies by `cpuid`, and whose exits `counts` counts. Doorbells come in
    /// order with those that `doorbells` keeps.
    ///
    /// # Errors
    /// KVM refuses the CPU, e.g. because there are too many.
    pub fn new(
        vm: &VmFd,
        index: u32,
        apic_id: u32,
        cpuid: &CpuId,
        counts: &Arc<ExitCounts>,
        doorbells: &Arc<Doorbells>,
    ) -> anyhow::Result<Self> {
        let fd =
            vm.create_vcpu(u64::from(apic_id)).with_context(|| format!("KVM_CREATE_VCPU for CPU {index}"))?;
        fd.set_cpuid2(cpuid).with_context(|| format!("KVM_SET_CPUID2 for CPU {index}"))?;
        boot::set_msrs(&fd)?;
        let (counts, doorbells) = (counts.clone(), doorbells.clone());
        Ok(Self { index, fd, exits: Exits::default(), counts, doorbells })
    }

    /// What KVM knows the CPU by.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Let this CPU begin at the kernel's entry point. The others wait for its INIT and SIPI.
    ///
    /// # Errors
    /// KVM refuses a register.
    pub fn set_entry(&self, entry: &EntryState) -> anyhow::Result<()> {
        entry.apply(&self.fd).context("the boot CPU's registers")?;
        let runnable = kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(runnable).context("KVM_SET_MP_STATE")
    }

    /// Run guest code until `stop` has an outcome.
    fn run(mut self, bus: &Bus, stop: &Stop) {
        while stop.outcome().is_none() {
            if let Err(outcome) = self.run_once(bus) {
                stop.request(outcome);
            }
        }
        log::info!("CPU {}: {:?}", self.index, self.exits);
    }

    /// Run guest code until it needs us, and serve it.
    fn run_once(&mut self, bus: &Bus) -> Result<(), Outcome> {
        let index = self.index;
        let exit = self.fd.run();
        self.exits.count(&exit);
        self.counts.bump(index);
        // What was rung before comes first.
        self.doorbells.hand_over();
        match exit {
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio_write(address, data);
                self.doorbells.stored(address);
            }
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::Intr) => {}
            // A guest that wants a reset has registers for it; a CPU that can't handle a fault while it handles
            // another has crashed.
            Ok(VcpuExit::Shutdown) => {
                return Err(Outcome::GuestPanic(format!("triple fault on CPU {index}")));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(Outcome::HostError(format!(
                    "CPU {index} can't enter the guest: reason {reason:#x}"
                )));
            }
            Ok(VcpuExit::InternalError) => return Err(Outcome::HostError(self.internal_error())),
            Ok(other) => return Err(Outcome::HostError(format!("CPU {index}: unexpected exit {other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(Outcome::HostError(format!("KVM_RUN on CPU {index}: {error}"))),
        }
        self.doorbells.follow();
        Ok(())
    }

    /// What KVM could not do, and where the guest was.
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the union's member; it is plain data.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let rip = self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
        format!("KVM gave up on CPU {} at {rip:#x}: suberror {}", self.index, internal.suberror)
    }
}

/// All CPUs, running.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<Stop>,
}

impl Vcpus {
    /// Start `vcpus`.
    ///
    /// # Errors
    /// The host has no room for a thread; those already started are stopped again.
    pub fn start(vcpus: Vec<Vcpu>, bus: &Arc<Bus>, stop: &Arc<Stop>) -> anyhow::Result<Self> {
        register_signal_handler(SIGRTMIN(), ignore_kick)
            .context("no handler for the signal that kicks CPUs")?;
        let mut running = Self { threads: Vec::new(), stop: stop.clone() };
        for vcpu in vcpus {
            let (bus, stop) = (bus.clone(), stop.clone());
            let builder = std::thread::Builder::new().name(format!("vcpu{}", vcpu.index));
            let run = move || match seccomp::enter(Role::Vcpu) {
                Ok(()) => vcpu.run(&bus, &stop),
                Err(error) => stop.request(Outcome::HostError(format!("{error:#}"))),
            };
            let thread = builder.spawn(run).context("no thread for a CPU")?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

impl Drop for Vcpus {
    /// Get every CPU out of the guest and its thread to its end.
    fn drop(&mut self) {
        self.stop.request(Outcome::PowerOff);
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                std::thread::sleep(KICK_INTERVAL);
            }
            let _ = thread.join();
        }
    }
}

/// The signal's only effect is that KVM_RUN returns.
extern "C" fn ignore_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
