//! Configuration space of the function: a type 0 header, 64-bit memory BARs, and the capabilities for power
//! management, MSI-X and PCI Express with function-level reset.
//!
//! Every register is a line of a table: offset, size, reset value, the bits that software may write.
//!
//! Source: PCI Express base specification, 7.5 and 7.7; identity from `mana_id_table` (gdma_main.c).

pub mod state;

use super::msix;
use crate::config::{BarLocation, DeviceConfig};

/// Bytes of configuration space that hold anything; the extended space above reads as 0 (no extended capability).
const SIZE: usize = 256;

/// Microsoft.
const VENDOR_ID: u32 = 0x1414;
/// `MANA_VF`.
const DEVICE_ID: u32 = 0x00ba;
/// Network controller, Ethernet; interface 0; revision 1.
const CLASS_REVISION: u32 = 0x0200_0001;

/// Offsets of the header (PCI Local Bus names).
mod header {
    pub const ID: u16 = 0x00;
    pub const COMMAND: u16 = 0x04;
    pub const STATUS: u16 = 0x06;
    pub const CLASS: u16 = 0x08;
    pub const CACHE_LINE: u16 = 0x0c;
    pub const BAR0: u16 = 0x10;
    pub const CAPABILITIES: u16 = 0x34;
    pub const INTERRUPT_LINE: u16 = 0x3c;
}
/// Offsets of the capabilities' registers.
mod cap {
    pub const PM: u16 = 0x40;
    pub const PMCSR: u16 = PM + 4;
    pub const MSIX: u16 = 0x50;
    pub const MSIX_CONTROL: u16 = MSIX + 2;
    pub const PCIE: u16 = 0x60;
    pub const DEVICE_CAP: u16 = PCIE + 0x04;
    pub const DEVICE_CONTROL: u16 = PCIE + 0x08;
    pub const LINK_CAP: u16 = PCIE + 0x0c;
    pub const LINK_CONTROL: u16 = PCIE + 0x10;
    pub const LINK_STATUS: u16 = PCIE + 0x12;
    pub const DEVICE_CONTROL_2: u16 = PCIE + 0x28;
    pub const LINK_CONTROL_2: u16 = PCIE + 0x30;
}

/// Memory Space Enable.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Bus Master Enable.
const COMMAND_MASTER: u16 = 1 << 2;
/// Initiate Function Level Reset, in Device Control.
const FLR: u16 = 1 << 15;
/// 64-bit, prefetchable: reads have no side effects, and a bridge's window above 4 GiB is prefetchable only.
const BAR_FLAGS: u32 = 0b1100;

/// A register: offset, bytes, reset value, writable bits.
type Register = (u16, u8, u32, u32);

const REGISTERS: &[Register] = &[
    (header::ID, 4, DEVICE_ID << 16 | VENDOR_ID, 0),
    // Memory Space, Bus Master, Parity Error Response, SERR#, Interrupt Disable.
    (header::COMMAND, 2, 0, 0x0546),
    // Capabilities List.
    (header::STATUS, 2, 0x0010, 0),
    (header::CLASS, 4, CLASS_REVISION, 0),
    (header::CACHE_LINE, 1, 0, 0xff),
    (header::CAPABILITIES, 1, cap::PM as u32, 0),
    (header::INTERRUPT_LINE, 1, 0, 0xff),
    // Power Management 1.2: D0 and D3hot only, no PME, No_Soft_Reset.
    (cap::PM, 4, 0x0003_0001 | (cap::MSIX as u32) << 8, 0),
    (cap::PMCSR, 2, 0x0008, 0x0003),
    // PCI Express capability version 2, endpoint.
    (cap::PCIE, 4, 0x0002_0010, 0),
    // Function Level Reset, Role-Based Error Reporting, 128-byte payloads.
    (cap::DEVICE_CAP, 4, 1 << 28 | 1 << 15, 0),
    // Relaxed Ordering, No Snoop, 512-byte read requests; all but the reset bit keep what is written.
    (cap::DEVICE_CONTROL, 2, 0x2810, 0x7fff),
    // 8 GT/s, 16 lanes.
    (cap::LINK_CAP, 4, 0x0000_0103, 0),
    (cap::LINK_CONTROL, 2, 0, 0x00c3),
    (cap::LINK_STATUS, 2, 0x0103, 0),
    (cap::DEVICE_CONTROL_2, 2, 0, 0x001f),
    (cap::LINK_CONTROL_2, 2, 0x0003, 0x000f),
];

