//! The messages on the socket: layouts and numbers, nothing else.
//!
//! Sources: the vfio-user specification (QEMU's `docs/interop/vfio-user.rst`), QEMU's `hw/vfio-user/protocol.h`, and
//! for what both take over from it, `linux/vfio.h`. Everything is little-endian here, as every client's host is.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Asserts a message's size at compile time.
macro_rules! sized {
    ($($message:ident = $size:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<$message>() == $size);)*
    };
}

sized! {
    Header = 16, Version = 4, DmaMap = 32, DmaUnmap = 24, DeviceInfo = 16, RegionInfo = 32, IrqInfo = 16,
    IrqSet = 20, RegionAccess = 16, WriteCount = 8, OneWrite = 24,
}

/// `VFIOUserHdr`: what every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// The request's number, which its reply repeats.
    pub id: U16,
    /// See [`Command`].
    pub command: U16,
    /// Bytes of the message, this header included.
    pub size: U32,
    /// See [`flags`].
    pub flags: U32,
    /// An errno, where the flags say so.
    pub error: U32,
}

/// Bits of [`Header::flags`].
pub mod flags {
    /// `VFIO_USER_TYPE`.
    pub const TYPE: u32 = 0xf;
    /// `VFIO_USER_REQUEST`.
    pub const REQUEST: u32 = 0;
    /// `VFIO_USER_REPLY`.
    pub const REPLY: u32 = 1;
    /// `VFIO_USER_NO_REPLY`: nobody waits for the answer (a posted write).
    pub const NO_REPLY: u32 = 1 << 4;
    /// `VFIO_USER_ERROR`: the reply is its header with an errno.
    pub const ERROR: u32 = 1 << 5;
}

/// `enum vfio_user_command`; those that only a server sends, and migration's, are not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the specification's own names")]
pub enum Command {
    Version,
    DmaMap,
    DmaUnmap,
    DeviceGetInfo,
    DeviceGetRegionInfo,
    DeviceGetIrqInfo,
    DeviceSetIrqs,
    RegionRead,
    RegionWrite,
    DeviceReset,
    RegionWriteMulti,
}

impl Command {
    /// The command with this number, if we know it.
    pub fn new(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            13 => Self::DeviceReset,
            15 => Self::RegionWriteMulti,
            _ => return None,
        })
    }
}

/// `VFIOUserVersion`, followed by a JSON object that a zero byte ends. Any 0.x client and server understand each
/// other.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Version {
    /// `VFIO_USER_MAJOR_VER`.
    pub major: U16,
    /// `VFIO_USER_MINOR_VER`.
    pub minor: U16,
}

/// `VFIOUserDMAMap`: memory of the client, in a file that comes along, or in none.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes of this structure.
    pub argsz: U32,
    /// See [`dma`].
    pub flags: U32,
    /// Bytes from the file's start.
    pub offset: U64,
    /// Bus address.
    pub iova: U64,
    /// Bytes.
    pub size: U64,
}

/// `VFIOUserDMAUnmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DmaUnmap {
    /// Bytes of this structure.
    pub argsz: U32,
    /// See [`dma`].
    pub flags: U32,
    /// Bus address.
    pub iova: U64,
    /// Bytes.
    pub size: U64,
}

/// Flags of [`DmaMap`] and [`DmaUnmap`].
pub mod dma {
    /// `VFIO_DMA_MAP_FLAG_READ`: the device may read.
    pub const READ: u32 = 1 << 0;
    /// `VFIO_DMA_MAP_FLAG_WRITE`: the device may write.
    pub const WRITE: u32 = 1 << 1;
    /// `VFIO_DMA_UNMAP_FLAG_ALL`: everything, whatever the addresses say.
    pub const UNMAP_ALL: u32 = 1 << 1;
}

/// `VFIOUserDeviceInfo`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceInfo {
    /// Bytes of this structure.
    pub argsz: U32,
    /// `VFIO_DEVICE_FLAGS_RESET` (1), `VFIO_DEVICE_FLAGS_PCI` (2).
    pub flags: U32,
    /// `VFIO_PCI_NUM_REGIONS`.
    pub num_regions: U32,
    /// `VFIO_PCI_NUM_IRQS`.
    pub num_irqs: U32,
}

/// `VFIOUserRegionInfo`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionInfo {
    /// Bytes of this structure.
    pub argsz: U32,
    /// `VFIO_REGION_INFO_FLAG_READ` (1), `VFIO_REGION_INFO_FLAG_WRITE` (2).
    pub flags: U32,
    /// See [`region`].
    pub index: U32,
    /// Where capabilities begin; 0, as there are none.
    pub cap_offset: U32,
    /// Bytes.
    pub size: U64,
    /// Where the region lies in a file that can be mapped; there is none.
    pub offset: U64,
}

/// Regions of a PCI device (`VFIO_PCI_*_REGION_INDEX`): 0 to 5 are the BARs.
pub mod region {
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// How many there are: BARs, ROM, configuration space, VGA.
    pub const COUNT: u32 = 9;
}

/// `VFIOUserIRQInfo`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IrqInfo {
    /// Bytes of this structure.
    pub argsz: U32,
    /// `VFIO_IRQ_INFO_EVENTFD` (1). Without `VFIO_IRQ_INFO_NORESIZE` (8) a client may add vectors one at a time.
    pub flags: U32,
    /// See [`irq`].
    pub index: U32,
    /// Vectors.
    pub count: U32,
}

/// Interrupts of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
pub mod irq {
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// How many kinds there are: INTx, MSI, MSI-X, error, request.
    pub const COUNT: u32 = 5;

    /// `VFIO_IRQ_SET_DATA_NONE`.
    pub const DATA_NONE: u32 = 1 << 0;
    /// `VFIO_IRQ_SET_DATA_BOOL`: a byte for each vector follows.
    pub const DATA_BOOL: u32 = 1 << 1;
    /// `VFIO_IRQ_SET_DATA_EVENTFD`: a descriptor for each vector comes along, or none for all.
    pub const DATA_EVENTFD: u32 = 1 << 2;
    /// `VFIO_IRQ_SET_ACTION_TRIGGER`.
    pub const ACTION_TRIGGER: u32 = 1 << 5;
}

/// `VFIOUserIRQSet`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct IrqSet {
    /// Bytes of this structure and what follows it.
    pub argsz: U32,
    /// See [`irq`].
    pub flags: U32,
    /// See [`irq`].
    pub index: U32,
    /// First vector.
    pub start: U32,
    /// Vectors.
    pub count: U32,
}

/// `VFIOUserRegionRW`, followed by the bytes: in the reply of a read, in the request of a write.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionAccess {
    /// Bytes from the region's start.
    pub offset: U64,
    /// See [`region`].
    pub region: U32,
    /// Bytes.
    pub count: U32,
}

/// Head of `VFIOUserWRMulti`: as many [`OneWrite`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct WriteCount {
    /// Writes, at most `VFIO_USER_MULTI_MAX` (200).
    pub count: U64,
}

/// `VFIOUserWROne`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct OneWrite {
    /// What is written where.
    pub access: RegionAccess,
    /// The bytes, of which the first `count` are meant.
    pub data: [u8; 8],
}
