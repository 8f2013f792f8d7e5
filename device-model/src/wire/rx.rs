//! Receive: the completion that says what lies in the buffers of one or more receive WQEs.
//!
//! Source: `struct mana_rxcomp_oob`, `struct mana_rxcomp_perpkt_info` and `enum mana_cqe_type` of the Linux
//! driver's mana.h.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::tx::CLIENT_TYPE_COMPLETION;

/// What a receive completion announces: its `cqe_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RxType {
    /// `CQE_RX_OKAY`: one packet.
    Okay = 1,
    /// `CQE_RX_COALESCED_4`: up to four packets, a WQE each, laid out as [`PerPacket`].
    Coalesced4 = 2,
    /// `CQE_RX_OBJECT_FENCE`: everything steered before the fence is complete; consumes no WQE.
    Fence = 3,
    /// `CQE_RX_TRUNCATED`: the packet did not fit into its WQE's buffers.
    Truncated = 4,
    /// `CQE_RX_COALESCED_8`: up to eight packets, a WQE each, laid out as [`PerPacketPair`].
    Coalesced8 = 7,
}

/// What was found out about a packet: `rx_vlan_id` and the bits that follow it, one word of the completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxMeta(u32);

impl RxMeta {
    const VLAN_PRESENT: u32 = 1 << 12;
    const HASH_TYPE_AT: u32 = 16;
    const IP_OK: u32 = 1 << 25;
    const IP_FAIL: u32 = 1 << 26;
    const TCP_OK: u32 = 1 << 27;
    const TCP_FAIL: u32 = 1 << 28;
    const UDP_OK: u32 = 1 << 29;
    const UDP_FAIL: u32 = 1 << 30;

    /// A tag with this TCI was taken out of the packet. Only the VLAN id has room.
    #[must_use]
    pub fn with_vlan(self, tci: u16) -> Self {
        Self(self.0 | u32::from(tci & 0xfff) | Self::VLAN_PRESENT)
    }
    /// `rx_hashtype`: the one bit of [`crate::steer::HashTypes`] that was hashed.
    #[must_use]
    pub fn with_hash_type(self, bit: u16) -> Self {
        Self(self.0 | u32::from(bit & 0x1ff) << Self::HASH_TYPE_AT)
    }
    /// Result of the IP header checksum; for IPv6, which has none, "ok" is what the driver wants to see.
    #[must_use]
    pub fn with_ip_checksum(self, ok: bool) -> Self {
        Self(self.0 | if ok { Self::IP_OK } else { Self::IP_FAIL })
    }
    /// Result of the TCP checksum.
    #[must_use]
    pub fn with_tcp_checksum(self, ok: bool) -> Self {
        Self(self.0 | if ok { Self::TCP_OK } else { Self::TCP_FAIL })
    }
    /// Result of the UDP checksum.
    #[must_use]
    pub fn with_udp_checksum(self, ok: bool) -> Self {
        Self(self.0 | if ok { Self::UDP_OK } else { Self::UDP_FAIL })
    }
    /// The word as it stands in the completion.
    pub const fn word(self) -> u32 {
        self.0
    }
    /// The VLAN id of the tag that was taken out.
    pub fn vlan_id(self) -> Option<u16> {
        (self.0 & Self::VLAN_PRESENT != 0).then_some((self.0 & 0xfff) as u16)
    }
    /// The hash type bit, 0 if the packet was not hashed.
    pub fn hash_type(self) -> u16 {
        (self.0 >> Self::HASH_TYPE_AT & 0x1ff) as u16
    }
    /// The driver trusts the checksums (`mana_rx_skb`: IP ok and TCP or UDP ok).
    pub fn checksums_ok(self) -> bool {
        self.0 & Self::IP_OK != 0 && self.0 & (Self::TCP_OK | Self::UDP_OK) != 0
    }
}

impl From<u32> for RxMeta {
    fn from(word: u32) -> Self {
        Self(word)
    }
}

/// Packets of one completion at most.
pub const MAX_COALESCED: usize = 8;

/// One packet of a completion that holds up to four (`struct mana_rxcomp_perpkt_info`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PerPacket {
    /// Bytes in the buffer; 0 ends the list.
    pub len: U16,
    /// Reserved.
    pub reserved: [U16; 3],
    /// Hash value.
    pub hash: U32,
}
const _: () = assert!(size_of::<PerPacket>() == 12);

/// Two packets of a completion that holds up to eight.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PerPacketPair {
    /// Hash value of the first.
    pub hash0: U32,
    /// Bytes of the first; 0 ends the list.
    pub len0: U16,
    /// Bytes of the second; 0 ends the list.
    pub len1: U16,
    /// Hash value of the second.
    pub hash1: U32,
}
const _: () = assert!(size_of::<PerPacketPair>() == 12);