/// What a write set off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// BARs moved, or memory decoding was switched.
    pub bars: bool,
    /// The command register's memory and bus master bits changed.
    pub command: bool,
    /// MSI-X Message Control, if it was written.
    pub msix_control: Option<u16>,
    /// A function-level reset was asked for.
    pub flr: bool,
}

/// The registers' present values.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Number and size of each BAR.
    bars: Vec<(u8, u64)>,
}

impl ConfigSpace {
    /// Reset values, with the MSI-X capability of `config` and `bars` (number, bytes).
    pub fn new(config: &DeviceConfig, bars: Vec<(u8, u64)>) -> Self {
        let mut space = Self { bytes: [0; SIZE], writable: [0; SIZE], bars };
        for &register in REGISTERS {
            space.define(register);
        }
        let place = |location: BarLocation| location.offset | u32::from(location.bar);
        let table_size = u32::from(config.msix_table_size.saturating_sub(1) & 0x7ff);
        let id_and_next = 0x11 | u32::from(cap::PCIE) << 8;
        let control = u32::from(msix::ENABLE | msix::FUNCTION_MASK);
        space.define((cap::MSIX, 4, table_size << 16 | id_and_next, control << 16));
        space.define((cap::MSIX + 4, 4, place(config.msix_table), 0));
        space.define((cap::MSIX + 8, 4, place(config.msix_pba), 0));
        for (index, size) in space.bars.clone() {
            let low = header::BAR0 + u16::from(index) * 4;
            let address_bits = !(size - 1);
            space.define((low, 4, BAR_FLAGS, address_bits as u32 & !0xf));
            space.define((low + 4, 4, 0, (address_bits >> 32) as u32));
        }
        space
    }
    fn define(&mut self, (offset, size, reset, writable): Register) {
        let range = usize::from(offset)..usize::from(offset) + usize::from(size);
        let set = |bytes: &mut [u8; SIZE], value: u32| {
            let slots = bytes.get_mut(range.clone()).unwrap_or_default();
            slots.iter_mut().zip(value.to_le_bytes()).for_each(|(slot, byte)| *slot = byte);
        };
        set(&mut self.bytes, reset);
        set(&mut self.writable, writable);
    }
    /// Back to the reset values of `fresh`, which was made by [`new`](Self::new).
    pub fn reset(&mut self, fresh: &Self) {
        self.clone_from(fresh);
    }
    /// Read `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }
    /// Write `data` at `offset`: only writable bits change.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Effects {
        let (command, bars) = (self.command(), self.bars());
        for (&new, at) in data.iter().zip(usize::from(offset)..) {
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
        let written = usize::from(offset)..usize::from(offset) + data.len();
        let touches = |register: u16| written.contains(&(usize::from(register) + 1));
        let flr_byte = (usize::from(cap::DEVICE_CONTROL) + 1).checked_sub(written.start);
        let changed = self.command() ^ command;
        Effects {
            bars: changed & COMMAND_MEMORY != 0 || self.bars() != bars,
            command: changed & (COMMAND_MEMORY | COMMAND_MASTER) != 0,
            msix_control: touches(cap::MSIX_CONTROL).then(|| self.word(cap::MSIX_CONTROL)),
            flr: flr_byte.and_then(|at| data.get(at)).is_some_and(|byte| u16::from(*byte) << 8 & FLR != 0),
        }
    }
    fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }
    fn command(&self) -> u16 {
        self.word(header::COMMAND)
    }
    /// Memory Space Enable.
    pub fn memory_enabled(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0
    }
    /// Bus Master Enable.
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_MASTER != 0
    }
    /// Number, address and size of each BAR.
    pub fn bars(&self) -> Vec<(u8, u64, u64)> {
        let bar = |&(index, size): &(u8, u64)| {
            let mut bytes = [0; 8];
            self.read(header::BAR0 + u16::from(index) * 4, &mut bytes);
            (index, u64::from_le_bytes(bytes) & !0xf, size)
        };
        self.bars.iter().map(bar).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&DeviceConfig::default(), vec![(0, 0x10_0000), (4, 0x1_0000)])
    }
    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity() {
        let space = space();
        assert_eq!(dword(&space, 0), 0x00ba_1414);
        assert_eq!(dword(&space, 8), 0x0200_0001);
        assert_eq!(dword(&space, 0x0c), 0);
    }

    #[test]
    fn capability_list_is_whole() {
        let space = space();
        let mut at = dword(&space, 0x34) as u16;
        let mut ids = Vec::new();
        while at != 0 {
            let head = dword(&space, at);
            ids.push(head as u8);
            at = u16::from((head >> 8) as u8);
        }
        assert_eq!(ids, [0x01, 0x11, 0x10]);
        assert_eq!(dword(&space, 0x50) >> 16, 63);
        assert_eq!(dword(&space, 0x54), 4);
        assert_eq!(dword(&space, 0x58), 0x8004);
        assert_eq!(dword(&space, 0x100), 0);
    }

    #[test]
    fn bars_size_and_move() {
        let mut space = space();
        assert_eq!(space.write(0x10, &[0xff; 4]), Effects { bars: true, ..Effects::default() });
        assert_eq!(dword(&space, 0x10), 0xfff0_000c);
        let _ = space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x14), 0xffff_ffff);
        let _ = space.write(0x10, &0xe000_0000_u32.to_le_bytes());
        let _ = space.write(0x14, &1_u32.to_le_bytes());
        assert_eq!(space.bars(), [(0, 0x1_e000_0000, 0x10_0000), (4, 0, 0x1_0000)]);
        let _ = space.write(0x18, &[0xff; 4]);
        assert_eq!(dword(&space, 0x18), 0);
    }

    #[test]
    fn command_bits_are_reported() {
        let mut space = space();
        let effects = space.write(4, &6_u16.to_le_bytes());
        assert!(effects.bars && effects.command);
        assert!(space.memory_enabled() && space.bus_master());
        assert!(!space.write(4, &6_u16.to_le_bytes()).command);
        assert!(!space.write(5, &[4]).bars);
    }

    #[test]
    fn function_mask_is_stored_and_flr_reads_as_zero() {
        let mut space = space();
        let effects = space.write(0x52, &0xc000_u16.to_le_bytes());
        assert_eq!(effects.msix_control, Some(0xc03f));
        assert_eq!(dword(&space, 0x50) >> 16, 0xc03f);
        assert!(space.write(0x68, &0xa810_u16.to_le_bytes()).flr);
        assert_eq!(dword(&space, 0x68) as u16, 0x2810);
        assert!(!space.write(0x68, &0x2810_u16.to_le_bytes()).flr);
        let fresh = ConfigSpace::new(&DeviceConfig::default(), vec![(0, 0x10_0000), (4, 0x1_0000)]);
        space.reset(&fresh);
        assert_eq!(dword(&space, 0x50) >> 16, 63);
    }

    #[test]
    fn accesses_beyond_the_end_are_harmless() {
        let mut space = space();
        assert_eq!(space.write(0xfff, &[1]), Effects::default());
        assert_eq!(space.write(u16::MAX, &[1, 2, 3, 4]), Effects::default());
        assert_eq!(dword(&space, 0xffe), 0);
    }
}
