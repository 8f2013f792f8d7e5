//! pvpanic: the port through which a guest's kernel says that it has panicked (QEMU's docs/specs/pvpanic.rst).

use std::sync::Arc;

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::stop::{Outcome, Stop};

/// The kernel has panicked. The only event that we take, so a kernel that goes on to a crash kernel says it too.
const PANICKED: u8 = 1 << 0;

/// One port; reads say which events it takes.
pub struct Pvpanic {
    stop: Arc<Stop>,
}

impl Pvpanic {
    /// Panics go to `stop`.
    pub fn new(stop: Arc<Stop>) -> Self {
        Self { stop }
    }
}

impl DevicePio for Pvpanic {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
        let event = data.first().copied().unwrap_or_default();
        if event & PANICKED != 0 {
            self.stop.request(Outcome::GuestPanic("the guest's kernel panicked (pvpanic)".into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_run() {
        let stop = Stop::new().unwrap();
        let pvpanic = Pvpanic::new(stop.clone());
        pvpanic.pio_write(PioAddress(0x505), 0, &[4]);
        assert_eq!(stop.outcome(), None);
        pvpanic.pio_write(PioAddress(0x505), 0, &[1]);
        assert!(matches!(stop.outcome(), Some(Outcome::GuestPanic(_))));
    }
}
