//! What happened, step by step: the typed events that traces, reports and tests are made of.
//!
//! The names and fields are a contract (`mana-vmm trace`, guest-tests and scripts read them). Serialised with
//! `serde`, an [`Event`] is an object whose `event` field is the name.

use std::sync::Arc;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::doors::Clock;

/// Takes events. Called on the thread that runs the device: be quick.
pub trait Observer: Send + Sync {
    /// `event` happened at `t_ns` of the device's clock.
    fn event(&self, t_ns: u64, event: &Event);
}

/// The device's way to its observer.
#[derive(Clone)]
pub struct Tracer {
    clock: Arc<dyn Clock>,
    observer: Option<Arc<dyn Observer>>,
}

impl Tracer {
    /// Report to `observer` with times of `clock`.
    pub fn new(clock: Arc<dyn Clock>, observer: Option<Arc<dyn Observer>>) -> Self {
        Self { clock, observer }
    }
    /// Time of the device's clock, nanoseconds.
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }
    /// As [`now_ns`](Self::now_ns), for times that only an event tells: without an observer 0, and the clock is not
    /// asked.
    pub fn stamp_ns(&self) -> u64 {
        if self.observer.is_some() { self.clock.now_ns() } else { 0 }
    }
    /// Report what `event` makes, if anybody wants to know.
    #[inline]
    pub fn emit(&self, event: impl FnOnce() -> Event) {
        if let Some(observer) = &self.observer {
            observer.event(self.clock.now_ns(), &event());
        }
    }
    /// Reports nothing; for tests.
    #[cfg(test)]
    pub fn silent() -> Self {
        struct Stopped;
        impl Clock for Stopped {
            fn now_ns(&self) -> u64 {
                0
            }
        }
        Self::new(Arc::new(Stopped), None)
    }
}

/// Decoded fields of a message, in message order: the ones that matter, under the driver's names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(pub Vec<(&'static str, u64)>);

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// Kinds of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueKind {
    /// Event queue.
    Eq,
    /// Completion queue.
    Cq,
    /// Send queue.
    Sq,
    /// Receive queue.
    Rq,
}

/// One step of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event")]
#[allow(missing_docs, reason = "the field names are the driver's and PCI's own")]
pub enum Event {
    #[serde(rename = "pci.command")]
    PciCommand { memory: bool, bus_master: bool },
    #[serde(rename = "pci.flr")]
    PciFlr,
    #[serde(rename = "msix.enable")]
    MsixEnable { table_size: u16, masked: bool },
    #[serde(rename = "msix.disable")]
    MsixDisable { table_size: u16, masked: bool },
    #[serde(rename = "msix.function_mask")]
    MsixFunctionMask { table_size: u16, masked: bool },
    #[serde(rename = "msix.program")]
    MsixProgram { vector: u16, address: u64, data: u32 },
    #[serde(rename = "msix.unmask")]
    MsixUnmask { vector: u16 },
    #[serde(rename = "msix.mask")]
    MsixMask { vector: u16 },
    #[serde(rename = "msix.fire")]
    MsixFire { vector: u16 },
    #[serde(rename = "msix.pend")]
    MsixPend { vector: u16 },
    #[serde(rename = "reg.read")]
    RegRead { offset: u64, size: u8, value: u64 },
    #[serde(rename = "smc.request")]
    SmcRequest {
        #[serde(rename = "type")]
        kind: &'static str,
    },
    #[serde(rename = "smc.response")]
    SmcResponse {
        #[serde(rename = "type")]
        kind: &'static str,
        status: u8,
    },
    #[serde(rename = "hwc.request")]
    HwcRequest {
        seq: u64,
        /// The driver's name of the command, e.g. `GDMA_QUERY_MAX_RESOURCES`; `UNKNOWN` if there is none.
        command: &'static str,
        code: u32,
        version: u16,
        #[serde(flatten)]
        fields: Fields,
    },
    #[serde(rename = "hwc.response")]
    HwcResponse {
        seq: u64,
        command: &'static str,
        code: u32,
        version: u16,
        status: u32,
        duration_ns: u64,
        #[serde(flatten)]
        fields: Fields,
    },
    #[serde(rename = "eqe")]
    Eqe {
        eq: u32,
        #[serde(rename = "type")]
        kind: u8,
    },
    #[serde(rename = "queue.create")]
    QueueCreate {
        kind: QueueKind,
        id: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        eq: Option<u32>,
        #[serde(skip_serializing_if = "Option::is_none")]
        msix: Option<u16>,
        entries: u32,
    },
    #[serde(rename = "queue.destroy")]
    QueueDestroy { kind: QueueKind, id: u32 },
    #[serde(rename = "vport.rx")]
    VportRx { vport: u16, enable: bool, rss: bool, entries: u16, coalescing: bool },
    #[serde(rename = "fault")]
    Fault { detail: String },
    /// A moment that somebody outside has named.
    #[serde(rename = "mark")]
    Mark { name: String },
    #[serde(rename = "host.event")]
    HostEvent { detail: String },
    #[serde(rename = "rule.violation")]
    RuleViolation { rule: &'static str, detail: String },
    /// Live objects by kind.
    #[serde(rename = "ledger")]
    Ledger {
        #[serde(flatten)]
        live: Fields,
    },
}
