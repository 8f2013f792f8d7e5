//! MSI-X as the kernel's PCI core uses it: the capability, and the table wherever it lies.

use mana_device::doors::MsiMessage;

use crate::pci::{CAP_MSIX, Pci};
use crate::world::World;

/// PCI_MSIX_FLAGS_ENABLE.
const ENABLE: u16 = 1 << 15;
/// PCI_MSIX_FLAGS_MASKALL.
const FUNCTION_MASK: u16 = 1 << 14;

/// MSI-X of the function.
#[derive(Clone, Copy)]
pub struct Msix<'w> {
    world: &'w World,
    pci: Pci<'w>,
    capability: u16,
    table: (u8, u64),
    pba: (u8, u64),
    size: u16,
}

impl<'w> Msix<'w> {
    /// Read the capability.
    pub fn new(world: &'w World) -> Self {
        let pci = Pci::new(world);
        let capability = pci.capability(CAP_MSIX);
        let place = |offset| {
            let value = pci.read32(capability + offset);
            (u8::try_from(value & 7).expect("masked"), u64::from(value & !7))
        };
        let size = (pci.read16(capability + 2) & 0x7ff) + 1;
        Self { world, pci, capability, table: place(4), pba: place(8), size }
    }

    /// Entries of the table.
    pub fn size(self) -> u16 {
        self.size
    }
    /// BAR number and byte offset of the table.
    pub fn table(self) -> (u8, u64) {
        self.table
    }
    /// BAR number and byte offset of the pending bits.
    pub fn pba(self) -> (u8, u64) {
        self.pba
    }
    /// MSI-X Enable and Function Mask as they read back.
    pub fn flags(self) -> (bool, bool) {
        let flags = self.pci.read16(self.capability + 2);
        (flags & ENABLE != 0, flags & FUNCTION_MASK != 0)
    }
    /// Write MSI-X Enable and Function Mask.
    pub fn set_flags(self, enable: bool, function_mask: bool) {
        let flags = self.pci.read16(self.capability + 2) & !(ENABLE | FUNCTION_MASK);
        let set = if enable { ENABLE } else { 0 } | if function_mask { FUNCTION_MASK } else { 0 };
        let _ = self.pci.write16(self.capability + 2, flags | set);
    }

    /// The dword at byte `at` of entry `vector`.
    ///
    /// # Panics
    /// The table does not answer.
    pub fn read(self, vector: u16, at: u64) -> u32 {
        let mut data = [0; 4];
        let offset = self.table.1 + 16 * u64::from(vector) + at;
        self.world.device.bar_read(self.table.0, offset, &mut data).expect("the MSI-X table answers");
        u32::from_le_bytes(data)
    }
    /// Write the dword at byte `at` of entry `vector`.
    ///
    /// # Panics
    /// The table does not answer.
    pub fn write(self, vector: u16, at: u64, value: u32) {
        let offset = self.table.1 + 16 * u64::from(vector) + at;
        self.world
            .device
            .bar_write(self.table.0, offset, &value.to_le_bytes())
            .expect("the MSI-X table answers");
    }

    /// Vector control's mask bit.
    pub fn masked(self, vector: u16) -> bool {
        self.read(vector, 12) & 1 == 1
    }
    /// Set vector control's mask bit, and read it back as the kernel does.
    pub fn set_mask(self, vector: u16, masked: bool) {
        self.write(vector, 12, u32::from(masked));
        assert_eq!(self.masked(vector), masked, "vector {vector}: the mask bit does not stick");
    }
    /// Write a message without touching the mask.
    ///
    /// # Panics
    /// It does not read back.
    pub fn set_message(self, vector: u16, message: MsiMessage) {
        let words = words(message);
        for (at, word) in (0..).step_by(4).zip(words) {
            self.write(vector, at, word);
        }
        let stored = [0, 4, 8].map(|at| self.read(vector, at));
        assert_eq!(stored, words, "vector {vector}: the message does not read back");
    }
    /// The pending bit.
    ///
    /// # Panics
    /// The pending-bit array does not answer.
    pub fn pending(self, vector: u16) -> bool {
        let mut data = [0; 8];
        let offset = self.pba.1 + u64::from(vector) / 64 * 8;
        self.world.device.bar_read(self.pba.0, offset, &mut data).expect("the PBA answers");
        u64::from_le_bytes(data) >> (vector % 64) & 1 == 1
    }

    /// `pci_alloc_irq_vectors`: enable with everything masked, then open the function mask.
    ///
    /// # Panics
    /// An entry that nobody programmed is not masked.
    pub fn enable(self, vectors: u16) {
        self.set_flags(true, true);
        assert_eq!(self.flags(), (true, true), "Function Mask and Enable are stored");
        for vector in 0..vectors {
            self.alloc(vector);
        }
        for vector in 0..self.size {
            self.write(vector, 12, 1);
        }
        self.set_flags(true, false);
        assert_eq!(self.flags(), (true, false), "Function Mask is cleared, Enable stays");
    }

    /// `pci_msix_alloc_irq_at`: write a placeholder message while the entry is masked.
    ///
    /// # Panics
    /// The entry is not masked.
    pub fn alloc(self, vector: u16) {
        assert!(vector < self.size, "vector {vector} lies past the table");
        assert!(self.masked(vector), "vector {vector} is not masked though nobody has unmasked it");
        self.set_message(vector, MsiMessage { address: 0xfee0_0000, data: 0xef });
    }

    /// `free_irq`.
    pub fn release(self, vector: u16) {
        self.set_mask(vector, true);
        self.set_message(vector, MsiMessage::default());
    }

    /// `pci_free_irq_vectors`.
    pub fn disable(self) {
        self.set_flags(false, false);
    }
}

fn words(message: MsiMessage) -> [u32; 3] {
    let low = u32::try_from(message.address & 0xffff_ffff).expect("masked");
    let high = u32::try_from(message.address >> 32).expect("32 bits");
    [low, high, message.data]
}
