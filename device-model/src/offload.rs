//! Checksums that the card makes for the driver (transmit) and checks for it (receive).
//!
//! On transmit the checksum field holds the sum of the pseudo-header, so that summing from the transport header
//! to the end gives the checksum (`CHECKSUM_PARTIAL`; `mana_start_xmit`). On receive the driver believes the
//! bits in the completion (`mana_rx_skb`).

use crate::checksum::{Sum, pseudo_header};
use crate::doors::PartialChecksum;
use crate::packet::{Headers, IPV4_HEADER, Ip, IpVersion, Protocol, Transport, parse_ip};
use crate::wire::rx::RxMeta;
use crate::wire::tx::TxOob;

/// Headers are not what the out-of-band data says, or are not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the headers do not fit the offloads asked for")]
pub struct HeaderError;

/// Where an IPv4 header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Header {
    /// Bytes from the start of the frame.
    pub offset: usize,
    /// Bytes, options included.
    pub len: usize,
}

impl Ipv4Header {
    fn of(ip: &Ip) -> Option<Self> {
        let Ip { version, offset, header_len: len, .. } = *ip;
        (version == IpVersion::V4).then_some(Self { offset, len })
    }
    fn fill(self, frame: &mut [u8]) -> Result<(), HeaderError> {
        let header = frame.get_mut(self.offset..self.offset + self.len).ok_or(HeaderError)?;
        store_be16(header, 10, 0)?;
        let checksum = Sum::default().add_bytes(header).checksum();
        store_be16(header, 10, checksum)
    }
}

/// The checksums to fill in a frame, by where their headers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxChecksums {
    /// The IPv4 header whose checksum is to be made.
    pub ip: Option<Ipv4Header>,
    /// The IPv4 header in front of an encapsulated packet, if its checksum is to be made, too.
    pub outer_ip: Option<Ipv4Header>,
    /// The transport header whose checksum is to be completed.
    pub transport: Option<Transport>,
}

impl TxChecksums {
    /// Where the headers are that `oob` asks checksums for. `frame` is the frame or its first bytes, as the driver
    /// has laid it out: a VLAN tag that the card inserts is not in it.
    ///
    /// # Errors
    /// [`HeaderError`] if they are not there.
    pub fn locate(oob: &TxOob, frame: &[u8]) -> Result<Self, HeaderError> {
        let transport_offset = usize::from(oob.transport_offset());
        let find = oob.compute_ip_checksum() || oob.compute_udp_checksum() || transport_offset == 0;
        let ip = if find { Some(ip_header(oob, frame).ok_or(HeaderError)?) } else { None };
        let found = |protocol| {
            let transport = ip.and_then(|ip| ip.transport).filter(|found| found.protocol == protocol);
            transport.ok_or(HeaderError)
        };
        let transport = if oob.compute_tcp_checksum() && transport_offset != 0 {
            Some(Transport { protocol: Protocol::Tcp, offset: transport_offset })
        } else if oob.compute_tcp_checksum() {
            Some(found(Protocol::Tcp)?)
        } else if oob.compute_udp_checksum() {
            Some(found(Protocol::Udp)?)
        } else {
            None
        };
        if !oob.compute_ip_checksum() {
            return Ok(Self { ip: None, outer_ip: None, transport });
        }
        let outer =
            if oob.is_encapsulated() && oob.is_outer_ipv4() { Headers::parse(frame).ip } else { None };
        let (ip, outer_ip) = (ip.as_ref().and_then(Ipv4Header::of), outer.as_ref().and_then(Ipv4Header::of));
        Ok(Self { ip, outer_ip, transport })
    }
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ip.is_none() && self.outer_ip.is_none() && self.transport.is_none()
    }
    /// What a port that makes transport checksums is told of a frame of `len` bytes.
    ///
    /// # Errors
    /// [`HeaderError`] if the checksum lies outside the frame.
    pub fn partial(&self, len: usize) -> Result<Option<PartialChecksum>, HeaderError> {
        let Some(transport) = self.transport else { return Ok(None) };
        let offset = transport.protocol.checksum_offset();
        if transport.offset + offset + size_of::<u16>() > len {
            return Err(HeaderError);
        }
        let start = u16::try_from(transport.offset).map_err(|_| HeaderError)?;
        Ok(Some(PartialChecksum { start, offset: offset as u16 }))
    }
    /// Fill them in the whole `frame`.
    ///
    /// # Errors
    /// [`HeaderError`] if a checksum lies outside the frame.
    pub fn fill(&self, frame: &mut [u8]) -> Result<(), HeaderError> {
        for ip in self.outer_ip.into_iter().chain(self.ip) {
            ip.fill(frame)?;
        }
        match self.transport {
            Some(transport) => complete_transport(frame, transport),
            None => Ok(()),
        }
    }
}