/// Client data of an RX completion (`struct mana_rxcomp_oob`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RxCompletion {
    /// `cqe_type` 0..5, `client_type` 6..7, `vendor_err` 8..31.
    pub header: U32,
    /// See [`RxMeta`].
    pub meta: U32,
    /// The packets, as [`PerPacket`] or [`PerPacketPair`].
    pub packets: [[u8; 12]; 4],
    /// `rx_wqe_offset`: bytes from the ring's first post to the (first) WQE, free running.
    pub wqe_offset: U32,
}
const _: () = assert!(size_of::<RxCompletion>() == 60);
const _: () = assert!(std::mem::offset_of!(RxCompletion, packets) == 8);
const _: () = assert!(std::mem::offset_of!(RxCompletion, wqe_offset) == 56);

impl RxCompletion {
    /// A completion without packets.
    pub fn new(kind: RxType, meta: RxMeta, wqe_offset: u32) -> Self {
        Self {
            header: U32::new(kind as u32 | CLIENT_TYPE_COMPLETION << 6),
            meta: U32::new(meta.word()),
            packets: [[0; 12]; 4],
            wqe_offset: U32::new(wqe_offset),
        }
    }
    /// Put `(len, hash)` of each packet where this completion's type wants it. What does not fit is left out.
    #[inline]
    pub fn set_packets(&mut self, packets: impl IntoIterator<Item = (u16, u32)>) {
        let mut packets = packets.into_iter();
        if self.cqe_type() == RxType::Coalesced8 as u8 {
            for slot in &mut self.packets {
                let (len0, hash0) = packets.next().unwrap_or_default();
                let (len1, hash1) = packets.next().unwrap_or_default();
                *slot = zerocopy::transmute!(PerPacketPair {
                    hash0: hash0.into(),
                    len0: len0.into(),
                    len1: len1.into(),
                    hash1: hash1.into(),
                });
            }
        } else {
            for (slot, (len, hash)) in self.packets.iter_mut().zip(packets) {
                let reserved = [U16::ZERO; 3];
                *slot = zerocopy::transmute!(PerPacket { len: len.into(), reserved, hash: hash.into() });
            }
        }
    }
    /// `cqe_type`, see [`RxType`].
    pub fn cqe_type(&self) -> u8 {
        (self.header.get() & 0x3f) as u8
    }
    /// What was found out about the packets.
    pub fn meta(&self) -> RxMeta {
        RxMeta(self.meta.get())
    }
    /// `(len, hash)` of each packet, as the driver walks them: up to the first length of 0.
    pub fn packets(&self) -> impl Iterator<Item = (u16, u32)> + '_ {
        let pairs = self.cqe_type() == RxType::Coalesced8 as u8;
        let each = move |slot: &[u8; 12]| -> [(u16, u32); 2] {
            if pairs {
                let pair: PerPacketPair = zerocopy::transmute!(*slot);
                [(pair.len0.get(), pair.hash0.get()), (pair.len1.get(), pair.hash1.get())]
            } else {
                let packet: PerPacket = zerocopy::transmute!(*slot);
                [(packet.len.get(), packet.hash.get()), (0, 0)]
            }
        };
        self.packets
            .iter()
            .flat_map(move |slot| each(slot).into_iter().take(if pairs { 2 } else { 1 }))
            .take_while(|&(len, _)| len != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_bits_are_where_the_driver_reads_them() {
        let meta = RxMeta::default()
            .with_vlan(0xfabc)
            .with_hash_type(1 << 8)
            .with_ip_checksum(true)
            .with_tcp_checksum(false)
            .with_udp_checksum(true);
        assert_eq!(meta.word(), 0xabc | 1 << 12 | 1 << 24 | 1 << 25 | 1 << 28 | 1 << 29);
        assert_eq!(meta.vlan_id(), Some(0xabc));
        assert_eq!(meta.hash_type(), 1 << 8);
        assert!(meta.checksums_ok());
        assert!(!RxMeta::default().with_udp_checksum(true).checksums_ok());
    }

    #[test]
    fn one_packet_leaves_the_other_slots_zero() {
        let mut completion = RxCompletion::new(RxType::Okay, RxMeta::default(), 0x40);
        completion.set_packets([(60, 0x1122_3344)]);
        let bytes = completion.as_bytes();
        assert_eq!(bytes[0], 1 | 1 << 6);
        assert_eq!(bytes[8..20], [60, 0, 0, 0, 0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11]);
        assert!(bytes[20..56].iter().all(|&byte| byte == 0));
        assert_eq!(bytes[56..], [0x40, 0, 0, 0]);
    }

    #[test]
    fn eight_packets_have_the_hash_first() {
        let packets: Vec<_> = (1..=5).map(|n| (n, u32::from(n) << 24)).collect();
        let mut completion = RxCompletion::new(RxType::Coalesced8, RxMeta::default(), 0);
        completion.set_packets(packets.iter().copied());
        let bytes = completion.as_bytes();
        assert_eq!(bytes[8..20], [0, 0, 0, 1, 1, 0, 2, 0, 0, 0, 0, 2]);
        assert_eq!(completion.packets().collect::<Vec<_>>(), packets);
    }

    #[test]
    fn four_packets_read_back() {
        let packets = [(1, 2), (3, 4), (5, 6), (7, 8)];
        let mut completion = RxCompletion::new(RxType::Coalesced4, RxMeta::default(), 0);
        completion.set_packets(packets.iter().copied());
        assert_eq!(completion.packets().collect::<Vec<_>>(), packets);
    }
}
