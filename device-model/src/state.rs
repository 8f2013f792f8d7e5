//! Save and restore: all that the card holds, as data.
//!
//! Each module says in its own `state` part what of it is kept, in a type of its own, so that the layout of a file does
//! not change with the code. What follows from something else is not kept (bus mastering and MSI-X Enable stand in
//! configuration space), nor is what only saves time (a queue's known room, scratch buffers).
//!
//! A state is not trusted: [`ManaDevice::load`] checks every id, index, range and relation before anything changes, and
//! keeps no more memory than a guest could have made it keep. What holds is what a guest could have brought about by
//! itself; guest memory is believed as little as ever.
//!
//! Times are kept as distances from the moment of saving, because clocks begin anew.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, DeviceConfig};
use crate::counters;
use crate::firmware::state::FirmwareState;
use crate::pci::config_space::state::ConfigSpaceState;
use crate::pci::msix::state::MsixState;
use crate::sync::lock;
use crate::timers::state::TimerState;
use crate::vport::state::VportState;
use crate::{Host, ManaDevice};

/// First bytes of a state.
const MAGIC: &[u8; 8] = b"MANADEV\0";
/// Layout of what follows. Raised whenever a type in a `state` module changes.
const VERSION: u32 = 1;

/// Why a state is refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Something else.
    #[error("this is not the saved state of a MANA device")]
    NotAState,
    /// Written by another version of this crate.
    #[error("the state has layout {0}, but only {VERSION} can be restored")]
    Version(u32),
    /// Cut off, or not what the layout says.
    #[error("the state can't be read: {0}")]
    Encoding(#[from] postcard::Error),
    /// Of a device with other options.
    #[error("the state is of a device with another {0}")]
    OtherDevice(&'static str),
    /// The options in the state make no device.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No guest could have brought this about.
    #[error("the state contradicts itself: {0}")]
    Impossible(String),
}

/// `Ok` if `holds`; else the state is impossible, for the reason `why`.
pub(crate) fn check(holds: bool, why: impl FnOnce() -> String) -> Result<(), StateError> {
    if holds { Ok(()) } else { Err(StateError::Impossible(why())) }
}

/// The state is impossible.
pub(crate) fn impossible(why: impl Into<String>) -> StateError {
    StateError::Impossible(why.into())
}

/// A count that no card reaches in its life: what is below it can be raised without overflow.
pub(crate) const MAX_COUNT: u64 = 1 << 62;

/// Everything that a [`ManaDevice`] holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    config: DeviceConfig,
    pci: ConfigSpaceState,
    msix: MsixState,
    window: [u8; 32],
    firmware: FirmwareState,
    vports: Vec<VportState>,
    timers: Vec<TimerState>,
    counters: Vec<(String, u64)>,
    broken_rules: Vec<(String, u64)>,
}

impl State {
    /// The device's options.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }
    /// As bytes: a magic number, the layout's version, and the state in postcard's encoding.
    ///
    /// # Errors
    /// Out of memory.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        Ok(postcard::to_extend(self, bytes)?)
    }
    /// From what [`to_bytes`](Self::to_bytes) made. What it holds is checked by [`ManaDevice::load`].
    ///
    /// # Errors
    /// [`StateError`] if the bytes are not a state of this version, whole and with nothing behind it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let body = bytes.strip_prefix(MAGIC).ok_or(StateError::NotAState)?;
        let (version, body) = body.split_first_chunk().ok_or(StateError::NotAState)?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let (state, rest) = postcard::take_from_bytes(body)?;
        check(rest.is_empty(), || format!("{} bytes follow it", rest.len()))?;
        Ok(state)
    }
}

/// What of the options differs.
fn difference(a: &DeviceConfig, b: &DeviceConfig) -> Option<&'static str> {
    let same = [
        ("set of ports (mac, max-queues)", a.vports == b.vports),
        ("max-msix", a.max_msix == b.max_msix),
        ("msix-table", a.msix_table_size == b.msix_table_size && a.msix_table == b.msix_table),
        ("msix-pba", a.msix_pba == b.msix_pba),
        ("mtu", a.mtu == b.mtu),
        ("rdma", a.rdma == b.rdma),
        ("doorbell-pages", a.doorbell_pages == b.doorbell_pages),
        ("indirection-entries", a.indirection_entries == b.indirection_entries),
        ("link-speed", a.link_speed_mbps == b.link_speed_mbps),
        ("configuration", a == b),
    ];
    same.into_iter().find(|(_, same)| !same).map(|(name, _)| name)
}

