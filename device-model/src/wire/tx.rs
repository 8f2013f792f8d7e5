//! Transmit: the out-of-band data inside a send WQE and the completion that answers it.
//!
//! Source: `struct mana_tx_oob`, `struct mana_tx_comp_oob` and `enum mana_cqe_type` of the Linux driver's
//! mana.h.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of the short form of [`TxOob`] (`struct mana_tx_short_oob`).
pub const SHORT_OOB_SIZE: usize = 8;
/// Bytes of the long form of [`TxOob`] (`struct mana_tx_oob`).
pub const LONG_OOB_SIZE: usize = 24;

/// Per-packet instructions, inline in the WQE.
///
/// The short form is the first [`SHORT_OOB_SIZE`] bytes; the rest then counts as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxOob {
    /// Packet format, checksum requests, completion queue.
    pub word0: U32,
    /// Transport offset, send queue frame, short vPort offset.
    pub word1: U32,
    /// Encapsulation and VLAN tag (long form).
    pub word2: U32,
    /// Inner offsets and long vPort offset (long form).
    pub word3: U32,
    /// Reserved (long form).
    pub reserved: [U32; 2],
}
const _: () = assert!(size_of::<TxOob>() == LONG_OOB_SIZE);

/// `len` bits of `word` from bit `at` on.
const fn bits(word: u32, at: u32, len: u32) -> u32 {
    (word >> at) & ((1 << len) - 1)
}

impl TxOob {
    /// `pkt_fmt` of the short form (`MANA_SHORT_PKT_FMT`).
    pub const FORMAT_SHORT: u32 = 0;
    /// `pkt_fmt` of the long form (`MANA_LONG_PKT_FMT`).
    pub const FORMAT_LONG: u32 = 1;

    /// The out-of-band data in the first bytes of `inline`, which is 8 or 24 bytes or more; `None` if it is
    /// shorter than its format says or of an unknown format.
    pub fn parse(inline: &[u8]) -> Option<Self> {
        let mut oob = Self::default();
        let short = inline.first_chunk::<SHORT_OOB_SIZE>()?;
        oob.as_mut_bytes().first_chunk_mut::<SHORT_OOB_SIZE>()?.copy_from_slice(short);
        match oob.format() {
            Self::FORMAT_SHORT => Some(oob),
            Self::FORMAT_LONG => Self::read_from_prefix(inline).ok().map(|(oob, _)| oob),
            _ => None,
        }
    }
    /// `pkt_fmt`.
    pub fn format(&self) -> u32 {
        bits(self.word0.get(), 0, 2)
    }
    /// `is_outer_ipv4`.
    pub fn is_outer_ipv4(&self) -> bool {
        bits(self.word0.get(), 2, 1) != 0
    }
    /// `is_outer_ipv6`.
    pub fn is_outer_ipv6(&self) -> bool {
        bits(self.word0.get(), 3, 1) != 0
    }
    /// `comp_iphdr_csum`: fill the IPv4 header checksum.
    pub fn compute_ip_checksum(&self) -> bool {
        bits(self.word0.get(), 4, 1) != 0
    }
    /// `comp_tcp_csum`: fill the TCP checksum, whose field holds the pseudo-header's sum.
    pub fn compute_tcp_checksum(&self) -> bool {
        bits(self.word0.get(), 5, 1) != 0
    }
    /// `comp_udp_csum`: fill the UDP checksum, whose field holds the pseudo-header's sum.
    pub fn compute_udp_checksum(&self) -> bool {
        bits(self.word0.get(), 6, 1) != 0
    }
    /// `supress_txcqe_gen`: no completion when all went well.
    pub fn suppress_completion(&self) -> bool {
        bits(self.word0.get(), 7, 1) != 0
    }
    /// `vcq_num`: id of the queue's CQ.
    pub fn cq(&self) -> u32 {
        bits(self.word0.get(), 8, 24)
    }
    /// `trans_off`: bytes from the start of the frame to the transport header; 0 is "find it" (UDP).
    pub fn transport_offset(&self) -> u16 {
        bits(self.word1.get(), 0, 10) as u16
    }
    /// `vsq_frame`: bits 10 to 23 of the SQ id.
    pub fn sq_frame(&self) -> u32 {
        bits(self.word1.get(), 10, 14)
    }
    /// The vPort offset that CONFIG_VPORT_TX answered. `short_vp_offset`, or `long_vp_offset` where only that
    /// is set: the driver uses the long one for offsets above 255 only (`mana_start_xmit`).
    pub fn vport_offset(&self) -> u16 {
        let short = bits(self.word1.get(), 24, 8);
        let long = bits(self.word3.get(), 16, 12);
        (if long != 0 { long } else { short }) as u16
    }
    /// `is_encap`: offloads are meant for the inner packet.
    pub fn is_encapsulated(&self) -> bool {
        bits(self.word2.get(), 0, 1) != 0
    }
    /// `inner_is_ipv6`.
    pub fn inner_is_ipv6(&self) -> bool {
        bits(self.word2.get(), 1, 1) != 0
    }
    /// The VLAN tag to insert as TCI (PCP, DEI, VLAN id), if `inject_vlan_pri_tag` is set.
    pub fn vlan_tci(&self) -> Option<u16> {
        let word = self.word2.get();
        (bits(word, 3, 1) != 0)
            .then(|| (bits(word, 16, 3) << 13 | bits(word, 19, 1) << 12 | bits(word, 20, 12)) as u16)
    }
    /// Bytes from the start of the frame to the inner IP header: `inner_frame_offset` plus
    /// `inner_ip_rel_offset`.
    pub fn inner_ip_offset(&self) -> u16 {
        let word = self.word3.get();
        (bits(word, 0, 10) + bits(word, 10, 6)) as u16
    }
}

