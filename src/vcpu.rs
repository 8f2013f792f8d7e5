//! vCPUs: one thread each, which runs guest code and hands its accesses to the bus.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, bail};
use kvm_bindings::{CpuId, kvm_mp_state};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::{self, EntryState};
use crate::bus::Bus;
use crate::exits::ExitCounts;
use crate::seccomp::{self, Role};
use crate::snapshot::cpu::CpuState;
use crate::stop::{Outcome, Stop};

/// A CPU that was between two runs when it was kicked is kicked again after this long.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// A CPU that has not run yet.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
    exits: Exits,
    counts: Arc<ExitCounts>,
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
    /// CPU number `index`, which the guest identifies by `cpuid`, and whose exits `counts` counts.
    ///
    /// # Errors
    /// KVM refuses the CPU, e.g. because there are too many.
    pub fn new(
        vm: &VmFd,
        index: u32,
        apic_id: u32,
        cpuid: &CpuId,
        counts: &Arc<ExitCounts>,
    ) -> anyhow::Result<Self> {
        let fd =
            vm.create_vcpu(u64::from(apic_id)).with_context(|| format!("KVM_CREATE_VCPU for CPU {index}"))?;
        fd.set_cpuid2(cpuid).with_context(|| format!("KVM_SET_CPUID2 for CPU {index}"))?;
        boot::set_msrs(&fd)?;
        counts.watch(index, &fd);
        Ok(Self { index, fd, exits: Exits::default(), counts: counts.clone() })
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

    /// The state of this CPU, which has been stopped; `msrs` are those that KVM says make it up.
    pub fn save(&self, msrs: &[u32]) -> anyhow::Result<CpuState> {
        CpuState::save(&self.fd, msrs).with_context(|| format!("CPU {}", self.index))
    }

    /// Be what `state` says, and not at the start.
    ///
    /// # Errors
    /// No CPU can be in this state.
    pub fn restore(&self, state: &CpuState, msrs: &[u32]) -> anyhow::Result<()> {
        state.restore(&self.fd, msrs).with_context(|| format!("CPU {}", self.index))
    }

    /// Let this CPU's time go on as `state` says.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn restore_tsc(&self, state: &CpuState) -> anyhow::Result<()> {
        state.restore_tsc(&self.fd)
    }

    /// Let its timer go on, once the time of all does.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn restore_deadline(&self, state: &CpuState) -> anyhow::Result<()> {
        state.restore_deadline(&self.fd)
    }

    /// Run guest code until `gate` is closed or `stop` has an outcome.
    fn run(&mut self, bus: &Bus, gate: &Gate, stop: &Stop) {
        while !gate.is_closed() && stop.outcome().is_none() {
            if let Err(outcome) = self.run_once(bus) {
                stop.request(outcome);
            }
        }
        if let Err(outcome) = self.settle(bus) {
            stop.request(outcome);
        }
    }

    /// Let KVM finish the access that it came out for last: before that, the registers are those of an instruction that
    /// is half done.
    fn settle(&mut self, bus: &Bus) -> Result<(), Outcome> {
        self.fd.set_kvm_immediate_exit(1);
        // An instruction may make several accesses.
        let settled = loop {
            match self.run_once(bus) {
                Ok(Came::ForNothing) => break Ok(()),
                Ok(Came::ForUs) => {}
                Err(outcome) => break Err(outcome),
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        settled
    }

    /// Run guest code until it needs us, and serve it.
    fn run_once(&mut self, bus: &Bus) -> Result<Came, Outcome> {
        let index = self.index;
        let exit = self.fd.run();
        self.exits.count(&exit);
        self.counts.bump(index);
        match exit {
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => bus.port_write(port, data),
            Ok(VcpuExit::Intr) => return Ok(Came::ForNothing),
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
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Came::ForNothing);
            }
            Err(error) => return Err(Outcome::HostError(format!("KVM_RUN on CPU {index}: {error}"))),
        }
        Ok(Came::ForUs)
    }

    /// What KVM could not do, and where the guest was.
    fn internal_error(&mut self) -> String {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the union's member; it is plain data.
        let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let rip = self.fd.get_regs().map(|regs| regs.rip).unwrap_or_default();
        format!("KVM gave up on CPU {} at {rip:#x}: suberror {}", self.index, internal.suberror)
    }
}

