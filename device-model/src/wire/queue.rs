//! Queue entries: what stands in send, receive, completion and event rings.
//!
//! Source: `struct gdma_wqe`, `struct gdma_sge`, `struct gdma_cqe`, `struct gdma_eqe`, `enum gdma_eqe_type` of the
//! Linux driver's gdma.h; the sheet's sections 5.1 to 5.3.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Work queue basic unit, bytes: WQEs start on it and are a multiple of it (`GDMA_WQE_BU_SIZE`).
pub const BASIC_UNIT: u32 = 32;
/// Largest send WQE, bytes (`MAX_TX_WQE_SIZE`).
pub const MAX_SQ_WQE: usize = 512;
/// Largest receive WQE, bytes (`MAX_RX_WQE_SIZE`).
pub const MAX_RQ_WQE: usize = 256;

/// First 8 bytes of a WQE (`struct gdma_wqe`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct WqeHeader {
    /// `last_vbytes` 24..31, the rest reserved.
    pub low: U32,
    /// `num_sge` 0..7, `inline_oob_size_div4` 8..10, `client_oob_in_sgl` 11, `client_data_unit` 16..29,
    /// `check_sn` 30, `sgl_direct` 31.
    pub high: U32,
}
const _: () = assert!(size_of::<WqeHeader>() == 8);

impl WqeHeader {
    /// Scatter/gather entries that follow the inline OOB.
    pub fn num_sge(self) -> usize {
        (self.high.get() & 0xff) as usize
    }
    /// Bytes of the inline OOB: the encodings are 2, 6 and 7; hardware takes any other for the smallest.
    pub fn oob_len(self) -> usize {
        match self.high.get() >> 8 & 7 {
            6 => 24,
            7 => 32,
            _ => 8,
        }
    }
    /// The first scatter/gather entry is headers (Ethernet: segmentation is asked for).
    pub fn client_oob_in_sgl(self) -> bool {
        self.high.get() & 1 << 11 != 0
    }
    /// MSS of a segmentation request, else 0.
    pub fn client_data_unit(self) -> u16 {
        (self.high.get() >> 16 & 0x3fff) as u16
    }
    /// Data lies inline where the scatter/gather list would be.
    pub fn sgl_direct(self) -> bool {
        self.high.get() & 1 << 31 != 0
    }
    /// Low 8 bits of the first entry's length, for segmentation.
    pub fn last_vbytes(self) -> u8 {
        (self.low.get() >> 24) as u8
    }
    /// Where the scatter/gather list starts: header and OOB, rounded up to 16 bytes.
    pub fn sgl_offset(self) -> usize {
        (size_of::<Self>() + self.oob_len()).next_multiple_of(16)
    }
    /// Bytes of the whole WQE, a multiple of [`BASIC_UNIT`]; the guest's counts may make it larger than any queue
    /// accepts.
    pub fn wqe_len(self) -> usize {
        (self.sgl_offset() + self.num_sge() * size_of::<Sge>()).next_multiple_of(BASIC_UNIT as usize)
    }
}

/// A scatter/gather entry (`struct gdma_sge`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Sge {
    /// Address under `mem_key`: a bus address for the device's own key.
    pub address: U64,
    /// Memory key (`gpa_mkey` of GDMA_REGISTER_DEVICE, or a memory region's `lkey`).
    pub mem_key: U32,
    /// Bytes.
    pub size: U32,
}
const _: () = assert!(size_of::<Sge>() == 16);
const _: () = assert!(std::mem::offset_of!(Sge, mem_key) == 8);

/// A completion (`struct gdma_cqe`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Cqe {
    /// Client data: what completed, laid out by the client.
    pub data: [u8; Cqe::DATA],
    /// `wq_num` 0..23, `is_sq` 24, `owner_bits` 29..31.
    pub info: U32,
}
const _: () = assert!(size_of::<Cqe>() == 64);
const _: () = assert!(std::mem::offset_of!(Cqe, info) == 60);

impl Cqe {
    /// Bytes of client data (`GDMA_COMP_DATA_SIZE`).
    pub const DATA: usize = 60;

