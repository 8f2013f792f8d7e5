//! Configuration space as the kernel's PCI core uses it: capabilities, BARs, command register, function reset.

use mana_device::ConfigEffect;

use crate::world::World;

/// PCI_VENDOR_ID.
pub const VENDOR_ID: u16 = 0x00;
/// PCI_DEVICE_ID.
pub const DEVICE_ID: u16 = 0x02;
/// PCI_COMMAND.
pub const COMMAND: u16 = 0x04;
/// PCI_STATUS.
pub const STATUS: u16 = 0x06;
/// PCI_BASE_ADDRESS_0.
pub const BAR0: u16 = 0x10;
/// PCI_CAPABILITY_LIST.
pub const CAPABILITIES: u16 = 0x34;

/// PCI_COMMAND_MEMORY.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// PCI_COMMAND_MASTER.
pub const COMMAND_MASTER: u16 = 1 << 2;

/// PCI_CAP_ID_EXP.
pub const CAP_PCIE: u8 = 0x10;
/// PCI_CAP_ID_MSIX.
pub const CAP_MSIX: u8 = 0x11;

/// PCI_EXP_DEVCAP_FLR.
const DEVCAP_FLR: u32 = 1 << 28;
/// PCI_EXP_DEVCTL_BCR_FLR.
const DEVCTL_FLR: u16 = 1 << 15;
/// What a function has after its reset to become ready.
const FLR_DELAY_NS: u64 = 100_000_000;

/// Where BARs are put: above 4 GiB and away from RAM.
const WINDOW: u64 = 0x80_0000_0000;

/// A BAR as sizing finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizedBar {
    /// Number of its first register.
    pub index: u8,
    /// Bytes.
    pub size: u64,
}

/// Configuration space of the function.
#[derive(Clone, Copy)]
pub struct Pci<'w> {
    world: &'w World,
}

/// What `pci_save_state` keeps over a reset.
#[derive(Clone, Debug)]
pub struct SavedState {
    header: Vec<(u16, u32)>,
    device_control: u16,
}

impl<'w> Pci<'w> {
    /// The function in `world`.
    pub fn new(world: &'w World) -> Self {
        Self { world }
    }

