//! What a driver function returns when the device let it down: the errno of the Linux driver, and the story.

use std::fmt;

/// The errnos by which the Linux driver tells failures apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// The device answered something that makes no sense, or an error status.
    Eproto,
    /// The device did not answer.
    Etimedout,
    /// Too few vectors or queues.
    Enospc,
    /// No such device.
    Enodev,
    /// A value outside its range.
    Einval,
    /// The device does not know the command (`GDMA_STATUS_CMD_UNSUPPORTED`).
    Eopnotsupp,
}

/// A failed driver function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{errno}: {what}")]
pub struct Error {
    /// What the Linux driver would return.
    pub errno: Errno,
    /// What happened.
    pub what: String,
    /// Status of the command, where the device answered with one.
    pub status: Option<u32>,
}

/// Result of a driver function.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure without a command status.
    pub fn new(errno: Errno, what: impl Into<String>) -> Self {
        Self { errno, what: what.into(), status: None }
    }
    /// `-EPROTO`.
    pub fn proto(what: impl Into<String>) -> Self {
        Self::new(Errno::Eproto, what)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eproto => "-EPROTO",
            Self::Etimedout => "-ETIMEDOUT",
            Self::Enospc => "-ENOSPC",
            Self::Enodev => "-ENODEV",
            Self::Einval => "-EINVAL",
            Self::Eopnotsupp => "-EOPNOTSUPP",
        })
    }
}
