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

pub use acpi_pm::AcpiPm;
pub use agent::AgentPort;
pub use console::{Console, ConsoleTimers};
pub use i8042::I8042;
pub use pvpanic::Pvpanic;
pub use rtc::{Rtc, RtcAlarm};
pub use serial::{SerialInput, SerialPort};