    /// The last word without owner bits.
    pub fn info(wq: u32, is_sq: bool) -> u32 {
        wq & 0xff_ffff | u32::from(is_sq) << 24
    }
    /// Number of the work queue that completed.
    pub fn wq_num(&self) -> u32 {
        self.info.get() & 0xff_ffff
    }
    /// The work queue is a send queue.
    pub fn is_sq(&self) -> bool {
        self.info.get() & 1 << 24 != 0
    }
}

/// An event (`struct gdma_eqe`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Eqe {
    /// What happened, by type.
    pub details: [U32; 3],
    /// `type` 0..7, `client_id` 16..17, `owner_bits` 29..31.
    pub info: U32,
}
const _: () = assert!(size_of::<Eqe>() == 16);
const _: () = assert!(std::mem::offset_of!(Eqe, info) == 12);

impl Eqe {
    /// Bytes of details.
    pub const DETAILS: usize = 12;
}

/// Owner bits of a CQE's or EQE's last word (`GDMA_CQE_OWNER_MASK`, `GDMA_EQE_OWNER_MASK`: 3 bits).
pub const OWNER_SHIFT: u32 = 29;

/// An event to be posted: its type and `details[0]` (no type uses more).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventEntry {
    /// `GDMA_EQE_COMPLETION`: the completion queue with this id has entries.
    Completion(u32),
    /// `GDMA_EQE_TEST_EVENT`: answer to GDMA_GENERATE_TEST_EQE.
    Test,
    /// `GDMA_EQE_HWC_INIT_EQ_ID_DB`: id of the channel's event queue and its doorbell page.
    HwcInitEqIdDb {
        /// Event queue id.
        eq: u16,
        /// Doorbell page index.
        doorbell: u16,
    },
    /// `GDMA_EQE_HWC_INIT_DATA`: one parameter of the channel.
    HwcInitData {
        /// `HWC_INIT_DATA_*`.
        kind: u8,
        /// 24 bits.
        value: u32,
    },
    /// `GDMA_EQE_HWC_INIT_DONE`: the channel is up.
    HwcInitDone,
    /// Whatever the simulated host raises. Owner bits that are set turn the ring's over.
    Raw(Eqe),
}

impl EventEntry {
    /// The entry's `type`.
    pub fn kind(self) -> u8 {
        match self {
            Self::Completion(_) => 3,
            Self::Test => 64,
            Self::HwcInitEqIdDb { .. } => 129,
            Self::HwcInitData { .. } => 130,
            Self::HwcInitDone => 131,
            Self::Raw(eqe) => eqe.info.get() as u8,
        }
    }
    /// The entry as it stands in the ring, owner bits 0.
    pub fn entry(self) -> Eqe {
        if let Self::Raw(eqe) = self {
            return eqe;
        }
        let detail = match self {
            Self::Completion(cq) => cq & 0xff_ffff,
            Self::HwcInitEqIdDb { eq, doorbell } => u32::from(eq) | u32::from(doorbell) << 16,
            Self::HwcInitData { kind, value } => value & 0xff_ffff | u32::from(kind) << 24,
            Self::Raw(_) | Self::Test | Self::HwcInitDone => 0,
        };
        Eqe { details: [U32::new(detail), U32::ZERO, U32::ZERO], info: U32::new(self.kind().into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wqe_length_follows_its_counts() {
        let header =
            |num_sge: u32, div4: u32| WqeHeader { low: U32::ZERO, high: U32::new(num_sge | div4 << 8) };
        assert_eq!(header(1, 2).wqe_len(), 32);
        assert_eq!(header(1, 6).wqe_len(), 64);
        assert_eq!(header(2, 7).wqe_len(), 96);
        assert_eq!(header(30, 6).wqe_len(), 512);
        assert_eq!(header(255, 3).oob_len(), 8);
        assert!(header(255, 2).wqe_len() > MAX_SQ_WQE);
    }

    #[test]
    fn events_carry_their_details() {
        let entry = EventEntry::HwcInitData { kind: 7, value: 0x01_0203 }.entry();
        assert_eq!(entry.details[0].get(), 0x0701_0203);
        assert_eq!(entry.info.get(), 130);
        assert_eq!(EventEntry::HwcInitEqIdDb { eq: 5, doorbell: 2 }.entry().details[0].get(), 0x2_0005);
    }
}
