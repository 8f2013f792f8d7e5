//! What a virtio function's configuration space holds at power-on, and what lies where in its BAR.
//!
//! Source: virtio 1.2, 4.1.4.

use mana_device::pci::msix;

use super::super::Backend;
use crate::pci_host::config_space::ConfigSpace;

/// What lies where in BAR 0.
pub mod bar {
    use std::ops::Range;

    pub const COMMON: Range<u64> = 0..0x38;
    pub const ISR: Range<u64> = 0x1000..0x1001;
    pub const DEVICE: Range<u64> = 0x2000..0x2100;
    /// A doorbell a queue, [`NOTIFY_MULTIPLIER`] bytes apart.
    pub const NOTIFY: Range<u64> = 0x3000..0x3400;
    pub const MSIX_TABLE: Range<u64> = 0x4000..0x5000;
    pub const MSIX_PBA: Range<u64> = 0x5000..0x5020;
    pub const SIZE: u64 = 0x8000;
    pub const NOTIFY_MULTIPLIER: u64 = 4;
}

/// Registers of the configuration space.
pub mod register {
    pub const COMMAND: u16 = 0x04;
    pub const BAR0: u16 = 0x10;
    pub const MSIX: u16 = 0x40;
    pub const COMMON: u16 = 0x50;
    pub const ISR: u16 = 0x60;
    pub const DEVICE: u16 = 0x70;
    pub const NOTIFY: u16 = 0x80;
    pub const ACCESS: u16 = 0x98;
    /// Data of the configuration access capability.
    pub const ACCESS_DATA: u16 = ACCESS + 16;
}
/// Memory Space Enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus Master Enable.
pub const COMMAND_MASTER: u16 = 1 << 2;

/// Where BAR 0 is.
pub fn bar_address(config: &ConfigSpace) -> u64 {
    let register = usize::from(register::BAR0);
    u64::from(config.u32(register) & !0xf) | u64::from(config.u32(register + 4)) << 32
}

/// The header and capabilities of a function in its power-on state.
pub fn config_space(backend: &impl Backend, vectors: u16) -> ConfigSpace {
    const VENDOR: u16 = 0x1af4;
    const FIRST_DEVICE: u16 = 0x1040;
    const MSIX_CAPABILITY: u16 = 0x11;
    const VENDOR_CAPABILITY: u16 = 0x09;
    /// 64 bits, and reading the interrupt status has a side effect.
    const BAR_FLAGS: u32 = 0b0100;

    let identity = backend.identity();
    let mut config = ConfigSpace::new();
    config.set_u16(0x00, VENDOR);
    config.set_u16(0x02, FIRST_DEVICE + identity.device);
    config.allow_u16(register::COMMAND.into(), 0x0546);
    // Capabilities list.
    config.set_u16(0x06, 0x0010);
    config.set_u32(0x08, identity.class << 8 | 1);
    config.allow_u16(0x0c, 0x00ff);
    let mask = !(bar::SIZE - 1);
    config.set_u32(register::BAR0.into(), BAR_FLAGS);
    config.allow_u32(register::BAR0.into(), mask as u32 & !0xf);
    config.allow_u32(usize::from(register::BAR0) + 4, (mask >> 32) as u32);
    config.set_u16(0x2c, VENDOR);
    config.set_u16(0x2e, FIRST_DEVICE + identity.device);
    config.set_u16(0x34, register::MSIX);
    config.allow_u16(0x3c, 0x00ff);

    let at = usize::from(register::MSIX);
    config.set_u16(at, MSIX_CAPABILITY | register::COMMON << 8);
    config.set_u16(at + 2, vectors - 1);
    config.allow_u16(at + 2, msix::ENABLE | msix::FUNCTION_MASK);
    config.set_u32(at + 4, bar::MSIX_TABLE.start as u32);
    config.set_u32(at + 8, bar::MSIX_PBA.start as u32);

    let structures = [
        (register::COMMON, register::ISR, 16, 1, bar::COMMON),
        (register::ISR, register::DEVICE, 16, 3, bar::ISR),
        (register::DEVICE, register::NOTIFY, 16, 4, bar::DEVICE),
        (register::NOTIFY, register::ACCESS, 20, 2, bar::NOTIFY),
        (register::ACCESS, 0, 20, 5, 0..0),
    ];
    for (at, next, len, kind, range) in structures {
        let at = usize::from(at);
        config.set_u16(at, VENDOR_CAPABILITY | next << 8);
        config.set_u16(at + 2, len | kind << 8);
        config.set_u32(at + 8, range.start as u32);
        config.set_u32(at + 12, (range.end - range.start) as u32);
    }
    config.set_u32(usize::from(register::NOTIFY) + 16, bar::NOTIFY_MULTIPLIER as u32);
    let access = usize::from(register::ACCESS);
    config.allow_u16(access + 4, 0x00ff);
    config.allow_u32(access + 8, u32::MAX);
    config.allow_u32(access + 12, u32::MAX);
    config
}
