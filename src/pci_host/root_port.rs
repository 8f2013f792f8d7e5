//! A PCI Express root port with one slot and one function in it, that can't be unplugged.
//!
//! Sources: PCI-to-PCI bridge architecture specification 1.2, chapter 3 (type 1 header); PCI Express base
//! specification, 7.5.3 (PCI Express capability).

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mana_device::ConfigEffect;

use super::bar_map::{self, Mapping};
use super::config_space::ConfigSpace;
use super::{PciFunction, contains};

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CLASS_REVISION: usize = 0x08;
const CLASS_PCI_BRIDGE: u32 = 0x06_04_00;
const HEADER_TYPE: usize = 0x0e;
const TYPE_1: u16 = 1;
/// Primary, secondary and subordinate bus number, a byte each.
pub const BUS_NUMBERS: usize = 0x18;
const SECONDARY_BUS: usize = 0x19;
/// Base and limit of the I/O window: address bits 15:12, in bits 7:4 of each byte. No function has I/O BARs, but some
/// kernels (6.1) take a bridge without the register for one with a window at 0.
pub const IO_WINDOW: usize = 0x1c;
/// Base and limit of the 32-bit window: address bits 31:20, in bits 15:4 of each half.
pub const MEMORY_WINDOW: usize = 0x20;
/// Base and limit of the prefetchable window, which goes on in the next registers.
pub const PREFETCHABLE_WINDOW: usize = 0x24;
/// Address bits 63:32 of the prefetchable window's base.
pub const PREFETCHABLE_BASE_UPPER: usize = 0x28;
/// Address bits 63:32 of the prefetchable window's limit.
pub const PREFETCHABLE_LIMIT_UPPER: usize = 0x2c;
const WINDOW_64_BIT: u32 = 0x0001_0001;
const WINDOW_ADDRESS: u32 = 0xfff0_fff0;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const BRIDGE_CONTROL: usize = 0x3e;
const BRIDGE_CONTROL_SECONDARY_RESET: u16 = 1 << 6;

/// The PCI Express capability's place.
const EXPRESS: usize = 0x40;

/// The bits of a bridge that say which addresses pass.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Routing {
    memory_enabled: bool,
    memory: Range<u64>,
    prefetchable: Range<u64>,
}

/// A root port and the function behind it.
pub struct RootPort {
    config: Mutex<ConfigSpace>,
    function: Arc<dyn PciFunction>,
}

impl RootPort {
    /// A port whose slot has the physical slot number `slot`. Its windows are closed.
    pub fn new(slot: u16, function: Arc<dyn PciFunction>) -> Self {
        Self { config: Mutex::new(power_on_config(slot)), function }
    }

    /// What is in the slot.
    pub fn function(&self) -> &Arc<dyn PciFunction> {
        &self.function
    }

    /// The bus number behind the port.
    pub fn secondary_bus(&self) -> u8 {
        self.config().u8(SECONDARY_BUS)
    }

    /// Configuration read.
    pub fn config_read(&self, register: u16, data: &mut [u8]) {
        self.config().read(register, data);
    }

    /// Configuration write. Setting Secondary Bus Reset resets the function.
    pub fn config_write(&self, register: u16, data: &[u8]) -> ConfigEffect {
        let (before, after) = {
            let mut config = self.config();
            let before = config.clone();
            config.write(register, data);
            (before, config.clone())
        };
        let in_reset =
            |config: &ConfigSpace| config.u16(BRIDGE_CONTROL) & BRIDGE_CONTROL_SECONDARY_RESET != 0;
        let reset = in_reset(&after) && !in_reset(&before);
        if reset {
            self.function.reset();
        }
        ConfigEffect { bars_changed: reset || routing(&before) != routing(&after) }
    }

    /// The function's BARs that the port lets through.
    pub fn mappings(&self) -> Vec<Mapping> {
        let routing = routing(&self.config());
        if !routing.memory_enabled {
            return Vec::new();
        }
        let passes =
            |range: &Range<u64>| contains(&routing.memory, range) || contains(&routing.prefetchable, range);
        let mut mappings = bar_map::mappings(&self.function);
        mappings.retain(|mapping| passes(&mapping.range));
        mappings
    }

    /// What is kept: the function behind it has its own.
    pub fn save(&self) -> Vec<u8> {
        self.config().save()
    }

