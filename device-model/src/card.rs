//! The parts of the card that the data path and the commands share.

use std::sync::Arc;

use crate::config::DeviceConfig;
use crate::queues::{Core, Queues};
use crate::vport::Vport;

/// Everything but what the hardware channel keeps for itself.
pub struct Card {
    /// As the host wants it.
    pub config: DeviceConfig,
    /// Events, counters, memory, interrupts.
    pub core: Arc<Core>,
    /// All queues.
    pub queues: Queues,
    /// All vPorts, by index.
    pub vports: Box<[Vport]>,
}
