//! BAR0: identification registers, the window of the shared-memory channel, doorbell pages.
//!
//! ```text
//! 0x00  registers           zone - 1  free (an MSI-X table may lie here)
//! 0x40  shared memory, 32 B     zone  doorbell page 0, 1, ...
//! ```
//!
//! Source: `mana_gd_init_vf_regs` (gdma_main.c), `GDMA_REG_*` (gdma.h), `union gdma_doorbell_entry`; the sheet's
//! section 2.

use crate::config::DeviceConfig;
use crate::region::PAGE_SIZE;

/// Offset of the shared-memory window.
pub const SHM_OFFSET: u32 = 0x40;
/// Bytes of the shared-memory window (`SMC_APERTURE_BITS` / 8).
pub const SHM_SIZE: u32 = 32;
/// Bytes of a doorbell page.
pub const DOORBELL_PAGE_SIZE: u32 = 4096;
/// Smallest distance of the doorbell zone, so that the largest MSI-X table and its pending bits fit before it.
const MIN_ZONE: u64 = 0x1_0000;

/// What lies where in BAR0.
#[derive(Clone, Debug)]
pub struct Layout {
    size: u64,
    zone: u64,
    /// The bytes of the identification registers, and 0 between them.
    registers: [u8; SHM_OFFSET as usize],
}

/// What an access to BAR0 hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Identification registers and the bytes between them.
    Registers,
    /// The shared-memory window, at this byte.
    Shm(u32),
    /// A doorbell page, at this byte of it.
    Doorbell {
        /// Page index.
        page: u32,
        /// Bytes from the page's start.
        offset: u32,
    },
}

impl Layout {
    /// Bytes that the registers and the shared-memory window take at BAR0's start.
    pub const HEAD: u32 = SHM_OFFSET + SHM_SIZE;

    /// The layout with as many doorbell pages as `config` wants.
    pub fn new(config: &DeviceConfig) -> Self {
        let pages = u64::from(config.doorbell_pages) * u64::from(DOORBELL_PAGE_SIZE);
        let zone = pages.next_power_of_two().max(MIN_ZONE);
        let mut registers = [0; SHM_OFFSET as usize];
        let mut register = |offset: usize, size: usize, value: u64| {
            let bytes = registers.iter_mut().skip(offset).take(size);
            bytes.zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        };
        // Interface version 1.0.1, as other drivers than Linux's want it.
        register(0x00, 2, 1);
        register(0x02, 1, 0);
        register(0x03, 1, 1);
        // GDMA_REG_DB_PAGE_OFFSET, GDMA_REG_DB_PAGE_SIZE, GDMA_REG_SHM_OFFSET, size of the shared memory.
        register(0x08, 8, zone);
        register(0x10, 4, DOORBELL_PAGE_SIZE.into());
        register(0x18, 8, SHM_OFFSET.into());
        register(0x20, 2, SHM_SIZE.into());
        Self { size: zone * 2, zone, registers }
    }
    /// Bytes of BAR0, a power of two.
    pub fn size(&self) -> u64 {
        self.size
    }
    /// Offset of doorbell page 0.
    pub fn zone(&self) -> u64 {
        self.zone
    }
    /// What an access of `len` bytes at `offset` hits, if it hits one thing.
    pub fn decode(&self, offset: u64, len: usize) -> Option<Target> {
        let end = offset.checked_add(len as u64)?;
        if offset >= self.zone && end <= self.size {
            let page_size = u64::from(DOORBELL_PAGE_SIZE);
            let (page, offset) = ((offset - self.zone) / page_size, (offset - self.zone) % page_size);
            return Some(Target::Doorbell { page: page as u32, offset: offset as u32 });
        }
        match (offset, end) {
            (_, end) if end <= SHM_OFFSET.into() => Some(Target::Registers),
            (offset, end) if offset >= SHM_OFFSET.into() && end <= Self::HEAD.into() => {
                Some(Target::Shm(offset as u32 - SHM_OFFSET))
            }
            _ => None,
        }
    }
    /// Read registers; what lies between them is 0.
    #[inline]
    pub fn read_registers(&self, offset: u32, data: &mut [u8]) {
        let offset = offset as usize;
        match self.registers.get(offset..offset + data.len()) {
            // By far the most common width, without a call to copy.
            Some(&[a, b, c, d]) if data.len() == 4 => data.copy_from_slice(&[a, b, c, d]),
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0),
        }
    }
}