impl ManaDevice {
    /// All that the device holds. Whoever asks has stopped all that moves it: vCPUs (register accesses), workers
    /// ([`run`](Self::run), [`run_timers`](Self::run_timers)) and cables ([`deliver`](Self::deliver)). Without that
    /// nothing breaks, but the parts of the state are of different moments.
    ///
    /// The device goes on as if nothing had happened.
    pub fn save(&self) -> State {
        let card = &self.card;
        let now_ns = card.core.tracer.now_ns();
        let vports = card.vports.iter();
        State {
            config: card.config.clone(),
            pci: lock(&self.pci).save(),
            msix: card.core.msix.save(),
            window: lock(&self.window).save(),
            firmware: lock(&self.firmware).save(card, now_ns),
            vports: vports.map(|vport| vport.save(now_ns)).collect(),
            timers: card.queues.save_timers(now_ns),
            counters: counters::save(&card.core.counters.fields()),
            broken_rules: counters::save(&card.core.rules.fields()),
        }
    }
    /// A device that goes on where `state` was saved: see [`load`](Self::load).
    ///
    /// # Errors
    /// [`StateError`]; there is no device then.
    pub fn restore(config: DeviceConfig, host: Host, state: &State) -> Result<Self, StateError> {
        let device = Self::new(config, host)?;
        device.load(state)?;
        Ok(device)
    }
    /// Become what `state` says, over guest memory as it was when that was saved. Nothing moves until
    /// [`resume`](Self::resume); whoever calls has stopped what moves the device, as for [`save`](Self::save).
    ///
    /// # Errors
    /// [`StateError`]; nothing has changed then.
    pub fn load(&self, state: &State) -> Result<(), StateError> {
        let card = &self.card;
        if let Some(name) = difference(&card.config, &state.config) {
            return Err(StateError::OtherDevice(name));
        }
        let now_ns = card.core.tracer.now_ns();
        // First everything that can fail.
        let pci = self.power_on.restored(&state.pci)?;
        card.core.msix.check(&state.msix)?;
        let timers = TimerState::restore_all(&state.timers, card.queues.limits(), now_ns)?;
        let firmware = state.firmware.build(card, &timers, now_ns)?;
        check(state.vports.len() == card.vports.len(), || format!("{} vPorts", state.vports.len()))?;
        let vports: Vec<_> =
            state.vports.iter().map(|vport| vport.build(card, now_ns)).collect::<Result<_, _>>()?;
        card.core.counters.check(&state.counters)?;
        card.core.rules.check(&state.broken_rules)?;
        // Then everything changes.
        self.clear();
        card.core.msix.load(&state.msix, pci.msix_control());
        lock(&self.window).load(state.window);
        vports.into_iter().zip(&card.vports).for_each(|(restored, vport)| vport.load(restored));
        lock(&self.firmware).load(card, firmware);
        card.queues.load_timers(timers);
        card.core.counters.load(&state.counters);
        card.core.rules.load(&state.broken_rules);
        self.bus_master.store(pci.bus_master(), Ordering::SeqCst);
        *lock(&self.pci) = pci;
        Ok(())
    }
    /// After [`load`](Self::load), once everything around the device runs: tells the interrupt controller of the
    /// vectors' routes, and whoever runs the queues that there may be work.
    pub fn resume(&self) {
        self.card.core.msix.replay();
        self.card.queues.resume_all();
        self.card.queues.wake_timers();
    }
    /// What a stranger's bytes do to a device: for fuzzing. They are refused, or the device runs on with them.
    ///
    /// # Errors
    /// [`StateError`]; nothing has changed then.
    pub fn load_bytes(&self, bytes: &[u8]) -> Result<(), StateError> {
        self.load(&State::from_bytes(bytes)?)
    }
}
