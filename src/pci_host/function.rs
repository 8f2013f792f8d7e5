//! What a PCI function must do to be plugged in.

use mana_device::{AccessError, Bar, ConfigEffect, ManaDevice};

/// A function. Called from any vCPU's thread, several at once; it guards its own state.
pub trait PciFunction: Send + Sync {
    /// Configuration read of 1, 2 or 4 naturally aligned bytes at `register` (0 to 4095).
    fn config_read(&self, register: u16, data: &mut [u8]);
    /// Configuration write of 1, 2 or 4 naturally aligned bytes at `register` (0 to 4095).
    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect;
    /// The BARs as the guest has placed them.
    fn bars(&self) -> Vec<Bar>;
    /// Memory Space Enable of the command register.
    fn memory_enabled(&self) -> bool;
    /// Read from a BAR; the bytes lie within it.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError>;
    /// Write to a BAR; the bytes lie within it.
    ///
    /// # Errors
    /// [`AccessError`] where nothing answers.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError>;
    /// Back to the power-on state (hot reset).
    fn reset(&self);
}

impl PciFunction for ManaDevice {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.config_read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        self.config_write(register, data)
    }

    fn bars(&self) -> Vec<Bar> {
        self.bars()
    }

    fn memory_enabled(&self) -> bool {
        self.memory_enabled()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.bar_read(bar, offset, data)
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.bar_write(bar, offset, data)
    }

    fn reset(&self) {
        self.reset();
    }
}
