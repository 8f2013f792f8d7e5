//! A virtual machine, from its configuration to its end.

mod trial;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use event_manager::SubscriberOps;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VmFd};
use mana_device::ManaDevice;
use mana_device::doors::Clock;
use mana_device::host::Answer;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::acpi::{self, Platform};
use crate::boot::{self, BootSource, EntryState};
use crate::bus::Bus;
use crate::clock::MonotonicClock;
use crate::config::{Slot, VmConfig};
use crate::control::desk::{self, Desk};
use crate::control::{Control, ControlSocket};
use crate::events::{self, BootTimeout, EventLoop, Signals, WishListener};
use crate::exits::ExitCounts;
use crate::irq::{self, IrqLine, LevelLine, MsiRoutes};
use crate::legacy::{
    AcpiPm, AgentPort, Console, ConsoleTimers, I8042, Legacy, Pvpanic, Rtc, RtcAlarm, SerialInput, SerialPort,
};
use crate::net::Exchange;
use crate::nic::{Nic, Surroundings};
use crate::pci_host::plan::Wish;
use crate::pci_host::{PciFunction, PciHost};
use crate::seccomp::{self, Role};
use crate::snapshot::chips::ChipsState;
use crate::snapshot::cpu::{CpuState, msr_list};
use crate::snapshot::{self, MachineState, Snapshot, Unfinished};
use crate::stop::{EXEC_FAILED, Outcome, Stop};
use crate::trace::TraceFile;
use crate::vcpu::{Vcpu, Vcpus};
use crate::{initramfs, layout, memory, topology, virtio};

/// Run the machine until it ends for good, and say how.
///
/// A reset builds the machine anew from the same configuration.
///
/// # Errors
/// Anything of the host's that fails.
pub fn run(config: &VmConfig) -> anyhow::Result<ExitCode> {
    seccomp::set_mode(config.seccomp);
    let outside = Outside::open(config)?;
    let restored = config.restore.as_deref().map(Snapshot::open).transpose()?;
    if let Some(lies) = &config.lies {
        let exit = trial::run(config, &outside, restored.as_ref(), lies);
        outside.desk.close();
        return exit;
    }
    loop {
        let machine = Machine::build(config, &outside, restored.as_ref())?;
        let cards = machine.cards();
        let (outcome, exec_status) = machine.run(config, &outside)?;
        if outcome == Outcome::Reset {
            log::info!("the guest asked for a reset");
            ensure!(
                restored.is_none(),
                "the guest asked for a reset, and a restored machine has no kernel to boot"
            );
            continue;
        }
        outside.desk.close();
        if let Outcome::GuestPanic(_) = outcome {
            trial::say_lies(&cards);
        }
        return Ok(report(config, &outcome, exec_status));
    }
}

/// The exit code, with a sentence on standard error if it is not 0.
fn report(config: &VmConfig, outcome: &Outcome, exec_status: Option<i32>) -> ExitCode {
    match outcome {
        Outcome::PowerOff if config.exec.is_some() => return report_exec(exec_status),
        Outcome::PowerOff | Outcome::Reset => {}
        Outcome::GuestPanic(line) => eprintln!("mana-vmm: guest kernel in trouble: {line}"),
        Outcome::TimedOut => eprintln!("mana-vmm: --timeout is over"),
        Outcome::RuleBroken(rule) => eprintln!("mana-vmm: strict=on: {rule}"),
        Outcome::HostError(error) => eprintln!("mana-vmm: {error}"),
    }
    outcome.exit_code()
}

fn report_exec(status: Option<i32>) -> ExitCode {
    match status {
        Some(0) => return ExitCode::SUCCESS,
        Some(status) => eprintln!("mana-vmm: --exec: the command failed with status {status}"),
        None => eprintln!("mana-vmm: --exec: the guest powered off before the command ended"),
    }
    ExitCode::from(EXEC_FAILED)
}

/// What outlasts a reset.
struct Outside {
    /// `--timeout`.
    deadline: Option<Instant>,
    /// `--console`.
    console: Option<File>,
    /// `--trace`.
    trace: Option<TraceFile>,
    clock: Arc<dyn Clock>,
    /// The simulated host, for whoever asks it for something.
    control: Arc<Control>,
    /// What is wished of the machine itself.
    desk: Arc<Desk>,
    /// `--control`.
    _socket: Option<ControlSocket>,
}

