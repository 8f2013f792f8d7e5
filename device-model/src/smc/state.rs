//! What is kept of the shared-memory window: its bytes.

use super::{SIZE, Window};

impl Window {
    /// What is kept.
    pub fn save(&self) -> [u8; SIZE] {
        self.bytes
    }
    /// Hold `bytes`.
    pub fn load(&mut self, bytes: [u8; SIZE]) {
        self.bytes = bytes;
    }
}
