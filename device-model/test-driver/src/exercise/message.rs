//! Requests of the hardware channel, built without an allocation.

use super::model::MANA;
use crate::gdma::code as gdma;
use crate::mana::code as mana;

/// Bytes of the longest request that is built here.
const LONGEST: usize = 640;
/// Bytes of a request's header.
pub const HEADER: usize = 40;

/// A request.
#[derive(Clone, Copy)]
pub struct Message {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Message {
    /// Command `code` for `device`, `len` bytes long, in version `version`, answered with up to `answer` bytes.
    pub fn new(code: u32, device: u16, len: usize, answer: u32, version: u16) -> Self {
        let mut message = Self { bytes: [0; LONGEST], len: len.min(LONGEST) };
        let put = message.u32(4, code).u32(8, u32::from(version) | 0x5a << 16).u32(12, len as u32);
        put.u32(20, code).u32(24, u32::from(version)).u32(28, answer).u32(32, device.into()).u32(36, 0x77);
        message
    }
    /// Write at byte `at`.
    pub fn put(&mut self, at: usize, data: &[u8]) -> &mut Self {
        if let Some(to) = self.bytes.get_mut(at..at + data.len()) {
            to.copy_from_slice(data);
        }
        self
    }
    /// Write a dword at byte `at`.
    pub fn u32(&mut self, at: usize, value: u32) -> &mut Self {
        self.put(at, &value.to_le_bytes())
    }
    /// Write a quadword at byte `at`.
    pub fn u64(&mut self, at: usize, value: u64) -> &mut Self {
        self.put(at, &value.to_le_bytes())
    }
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
    /// It is `len` bytes long, whatever it says.
    pub fn cut(&mut self, len: usize) -> &mut Self {
        self.len = len.min(LONGEST);
        self
    }
    /// Flip bits.
    pub fn flip(&mut self, at: usize, bits: u8) -> &mut Self {
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte ^= bits;
        }
        self
    }
}

/// GDMA_REGISTER_DEVICE.
pub fn register(device: u16) -> Message {
    Message::new(gdma::REGISTER_DEVICE, device, 40, 44, 1)
}
/// GDMA_DEREGISTER_DEVICE.
pub fn deregister(device: u16) -> Message {
    Message::new(gdma::DEREGISTER_DEVICE, device, 40, 32, 1)
}
/// GDMA_CREATE_DMA_REGION of whole `pages`, `given` of them in this message.
pub fn create_region(pages: &[u64], given: usize) -> Message {
    let mut message = Message::new(gdma::CREATE_DMA_REGION, 0, 64 + 8 * given, 40, 1);
    message.u64(40, 4096 * pages.len() as u64).u32(56, pages.len() as u32).u32(60, given as u32);
    for (page, at) in pages.iter().take(given).zip((64..).step_by(8)) {
        message.u64(at, *page);
    }
    message
}
/// GDMA_DMA_REGION_ADD_PAGES.
pub fn add_pages(region: u64, pages: &[u64]) -> Message {
    let mut message = Message::new(gdma::DMA_REGION_ADD_PAGES, 0, 56 + 8 * pages.len(), 32, 1);
    message.u64(40, region).u32(48, pages.len() as u32);
    for (page, at) in pages.iter().zip((56..).step_by(8)) {
        message.u64(at, *page);
    }
    message
}
/// A command for `device` whose body is one quadword: DESTROY_DMA_REGION, DESTROY_PD, FENCE_RQ and others.
pub fn of_one(code: u32, device: u16, value: u64, answer: u32) -> Message {
    *Message::new(code, device, 48, answer, 1).u64(40, value)
}
/// GDMA_CREATE_QUEUE, of an event queue of `size` bytes.
pub fn create_eq(device: u16, region: u64, page: u32, size: u32, vector: u32) -> Message {
    let mut message = Message::new(gdma::CREATE_QUEUE, device, 96, 36, 1);
    message.u32(40, 4).u32(48, u32::from(device)).u32(52, page).u64(56, region).u32(68, size).u32(76, vector);
    message
}
/// GDMA_DISABLE_QUEUE, of an event queue.
pub fn disable_eq(device: u16, id: u32) -> Message {
    *Message::new(gdma::DISABLE_QUEUE, device, 52, 32, 1).u32(40, 4).u32(44, id).u32(48, 1)
}
/// Handle of vPort `index`. The driver learns it from MANA_QUERY_VPORT_CONFIG.
pub fn vport(index: u32) -> u64 {
    0x7600_0000_0000_0000 | u64::from(index)
}
/// MANA_CONFIG_VPORT_TX, bound to protection domain `pd` and doorbell page `page`.
pub fn config_tx(port: u32, pd: u32, page: u32) -> Message {
    *Message::new(mana::CONFIG_VPORT_TX, MANA, 56, 36, 1).u64(40, vport(port)).u32(48, pd).u32(52, page)
}
/// MANA_CREATE_WQ_OBJ in version 3.
pub fn create_wq(port: u32, is_send: bool, regions: [u64; 2], sizes: [u32; 2], eq: u32) -> Message {
    let mut message = Message::new(mana::CREATE_WQ_OBJ, MANA, 96, 56, 3);
    message.u64(40, vport(port)).u32(48, if is_send { 1 } else { 2 });
    message.u64(56, regions[0]).u64(64, regions[1]).u32(72, sizes[0]).u32(76, sizes[1]).u32(84, eq);
    message
}
/// The request of [`config_rx`] sets a key, too.
pub fn with_key(mut message: Message) -> Message {
    message.put(61, &[1]).put(72, &crate::netdev::RSS_KEY);
    message
}
/// MANA_DESTROY_WQ_OBJ.
pub fn destroy_wq(is_send: bool, handle: u64) -> Message {
    let mut message = Message::new(mana::DESTROY_WQ_OBJ, MANA, 56, 32, 1);
    *message.u32(40, if is_send { 1 } else { 2 }).u64(48, handle)
}
/// MANA_CONFIG_VPORT_RX in version 5: all but a key is told, the table is `queues` again and again.
pub fn config_rx(port: u32, on: bool, rss: bool, queues: &[u64], entries: u16, coalescing: u8) -> Message {
    let len = 120 + 8 * usize::from(entries);
    let mut message = Message::new(mana::CONFIG_VPORT_RX, MANA, len, 40, 5);
    message.u64(40, vport(port)).u32(48, u32::from(entries) | 120 << 16);
    message.u32(52, on.into()).u32(56, rss.into()).u64(64, queues.first().copied().unwrap_or(u64::MAX));
    message.put(60, &[1, 0, u8::from(!queues.is_empty())]);
    message.put(112, &[coalescing & 1, 0, 0, 0, 0x3f, 0, coalescing >> 1 & 1]);
    for (queue, at) in queues.iter().cycle().take(entries.into()).zip((120..).step_by(8)) {
        message.u64(at, *queue);
    }
    message
}