impl Outside {
    fn open(config: &VmConfig) -> anyhow::Result<Self> {
        // Before the trace has its thread.
        Signals::hold()?;
        let create = |path: &PathBuf| {
            File::create(path)
                .with_context(|| format!("--console {}: the file can't be written", path.display()))
        };
        let control = Arc::new(Control::default());
        let desk = Arc::new(Desk::new()?);
        control.set_machine(desk.clone());
        let socket = config.control.as_deref().map(|path| ControlSocket::open(path, &control));
        Ok(Self {
            _socket: socket.transpose()?,
            control,
            desk,
            deadline: config.timeout.map(|timeout| Instant::now() + timeout),
            console: config.console.as_ref().map(create).transpose()?,
            trace: config.trace.as_deref().map(TraceFile::create).transpose()?,
            clock: Arc::new(MonotonicClock::new()),
        })
    }

    /// `--timeout` is over.
    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Where the guest's console goes. With `--exec`, standard output is for the command's own.
    fn console(&self, config: &VmConfig) -> anyhow::Result<Box<dyn Write + Send>> {
        Ok(match &self.console {
            Some(file) => Box::new(file.try_clone().context("--console")?),
            None if config.exec.is_some() => Box::new(std::io::stderr()),
            None => Box::new(std::io::stdout()),
        })
    }
}

/// Everything that makes up a machine. Fields are dropped from top to bottom: what uses comes before what is used.
struct Machine {
    events: EventLoop,
    vcpus: Vec<Vcpu>,
    nics: Vec<Nic>,
    virtio: Vec<virtio::Running>,
    bus: Arc<Bus>,
    pci: Arc<PciHost>,
    legacy: Legacy,
    console: Arc<Console>,
    stop: Arc<Stop>,
    clock: Arc<dyn Clock>,
    /// MSRs that make up a CPU's state.
    msrs: Vec<u32>,
    vm: Arc<VmFd>,
    memory: GuestMemoryMmap,
}

impl Machine {
    /// Power on, or take up where `restored` was saved.
    fn build(config: &VmConfig, outside: &Outside, restored: Option<&Snapshot>) -> anyhow::Result<Self> {
        if let Some(snapshot) = restored {
            let machine = Self::assemble(config, outside, snapshot.ram()?)?;
            machine.take_up(&snapshot.state).context("--restore")?;
            return Ok(machine);
        }
        let machine = Self::assemble(config, outside, memory::allocate(config.memory)?)?;
        let entry = power_on(config, &machine.memory, &machine.pci)?;
        machine.vcpus.first().context("--cpus: there must be one")?.set_entry(&entry)?;
        Ok(machine)
    }

    /// All that a machine consists of, before any of it has done anything.
    fn assemble(config: &VmConfig, outside: &Outside, memory: GuestMemoryMmap) -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm can't be used")?;
        let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
        memory::register(&vm, &memory)?;
        irq::create_irqchip(&vm)?;

        let stop = Stop::new()?;
        let mut bus = Bus::default();
        let remaining = outside.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut events = events::until_stopped(&stop, remaining)?;
        let console = Console::new(outside.console(config)?, stop.clone())?;
        let agent = Arc::new(AgentPort::default());
        let legacy = add_legacy_devices(config, &vm, &mut bus, &mut events, &console, &agent, &stop)?;
        if let Some(after) = config.boot_timeout {
            events.add_subscriber(Box::new(BootTimeout::new(after, agent.clone(), stop.clone())?));
        }
        events.add_subscriber(Box::new(WishListener(outside.desk.clone())));

