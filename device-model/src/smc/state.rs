//! What is kept of the shared-memory window: its bytes. A request that the simulated host lets wait is lost, as its
//! faults are, and the window is the driver's again.

use super::{SIZE, Window};

impl Window {
    /// What is kept.
    pub fn save(&self) -> [u8; SIZE] {
        let mut bytes = self.bytes;
        if let Some(last) = bytes.last_mut() {
            // The top bit of the header: the card owns the window.
            *last &= 0x7f;
        }
        bytes
    }
    /// Hold `bytes`.
    pub fn load(&mut self, bytes: [u8; SIZE]) {
        self.bytes = bytes;
    }
}
