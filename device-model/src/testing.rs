//! Frames and out-of-band data for this crate's tests; the frames and their checksums are etherparse's.

mod pending;
pub mod rig;

use etherparse::PacketBuilder;

use crate::wire::tx::TxOob;

/// Destination and source of every frame.
const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// Ethernet, IPv4, TCP.
pub fn tcp4(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    builder.tcp(1000, 2000, 7, 100).write(&mut frame, payload).unwrap();
    frame
}

/// Ethernet, IPv4, UDP.
pub fn udp4(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    builder.udp(1000, 2000).write(&mut frame, payload).unwrap();
    frame
}

/// Ethernet, IPv6, TCP.
pub fn tcp6(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv6([0xfd; 16], [0xfe; 16], 64);
    builder.tcp(1000, 2000, 7, 100).write(&mut frame, payload).unwrap();
    frame
}

/// Ethernet, IPv6, UDP.
pub fn udp6(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv6([0xfd; 16], [0xfe; 16], 64);
    builder.udp(1000, 2000).write(&mut frame, payload).unwrap();
    frame
}

/// Builds a [`TxOob`].
#[derive(Clone, Copy, Default)]
pub struct OobBuilder([u32; 4]);

/// A [`TxOob`] that asks for nothing.
pub fn oob() -> OobBuilder {
    OobBuilder::default()
}

impl OobBuilder {
    fn with(mut self, word: usize, bits: u32) -> Self {
        self.0[word] |= bits;
        self
    }
    pub fn ipv4(self) -> Self {
        self.with(0, 1 << 2)
    }
    pub fn ipv6(self) -> Self {
        self.with(0, 1 << 3)
    }
    pub fn ip_checksum(self) -> Self {
        self.with(0, 1 << 4)
    }
    pub fn tcp(self, offset: u32) -> Self {
        self.with(0, 1 << 5).with(1, offset)
    }
    pub fn udp(self) -> Self {
        self.with(0, 1 << 6)
    }
    /// Offloads are for what is at byte `inner_ip`, IPv6 if `v6`.
    pub fn inner(self, inner_ip: u32, v6: bool) -> Self {
        self.with(0, TxOob::FORMAT_LONG).with(2, 1 | u32::from(v6) << 1).with(3, (inner_ip - 14) | (14 << 10))
    }
    /// Of the queue `queue`.
    pub fn of(self, queue: &rig::DriverQueue) -> Self {
        self.with(0, queue.cq << 8).with(1, (queue.id >> 10 & 0x3fff) << 10)
    }
    pub fn vport_offset(self, offset: u32) -> Self {
        self.with(1, offset << 24)
    }
    pub fn suppress(self) -> Self {
        self.with(0, 1 << 7)
    }
    pub fn vlan(self, tci: u16) -> Self {
        let tci = u32::from(tci);
        self.with(0, TxOob::FORMAT_LONG)
            .with(2, 1 << 3 | (tci >> 13) << 16 | (tci >> 12 & 1) << 19 | (tci & 0xfff) << 20)
    }
    /// With a tag to insert, if there is one.
    pub fn maybe_vlan(self, tci: Option<u16>) -> Self {
        tci.map_or(self, |tci| self.vlan(tci))
    }
    /// The bytes in the WQE: as long as the format needs.
    pub fn bytes(self) -> Vec<u8> {
        let oob = self.build();
        let len = if oob.format() == TxOob::FORMAT_LONG { 24 } else { 8 };
        zerocopy::IntoBytes::as_bytes(&oob)[..len].to_vec()
    }
    pub fn build(self) -> TxOob {
        let mut words = [0; 24];
        for (bytes, word) in words.chunks_mut(4).zip(self.0) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        TxOob::parse(&words).unwrap()
    }
}
