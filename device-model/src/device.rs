//! The card as its holder sees it: the doors that lead in.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::bar0::{Doorbell, Layout, Target};
use crate::card::Card;
use crate::config::{BarLocation, ConfigError, DeviceConfig, TxPolicy};
use crate::counters::Counters;
use crate::dma::Dma;
use crate::doors::{Clock, Memory, MsiSink, Port, RxFrame, Waker, Work};
use crate::firmware::Firmware;
use crate::host::{Answer, Fate, FirstIds, HELD, Point, Profile, Words, strike_register, strike_smc};
use crate::observe::{Event, Fields, Observer, Tracer};
use crate::pci::config_space::ConfigSpace;
use crate::pci::msix::Msix;
use crate::queues::{Core, Limits, Queues};
use crate::rules::Rules;
use crate::smc::Window;
use crate::sync::lock;
use crate::timers::{Timer, Timers};
use crate::vport::Vport;
use crate::wire::smc::Header;
use crate::{rx, smc, tx};

/// What the device is given to reach the world with.
pub struct Host {
    /// Guest memory for DMA.
    pub memory: Memory,
    /// Interrupts.
    pub msi: Arc<dyn MsiSink>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Told when [`ManaDevice::run`] is due.
    pub waker: Arc<dyn Waker>,
    /// One cable a vPort, in the order of [`DeviceConfig::vports`].
    pub ports: Vec<Arc<dyn Port>>,
    /// Told of every step; `None` costs one branch an event.
    pub observer: Option<Arc<dyn Observer>>,
}

/// A BAR as the guest has placed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Even BAR number: all are 64-bit memory BARs.
    pub index: u8,
    /// Current bus address.
    pub address: u64,
    /// Bytes, a power of two.
    pub size: u64,
    /// Prefetchable.
    pub prefetchable: bool,
}

/// What the bus must do after a configuration write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct ConfigEffect {
    /// BAR addresses or memory decoding changed: read [`ManaDevice::bars`] and [`ManaDevice::memory_enabled`].
    pub bars_changed: bool,
}

/// An access that hits nothing. The bus logs it (rate-limited) and reads as all ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no register takes a {size}-byte access at BAR{bar} + {offset:#x}")]
pub struct AccessError {
    /// BAR number.
    pub bar: u8,
    /// Bytes from the BAR's start.
    pub offset: u64,
    /// Bytes accessed.
    pub size: usize,
}

/// Whether a piece of work is finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Ran {
    /// Nothing left; the [`Waker`] is called when there is more.
    Idle,
    /// The budget ran out first: run it again, after others had their turn.
    More,
}

/// The MANA function.
///
/// Every method takes `&self` and may be called from any thread.
///
/// Lock order: shared-memory window, firmware, then as in `Queues`.
pub struct ManaDevice {
    layout: Layout,
    pub(crate) pci: Mutex<ConfigSpace>,
    pub(crate) power_on: ConfigSpace,
    pub(crate) bus_master: Arc<AtomicBool>,
    pub(crate) window: Mutex<Window>,
    pub(crate) firmware: Mutex<Firmware>,
    pub(crate) card: Card,
}

/// One thing in a BAR.
enum Place {
    Bar0(Target),
    MsixTable(u32),
    MsixPba(u32),
}

