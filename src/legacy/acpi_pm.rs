//! ACPI's fixed hardware: power-off by PM1 control, and the reset register. There are no fixed events to signal;
//! the event registers only keep what the guest enables.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::layout::{PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE};
use crate::stop::{Outcome, Stop};

/// `SCI_EN`: the machine is in ACPI mode, since there is no other.
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP_MASK: u16 = 7;
const SLP_EN: u16 = 1 << 13;

/// Offset of PM1_EN in the event block, whose first half is PM1_STS.
const ENABLE: u16 = 2;
const CONTROL: u16 = PM1A_CONTROL_PORT - PM1A_EVENT_PORT;
const RESET: u16 = RESET_PORT - PM1A_EVENT_PORT;

/// PM1a event block, PM1a control block and reset register: 7 ports from [`PM1A_EVENT_PORT`] on.
pub struct AcpiPm {
    enable: AtomicU16,
    stop: Arc<Stop>,
}

impl AcpiPm {
    /// Ports that it answers.
    pub const PORTS: u16 = RESET + 1;

    /// Power-off and reset go to `stop`.
    pub fn new(stop: Arc<Stop>) -> Self {
        Self { enable: AtomicU16::new(0), stop }
    }

    fn write_control(&self, value: u16) {
        let sleep_type = (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK;
        if value & SLP_EN != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.stop.request(Outcome::PowerOff);
        }
    }
}

impl DevicePio for AcpiPm {
    fn pio_read(&self, _: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let value = match offset {
            ENABLE => self.enable.load(Ordering::Relaxed),
            CONTROL => SCI_EN,
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn pio_write(&self, _: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let value = match *data {
            [low] => u16::from(low),
            [low, high, ..] => u16::from_le_bytes([low, high]),
            [] => return,
        };
        match offset {
            ENABLE => self.enable.store(value, Ordering::Relaxed),
            CONTROL => self.write_control(value),
            RESET if value == u16::from(RESET_VALUE) => self.stop.request(Outcome::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_write(port: u16, data: &[u8]) -> Option<Outcome> {
        let stop = Stop::new().unwrap();
        AcpiPm::new(stop.clone()).pio_write(PioAddress(PM1A_EVENT_PORT), port - PM1A_EVENT_PORT, data);
        stop.outcome().cloned()
    }

    #[test]
    fn only_s5_powers_off() {
        let s5 = SLP_EN | u16::from(S5_SLEEP_TYPE) << SLP_TYP_SHIFT;
        assert_eq!(after_write(PM1A_CONTROL_PORT, &s5.to_le_bytes()), Some(Outcome::PowerOff));
        assert_eq!(after_write(PM1A_CONTROL_PORT, &(s5 & !SLP_EN).to_le_bytes()), None);
        assert_eq!(after_write(PM1A_CONTROL_PORT, &SLP_EN.to_le_bytes()), None);
        assert_eq!(after_write(PM1A_EVENT_PORT, &s5.to_le_bytes()), None);
        assert_eq!(after_write(PM1A_CONTROL_PORT, &[]), None);
    }

    #[test]
    fn the_reset_register_takes_its_value_only() {
        assert_eq!(after_write(RESET_PORT, &[RESET_VALUE]), Some(Outcome::Reset));
        assert_eq!(after_write(RESET_PORT, &[0]), None);
    }

    #[test]
    fn the_machine_is_in_acpi_mode() {
        let pm = AcpiPm::new(Stop::new().unwrap());
        let mut data = [0xff; 4];
        pm.pio_read(PioAddress(PM1A_EVENT_PORT), CONTROL, &mut data);
        assert_eq!(u32::from_le_bytes(data), u32::from(SCI_EN));
    }
}