    /// Read a byte.
    pub fn read8(self, offset: u16) -> u8 {
        let mut data = [0; 1];
        self.world.device.config_read(offset, &mut data);
        data[0]
    }
    /// Read a word.
    pub fn read16(self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.world.device.config_read(offset, &mut data);
        u16::from_le_bytes(data)
    }
    /// Read a dword.
    pub fn read32(self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.world.device.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    /// Write a word.
    pub fn write16(self, offset: u16, value: u16) -> ConfigEffect {
        self.world.device.config_write(offset, &value.to_le_bytes())
    }
    /// Write a dword.
    pub fn write32(self, offset: u16, value: u32) -> ConfigEffect {
        self.world.device.config_write(offset, &value.to_le_bytes())
    }

    /// Offset of the capability `id`.
    ///
    /// # Panics
    /// The list runs in a circle.
    pub fn find_capability(self, id: u8) -> Option<u16> {
        if self.read16(STATUS) & 1 << 4 == 0 {
            return None;
        }
        let mut at = u16::from(self.read8(CAPABILITIES) & !3);
        for _ in 0..48 {
            match at {
                0 => return None,
                _ if self.read8(at) == id => return Some(at),
                _ => at = u16::from(self.read8(at + 1) & !3),
            }
        }
        panic!("the capability list has no end");
    }

    /// Offset of a capability that a MANA function must have.
    ///
    /// # Panics
    /// It is missing.
    pub fn capability(self, id: u8) -> u16 {
        self.find_capability(id).unwrap_or_else(|| panic!("no capability {id:#x}"))
    }

    /// Set and clear bits of the command register.
    pub fn update_command(self, set: u16, clear: u16) {
        let _ = self.write16(COMMAND, self.read16(COMMAND) & !clear | set);
    }

    /// Size the BARs as the PCI core does, with memory decoding off.
    ///
    /// # Panics
    /// A BAR is not a 64-bit memory BAR with a power of two as its size.
    pub fn size_bars(self) -> Vec<SizedBar> {
        let command = self.read16(COMMAND);
        let _ = self.write16(COMMAND, command & !COMMAND_MEMORY);
        let bars = (0..6).step_by(2).filter_map(|index| self.size_bar(index)).collect();
        let _ = self.write16(COMMAND, command);
        bars
    }

    fn size_bar(self, index: u8) -> Option<SizedBar> {
        let at = BAR0 + 4 * u16::from(index);
        let before = (self.read32(at), self.read32(at + 4));
        let _ = self.write32(at, u32::MAX);
        let _ = self.write32(at + 4, u32::MAX);
        let mask = u64::from(self.read32(at)) | u64::from(self.read32(at + 4)) << 32;
        let _ = self.write32(at, before.0);
        let _ = self.write32(at + 4, before.1);
        if mask == 0 {
            return None;
        }
        assert_eq!(mask & 7, 4, "BAR{index} is no 64-bit memory BAR");
        let size = (mask & !0xf).wrapping_neg();
        assert!(size.is_power_of_two(), "BAR{index} has a size of {size:#x}");
        Some(SizedBar { index, size })
    }

    /// Give each BAR an address.
    ///
    /// # Panics
    /// The device says it is somewhere else.
    pub fn assign_bars(self) -> Vec<SizedBar> {
        let bars = self.size_bars();
        let mut next = WINDOW;
        for bar in &bars {
            let address = next.next_multiple_of(bar.size);
            self.move_bar(*bar, address);
            next = address + bar.size;
        }
        bars
    }

    /// Put a BAR at `address`.
    ///
    /// # Panics
    /// The device says it is somewhere else.
    pub fn move_bar(self, bar: SizedBar, address: u64) {
        let at = BAR0 + 4 * u16::from(bar.index);
        let low = u32::try_from(address & 0xffff_ffff).expect("masked");
        let high = u32::try_from(address >> 32).expect("32 bits");
        let _ = self.write32(at, low);
        let _ = self.write32(at + 4, high);
        let placed = self.world.device.bars();
        let found = placed.iter().find(|placed| placed.index == bar.index);
        let found = found.unwrap_or_else(|| panic!("the device lists no BAR{}", bar.index));
        assert_eq!((found.address, found.size), (address, bar.size), "BAR{} moved elsewhere", bar.index);
    }

    /// `pci_save_state`: what the kernel keeps over a reset, MSI-X apart.
    pub fn save(self) -> SavedState {
        let header = (COMMAND..0x40).step_by(4).map(|at| (at, self.read32(at))).collect();
        SavedState { header, device_control: self.read16(self.capability(CAP_PCIE) + 8) }
    }

    /// `pci_restore_state`: the header from its end to its start, so that the command register comes last.
    pub fn restore(self, state: &SavedState) {
        let _ = self.write16(self.capability(CAP_PCIE) + 8, state.device_control);
        for &(at, value) in state.header.iter().rev() {
            let _ = self.write32(at, value);
        }
    }

    /// `pcie_flr`.
    ///
    /// # Panics
    /// The function can't, or does not come back.
    pub fn flr(self) {
        let pcie = self.capability(CAP_PCIE);
        assert_ne!(self.read32(pcie + 4) & DEVCAP_FLR, 0, "the function offers no FLR");
        let control = self.read16(pcie + 8);
        let _ = self.write16(pcie + 8, control | DEVCTL_FLR);
        let _ = self.world.settle();
        self.world.clock.advance(FLR_DELAY_NS);
        let _ = self.world.settle();
        assert_eq!(self.read16(VENDOR_ID), 0x1414, "the function is back 100 ms after FLR");
        assert_eq!(self.read16(pcie + 8) & DEVCTL_FLR, 0, "Initiate FLR reads as zero");
    }
}
