//! How a command ends: the status in its response, and why.

use crate::region::RegionError;
use crate::rx::RxConfigError;

/// Status of a response. The driver knows 0, "more entries" and "unsupported"; any other number is an error to it,
/// and hardware's own numbers are not public.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Success = 0,
    /// A number, size or combination that can't be.
    InvalidParameter = 0x10,
    /// No such object, or one that belongs to another device.
    NotFound = 0x11,
    /// A limit of the card is reached.
    NoResources = 0x12,
    /// Not possible now: already done, or something must be done first.
    WrongState = 0x13,
    /// A page is not guest memory.
    DmaFault = 0x14,
    /// `GDMA_STATUS_MORE_ENTRIES`: pages of a DMA region are still missing.
    MoreEntries = 0x105,
    /// `GDMA_STATUS_CMD_UNSUPPORTED`.
    Unsupported = 0xffff_ffff,
}

/// A command that failed: the status for the guest, the cause for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct CommandError {
    /// For the guest.
    pub status: Status,
    /// For the log.
    pub cause: String,
}

impl CommandError {
    fn new(status: Status, cause: impl Into<String>) -> Self {
        Self { status, cause: cause.into() }
    }
    /// A parameter that can't be.
    pub fn invalid(cause: impl Into<String>) -> Self {
        Self::new(Status::InvalidParameter, cause)
    }
    /// An object that does not exist for whoever asks.
    pub fn not_found(cause: impl Into<String>) -> Self {
        Self::new(Status::NotFound, cause)
    }
    /// A limit is reached.
    pub fn exhausted(cause: impl Into<String>) -> Self {
        Self::new(Status::NoResources, cause)
    }
    /// Not now.
    pub fn wrong_state(cause: impl Into<String>) -> Self {
        Self::new(Status::WrongState, cause)
    }
    /// Guest memory could not be reached.
    pub fn dma(cause: impl Into<String>) -> Self {
        Self::new(Status::DmaFault, cause)
    }
    /// A command that the card does not have.
    pub fn unsupported(cause: impl Into<String>) -> Self {
        Self::new(Status::Unsupported, cause)
    }
}

impl From<RegionError> for CommandError {
    fn from(error: RegionError) -> Self {
        Self::invalid(error.to_string())
    }
}

impl From<RxConfigError> for CommandError {
    fn from(error: RxConfigError) -> Self {
        Self::invalid(error.to_string())
    }
}