/// How a send WQE ended: `cqe_type` of the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TxStatus {
    /// `CQE_TX_OKAY`: sent.
    Okay = 32,
    /// `CQE_TX_SA_DROP`: source address not allowed.
    SaDrop = 33,
    /// `CQE_TX_MTU_DROP`: longer than MTU and headers.
    MtuDrop = 34,
    /// `CQE_TX_INVALID_OOB`: out-of-band data that makes no sense or is not this queue's.
    InvalidOob = 35,
    /// `CQE_TX_INVALID_ETH_TYPE`: EtherType not allowed.
    InvalidEthType = 36,
    /// `CQE_TX_HDR_PROCESSING_ERROR`: headers are not what the out-of-band data says.
    HeaderProcessingError = 37,
    /// `CQE_TX_VF_DISABLED`: the function must not send.
    VfDisabled = 38,
    /// `CQE_TX_VPORT_IDX_OUT_OF_RANGE`: vPort offset of no vPort.
    VportIndexOutOfRange = 39,
    /// `CQE_TX_VPORT_DISABLED`: the vPort must not send.
    VportDisabled = 40,
    /// `CQE_TX_VLAN_TAGGING_VIOLATION`: a tag that must not be inserted.
    VlanTaggingViolation = 41,
    /// `CQE_TX_GDMA_ERR`: the WQE or its scatter list is broken; the queue stops.
    GdmaError = 42,
}

/// `client_type` of every Ethernet completion; the driver checks it in TX ones
/// (`MANA_CQE_COMPLETION`).
pub const CLIENT_TYPE_COMPLETION: u32 = 1;

/// Client data of a TX completion (`struct mana_tx_comp_oob`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TxCompletion {
    /// `cqe_type` 0..5, `client_type` 6..7, `vendor_err` 8..31.
    pub header: U32,
    /// `tx_data_offset`.
    pub data_offset: U32,
    /// `tx_sgl_offset` 0..4, `tx_wqe_offset` 5..31 (basic units).
    pub wqe_offset: U32,
    /// Reserved.
    pub reserved: [U32; 12],
}
const _: () = assert!(size_of::<TxCompletion>() == 60);

impl TxCompletion {
    /// The completion of the WQE that starts `wqe_offset` basic units from the ring's first post, free running.
    pub fn new(status: TxStatus, wqe_offset: u32) -> Self {
        Self {
            header: U32::new(status as u32 | CLIENT_TYPE_COMPLETION << 6),
            data_offset: U32::ZERO,
            wqe_offset: U32::new(wqe_offset << 5),
            reserved: [U32::ZERO; 12],
        }
    }
    /// `cqe_type`, see [`TxStatus`].
    pub fn cqe_type(&self) -> u8 {
        bits(self.header.get(), 0, 6) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oob(words: [u32; 6]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn reads_every_field_of_the_long_form() {
        let bytes = oob([
            0b1001_0101 | 0x12_3456 << 8 | 1 << 5,
            54 | 0x2aaa << 10 | 7 << 24,
            1 | 1 << 1 | 1 << 3 | 5 << 16 | 1 << 19 | 0xabc << 20,
            100 | 14 << 10 | 0x321 << 16,
            0,
            0,
        ]);
        let oob = TxOob::parse(&bytes).unwrap();
        assert_eq!(oob.format(), TxOob::FORMAT_LONG);
        assert!(oob.is_outer_ipv4() && !oob.is_outer_ipv6());
        assert!(oob.compute_ip_checksum() && oob.compute_tcp_checksum() && !oob.compute_udp_checksum());
        assert!(oob.suppress_completion());
        assert_eq!(oob.cq(), 0x12_3456);
        assert_eq!(oob.transport_offset(), 54);
        assert_eq!(oob.sq_frame(), 0x2aaa);
        assert_eq!(oob.vport_offset(), 0x321);
        assert!(oob.is_encapsulated() && oob.inner_is_ipv6());
        assert_eq!(oob.vlan_tci(), Some(0b1011_1010_1011_1100));
        assert_eq!(oob.inner_ip_offset(), 114);
    }

    #[test]
    fn short_form_ignores_what_follows() {
        let mut bytes = oob([0, 9 << 24, u32::MAX, u32::MAX, 0, 0]);
        let oob = TxOob::parse(&bytes).unwrap();
        assert_eq!(oob.vlan_tci(), None);
        assert_eq!(oob.vport_offset(), 9);
        assert_eq!(TxOob::parse(&bytes[..8]), Some(oob));
        bytes[0] = 1;
        assert_eq!(TxOob::parse(&bytes[..8]), None, "long format in a short WQE");
        bytes[0] = 2;
        assert_eq!(TxOob::parse(&bytes), None, "unknown format");
        assert_eq!(TxOob::parse(&[]), None);
    }

    #[test]
    fn completion_carries_type_client_and_offset() {
        let bytes = TxCompletion::new(TxStatus::MtuDrop, 3);
        assert_eq!(bytes.as_bytes()[..12], [34 | 1 << 6, 0, 0, 0, 0, 0, 0, 0, 3 << 5, 0, 0, 0]);
        assert_eq!(bytes.cqe_type(), 34);
    }
}