/// Why a CPU came out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// For an access, which is done.
    ForUs,
    /// Because of a signal.
    ForNothing,
}

/// What CPUs stop at.
#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    waiting: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn waiting(&self) -> MutexGuard<'_, usize> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A CPU's side: wait here while it is closed.
    fn pass(&self, stop: &Stop) {
        let mut waiting = self.waiting();
        *waiting += 1;
        self.changed.notify_all();
        while self.is_closed() && stop.outcome().is_none() {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting -= 1;
    }

    /// Wait for a while until `all` CPUs are here; whether they are.
    fn await_all(&self, all: usize) -> bool {
        let waiting = self.waiting();
        let waited = self.changed.wait_timeout_while(waiting, KICK_INTERVAL, |waiting| *waiting < all);
        *waited.unwrap_or_else(PoisonError::into_inner).0 >= all
    }

    fn open(&self) {
        let _waiting = self.waiting();
        self.closed.store(false, Ordering::Release);
        self.changed.notify_all();
    }
}

/// All CPUs, running.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    /// A CPU's thread holds it but while it waits at the gate.
    cpus: Vec<Arc<Mutex<Vcpu>>>,
    gate: Arc<Gate>,
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
        let cpus: Vec<_> = vcpus.into_iter().map(|vcpu| Arc::new(Mutex::new(vcpu))).collect();
        let mut running = Self { threads: Vec::new(), cpus, gate: Arc::default(), stop: stop.clone() };
        for (index, cpu) in running.cpus.iter().enumerate() {
            let (cpu, bus, gate, stop) = (cpu.clone(), bus.clone(), running.gate.clone(), stop.clone());
            let builder = std::thread::Builder::new().name(format!("vcpu{index}"));
            let run = move || match seccomp::enter(Role::Vcpu) {
                Ok(()) => {
                    while stop.outcome().is_none() {
                        lock(&cpu).run(&bus, &gate, &stop);
                        gate.pass(&stop);
                    }
                    log::info!("CPU {index}: {:?}", lock(&cpu).exits);
                }
                Err(error) => stop.request(Outcome::HostError(format!("{error:#}"))),
            };
            let thread = builder.spawn(run).context("no thread for a CPU")?;
            running.threads.push(thread);
        }
        Ok(running)
    }

    /// Let all CPUs come to a stop between two instructions. They go on after [`resume`](Self::resume).
    ///
    /// # Errors
    /// The run has ended.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.gate.closed.store(true, Ordering::Release);
        while self.stop.outcome().is_none() {
            for thread in &self.threads {
                let _ = thread.kill(SIGRTMIN());
            }
            if self.gate.await_all(self.threads.len()) {
                return Ok(());
            }
        }
        bail!("the run has ended")
    }

    /// Let them go on. A guest with a kvmclock learns that it stood still, lest it take that for a lockup.
    pub fn resume(&self) {
        for cpu in &self.cpus {
            let _has_no_kvmclock = lock(cpu).fd.kvmclock_ctrl();
        }
        self.gate.open();
    }

    /// The states of the CPUs, which have been stopped.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save(&self, msrs: &[u32]) -> anyhow::Result<Vec<CpuState>> {
        let mut states =
            self.cpus.iter().map(|cpu| lock(cpu).save(msrs)).collect::<anyhow::Result<Vec<_>>>()?;
        for (state, cpu) in states.iter_mut().zip(&self.cpus) {
            state.save_time(&lock(cpu).fd)?;
        }
        Ok(states)
    }
}

fn lock(cpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    cpu.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Vcpus {
    /// Get every CPU out of the guest and its thread to its end.
    fn drop(&mut self) {
        self.stop.request(Outcome::PowerOff);
        self.gate.open();
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