        let cables = Exchange::new(outside.clock.clone());
        let around = Surroundings {
            netdevs: &config.netdevs,
            cables: &cables,
            functions: config.nics.len(),
            cpus: Some(config.topology.cpus),
            clock: &outside.clock,
            trace: outside.trace.as_ref(),
            stop: &stop,
        };
        let nics = config.nics.iter().enumerate().map(|(index, nic)| {
            let msi = Arc::new(MsiRoutes::new(vm.clone()));
            Nic::start(nic, index, &around, GuestMemoryAtomic::new(memory.clone()), msi)
        });
        let nics = nics.collect::<anyhow::Result<Vec<_>>>()?;
        outside.control.set_devices(nics.iter().map(|nic| nic.device().clone()).collect());
        agent.set_control(outside.control.clone());
        let around = virtio::Surroundings {
            vm: &vm,
            memory: &GuestMemoryAtomic::new(memory.clone()),
            clock: &outside.clock,
            cables: &cables,
        };
        let virtio = virtio::Running::start_all(config, &around)?;
        let pci = add_pci(config, &mut bus, &nics, &virtio)?;
        let exits = ExitCounts::new(config.topology.cpus);
        agent.set_exits(exits.clone());
        let vcpus = create_vcpus(config, &kvm, &vm, &exits)?;
        let (bus, clock) = (Arc::new(bus), outside.clock.clone());
        let msrs = msr_list(&kvm)?;
        Ok(Self { events, vcpus, nics, virtio, bus, pci, legacy, console, stop, clock, msrs, vm, memory })
    }

    /// Become what `state` says: devices, then CPUs, then chips and clock. RAM is there already.
    fn take_up(&self, state: &MachineState) -> anyhow::Result<()> {
        let MachineState { options: _, cpus, chips, legacy, pci, cards, virtio } = state;
        ensure!(cards.len() == self.nics.len(), "the state has {} MANA functions", cards.len());
        ensure!(cpus.len() == self.vcpus.len(), "the state has {} CPUs", cpus.len());
        ensure!(virtio.len() == self.virtio.len(), "the state has {} virtio functions", virtio.len());
        self.nics.iter().for_each(Nic::pause);
        self.virtio.iter().for_each(virtio::Running::pause);
        for (nic, card) in self.nics.iter().zip(cards) {
            nic.device().load(card)?;
        }
        for (function, saved) in self.virtio.iter().zip(virtio) {
            function.load(saved)?;
        }
        self.pci.load(pci)?;
        for (vcpu, cpu) in self.vcpus.iter().zip(cpus) {
            vcpu.restore(cpu, &self.msrs)?;
        }
        chips.restore(&self.vm)?;
        chips.restore_clock(&self.vm)?;
        let each = || self.vcpus.iter().zip(cpus);
        each().try_for_each(|(vcpu, cpu)| vcpu.restore_tsc(cpu))?;
        each().try_for_each(|(vcpu, cpu)| vcpu.restore_deadline(cpu))?;
        // From here on there are interrupts.
        self.legacy.load(legacy)?;
        for nic in &self.nics {
            nic.device().resume();
            nic.resume();
        }
        self.virtio.iter().for_each(virtio::Running::go_on);
        Ok(())
    }

    /// Do what is wished of the machine, which may stand still already.
    fn grant(&self, wish: &desk::Wish, around: &Saving<'_>, standing: &mut bool) -> anyhow::Result<Answer> {
        match wish {
            desk::Wish::Pause if *standing => bail!("the machine stands still already"),
            desk::Wish::Resume if !*standing => bail!("the machine does not stand still"),
            desk::Wish::Pause => {
                self.pause(around.vcpus)?;
                *standing = true;
                Ok(Answer::default())
            }
            desk::Wish::Resume => {
                self.resume(around.vcpus);
                *standing = false;
                Ok(Answer::default())
            }
            desk::Wish::Save(path) => {
                let begin = Instant::now();
                if !*standing {
                    self.pause(around.vcpus)?;
                }
                let saved = self.save(path, around);
                if !*standing {
                    self.resume(around.vcpus);
                }
                let milliseconds = begin.elapsed().as_millis() as u64;
                Ok(Answer(vec![("bytes", saved?.into()), ("ms", milliseconds.into())]))
            }
        }
    }

    /// The MANA functions' devices.
    fn cards(&self) -> Vec<Arc<ManaDevice>> {
        self.nics.iter().map(|nic| nic.device().clone()).collect()
    }

    /// All that moves stands still: CPUs first, since they may wait for workers.
    fn pause(&self, vcpus: &Vcpus) -> anyhow::Result<()> {
        vcpus.pause()?;
        self.nics.iter().for_each(Nic::pause);
        self.virtio.iter().for_each(virtio::Running::pause);
        Ok(())
    }

    fn resume(&self, vcpus: &Vcpus) {
        self.virtio.iter().for_each(virtio::Running::resume);
        self.nics.iter().for_each(Nic::resume);
        vcpus.resume();
    }

    /// Write the machine, which stands still, to a file at `path`; the answer is its size.
    fn save(&self, path: &Path, around: &Saving<'_>) -> anyhow::Result<u64> {
        let _nobody_asks = around.control.hold();
        let state = self.state(around.config, around.vcpus.save(&self.msrs)?)?;
        let name = || format!("save {}", path.display());
        // Never into a file that a machine was restored from: others may use it.
        let whole = Unfinished::create(path).with_context(name)?;
        let size = Snapshot::write(whole.file(), &state, &self.memory).with_context(name)?;
        whole.finish().with_context(name)?;
        Ok(size)
    }

    /// All but RAM, with the state of the CPUs.
    fn state(&self, config: &VmConfig, cpus: Vec<CpuState>) -> anyhow::Result<MachineState> {
        Ok(MachineState {
            options: snapshot::Options::of(config),
            cpus,
            chips: ChipsState::save(&self.vm)?,
            legacy: self.legacy.save(),
            pci: self.pci.save(),
            cards: self.nics.iter().map(|nic| nic.device().save()).collect(),
            virtio: self.virtio.iter().map(virtio::Running::save).collect(),
        })
    }

    /// Run until something ends it; the answer is what, and the status of the `--exec` command.
    fn run(mut self, config: &VmConfig, outside: &Outside) -> anyhow::Result<(Outcome, Option<i32>)> {
        log::info!("{} ms: the CPUs start", self.clock.now_ns() / 1_000_000);
        let vcpus = Vcpus::start(std::mem::take(&mut self.vcpus), &self.bus, &self.stop)?;
        seccomp::enter(Role::Main)?;
        let mut standing = false;
        let outcome = loop {
            self.events.run().context("event loop")?;
            while let Some((wish, answer)) = outside.desk.take() {
                let around = Saving { config, vcpus: &vcpus, control: &outside.control };
                let granted = self.grant(&wish, &around, &mut standing);
                // Who has lost patience is gone.
                let _ = answer.send(granted.map_err(|error| format!("{error:#}")));
            }
            if let Some(outcome) = self.stop.outcome() {
                break outcome.clone();
            }
        };
        log::info!("{} ms: {outcome:?}", self.clock.now_ns() / 1_000_000);
        drop(vcpus);
        self.nics.into_iter().try_for_each(Nic::finish)?;
        self.virtio.into_iter().try_for_each(virtio::Running::finish)?;
        self.console.flush();
        // An oopsed guest may get as far as powering off, or be at it still. And pvpanic says less than the console.
        let bug = || config.lies.as_ref().and_then(|_| self.console.bug());
        let outcome = match (outcome, self.console.trouble().or_else(bug)) {
            (Outcome::PowerOff | Outcome::Reset | Outcome::TimedOut | Outcome::GuestPanic(_), Some(line)) => {
                Outcome::GuestPanic(line)
            }
            (outcome, _) => outcome,
        };
        Ok((outcome, self.legacy.agent.exec_status()))
    }
}

