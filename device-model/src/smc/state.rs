//! What is kept of the shared-memory window: its bytes. A request that the simulated host lets wait is lost, as its
//! faults are, and the window is the driver's again.

use zerocopy::IntoBytes;

use super::{HEADER, SIZE, Window};

impl Window {
    /// What is kept.
    pub fn save(&self) -> [u8; SIZE] {
        let mut bytes = self.bytes;
        if let Some(header) = self.withheld {
            bytes.iter_mut().skip(HEADER).zip(header.0.to_le().as_bytes()).for_each(|(to, from)| *to = *from);
        }
        if let Some(last) = bytes.last_mut() {
            // The top bit of the header: the card owns the window.
            *last &= 0x7f;
        }
        bytes
    }
    /// Hold `bytes`.
    pub fn load(&mut self, bytes: [u8; SIZE]) {
        *self = Self { bytes, ..Self::default() };
    }
}