/// The IP header that `oob` is about, of the version that it says.
fn ip_header(oob: &TxOob, frame: &[u8]) -> Option<Ip> {
    let (ip, v4, v6) = if oob.is_encapsulated() {
        let inner = parse_ip(frame, usize::from(oob.inner_ip_offset()))?;
        (inner, !oob.inner_is_ipv6(), oob.inner_is_ipv6())
    } else {
        (Headers::parse(frame).ip?, oob.is_outer_ipv4(), oob.is_outer_ipv6())
    };
    let said = match ip.version {
        IpVersion::V4 => v4,
        IpVersion::V6 => v6,
    };
    said.then_some(ip)
}

/// Make the checksum of an IPv4 header.
///
/// # Errors
/// [`HeaderError`] if the header lies outside the frame.
pub fn fill_ip(frame: &mut [u8], ip: &Ip) -> Result<(), HeaderError> {
    Ipv4Header { offset: ip.offset, len: ip.header_len }.fill(frame)
}

/// Complete a transport checksum whose field holds the pseudo-header's sum.
fn complete_transport(frame: &mut [u8], transport: Transport) -> Result<(), HeaderError> {
    let segment = frame.get_mut(transport.offset..).ok_or(HeaderError)?;
    let checksum = Sum::default().add_bytes(segment).checksum();
    // Zero in a UDP header means "no checksum" (RFC 768).
    let checksum = if checksum == 0 && transport.protocol == Protocol::Udp { 0xffff } else { checksum };
    store_be16(segment, transport.protocol.checksum_offset(), checksum)
}

/// Store `value` at `offset`, big-endian.
///
/// # Errors
/// [`HeaderError`] if that is outside `bytes`.
pub fn store_be16(bytes: &mut [u8], offset: usize, value: u16) -> Result<(), HeaderError> {
    let place = bytes.get_mut(offset..).and_then(|rest| rest.first_chunk_mut()).ok_or(HeaderError)?;
    *place = value.to_be_bytes();
    Ok(())
}

/// The checksum bits of the completion for a received frame. `transport_valid`: the port vouches for the
/// transport checksum, which then may not even be there.
#[inline]
pub fn verify(frame: &[u8], headers: &Headers, transport_valid: bool, meta: RxMeta) -> RxMeta {
    let Some(ip) = &headers.ip else { return meta };
    let ip_ok = ip_is_valid(frame, ip);
    let meta = meta.with_ip_checksum(ip_ok);
    let Some(transport) = ip.transport.filter(|_| ip_ok) else { return meta };
    let transport_ok = if transport_valid { Some(true) } else { transport_is_valid(frame, ip, transport) };
    match (transport_ok, transport.protocol) {
        (None, _) => meta,
        (Some(ok), Protocol::Tcp) => meta.with_tcp_checksum(ok),
        (Some(ok), Protocol::Udp) => meta.with_udp_checksum(ok),
    }
}