impl ManaDevice {
    /// Build the device in its power-on state.
    ///
    /// # Errors
    /// [`ConfigError`] names the option that is out of range.
    pub fn new(config: DeviceConfig, host: Host) -> Result<Self, ConfigError> {
        config.check()?;
        let Host { memory, msi, clock, waker, ports, observer } = host;
        if ports.len() != config.vports.len() {
            let reason = format!("{} cables for {} ports", ports.len(), config.vports.len());
            return Err(ConfigError { option: "netdev", reason });
        }
        let bus_master = Arc::new(AtomicBool::new(false));
        let tracer = Tracer::new(clock, observer);
        let counters = Arc::new(Counters::default());
        let msix =
            Msix::new(config.msix_table_size, msi, bus_master.clone(), tracer.clone(), counters.clone());
        let dma = Dma::new(memory, bus_master.clone());
        let limits = Limits::of(&config);
        let core = Arc::new(Core {
            tracer,
            counters,
            rules: Rules::default(),
            dma,
            msix,
            waker,
            host: Arc::default(),
            timers: Timers::new(limits.timers()),
        });
        let queues = Queues::new(core.clone(), limits);
        let vports = config.vports.iter().zip(ports);
        let vports = vports.map(|(vport, port)| Vport::new(vport.mac, port, config.mtu)).collect();
        let power_on = ConfigSpace::new(&config, config.bars());
        let layout = Layout::new(&config);
        core.host.set_hostile(config.hostile.clone());
        core.host.set_registers(config.profile.registers.clone());
        let card = Card { config, core, queues, vports };
        Ok(Self {
            layout,
            pci: Mutex::new(power_on.clone()),
            power_on,
            bus_master,
            window: Mutex::default(),
            firmware: Mutex::new(Firmware::new(&card)),
            card,
        })
    }
    /// Configuration read of 1, 2 or 4 bytes at `offset` (0 to 4095).
    pub fn config_read(&self, offset: u16, data: &mut [u8]) {
        lock(&self.pci).read(offset, data);
    }
    /// Configuration write of 1, 2 or 4 bytes at `offset` (0 to 4095).
    pub fn config_write(&self, offset: u16, data: &[u8]) -> ConfigEffect {
        let mut pci = lock(&self.pci);
        let effects = pci.write(offset, data);
        if effects.flr {
            drop(pci);
            self.card.core.tracer.emit(|| Event::PciFlr);
            self.power_cycle();
            return ConfigEffect { bars_changed: true };
        }
        let (memory, bus_master) = (pci.memory_enabled(), pci.bus_master());
        self.bus_master.store(bus_master, Ordering::SeqCst);
        drop(pci);
        if effects.command {
            self.card.core.tracer.emit(|| Event::PciCommand { memory, bus_master });
            self.card.core.msix.replay();
            self.card.queues.resume_all();
        }
        if let Some(control) = effects.msix_control {
            self.card.core.msix.set_control(control);
        }
        ConfigEffect { bars_changed: effects.bars }
    }
    /// The function's BARs as the guest has placed them.
    pub fn bars(&self) -> Vec<Bar> {
        let bars = lock(&self.pci).bars().into_iter();
        bars.map(|(index, address, size)| Bar { index, address, size, prefetchable: true }).collect()
    }
    /// Memory Space Enable of the command register.
    pub fn memory_enabled(&self) -> bool {
        lock(&self.pci).memory_enabled()
    }
    /// What an access of `len` bytes hits.
    fn place(&self, bar: u8, offset: u64, len: usize) -> Option<Place> {
        if bar == 0
            && let Some(target) = self.layout.decode(offset, len)
        {
            return Some(Place::Bar0(target));
        }
        let end = offset.checked_add(len as u64)?;
        let within = |location: BarLocation, range: Range<u64>| {
            let hit = location.bar == bar && range.start <= offset && end <= range.end;
            hit.then(|| (offset - range.start) as u32)
        };
        // The table and the pending bits take aligned accesses of 4 and 8 bytes.
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
            return None;
        }
        let table = within(self.card.config.msix_table, self.card.config.table_range()).map(Place::MsixTable);
        table.or_else(|| within(self.card.config.msix_pba, self.card.config.pba_range()).map(Place::MsixPba))
    }
    /// Read of 1, 2, 4 or 8 bytes from a BAR.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers; `data` is then all ones.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        match self.place(bar, offset, data.len()) {
            Some(Place::Bar0(Target::Registers)) => self.read_registers(offset, data),
            Some(Place::Bar0(Target::Shm(at))) => lock(&self.window).read(at, data),
            Some(Place::MsixTable(at)) => read_dwords(at, data, |at| self.card.core.msix.read_table(at)),
            Some(Place::MsixPba(at)) => read_dwords(at, data, |at| self.card.core.msix.read_pending(at)),
            // A doorbell is written, never read.
            Some(Place::Bar0(Target::Doorbell { .. })) | None => {
                data.fill(0xff);
                return Err(AccessError { bar, offset, size: data.len() });
            }
        }
        Ok(())
    }
    fn read_registers(&self, offset: u64, data: &mut [u8]) {
        self.layout.read_registers(offset as u32, data);
        if self.card.core.host.watches(Point::Reg) {
            strike_register(&self.card.core, offset, data);
        }
        self.card.core.tracer.emit(|| {
            let mut value = [0; 8];
            value.iter_mut().zip(&*data).for_each(|(to, from)| *to = *from);
            Event::RegRead { offset, size: data.len() as u8, value: u64::from_le_bytes(value) }
        });
    }
    /// Write of 1, 2, 4 or 8 bytes to a BAR.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers; the write is dropped.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let error = AccessError { bar, offset, size: data.len() };
        match self.place(bar, offset, data.len()).ok_or(error)? {
            Place::Bar0(Target::Doorbell { page, offset }) => {
                let value = u64::from_le_bytes(data.try_into().map_err(|_| error)?);
                self.card.queues.doorbell(page, Doorbell::decode(offset, value).ok_or(error)?);
            }
            Place::MsixTable(at) => {
                for (dword, at) in data.chunks_exact(4).zip((at..).step_by(4)) {
                    let value = u32::from_le_bytes(dword.try_into().map_err(|_| error)?);
                    self.card.core.msix.write_table(at, value);
                }
            }
            Place::Bar0(Target::Shm(at)) => self.write_window(at, data),
            // Read-only.
            Place::MsixPba(_) | Place::Bar0(Target::Registers) => {}
        }
        Ok(())
    }
    fn write_window(&self, at: u32, data: &[u8]) {
        let mut window = lock(&self.window);
        if let Some(request) = window.write(at, data) {
            if self.card.core.host.watches(Point::Smc) {
                return self.answer_struck(&mut window, request);
            }
            let status = lock(&self.firmware).shared_memory(&self.card, &request);
            window.answer(&request, status);
        }
    }
    /// As the faults of the simulated host want it: late, never, or with another answer.
    #[cold]
    fn answer_struck(&self, window: &mut Window, request: smc::Request) {
        let fine = request.header.response(0).0;
        let mut header = fine;
        let kind = request.header.kind().name();
        let Fate { copies, later, status, lost } = strike_smc(&self.card.core, kind, &mut header);
        if let Some(&due_ns) = later.first() {
            window.keep(Some((due_ns, request)));
            if due_ns != HELD {
                self.card.core.add_timer(due_ns, Timer::Host);
            }
            return;
        }
        if copies == 0 && !lost {
            return window.keep(None);
        }
        let done = || lock(&self.firmware).shared_memory(&self.card, &request);
        let status = status.map_or_else(done, |status| status as u8);
        if lost {
            return window.keep(None);
        }
        window.respond(Header(request.header.response(status).0 ^ fine ^ header));
    }
    /// Serve what the simulated host has kept waiting in the shared-memory channel until `now_ns`.
    fn serve_kept(&self, now_ns: u64) {
        let mut window = lock(&self.window);
        if let Some(request) = window.take_kept(now_ns) {
            let status = lock(&self.firmware).shared_memory(&self.card, &request);
            window.answer(&request, status);
        }
    }
    /// Do `work`, at most `budget` requests or packets of it. One piece of work never runs on two threads at
    /// once; different pieces may.
    pub fn run(&self, work: Work, budget: usize) -> Ran {
        match work {
            Work::Hwc => lock(&self.firmware).run(&self.card, budget),
            Work::Transmit { sq } => tx::run(&self.card.queues, &self.card.vports, sq, budget),
            Work::Timers => {
                // Who runs the timers so asks for the next deadline by and by.
                self.run_timers();
                Ran::Idle
            }
        }
    }
    /// Do what has come due; the answer is the next deadline on the [`Clock`], if there is one.
    pub fn run_timers(&self) -> Option<u64> {
        let next = self.card.queues.run_timers();
        self.serve_kept(self.card.core.tracer.now_ns());
        next
    }
    /// Frames from the cable of vPort `port`, in order. Each is steered, written to guest memory and completed,
    /// or dropped and counted; the answer is how many were not dropped.
    pub fn deliver(&self, port: usize, frames: &[RxFrame<'_>]) -> usize {
        self.card.vports.get(port).map_or(0, |vport| rx::deliver(&self.card.queues, vport, frames))
    }
    /// Reset of the whole machine: back to the power-on state.
    pub fn reset(&self) {
        self.power_cycle();
    }
    /// Every part back to its power-on state. Bus mastering goes first, so that nothing new begins.
    fn power_cycle(&self) {
        self.clear();
        self.card.core.tracer.emit(|| Event::Ledger { live: self.ledger() });
    }
    /// What a reset does, without a word about it.
    pub(crate) fn clear(&self) {
        let Self { layout: _, pci, power_on, bus_master, window, firmware, card } = self;
        bus_master.store(false, Ordering::SeqCst);
        let mut window = lock(window);
        lock(firmware).reset(card);
        *window = Window::default();
        card.core.msix.reset();
        lock(pci).reset(power_on);
    }
    /// Live objects by kind; all zero when the driver left nothing behind.
    pub fn ledger(&self) -> Fields {
        lock(&self.firmware).ledger()
    }
    /// Named counters of drops, errors and traffic.
    pub fn counters(&self) -> Fields {
        let mut fields = self.card.core.counters.fields();
        for (name, value) in self.card.vports.iter().flat_map(|vport| vport.counters.fields().0) {
            match fields.0.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum = sum.wrapping_add(value),
                None => fields.0.push((name, value)),
            }
        }
        fields
    }
    /// Named counters of vPort `port` alone; `None` if there is no such port.
    pub fn port_counters(&self, port: usize) -> Option<Fields> {
        self.card.vports.get(port).map(|vport| vport.counters.fields())
    }
    /// What the host lets vPort `port` send from now on, whatever the driver does; survives resets. `false` if there
    /// is no such port.
    pub fn set_tx_policy(&self, port: usize, policy: TxPolicy) -> bool {
        self.card.vports.get(port).map(|vport| vport.set_tx_policy(policy)).is_some()
    }
    /// Do what `words` ask of the simulated host; [`host`](crate::host) has the language. From any thread.
    ///
    /// # Errors
    /// One sentence that says which word is wrong and what would be right; nothing is done then.
    pub fn control<W: AsRef<str>>(&self, words: &[W]) -> Result<Answer, String> {
        let words = Words::parse(words)?;
        let plan = &self.card.core.host;
        if let Some(done) = plan.execute(&words, self.card.core.tracer.now_ns()) {
            match &words {
                Words::Mark(name) => self.card.core.tracer.emit(|| Event::Mark { name: name.clone() }),
                Words::Clear(None) if done.is_ok() => {
                    self.serve_kept(HELD);
                    lock(&self.window).release();
                    lock(&self.firmware).heal(&self.card);
                    self.card.queues.run_host(self.card.core.tracer.now_ns());
                }
                Words::Raise(_) => self.card.queues.run_host(self.card.core.tracer.now_ns()),
                _ => {}
            }
            return done;
        }
        Ok(match words {
            Words::Profile(profile) => {
                self.set_profile(&profile)?;
                Answer::default()
            }
            Words::Profiles => {
                let names = Profile::names().into_iter();
                let names = names.map(|name| Answer::one("name", name.to_owned()));
                Answer::one("profiles", names.collect::<Vec<_>>())
            }
            Words::Limits(limits) => {
                self.set_limits(&limits)?;
                Answer::default()
            }
            Words::Ledger => {
                let live = self.ledger();
                self.card.core.tracer.emit(|| Event::Ledger { live: live.clone() });
                Answer::one("ledger", live)
            }
            Words::Rules => Answer::one("rules", self.violations()),
            _ => Answer::one("counters", self.counters()),
        })
    }
    /// What the host shows from the next channel on; its registers, at once.
    ///
    /// # Errors
    /// One sentence that names the key that can't be.
    pub fn set_profile(&self, profile: &Profile) -> Result<(), String> {
        let change = |next: &mut Profile| {
            let has_ids = profile.ids != FirstIds::default() && profile.ids != self.card.config.profile.ids;
            if has_ids {
                return Err("ids can't change while the card runs: start it with this profile".into());
            }
            *next = profile.clone();
            Ok(())
        };
        lock(&self.firmware).change_offer(change)?;
        self.card.core.host.set_registers(profile.registers.clone());
        Ok(())
    }
    /// Change limits that the host shows from the next channel on.
    fn set_limits(&self, limits: &[(String, u32)]) -> Result<(), String> {
        lock(&self.firmware).change_offer(|next| {
            let unknown = limits.iter().find(|(name, value)| !next.limit(name, *value));
            match unknown {
                None => Ok(()),
                Some((name, value)) => Err(format!(
                    "there is no limit {name}={value}, but max-msix, max-queues, max-sq, max-rq, max-cq, max-eq, ports, \
                     mtu and indirection-entries"
                )),
            }
        })
    }
    /// Rules of the device that the driver broke, with how often.
    pub fn violations(&self) -> Fields {
        self.card.core.rules.fields()
    }
}

/// A read of one or two dwords from a register file of dwords.
fn read_dwords(at: u32, data: &mut [u8], read: impl Fn(u32) -> u32) {
    for (dword, at) in data.chunks_mut(4).zip((at..).step_by(4)) {
        dword.iter_mut().zip(read(at).to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}
