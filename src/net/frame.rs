//! Frames between a cable's two ends, and what may be left to do on them.

use mana_device::doors::{PartialChecksum, RxChecksum, RxFrame, TxOffload};

/// A frame for the guest.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The bytes from the Ethernet header on, without FCS.
    pub bytes: &'a [u8],
    /// What the cable knows of its checksums.
    pub checksum: RxChecksum,
    /// What is left to do; nothing but what the taker has said it accepts (see [`super::Cable::accept`]).
    pub offload: TxOffload,
}

impl<'a> Frame<'a> {
    /// A frame as it would be on a wire.
    pub fn plain(bytes: &'a [u8], checksum: RxChecksum) -> Self {
        Self { bytes, checksum, offload: TxOffload::default() }
    }

    /// As the MANA device takes it, which accepts no unfinished frames.
    pub fn received(&self) -> RxFrame<'a> {
        RxFrame { bytes: self.bytes, checksum: self.checksum }
    }
}

/// Unfinished frames that the taker of a cable's frames can deal with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// TCP and UDP checksums that are only the sum of the pseudo-header.
    pub checksum: bool,
    /// TCP super-frames over IPv4; needs `checksum`.
    pub tcp4: bool,
    /// TCP super-frames over IPv6; needs `checksum`.
    pub tcp6: bool,
}

impl Accepts {
    /// Whether a frame of which `offload` is left may be passed on as it is.
    pub fn takes(self, offload: &TxOffload) -> bool {
        let segments = offload.segmentation.is_none_or(|cut| if cut.ipv6 { self.tcp6 } else { self.tcp4 });
        segments && (self.checksum || offload.checksum.is_none())
    }
}

/// Make the checksum of `frame` that `partial` describes. `false` if its place is not in the frame.
pub fn complete_checksum(frame: &mut [u8], partial: PartialChecksum) -> bool {
    const UDP_CHECKSUM: u16 = 6;
    let Some(segment) = frame.get_mut(usize::from(partial.start)..) else { return false };
    let sum = mana_device::checksum::Sum::default().add_bytes(segment).checksum();
    // Zero in a UDP header means "no checksum" (RFC 768).
    let sum = if sum == 0 && partial.offset == UDP_CHECKSUM { 0xffff } else { sum };
    mana_device::offload::store_be16(segment, partial.offset.into(), sum).is_ok()
}

#[cfg(test)]
mod tests {
    use mana_device::doors::Segmentation;

    use super::*;

    #[test]
    fn takes_only_what_was_accepted() {
        let checksum = Some(PartialChecksum { start: 34, offset: 16 });
        let cut = |ipv6| TxOffload {
            checksum,
            segmentation: Some(Segmentation { mss: 1448, header_len: 66, ipv6 }),
        };
        let partial = TxOffload { checksum, segmentation: None };
        let only = |checksum, tcp4, tcp6| Accepts { checksum, tcp4, tcp6 };
        assert!(Accepts::default().takes(&TxOffload::default()));
        assert!(!Accepts::default().takes(&partial));
        assert!(only(true, false, false).takes(&partial));
        assert!(!only(true, false, true).takes(&cut(false)));
        assert!(only(true, false, true).takes(&cut(true)));
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_all_ones() {
        // The words sum to 0xffff, so that the checksum's complement is 0.
        let mut frame = [0x12, 0x34, 0xed, 0xcb, 0, 0, 0, 0];
        assert!(complete_checksum(&mut frame, PartialChecksum { start: 0, offset: 6 }));
        assert_eq!(frame[6..], [0xff, 0xff]);
        assert!(!complete_checksum(&mut frame, PartialChecksum { start: 0, offset: 7 }));
        assert!(!complete_checksum(&mut frame, PartialChecksum { start: 9, offset: 0 }));
    }
}
