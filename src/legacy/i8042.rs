//! The keyboard controller's command port, which kernels use to reset a machine when all else fails.

use std::sync::{Arc, Mutex};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::{I8042Device, Trigger};

use crate::layout::I8042_COMMAND_PORT;
use crate::stop::{Outcome, Stop};

/// What [`I8042Device`] calls the command port: its offset from the data port.
const COMMAND_OFFSET: u8 = (I8042_COMMAND_PORT - 0x60) as u8;

/// One port, [`I8042_COMMAND_PORT`]. There is no keyboard, so the status is always 0.
pub struct I8042 {
    device: Mutex<I8042Device<ResetTrigger>>,
}

struct ResetTrigger(Arc<Stop>);

impl Trigger for ResetTrigger {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.request(Outcome::Reset);
        Ok(())
    }
}

impl I8042 {
    /// Resets go to `stop`.
    pub fn new(stop: Arc<Stop>) -> Self {
        Self { device: Mutex::new(I8042Device::new(ResetTrigger(stop))) }
    }
}

impl DevicePio for I8042 {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
        if let (Ok(mut device), Some(value)) = (self.device.lock(), data.first()) {
            let Ok(()) = device.write(COMMAND_OFFSET, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_resets() {
        let stop = Stop::new().unwrap();
        let i8042 = I8042::new(stop.clone());
        i8042.pio_write(PioAddress(I8042_COMMAND_PORT), 0, &[0xaa]);
        i8042.pio_write(PioAddress(I8042_COMMAND_PORT), 0, &[]);
        assert_eq!(stop.outcome(), None);
        i8042.pio_write(PioAddress(I8042_COMMAND_PORT), 0, &[0xfe]);
        assert_eq!(stop.outcome(), Some(&Outcome::Reset));
    }
}
