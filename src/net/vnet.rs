//! The header that says what is left to do on a frame: virtio-net's, which Linux's tap interfaces use too.
//!
//! Source: virtio 1.2, 5.1.6 (`struct virtio_net_hdr`, the part before `num_buffers`); Linux's
//! Documentation/networking/tuntap.rst and `virtio_net_hdr_to_skb` (include/linux/virtio_net.h). A tap's is in the
//! host's byte order, which on the only kind of host there is, is little-endian as virtio's.

use mana_device::doors::{PartialChecksum, RxChecksum, Segmentation, TxOffload};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Byte of a TCP header with the data offset.
const DATA_OFFSET: usize = 12;
/// First bytes of a frame that [`VnetHeader::offload`] may have to look at.
pub const HEAD: usize = 256;

/// The header.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VnetHeader {
    flags: u8,
    gso_type: u8,
    header_len: U16,
    gso_size: U16,
    checksum_start: U16,
    checksum_offset: U16,
}
const _: () = assert!(size_of::<VnetHeader>() == 10);

/// The header doesn't fit its frame, or asks for what was never offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a frame's offload header makes no sense")]
pub struct Senseless;

impl VnetHeader {
    /// The header for a frame on which `offload` is left; `valid` vouches for its checksums.
    pub fn new(offload: &TxOffload, valid: bool) -> Self {
        let mut header = Self::default();
        if let Some(partial) = offload.checksum {
            header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
            header.checksum_start = partial.start.into();
            header.checksum_offset = partial.offset.into();
        } else if valid {
            header.flags = VIRTIO_NET_HDR_F_DATA_VALID as u8;
        }
        if let Some(cut) = offload.segmentation {
            let kind = if cut.ipv6 { VIRTIO_NET_HDR_GSO_TCPV6 } else { VIRTIO_NET_HDR_GSO_TCPV4 };
            header.gso_type = kind as u8;
            header.header_len = cut.header_len.into();
            header.gso_size = cut.mss.into();
        }
        header
    }

    /// What is left to do on a frame of `len` bytes that begins with `head`, its first [`HEAD`] bytes or all of them.
    ///
    /// # Errors
    /// [`Senseless`].
    pub fn offload(&self, head: &[u8], len: usize) -> Result<(RxChecksum, TxOffload), Senseless> {
        let partial = u32::from(self.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
        let valid = u32::from(self.flags) & VIRTIO_NET_HDR_F_DATA_VALID != 0;
        let (start, offset) = (self.checksum_start.get(), self.checksum_offset.get());
        if partial && usize::from(start) + usize::from(offset) + 2 > len {
            return Err(Senseless);
        }
        let checksum = partial.then_some(PartialChecksum { start, offset });
        let ipv6 = match u32::from(self.gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => {
                let known = if valid || partial { RxChecksum::Valid } else { RxChecksum::Unknown };
                return Ok((known, TxOffload { checksum, segmentation: None }));
            }
            VIRTIO_NET_HDR_GSO_TCPV4 => false,
            VIRTIO_NET_HDR_GSO_TCPV6 => true,
            _ => return Err(Senseless),
        };
        let mss = self.gso_size.get();
        let data_offset = head.get(usize::from(start) + DATA_OFFSET).ok_or(Senseless)? >> 4;
        let header_len = start.checked_add(u16::from(data_offset) * 4).ok_or(Senseless)?;
        if !partial || mss == 0 || usize::from(header_len) > len.min(HEAD) {
            return Err(Senseless);
        }
        let segmentation = Some(Segmentation { mss, header_len, ipv6 });
        Ok((RxChecksum::Valid, TxOffload { checksum, segmentation }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::tests::{PARTIAL, cut_at, partial_tcp4};
    use super::*;

    #[test]
    fn says_the_same_both_ways() {
        let frame = partial_tcp4(&[1; 5000]);
        for offload in [TxOffload::default(), PARTIAL, cut_at(1448)] {
            let header = VnetHeader::new(&offload, false);
            assert_eq!(header.offload(&frame[..HEAD], frame.len()).unwrap().1, offload);
        }
        let header = VnetHeader::new(&TxOffload::default(), true);
        assert_eq!(header.offload(&frame, frame.len()).unwrap().0, RxChecksum::Valid);
        assert_eq!(VnetHeader::default().offload(&frame, frame.len()).unwrap().0, RxChecksum::Unknown);
    }

    #[test]
    fn layout_is_virtios() {
        let header = VnetHeader::new(&cut_at(0x1234), false);
        assert_eq!(header.as_bytes(), [1, 1, 54, 0, 0x34, 0x12, 34, 0, 16, 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        let frame = partial_tcp4(&[1; 100]);
        let good = VnetHeader::new(&cut_at(50), false);
        let refused = |change: fn(&mut VnetHeader)| {
            let mut header = good;
            change(&mut header);
            header.offload(&frame, frame.len()) == Err(Senseless)
        };
        assert!(!refused(|_| {}));
        assert!(refused(|header| header.flags = 0));
        assert!(refused(|header| header.gso_size = 0.into()));
        assert!(refused(|header| header.gso_type = 3));
        assert!(refused(|header| header.checksum_start = 0xffff.into()));
        assert!(refused(|header| header.checksum_offset = 0xffff.into()));
        assert!(refused(|header| header.checksum_start = 150.into()));
    }
}
