//! A cable with nothing at its end: takes every frame, never sends one.

use mana_device::doors::{Port, PortCapabilities, PortDropped, TxFrame};

use super::{Cable, Deliver, Polled};

/// `--netdev null`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Port for Null {
    fn capabilities(&self) -> PortCapabilities {
        PortCapabilities { checksum: true, segmentation: true }
    }
    fn send(&self, _frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        Ok(())
    }
}

impl Cable for Null {
    fn poll(&self, _budget: usize, _deliver: Deliver<'_>) -> Polled {
        Polled::default()
    }
}