    /// Become what was saved.
    ///
    /// # Errors
    /// It is of another port.
    pub fn load(&self, saved: &[u8]) -> anyhow::Result<()> {
        self.config().load(saved)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn routing(config: &ConfigSpace) -> Routing {
    let upper = |register| u64::from(config.u32(register)) << 32;
    Routing {
        memory_enabled: config.u16(COMMAND) & COMMAND_MEMORY != 0,
        memory: window(config.u32(MEMORY_WINDOW), 0, 0),
        prefetchable: window(
            config.u32(PREFETCHABLE_WINDOW),
            upper(PREFETCHABLE_BASE_UPPER),
            upper(PREFETCHABLE_LIMIT_UPPER),
        ),
    }
}

/// Addresses from a base/limit register: empty if the limit is below the base.
fn window(base_limit: u32, base_upper: u64, limit_upper: u64) -> Range<u64> {
    let base = base_upper | u64::from(base_limit & 0xfff0) << 16;
    let last = limit_upper | u64::from(base_limit & 0xfff0_0000) | 0xf_ffff;
    base..last.saturating_add(1)
}

/// The base/limit register for `range`, both ends at multiples of 1 MiB, and the upper halves.
pub fn window_registers(range: &Range<u64>) -> (u32, u32, u32) {
    let last = range.end.wrapping_sub(1);
    let base_limit = (range.start as u32 >> 16 & 0xfff0) | (last as u32 & 0xfff0_0000);
    (base_limit, (range.start >> 32) as u32, (last >> 32) as u32)
}

fn power_on_config(slot: u16) -> ConfigSpace {
    const VENDOR_RED_HAT: u16 = 0x1b36;
    const DEVICE_PCIE_ROOT_PORT: u16 = 0x000c;
    /// I/O, Memory, Bus Master, Parity Error Response, SERR# Enable, Interrupt Disable.
    const COMMAND_WRITABLE: u16 = 0x0547;
    /// SERR# Enable and Secondary Bus Reset.
    const BRIDGE_CONTROL_WRITABLE: u16 = BRIDGE_CONTROL_SECONDARY_RESET | 1 << 1;

    let mut config = ConfigSpace::new();
    config.set_u16(0x00, VENDOR_RED_HAT);
    config.set_u16(0x02, DEVICE_PCIE_ROOT_PORT);
    config.allow_u16(COMMAND, COMMAND_WRITABLE);
    config.set_u16(STATUS, STATUS_CAPABILITIES);
    config.set_u32(CLASS_REVISION, CLASS_PCI_BRIDGE << 8);
    config.set_u16(HEADER_TYPE, TYPE_1);
    config.allow_u32(BUS_NUMBERS, 0x00ff_ffff);
    config.allow_u16(IO_WINDOW, 0xf0f0);
    config.allow_u32(MEMORY_WINDOW, WINDOW_ADDRESS);
    config.set_u32(PREFETCHABLE_WINDOW, WINDOW_64_BIT);
    config.allow_u32(PREFETCHABLE_WINDOW, WINDOW_ADDRESS);
    config.allow_u32(PREFETCHABLE_BASE_UPPER, u32::MAX);
    config.allow_u32(PREFETCHABLE_LIMIT_UPPER, u32::MAX);
    config.set_u16(CAPABILITIES, EXPRESS as u16);
    config.allow_u16(INTERRUPT_LINE, 0x00ff);
    config.allow_u16(BRIDGE_CONTROL, BRIDGE_CONTROL_WRITABLE);
    add_express_capability(&mut config, slot);
    config
}

/// A 16 GT/s x16 link that is up and reports so (without that report Linux waits a second after each reset), a slot
/// that is occupied, and no service that would need an interrupt.
fn add_express_capability(config: &mut ConfigSpace, slot: u16) {
    const ID: u16 = 0x10;
    const VERSION_2: u16 = 2;
    const ROOT_PORT: u16 = 4 << 4;
    const SLOT_IMPLEMENTED: u16 = 1 << 8;
    const ROLE_BASED_ERRORS: u32 = 1 << 15;
    /// All but Initiate FLR, which a port has not, and the error-reporting bits, which would have to report.
    const DEVICE_CONTROL_WRITABLE: u16 = 0x7ff0;
    const SPEED_16_GT: u16 = 4;
    const WIDTH_16: u16 = 16 << 4;
    const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
    const LINK_ACTIVE: u16 = 1 << 13;
    /// ASPM, Read Completion Boundary, Common Clock, Extended Synch.
    const LINK_CONTROL_WRITABLE: u16 = 0x00cb;
    const SLOT_PRESENCE: u16 = 1 << 6;
    const SPEEDS_UP_TO_16_GT: u32 = 0b1111 << 1;

    config.set_u16(EXPRESS, ID);
    config.set_u16(EXPRESS + 0x02, VERSION_2 | ROOT_PORT | SLOT_IMPLEMENTED);
    config.set_u32(EXPRESS + 0x04, ROLE_BASED_ERRORS);
    config.allow_u16(EXPRESS + 0x08, DEVICE_CONTROL_WRITABLE);
    config.set_u32(EXPRESS + 0x0c, u32::from(SPEED_16_GT | WIDTH_16) | LINK_ACTIVE_REPORTING);
    config.allow_u16(EXPRESS + 0x10, LINK_CONTROL_WRITABLE);
    config.set_u16(EXPRESS + 0x12, SPEED_16_GT | WIDTH_16 | LINK_ACTIVE);
    config.set_u32(EXPRESS + 0x14, u32::from(slot) << 19);
    config.set_u16(EXPRESS + 0x1a, SLOT_PRESENCE);
    config.set_u32(EXPRESS + 0x2c, SPEEDS_UP_TO_16_GT);
    config.set_u16(EXPRESS + 0x30, SPEED_16_GT);
    config.allow_u16(EXPRESS + 0x30, 0x000f);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_read_back_as_written() {
        for range in [0xc000_0000..0xc010_0000, 0x1_0000_0000..0x1_0230_0000, 0xfff0_0000..0x1_0000_0000] {
            let (base_limit, base_upper, limit_upper) = window_registers(&range);
            let upper = |half| u64::from(half) << 32;
            assert_eq!(window(base_limit, upper(base_upper), upper(limit_upper)), range);
        }
    }

    #[test]
    fn a_limit_below_the_base_closes_the_window() {
        assert!(window(0x0000_fff0, 0, 0).is_empty());
        assert!(window(0x0000_0000, 1 << 32, 0).is_empty());
    }
}