/// What a machine that runs is saved with.
struct Saving<'a> {
    config: &'a VmConfig,
    vcpus: &'a Vcpus,
    control: &'a Control,
}

/// Put into memory what firmware and a boot loader would; the answer is how the boot CPU begins.
fn power_on(config: &VmConfig, memory: &GuestMemoryMmap, pci: &PciHost) -> anyhow::Result<EntryState> {
    let ram = layout::numa_ram(config.memory, &config.topology);
    let rsdp =
        acpi::write(memory, &Platform { topology: &config.topology, ram: &ram, bridges: &pci.bridges() })?;
    let initrd = initrd(config)?;
    let command_line = command_line(config);
    let source = BootSource { kernel: &config.kernel, initrd: &initrd, command_line: &command_line, rsdp };
    boot::load(memory, &source)
}

/// The devices at fixed ports.
fn add_legacy_devices(
    config: &VmConfig,
    vm: &Arc<VmFd>,
    bus: &mut Bus,
    events: &mut EventLoop,
    console: &Arc<Console>,
    agent: &Arc<AgentPort>,
    stop: &Arc<Stop>,
) -> anyhow::Result<Legacy> {
    let serial = Arc::new(SerialPort::new(IrqLine::new(vm, layout::SERIAL_GSI)?, console.clone())?);
    let sci = LevelLine::new(vm.clone(), layout::SCI_GSI);
    let pm = Arc::new(AcpiPm::new(Box::new(sci), stop.clone()));
    let rtc = Arc::new(Rtc::new(IrqLine::new(vm, layout::RTC_GSI)?, pm.clone())?);
    bus.add_ports(layout::SERIAL_PORT, 8, serial.clone())?;
    bus.add_ports(layout::RTC_PORT, 2, rtc.clone())?;
    bus.add_ports(layout::I8042_COMMAND_PORT, 1, Arc::new(I8042::new(stop.clone())))?;
    bus.add_ports(layout::PVPANIC_PORT, 1, Arc::new(Pvpanic::new(stop.clone())))?;
    bus.add_ports(layout::PM1A_EVENT_PORT, AcpiPm::PORTS, pm.clone())?;
    bus.add_ports(layout::AGENT_PORT, 1, agent.clone())?;
    events.add_subscriber(Box::new(ConsoleTimers::new(console.clone())));
    events.add_subscriber(Box::new(RtcAlarm::new(rtc.clone())));
    // A command needs no typing, and a console in a file shows no prompt.
    if config.exec.is_none() && config.console.is_none() {
        events.add_subscriber(Box::new(SerialInput::new(serial.clone(), stop.clone())?));
    }
    Ok(Legacy { serial, rtc, pm, agent: agent.clone() })
}

