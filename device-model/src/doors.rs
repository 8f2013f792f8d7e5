//! The doors of the card: what it needs from whoever holds it.
//!
//! A PCI function touches the world in four ways: configuration cycles and BAR accesses come in (see
//! [`crate::ManaDevice`]); DMA, message-signalled interrupts and packets go out, through the types here.
//! The device owns no thread, socket or clock: a VMM, a vfio-user server, a benchmark and a fuzzer each
//! bring their own.

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, VolatileSlice};

/// Guest memory as the function's DMA sees it. Replaced as a whole when regions come or go.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// One MSI-X message: a 4-byte write of `data` to `address` (PCIe base specification, 6.1.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, upper half included.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where interrupts go.
///
/// Called from whichever thread runs the device, never with a queue's lock held.
pub trait MsiSink: Send + Sync {
    /// `vector` will send `message` from now on. Called before the first [`fire`](Self::fire) of a vector and
    /// again when the guest changes the entry; a vector that the guest never unmasks is never routed.
    fn route(&self, vector: u16, message: MsiMessage);
    /// Send the message that was last routed for `vector`.
    fn fire(&self, vector: u16);
}

/// The only time the device knows.
pub trait Clock: Send + Sync {
    /// Nanoseconds since an arbitrary start; never goes back.
    fn now_ns(&self) -> u64;
}

/// A piece of the device that has something to do and must be run by [`crate::ManaDevice::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// The hardware channel's SQ has requests.
    Hwc,
    /// The send queue with this id has WQEs.
    Transmit {
        /// SQ id, as CREATE_WQ_OBJ returned it.
        sq: u32,
    },
    /// The next deadline moved closer: call [`crate::ManaDevice::run_timers`].
    Timers,
}

/// Told when a piece of the device that was idle has work. Called at most once between two runs of the same
/// piece, from the thread that rang the doorbell.
pub trait Waker: Send + Sync {
    /// `work` is to be run soon.
    fn wake(&self, work: Work);
}

/// What a [`Port`] does itself, so that the device need not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCapabilities {
    /// Takes frames whose TCP or UDP checksum is still a pseudo-header sum ([`TxOffload::checksum`]).
    pub checksum: bool,
    /// Takes TCP super-frames ([`TxOffload::segmentation`]).
    pub segmentation: bool,
}

/// A checksum still to be made: sum from `start` to the end of the frame, complement, store at
/// `start + offset` (virtio-net's `csum_start`, `csum_offset`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Bytes from the start of the frame.
    pub start: u16,
    /// Bytes from `start`: 16 for TCP, 6 for UDP.
    pub offset: u16,
}

/// A TCP super-frame still to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// Payload bytes of each segment but the last.
    pub mss: u16,
    /// Ethernet, IP and TCP header bytes at the start of the frame.
    pub header_len: u16,
    /// IPv6, else IPv4.
    pub ipv6: bool,
}

/// What is left to do on a frame; only what [`PortCapabilities`] allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxOffload {
    /// The transport checksum.
    pub checksum: Option<PartialChecksum>,
    /// The segmentation.
    pub segmentation: Option<Segmentation>,
}

/// A frame on its way out, still lying in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct TxFrame<'a> {
    /// The frame's bytes from the Ethernet header on, without FCS.
    pub slices: &'a [VolatileSlice<'a>],
    /// Sum of the slices' lengths.
    pub len: usize,
    /// What the port is still to do.
    pub offload: TxOffload,
}

/// The frame was not taken; the device counts it as dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the port dropped the frame")]
pub struct PortDropped;

/// The cable of one vPort.
///
/// Sending may happen from several threads at once. Frames for the guest go the other way, through
/// [`crate::ManaDevice::deliver`].
pub trait Port: Send + Sync {
    /// What the port does itself. Constant.
    fn capabilities(&self) -> PortCapabilities {
        PortCapabilities::default()
    }
    /// Take one frame. Must not block.
    ///
    /// # Errors
    /// [`PortDropped`] when there is no room.
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped>;
    /// The batch of frames from one doorbell is over.
    fn flush(&self) {}
}

/// What is known of the checksums of a frame for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RxChecksum {
    /// Nothing: the device checks.
    #[default]
    Unknown,
    /// The port vouches for the transport checksum (virtio-net's DATA_VALID or NEEDS_CSUM).
    Valid,
}

/// A frame for the guest.
#[derive(Clone, Copy, Debug)]
pub struct RxFrame<'a> {
    /// The bytes from the Ethernet header on, without FCS.
    pub bytes: &'a [u8],
    /// What the port knows of its checksums.
    pub checksum: RxChecksum,
}
