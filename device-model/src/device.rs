//! The card as its holder sees it: the doors that lead in.

use std::sync::Arc;

use crate::config::DeviceConfig;
use crate::doors::{Clock, Memory, MsiSink, Port, RxFrame, Waker, Work};
use crate::observe::{Fields, Observer};

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

/// A configuration the device can't be built from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct ConfigError {
    /// The command line's name of the option, e.g. `max-msix`.
    pub option: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
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
pub struct ManaDevice {}

impl ManaDevice {
    /// Build the device in its power-on state.
    ///
    /// # Errors
    /// [`ConfigError`] names the option that is out of range.
    pub fn new(_config: DeviceConfig, _host: Host) -> Result<Self, ConfigError> {
        Ok(Self {})
    }
    /// Configuration read of 1, 2 or 4 bytes at `offset` (0 to 4095).
    pub fn config_read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    /// Configuration write of 1, 2 or 4 bytes at `offset` (0 to 4095).
    pub fn config_write(&self, _offset: u16, _data: &[u8]) -> ConfigEffect {
        ConfigEffect::default()
    }
    /// The function's BARs as the guest has placed them.
    pub fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }
    /// Memory Space Enable of the command register.
    pub fn memory_enabled(&self) -> bool {
        false
    }
    /// Read of 1, 2, 4 or 8 bytes from a BAR.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers; `data` is then all ones.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        data.fill(0xff);
        Err(AccessError { bar, offset, size: data.len() })
    }
    /// Write of 1, 2, 4 or 8 bytes to a BAR.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers; the write is dropped.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError { bar, offset, size: data.len() })
    }
    /// Do `work`, at most `budget` requests or packets of it. One piece of work never runs on two threads at
    /// once; different pieces may.
    pub fn run(&self, _work: Work, _budget: usize) -> Ran {
        Ran::Idle
    }
    /// Do what has come due; the answer is the next deadline on the [`Clock`], if there is one.
    pub fn run_timers(&self) -> Option<u64> {
        None
    }
    /// Frames from the cable of vPort `port`, in order. Each is steered, written to guest memory and completed,
    /// or dropped and counted; the answer is how many were not dropped.
    pub fn deliver(&self, _port: usize, _frames: &[RxFrame<'_>]) -> usize {
        0
    }
    /// Reset of the whole machine: back to the power-on state.
    pub fn reset(&self) {}
    /// Live objects by kind; all zero when the driver left nothing behind.
    pub fn ledger(&self) -> Fields {
        Fields::default()
    }
    /// Named counters of drops, errors and traffic.
    pub fn counters(&self) -> Fields {
        Fields::default()
    }
}
