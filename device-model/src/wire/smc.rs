//! The shared-memory channel's 32 bytes: a request's payload and, in the last dword, its header.
//!
//! Source: `union smc_proto_hdr`, `mana_smc_setup_hwc` (shm_channel.c); the sheet's section 3.

/// Type of a request (`enum smc_msg_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `SMC_MSG_TYPE_ESTABLISH_HWC`.
    EstablishHwc,
    /// `SMC_MSG_TYPE_DESTROY_HWC`.
    DestroyHwc,
    /// The driver reports that a command got no answer in time (OpenVMM's driver only).
    ReportHwcTimeout,
    /// Any other number.
    Unknown(u8),
}

impl Kind {
    /// The name in traces.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EstablishHwc => "ESTABLISH_HWC",
            Self::DestroyHwc => "DESTROY_HWC",
            Self::ReportHwcTimeout => "REPORT_HWC_TIMEOUT",
            Self::Unknown(_) => "UNKNOWN",
        }
    }
}

/// The last dword: `msg_type` 0..2, `msg_version` 3..5, `direction` 7, `status` 8..15, `reset_vf` 24,
/// `owner_is_pf` 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header(pub u32);

impl Header {
    const RESPONSE: u32 = 1 << 7;
    /// `owner_is_pf`: the card has the window.
    pub const CARD_OWNS: u32 = 1 << 31;

    /// What is asked.
    pub fn kind(self) -> Kind {
        match self.0 & 7 {
            1 => Kind::EstablishHwc,
            2 => Kind::DestroyHwc,
            4 => Kind::ReportHwcTimeout,
            other => Kind::Unknown(other as u8),
        }
    }
    /// The answer to this request, the channel given back to the driver: same type and version, 0 for success.
    pub fn response(self, status: u8) -> Self {
        Self(self.0 & 0x3f | Self::RESPONSE | u32::from(status) << 8)
    }
}

/// Payload of an ESTABLISH_HWC request: one page for each queue, and the vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EstablishHwc {
    /// Bus address of the event queue's page.
    pub eq: u64,
    /// Bus address of the completion queue's page.
    pub cq: u64,
    /// Bus address of the receive queue's page.
    pub rq: u64,
    /// Bus address of the send queue's page.
    pub sq: u64,
    /// MSI-X vector of the event queue.
    pub msix: u16,
}

impl EstablishHwc {
    /// Page frame numbers: the low 48 bits in 6 bytes each from byte 0, bits 48..51 in nibbles of bytes 24 and 25.
    pub fn parse(window: &[u8; 32]) -> Self {
        let [e0, e1, e2, e3, e4, e5, c0, c1, c2, c3, c4, c5, rest @ ..] = *window;
        let [r0, r1, r2, r3, r4, r5, s0, s1, s2, s3, s4, s5, h0, h1, m0, m1, ..] = rest;
        let high = u16::from_le_bytes([h0, h1]);
        let address = |low: [u8; 6], nibble: u16| {
            let [a, b, c, d, e, f] = low;
            let top = (high >> (4 * nibble) & 0xf) as u8;
            u64::from_le_bytes([a, b, c, d, e, f, top, 0]) << 12
        };
        Self {
            eq: address([e0, e1, e2, e3, e4, e5], 0),
            cq: address([c0, c1, c2, c3, c4, c5], 1),
            rq: address([r0, r1, r2, r3, r4, r5], 2),
            sq: address([s0, s1, s2, s3, s4, s5], 3),
            msix: u16::from_le_bytes([m0, m1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_all_their_bits() {
        let mut window = [0; 32];
        window[..6].copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        window[18..24].copy_from_slice(&[0xff; 6]);
        window[24..28].copy_from_slice(&[0x07, 0xf0, 3, 0]);
        let message = EstablishHwc::parse(&window);
        assert_eq!(message.eq, 0x7060_5040_3020_1000);
        assert_eq!(message.cq, 0);
        assert_eq!(message.sq, 0xffff_ffff_ffff_f000);
        assert_eq!(message.msix, 3);
    }

    #[test]
    fn response_echoes_type_and_version() {
        assert_eq!(Header(0x8100_ff42 | 1 << 3).response(3), Header(0x0000_038a));
        assert_eq!(Header(1).response(0), Header(0x81));
    }
}
