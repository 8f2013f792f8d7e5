//! A cable between two ports of one machine (`--netdev loopback,id=A,peer=B`).

use std::sync::Arc;

use mana_device::doors::{Port, PortCapabilities, PortDropped, TxFrame};

use super::inbox::Inbox;
use super::{Accepts, Cable, Deliver, Kick, Polled};

/// One end.
pub struct Loopback {
    own: Arc<Inbox>,
    other: Arc<Inbox>,
}

impl Loopback {
    /// The end whose frames come from `own`; what it sends goes to `other`.
    pub fn new(own: Arc<Inbox>, other: Arc<Inbox>) -> Self {
        Self { own, other }
    }
}

impl Port for Loopback {
    /// Frames stay unfinished as long as they are in the machine; the other end finishes what its taker can't.
    fn capabilities(&self) -> PortCapabilities {
        PortCapabilities { checksum: true, segmentation: true }
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        self.other.put(frame)
    }
    fn flush(&self) {
        self.other.ring();
    }
}

impl Cable for Loopback {
    fn on_ready(&self, kick: Kick) {
        self.own.on_ready(kick);
    }
    fn accept(&self, accepts: Accepts) {
        self.own.accept(accepts);
    }
    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        self.own.poll(budget, deliver)
    }
    fn dropped(&self) -> u64 {
        self.own.dropped()
    }
}