/// The PCI host bridges with all functions plugged in.
fn add_pci(
    config: &VmConfig,
    bus: &mut Bus,
    nics: &[Nic],
    virtio: &[virtio::Running],
) -> anyhow::Result<Arc<PciHost>> {
    let functions = config.nics.iter().zip(nics).map(|(nic, running)| {
        let function: Arc<dyn PciFunction> = running.device().clone();
        (Wish { node: nic.node, slot: nic.slot }, function)
    });
    // On the root bus of no node, where they take no slot from anybody.
    let virtio = virtio.iter().map(|device| (Wish { node: None, slot: Slot::Root }, device.function()));
    let functions = functions.chain(virtio);
    let pci = Arc::new(PciHost::new(&layout::mmio64(config.memory), functions.collect())?);
    for range in pci.mmio_ranges() {
        bus.add_mmio(range, pci.clone())?;
    }
    bus.add_ports(layout::PCI_CONFIG_PORT, 8, pci.clone())?;
    Ok(pci)
}

/// The CPUs, which see themselves where the topology puts them.
fn create_vcpus(
    config: &VmConfig,
    kvm: &Kvm,
    vm: &VmFd,
    exits: &Arc<ExitCounts>,
) -> anyhow::Result<Vec<Vcpu>> {
    let most = kvm.get_max_vcpus();
    let cpus = config.topology.cpus;
    ensure!(cpus as usize <= most, "--cpus: this machine's KVM allows {most} CPUs, not {cpus}");
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    let vcpu = |index| {
        let cpuid = topology::cpuid(&supported, &config.topology, index);
        Vcpu::new(vm, index, topology::apic_id(&config.topology, index), &cpuid, exits)
    };
    (0..cpus).map(vcpu).collect()
}

/// The user's initramfs, or one made of the kernel's modules and the agent.
fn initrd(config: &VmConfig) -> anyhow::Result<Vec<u8>> {
    match &config.initrd {
        Some(path) => std::fs::read(path).with_context(|| format!("--initrd: {}", path.display())),
        None => initramfs::build(config),
    }
}

/// What every guest needs on its command line, then what the user adds and may override it with.
///
/// The console comes first. A UART costs the guest two exits a byte, which makes a kernel's log half of the boot time
/// where exits are expensive, so that a command's run shows only warnings and worse, unless the log goes to a file.
/// All else that Linux would find out by trying (timer frequencies, a keyboard controller) CPUID and ACPI tell it.
fn command_line(config: &VmConfig) -> String {
    let only_warnings = config.exec.is_some() && config.console.is_none();
    let loglevel = if only_warnings { "loglevel=5" } else { "" };
    let words = ["console=ttyS0", loglevel, &config.append];
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