/// A doorbell, decoded (`union gdma_doorbell_entry`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// WQEs were posted to a send queue.
    Sq {
        /// Queue id.
        id: u32,
        /// Bytes posted, free running.
        tail: u32,
    },
    /// WQEs were posted to a receive queue.
    Rq {
        /// Queue id.
        id: u32,
        /// Bytes posted, free running.
        tail: u32,
        /// 0, by the rules.
        wqe_count: u8,
    },
    /// Arms a completion of a connected queue pair (RDMA only).
    RqClientData,
    /// Entries were taken from a completion queue.
    Cq {
        /// Queue id.
        id: u32,
        /// Entries taken, modulo eight laps.
        tail: u32,
        /// Notify of the next.
        arm: bool,
    },
    /// Interrupt moderation of a completion queue: what is `None` stays as it is.
    CqModeration {
        /// Queue id.
        id: u32,
        /// Microseconds, at most 1023.
        usec: Option<u16>,
        /// Completions, at most 255.
        completions: Option<u16>,
    },
    /// Entries were taken from an event queue.
    Eq {
        /// Queue id.
        id: u32,
        /// Entries taken, modulo eight laps.
        tail: u32,
        /// Interrupt on the next.
        arm: bool,
    },
}

impl Doorbell {
    /// The doorbell that an 8-byte write of `value` at byte `offset` of a page rings (`DOORBELL_OFFSET_*`).
    pub fn decode(offset: u32, value: u64) -> Option<Self> {
        let id = value as u32 & 0xff_ffff;
        let high = (value >> 32) as u32;
        let (tail, arm) = (high & 0x7fff_ffff, high >> 31 != 0);
        Some(match offset {
            0x000 => Self::Sq { id, tail: high },
            0x400 => Self::Rq { id, tail: high, wqe_count: (value >> 24) as u8 },
            0x408 => Self::RqClientData,
            0x800 => Self::Cq { id, tail, arm },
            0x820 => Self::CqModeration {
                id,
                usec: (high >> 15 & 1 != 0).then_some((high & 0x3ff) as u16),
                completions: (high >> 31 != 0).then_some((high >> 16 & 0xff) as u16),
            },
            0xff8 => Self::Eq { id, tail, arm },
            _ => return None,
        })
    }
}

const _: () = assert!(DOORBELL_PAGE_SIZE >= PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(&DeviceConfig::default())
    }

    #[test]
    fn registers_satisfy_the_newest_drivers_checks() {
        let layout = layout();
        let read = |offset, len| {
            let mut data = [0; 8];
            layout.read_registers(offset, &mut data[..len]);
            u64::from_le_bytes(data)
        };
        assert_eq!(read(0x08, 8), layout.zone());
        assert!(read(0x08, 8) < layout.size() && read(0x08, 8) % 4096 == 0);
        assert_eq!(read(0x08, 4) | read(0x0c, 4) << 32, layout.zone());
        assert_eq!(read(0x10, 4) & 0xffff, 4096);
        assert_eq!(read(0x18, 8), 0x40);
        assert_eq!(read(0x24, 4), 0);
    }

    #[test]
    fn accesses_hit_one_thing_or_nothing() {
        let layout = layout();
        assert_eq!(layout.decode(0x3c, 4), Some(Target::Registers));
        assert_eq!(layout.decode(0x3c, 8), None);
        assert_eq!(layout.decode(0x5c, 4), Some(Target::Shm(28)));
        assert_eq!(layout.decode(0x60, 4), None);
        let page = layout.decode(layout.zone() + 3 * 4096 + 0x800, 8);
        assert_eq!(page, Some(Target::Doorbell { page: 3, offset: 0x800 }));
        assert_eq!(layout.decode(layout.size() - 4, 8), None);
        assert_eq!(layout.decode(u64::MAX, 8), None);
    }

    #[test]
    fn doorbells_decode() {
        let value = 0x8000_0105_0000_0007;
        assert_eq!(Doorbell::decode(0x000, value), Some(Doorbell::Sq { id: 7, tail: 0x8000_0105 }));
        assert_eq!(Doorbell::decode(0x800, value), Some(Doorbell::Cq { id: 7, tail: 0x105, arm: true }));
        assert_eq!(
            Doorbell::decode(0xff8, value & !(1 << 63)),
            Some(Doorbell::Eq { id: 7, tail: 0x105, arm: false })
        );
        let counted = Doorbell::Rq { id: 7, tail: 0x8000_0105, wqe_count: 3 };
        assert_eq!(Doorbell::decode(0x400, value | 3 << 24), Some(counted));
        assert_eq!(Doorbell::decode(0x10, value), None);
        let moderation = Doorbell::CqModeration { id: 7, usec: Some(0x3ff), completions: None };
        assert_eq!(Doorbell::decode(0x820, 0x7eff_83ff_0000_0007), Some(moderation));
        let moderation = Doorbell::CqModeration { id: 7, usec: None, completions: Some(0x12) };
        assert_eq!(Doorbell::decode(0x820, 0x8012_7fff_0000_0007), Some(moderation));
    }
}
