//! HWC messages byte by byte: the headers of sections 6.1 of the interface, and fields at their offsets.

use crate::error::{Error, Result};
use crate::gdma::DeviceId;

/// Bytes of a request header.
pub const REQUEST_HEADER: usize = 40;
/// Bytes of a response header.
pub const RESPONSE_HEADER: usize = 32;
/// `GDMA_STATUS_MORE_ENTRIES`.
pub const STATUS_MORE_ENTRIES: u32 = 0x105;
/// `GDMA_STATUS_CMD_UNSUPPORTED`.
pub const STATUS_UNSUPPORTED: u32 = 0xffff_ffff;

/// A request, whole: header, body, and what it asks the response to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Request `code` of `len` bytes for device `device`, asking for `response_len` bytes; both versions 1.
    pub fn new(code: u32, device: DeviceId, len: usize, response_len: usize) -> Self {
        Self { bytes: vec![0; len.max(REQUEST_HEADER)] }
            .u32(4, code)
            .u16(8, 1)
            .u32(12, size(len))
            .u32(20, code)
            .u16(24, 1)
            .u32(28, size(response_len))
            .u16(32, device.kind)
            .u16(34, device.instance)
    }

    /// The request's own version, and the highest response version it understands.
    #[must_use]
    pub fn versions(self, request: u16, response: u16) -> Self {
        self.u16(8, request).u16(24, response)
    }

    /// `activity_id`.
    #[must_use]
    pub fn activity(self, id: u32) -> Self {
        self.u32(36, id)
    }

    /// The byte at `offset`.
    #[must_use]
    pub fn u8(self, offset: usize, value: u8) -> Self {
        self.put(offset, &[value])
    }
    /// The u16 at `offset`.
    #[must_use]
    pub fn u16(self, offset: usize, value: u16) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// The u32 at `offset`.
    #[must_use]
    pub fn u32(self, offset: usize, value: u32) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// The u64 at `offset`.
    #[must_use]
    pub fn u64(self, offset: usize, value: u64) -> Self {
        self.put(offset, &value.to_le_bytes())
    }
    /// Consecutive u64s from `offset` on.
    #[must_use]
    pub fn u64s(self, offset: usize, values: &[u64]) -> Self {
        values.iter().enumerate().fold(self, |request, (i, &value)| request.u64(offset + 8 * i, value))
    }
    /// Bytes from `offset` on.
    ///
    /// # Panics
    /// They reach past the end of the message.
    #[must_use]
    pub fn put(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// The message.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
    /// Command code.
    pub fn code(&self) -> u32 {
        field(&self.bytes, 4).map_or(0, u32::from_le_bytes)
    }
    /// Response bytes that the request asks for.
    pub fn response_len(&self) -> usize {
        field(&self.bytes, 28).map_or(0, u32::from_le_bytes) as usize
    }
}

/// A response as the driver's caller sees it: the buffer it brought, zero where the device wrote nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    bytes: Vec<u8>,
    received: usize,
}

impl Response {
    /// `received` into a caller's buffer of `expected` bytes.
    pub fn new(mut received: Vec<u8>, expected: usize) -> Self {
        let len = received.len();
        received.resize(expected.max(len), 0);
        Self { bytes: received, received: len }
    }
    /// Bytes that the device sent (`tx_oob_data_size`).
    pub fn received(&self) -> usize {
        self.received
    }
    /// The message.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
    /// The byte at `offset`.
    pub fn u8(&self, offset: usize) -> u8 {
        self.field::<1>(offset)[0]
    }
    /// The u16 at `offset`.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.field(offset))
    }
    /// The u32 at `offset`.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.field(offset))
    }
    /// The u64 at `offset`.
    pub fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.field(offset))
    }
    /// `N` bytes from `offset` on.
    ///
    /// # Panics
    /// The caller's buffer ends before.
    pub fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        field(&self.bytes, offset)
            .unwrap_or_else(|| panic!("no field at {offset} of a {}-byte response", self.bytes.len()))
    }
    /// Version of the response: says which fields are valid.
    pub fn version(&self) -> u16 {
        self.u16(8)
    }
    /// Status of the command.
    pub fn status(&self) -> u32 {
        self.u32(24)
    }

    /// The checks of `mana_verify_resp_hdr` and its callers: an answer to this very request, at least `min` bytes.
    ///
    /// # Errors
    /// `-EPROTO`, saying which field is wrong.
    pub fn verify(&self, request: &Request, min: usize) -> Result<()> {
        let wrong = |what: &str, got: u32, want: u32| {
            Err(Error::proto(format!("response to {:#x}: {what} is {got:#x}, not {want:#x}", request.code())))
        };
        let asked = |offset| field(request.bytes(), offset).map_or(0, u32::from_le_bytes);
        match () {
            () if self.u32(4) != request.code() => wrong("msg_type", self.u32(4), request.code()),
            () if self.version() < 1 => wrong("msg_version", 0, 1),
            () if (self.u32(12) as usize) < min => wrong("msg_size", self.u32(12), size(min)),
            () if self.u32(16) != asked(32) => wrong("dev_id", self.u32(16), asked(32)),
            () if self.u32(20) != asked(36) => wrong("activity_id", self.u32(20), asked(36)),
            () => Ok(()),
        }
    }
}

fn size(len: usize) -> u32 {
    u32::try_from(len).expect("a message is short")
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}
