//! ACPI's fixed hardware: events that raise the SCI (the RTC's alarm is the only one that happens), power-off by PM1
//! control, and the reset register.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::irq::Level;
use crate::layout::{PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE};
use crate::stop::{Outcome, Stop};

/// `RTC_STS` and `RTC_EN` (ACPI 6.5, 4.8.4.1).
const RTC_EVENT: u16 = 1 << 10;
/// `SCI_EN`: the machine is in ACPI mode, since there is no other.
const SCI_EN: u16 = 1 << 0;
const SLP_TYP_SHIFT: u16 = 10;
const SLP_TYP_MASK: u16 = 7;
const SLP_EN: u16 = 1 << 13;

/// PM1_STS; a 1 written clears the bit.
const STATUS: u16 = 0;
/// PM1_EN.
const ENABLE: u16 = 2;
const CONTROL: u16 = PM1A_CONTROL_PORT - PM1A_EVENT_PORT;
const RESET: u16 = RESET_PORT - PM1A_EVENT_PORT;

/// PM1a event block, PM1a control block and reset register: [`PORTS`](Self::PORTS) ports from [`PM1A_EVENT_PORT`] on.
pub struct AcpiPm {
    events: Mutex<Events>,
    sci: Box<dyn Level>,
    stop: Arc<Stop>,
}

/// The event block's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    status: u16,
    enable: u16,
}

impl AcpiPm {
    /// Ports that it answers.
    pub const PORTS: u16 = RESET + 1;

    /// Events go to `sci`, power-off and reset to `stop`.
    pub fn new(sci: Box<dyn Level>, stop: Arc<Stop>) -> Self {
        Self { events: Mutex::default(), sci, stop }
    }

    /// The RTC's alarm has come, which can wake a guest from suspend-to-idle.
    pub fn rtc_alarm(&self) {
        self.change(|events| events.status |= RTC_EVENT);
    }

    /// What is kept.
    pub fn save(&self) -> Events {
        *self.events()
    }

    /// Become what `saved` says; the SCI follows.
    pub fn load(&self, saved: Events) {
        self.change(|events| *events = Events { status: saved.status & RTC_EVENT, ..saved });
    }

    fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The SCI follows the events, in the order in which they change.
    fn change(&self, change: impl FnOnce(&mut Events)) {
        let mut events = self.events();
        let asserted = |events: &Events| events.status & events.enable != 0;
        let before = asserted(&events);
        change(&mut events);
        if asserted(&events) != before {
            self.sci.set(!before);
        }
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
            STATUS => self.events().status,
            ENABLE => self.events().enable,
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
            STATUS => self.change(|events| events.status &= !value),
            ENABLE => self.change(|events| events.enable = value),
            CONTROL => self.write_control(value),
            RESET if value == u16::from(RESET_VALUE) => self.stop.request(Outcome::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Sci(Arc<AtomicBool>);

    impl Level for Sci {
        fn set(&self, asserted: bool) {
            assert_ne!(self.0.swap(asserted, Ordering::Relaxed), asserted, "only changes are told");
        }
    }

    fn pm(stop: &Arc<Stop>) -> (AcpiPm, Sci) {
        let sci = Sci::default();
        (AcpiPm::new(Box::new(sci.clone()), stop.clone()), sci)
    }

    fn write(pm: &AcpiPm, port: u16, data: &[u8]) {
        pm.pio_write(PioAddress(PM1A_EVENT_PORT), port - PM1A_EVENT_PORT, data);
    }

    fn after_write(port: u16, data: &[u8]) -> Option<Outcome> {
        let stop = Stop::new().unwrap();
        write(&pm(&stop).0, port, data);
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
        let (pm, _) = pm(&Stop::new().unwrap());
        let mut data = [0xff; 4];
        pm.pio_read(PioAddress(PM1A_EVENT_PORT), CONTROL, &mut data);
        assert_eq!(u32::from_le_bytes(data), u32::from(SCI_EN));
    }

    #[test]
    fn an_enabled_event_raises_the_sci_until_it_is_cleared() {
        let (pm, sci) = pm(&Stop::new().unwrap());
        let asserted = || sci.0.load(Ordering::Relaxed);
        pm.rtc_alarm();
        assert!(!asserted(), "not enabled");
        write(&pm, PM1A_EVENT_PORT + ENABLE, &RTC_EVENT.to_le_bytes());
        assert!(asserted());
        write(&pm, PM1A_EVENT_PORT, &(!RTC_EVENT).to_le_bytes());
        assert!(asserted(), "another bit was cleared");
        write(&pm, PM1A_EVENT_PORT, &RTC_EVENT.to_le_bytes());
        assert!(!asserted());
    }
}
