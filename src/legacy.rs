//! What a PC has had since long before PCI, as far as kernels still ask for it, and the ports of virtual machines
//! that live beside it.

mod acpi_pm;
mod agent;
mod console;
mod i8042;
mod panic_watch;
mod pvpanic;
mod rtc;
mod serial;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use acpi_pm::AcpiPm;
pub use agent::AgentPort;
pub use console::{Console, ConsoleTimers};
pub use i8042::I8042;
pub use panic_watch::what;
pub use pvpanic::Pvpanic;
pub use rtc::{Rtc, RtcAlarm};
pub use serial::{SerialInput, SerialPort};

/// The devices that have something to keep.
pub struct Legacy {
    /// COM1.
    pub serial: Arc<SerialPort>,
    /// The real-time clock.
    pub rtc: Arc<Rtc>,
    /// ACPI's fixed hardware.
    pub pm: Arc<AcpiPm>,
    /// The channel from the guest's agent.
    pub agent: Arc<AgentPort>,
}

/// What is kept of them. The keyboard controller and pvpanic have nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegacyState {
    serial: serial::UartState,
    rtc: rtc::RtcState,
    pm: acpi_pm::Events,
    agent: agent::AgentState,
}

impl Legacy {
    /// What is kept.
    pub fn save(&self) -> LegacyState {
        let Self { serial, rtc, pm, agent } = self;
        LegacyState { serial: serial.save(), rtc: rtc.save(), pm: pm.save(), agent: agent.save() }
    }

    /// Become what `state` says.
    ///
    /// # Errors
    /// No guest can have brought it about.
    pub fn load(&self, state: &LegacyState) -> anyhow::Result<()> {
        self.serial.load(&state.serial)?;
        self.agent.load(&state.agent)?;
        self.rtc.load(&state.rtc);
        self.pm.load(state.pm);
        Ok(())
    }
}