/// The packet lies in the frame as a whole and its header checksum, where it has one, is right.
#[inline]
fn ip_is_valid(frame: &[u8], ip: &Ip) -> bool {
    if ip.end() > frame.len() || ip.len < ip.header_len {
        return false;
    }
    match ip.version {
        IpVersion::V6 => true,
        IpVersion::V4 if ip.header_len == IPV4_HEADER => frame
            .get(ip.offset..)
            .and_then(|rest| rest.first_chunk::<IPV4_HEADER>())
            .is_some_and(|header| Sum::default().add_bytes(header).is_valid()),
        IpVersion::V4 => frame
            .get(ip.offset..ip.offset + ip.header_len)
            .is_some_and(|header| Sum::default().add_bytes(header).is_valid()),
    }
}

/// Whether the transport checksum is right; `None` if the sender made none.
#[inline]
fn transport_is_valid(frame: &[u8], ip: &Ip, transport: Transport) -> Option<bool> {
    let Some(segment) = frame.get(transport.offset..ip.end()) else { return Some(false) };
    // The length of a UDP datagram is its own (RFC 768); it may be shorter than IP's.
    let segment = match transport.protocol {
        Protocol::Tcp => segment,
        Protocol::Udp => {
            let Some(&[_, _, _, _, len_high, len_low, checksum @ ..]) = segment.first_chunk::<8>() else {
                return Some(false);
            };
            if checksum == [0, 0] {
                return if ip.version == IpVersion::V4 { None } else { Some(false) };
            }
            let len = usize::from(u16::from_be_bytes([len_high, len_low]));
            match segment.get(..len) {
                Some(datagram) => datagram,
                None => return Some(false),
            }
        }
    };
    let sum = pseudo_header(frame, ip, transport.protocol, segment.len());
    Some(sum.is_some_and(|sum| sum.add_bytes(segment).is_valid()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::be16;
    use crate::testing::{oob, tcp4, tcp6, udp4, udp6};
    use proptest::prelude::*;

    /// Replace the right transport checksum by the pseudo-header's sum, as the driver's stack leaves it.
    fn make_partial(frame: &mut [u8]) -> u16 {
        let ip = Headers::parse(frame).ip.unwrap();
        let transport = ip.transport.unwrap();
        let at = transport.offset + transport.protocol.checksum_offset();
        let right = be16(frame, at).unwrap();
        let sum = pseudo_header(frame, &ip, transport.protocol, ip.end() - transport.offset).unwrap();
        store_be16(frame, at, sum.fold()).unwrap();
        right
    }

    fn frames() -> impl Strategy<Value = (Vec<u8>, TxOob)> {
        proptest::collection::vec(any::<u8>(), 0..3000).prop_flat_map(|payload| {
            prop_oneof![
                Just((tcp4(&payload), oob().ipv4().tcp(34).build())),
                Just((udp4(&payload), oob().ipv4().udp().build())),
                Just((tcp6(&payload), oob().ipv6().tcp(54).build())),
                Just((udp6(&payload), oob().ipv6().udp().build())),
            ]
        })
    }

    proptest! {
        #[test]
        fn completes_what_etherparse_computes((right, oob) in frames()) {
            let mut frame = right.clone();
            make_partial(&mut frame);
            let checksums = TxChecksums::locate(&oob, &frame).unwrap();
            checksums.fill(&mut frame).unwrap();
            prop_assert_eq!(frame, right);
        }

        #[test]
        fn accepts_right_and_rejects_wrong((mut frame, _) in frames(), at in any::<usize>(), flip in 1u8..) {
            let headers = Headers::parse(&frame);
            prop_assert!(verify(&frame, &headers, false, RxMeta::default()).checksums_ok());
            // Anything from the addresses on is covered by one of the checksums.
            let from = 26;
            let at = from + at % (frame.len() - from);
            frame[at] ^= flip;
            let headers = Headers::parse(&frame);
            let udp_without = headers.transport().is_some_and(|t| frame[t.offset + 6..][..2] == [0, 0]);
            prop_assert!(udp_without || !verify(&frame, &headers, false, RxMeta::default()).checksums_ok());
        }

        #[test]
        fn survives_anything(mut frame in proptest::collection::vec(any::<u8>(), 0..100), words in any::<[u32; 4]>()) {
            let mut bytes = [0; 24];
            for (chunk, word) in bytes.chunks_mut(4).zip(words) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            bytes[0] &= !2;
            let oob = TxOob::parse(&bytes).unwrap();
            if let Ok(checksums) = TxChecksums::locate(&oob, &frame) {
                let _ = checksums.fill(&mut frame);
            }
            let _ = verify(&frame, &Headers::parse(&frame), false, RxMeta::default());
        }
    }

    #[test]
    fn udp_checksum_of_zero_is_sent_as_all_ones() {
        let mut frame = udp4(&[0, 0]);
        let checksum = be16(&frame, 40).unwrap();
        frame[42..44].copy_from_slice(&checksum.to_be_bytes());
        make_partial(&mut frame);
        let oob = oob().ipv4().udp().build();
        TxChecksums::locate(&oob, &frame).unwrap().fill(&mut frame).unwrap();
        assert_eq!(be16(&frame, 40), Some(0xffff));
        assert!(verify(&frame, &Headers::parse(&frame), false, RxMeta::default()).checksums_ok());
    }

    #[test]
    fn ip_checksum_alone() {
        let right = udp4(b"x");
        let mut frame = right.clone();
        frame[24..26].copy_from_slice(&[0xde, 0xad]);
        let checksums = TxChecksums::locate(&oob().ipv4().ip_checksum().build(), &frame).unwrap();
        checksums.fill(&mut frame).unwrap();
        assert_eq!(frame, right);
    }

    #[test]
    fn inner_headers_of_a_tunnel() {
        let inner_right = udp6(b"inner");
        let mut inner = inner_right.clone();
        make_partial(&mut inner);
        let mut frame = udp4(&[&[0; 8], &inner[..]].concat()); // VXLAN-like: 8 bytes, then a frame
        let at = frame.len() - inner.len();
        let oob = oob().ipv4().inner(at as u32 + 14, true).udp().build();
        TxChecksums::locate(&oob, &frame).unwrap().fill(&mut frame).unwrap();
        assert_eq!(frame[at..], inner_right);
    }

    #[test]
    fn headers_that_are_not_there_are_errors() {
        let frame = tcp4(b"hello");
        let locate = |oob: TxOob| TxChecksums::locate(&oob, &frame);
        assert_eq!(locate(oob().ipv4().udp().build()), Err(HeaderError), "TCP, not UDP");
        assert_eq!(locate(oob().ipv6().ip_checksum().build()), Err(HeaderError), "IPv4, not IPv6");
        let beyond = locate(oob().ipv4().tcp(1000).build()).unwrap();
        assert_eq!(beyond.fill(&mut frame.clone()), Err(HeaderError));
    }

    #[test]
    fn zero_udp_checksum_says_nothing_over_ipv4_only() {
        for (mut frame, at, bits) in [(udp4(b"x"), 40, 1 << 25), (udp6(b"x"), 60, 1 << 25 | 1 << 30)] {
            frame[at..at + 2].fill(0);
            let meta = verify(&frame, &Headers::parse(&frame), false, RxMeta::default());
            assert_eq!(meta.word(), bits);
        }
    }

    #[test]
    fn port_vouches_for_the_transport_only() {
        let mut frame = tcp4(b"x");
        make_partial(&mut frame);
        assert!(verify(&frame, &Headers::parse(&frame), true, RxMeta::default()).checksums_ok());
        frame[24] ^= 1;
        assert!(!verify(&frame, &Headers::parse(&frame), true, RxMeta::default()).checksums_ok());
    }
}
