//! Large send offload: one TCP super-frame from the driver becomes frames of one MSS each.
//!
//! The driver hands over a header whose lengths and IPv4 checksum are zero and whose TCP checksum field holds
//! the pseudo-header's sum without the length (`mana_start_xmit`, GSO). Addresses, ports and options are
//! repeated in each segment; lengths, identification, sequence number, flags and checksums are its own. The same
//! goes for the outer headers of an encapsulated packet.

use crate::checksum::{Sum, pseudo_header};
use crate::doors::PartialChecksum;
use crate::offload::{HeaderError, fill_ip, store_be16};
use crate::packet::{Headers, IPV6_HEADER, Ip, IpVersion, Protocol, TCP_HEADER, be16, parse_ip};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Bytes from the TCP header to the flags.
const FLAGS: usize = 13;

/// The header of a super-frame, ready to be repeated.
pub struct Template<'a> {
    header: &'a [u8],
    outer: Option<Outer>,
    ip: Ip,
    tcp: usize,
    sequence: u32,
    identification: u16,
    flags: u8,
}

/// The headers in front of an encapsulated packet that tell lengths.
struct Outer {
    ip: Ip,
    identification: u16,
    /// Where the UDP header is, if the tunnel has one.
    udp: Option<usize>,
    /// That header has a checksum.
    udp_checksum: bool,
}

impl Outer {
    fn new(header: &[u8], ip: Ip) -> Result<Self, HeaderError> {
        let udp = ip.transport.filter(|found| found.protocol == Protocol::Udp).map(|found| found.offset);
        let checksum = udp.and_then(|udp| be16(header, udp + Protocol::Udp.checksum_offset()));
        let udp_checksum = checksum.is_some_and(|checksum| checksum != 0);
        Ok(Self { ip, identification: identification(header, &ip)?, udp, udp_checksum })
    }
    /// Lengths, identification and IP checksum of segment `index`, whose frame has `len` bytes, of which `header` are
    /// the first.
    fn complete(&self, header: &mut [u8], index: u16, len: usize) -> Result<(), HeaderError> {
        store_lengths(header, &self.ip, self.identification.wrapping_add(index), len - self.ip.offset)?;
        let Some(udp) = self.udp else { return Ok(()) };
        store_be16(header, udp + 4, u16::try_from(len - udp).map_err(|_| HeaderError)?)
    }
    /// The checksum over the whole of `segment`, once everything else is in place.
    fn fill_checksum(&self, segment: &mut [u8]) -> Result<(), HeaderError> {
        let Some(udp) = self.udp.filter(|_| self.udp_checksum) else { return Ok(()) };
        let at = udp + Protocol::Udp.checksum_offset();
        store_be16(segment, at, 0)?;
        let datagram = segment.get(udp..).ok_or(HeaderError)?;
        let sum = pseudo_header(segment, &self.ip, Protocol::Udp, datagram.len()).ok_or(HeaderError)?;
        let checksum = sum.add_bytes(datagram).checksum();
        store_be16(segment, at, if checksum == 0 { 0xffff } else { checksum })
    }
}

/// Identification of an IPv4 header; IPv6 has none.
fn identification(header: &[u8], ip: &Ip) -> Result<u16, HeaderError> {
    match ip.version {
        IpVersion::V4 => be16(header, ip.offset + 4).ok_or(HeaderError),
        IpVersion::V6 => Ok(0),
    }
}

/// Length of a packet of `len` bytes, identification and checksum where there are such, in the IP header `ip`.
fn store_lengths(header: &mut [u8], ip: &Ip, identification: u16, len: usize) -> Result<(), HeaderError> {
    match ip.version {
        IpVersion::V4 => {
            store_be16(header, ip.offset + 2, u16::try_from(len).map_err(|_| HeaderError)?)?;
            store_be16(header, ip.offset + 4, identification)?;
            fill_ip(header, ip)
        }
        IpVersion::V6 => {
            let len = len.checked_sub(IPV6_HEADER).ok_or(HeaderError)?;
            store_be16(header, ip.offset + 4, u16::try_from(len).map_err(|_| HeaderError)?)
        }
    }
}

impl<'a> Template<'a> {
    /// `header` is Ethernet, IP and TCP, to the last option byte.
    ///
    /// # Errors
    /// [`HeaderError`] if it is anything else.
    pub fn new(header: &'a [u8]) -> Result<Self, HeaderError> {
        Self::with_outer(header, None, Headers::parse(header).ip.ok_or(HeaderError)?)
    }
    /// `header` is Ethernet, IP, whatever makes the tunnel, then at byte `inner_ip` IP and TCP, to the last option
    /// byte.
    ///
    /// # Errors
    /// [`HeaderError`] if it is anything else.
    pub fn encapsulated(header: &'a [u8], inner_ip: usize) -> Result<Self, HeaderError> {
        let outer = Headers::parse(header).ip.ok_or(HeaderError)?;
        if outer.offset + outer.header_len > inner_ip {
            return Err(HeaderError);
        }
        let inner = parse_ip(header, inner_ip).ok_or(HeaderError)?;
        Self::with_outer(header, Some(Outer::new(header, outer)?), inner)
    }
    fn with_outer(header: &'a [u8], outer: Option<Outer>, ip: Ip) -> Result<Self, HeaderError> {
        let transport = ip.transport.filter(|found| found.protocol == Protocol::Tcp).ok_or(HeaderError)?;
        let tcp: &[u8; TCP_HEADER] =
            header.get(transport.offset..).and_then(|rest| rest.first_chunk()).ok_or(HeaderError)?;
        let tcp_len = usize::from(tcp[12] >> 4) * 4;
        if tcp_len < TCP_HEADER || transport.offset + tcp_len != header.len() {
            return Err(HeaderError);
        }
        let identification = identification(header, &ip)?;
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        Ok(Self { header, outer, ip, tcp: transport.offset, sequence, identification, flags: tcp[FLAGS] })
    }
    /// The IP version.
    pub fn version(&self) -> IpVersion {
        self.ip.version
    }
    /// Bytes from the start of the frame to the TCP header.
    pub fn tcp_offset(&self) -> usize {
        self.tcp
    }
    /// The checksum that a port that segments is to make in each segment.
    pub fn partial(&self) -> Option<PartialChecksum> {
        let start = u16::try_from(self.tcp).ok()?;
        Some(PartialChecksum { start, offset: Protocol::Tcp.checksum_offset() as u16 })
    }
    /// Longest super-frame whose length the IP header can say.
    pub fn max_len(&self) -> usize {
        let start = match self.ip.version {
            IpVersion::V4 => self.ip.offset,
            IpVersion::V6 => self.ip.offset + IPV6_HEADER,
        };
        start + usize::from(u16::MAX)
    }
    /// Bytes of the header.
    pub fn header_len(&self) -> usize {
        self.header.len()
    }
    /// Write the header of one whole super-frame of `payload` bytes into `out`, for a port that segments: with
    /// lengths, and the TCP field as sum of the whole pseudo-header.
    ///
    /// # Errors
    /// [`HeaderError`] if it does not fit `out` or the IP header.
    pub fn super_frame(&self, payload: usize, out: &mut [u8]) -> Result<(), HeaderError> {
        let header = self.copy_with_lengths(payload, 0, out)?;
        let tcp_len = self.header.len() - self.tcp + payload;
        let sum = pseudo_header(header, &self.ip, Protocol::Tcp, tcp_len).ok_or(HeaderError)?;
        store_be16(header, self.tcp + 16, sum.fold())
    }
    /// Write the header of the segment that starts `at` bytes into the payload and is number `index` into the
    /// front of `segment`, whose rest holds the segment's payload already, and make the checksums. `last` says
    /// that it ends the super-frame.
    ///
    /// # Errors
    /// [`HeaderError`] if `segment` is too short or too long.
    pub fn complete(&self, segment: &mut [u8], index: u32, at: u32, last: bool) -> Result<(), HeaderError> {
        let payload = segment.len().checked_sub(self.header.len()).ok_or(HeaderError)?;
        self.copy_with_lengths(payload, index as u16, segment)?;
        let tcp = segment.get_mut(self.tcp..).ok_or(HeaderError)?;
        let [_, _, _, _, sequence @ .., _, _, _, _, _, flags] =
            tcp.first_chunk_mut::<{ FLAGS + 1 }>().ok_or(HeaderError)?;
        *sequence = self.sequence.wrapping_add(at).to_be_bytes();
        let keep = (if last { FIN | PSH } else { 0 }) | (if index == 0 { CWR } else { 0 });
        *flags = self.flags & (!(FIN | PSH | CWR) | keep);
        store_be16(tcp, 16, 0)?;
        let sum: Sum =
            pseudo_header(segment, &self.ip, Protocol::Tcp, segment.len() - self.tcp).ok_or(HeaderError)?;
        let checksum = sum.add_bytes(segment.get(self.tcp..).ok_or(HeaderError)?).checksum();
        store_be16(segment, self.tcp + 16, checksum)?;
        self.outer.as_ref().map_or(Ok(()), |outer| outer.fill_checksum(segment))
    }
    /// Copy the header to the front of `out`, with lengths, identifications and IP checksums of segment `index` with
    /// `payload` bytes.
    fn copy_with_lengths<'b>(
        &self,
        payload: usize,
        index: u16,
        out: &'b mut [u8],
    ) -> Result<&'b mut [u8], HeaderError> {
        let header = out.get_mut(..self.header.len()).ok_or(HeaderError)?;
        header.copy_from_slice(self.header);
        let len = self.header.len() + payload;
        store_lengths(header, &self.ip, self.identification.wrapping_add(index), len - self.ip.offset)?;
        if let Some(outer) = &self.outer {
            outer.complete(header, index, len)?;
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::verify;
    use crate::testing::{tcp4, tcp6};
    use crate::wire::rx::RxMeta;
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    /// A header as the driver hands it over: lengths, IP checksum and TCP checksum wiped.
    fn super_header(v6: bool, flags: u8) -> Vec<u8> {
        let mut header = if v6 { tcp6(&[]) } else { tcp4(&[]) };
        if v6 {
            header[18..20].fill(0);
        } else {
            header[16..18].fill(0);
            header[18..20].copy_from_slice(&[0xff, 0xff]);
            header[24..26].fill(0);
        }
        let tcp = header.len() - 20;
        header[tcp + FLAGS] = flags;
        header[tcp + 16..tcp + 18].copy_from_slice(&[0x12, 0x34]);
        header
    }

    fn segments(header: &[u8], payload: &[u8], mss: usize) -> Vec<Vec<u8>> {
        let template = Template::new(header).unwrap();
        let chunks: Vec<&[u8]> = payload.chunks(mss).collect();
        (0..chunks.len())
            .map(|index| {
                let mut segment = [&vec![0; header.len()][..], chunks[index]].concat();
                let last = index + 1 == chunks.len();
                template.complete(&mut segment, index as u32, (index * mss) as u32, last).unwrap();
                segment
            })
            .collect()
    }

    proptest! {
        #[test]
        fn segments_are_right_and_make_up_the_payload(
            v6 in any::<bool>(),
            payload in proptest::collection::vec(any::<u8>(), 1..20_000),
            mss in 200usize..9000,
        ) {
            let header = super_header(v6, CWR | PSH | FIN | 0x10);
            let made = segments(&header, &payload, mss);
            let mut joined = Vec::new();
            for (index, segment) in made.iter().enumerate() {
                let (first, last) = (index == 0, index + 1 == made.len());
                let packet = SlicedPacket::from_ethernet(segment).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("no TCP") };
                prop_assert_eq!(tcp.sequence_number(), 7 + joined.len() as u32);
                prop_assert_eq!((tcp.cwr(), tcp.psh(), tcp.fin(), tcp.ack()), (first, last, last, true));
                let header = tcp.to_header();
                let checksum = match packet.net.as_ref().unwrap() {
                    NetSlice::Ipv4(ip) => {
                        let ip = ip.header();
                        prop_assert_eq!(ip.header_checksum(), ip.to_header().calc_header_checksum());
                        prop_assert_eq!(ip.identification(), 0xffff_u16.wrapping_add(index as u16));
                        header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), tcp.payload())
                    }
                    NetSlice::Ipv6(ip) => {
                        header.calc_checksum_ipv6_raw(ip.header().source(), ip.header().destination(), tcp.payload())
                    }
                    NetSlice::Arp(_) => unreachable!(),
                };
                prop_assert_eq!(tcp.checksum(), checksum.unwrap());
                joined.extend_from_slice(tcp.payload());
            }
            prop_assert_eq!(joined, payload);
        }

        #[test]
        fn survives_any_header(mut header in proptest::collection::vec(any::<u8>(), 0..80), v6 in any::<bool>(),
                               at in any::<usize>(), payload in 0usize..70_000) {
            let _ = Template::new(&header).map(|_| ());
            header = super_header(v6, 0);
            let len = header.len();
            header[at % len] ^= 0x55;
            if let Ok(template) = Template::new(&header) {
                let _ = template.complete(&mut vec![0; payload], 1, 1, true);
                let _ = template.super_frame(payload, &mut [0; 60]);
            }
        }
    }

    #[test]
    fn super_frame_for_a_port_that_segments() {
        for v6 in [false, true] {
            let header = super_header(v6, 0x10);
            let template = Template::new(&header).unwrap();
            let payload = [9; 5000];
            let mut frame = [&vec![0; header.len()][..], &payload].concat();
            template.super_frame(payload.len(), &mut frame).unwrap();
            // Completing it as one segment would must give a packet that checks out.
            let sum = Sum::default().add_bytes(&frame[template.tcp_offset()..]).checksum();
            store_be16(&mut frame, template.tcp_offset() + 16, sum).unwrap();
            assert!(verify(&frame, &Headers::parse(&frame), false, RxMeta::default()).checksums_ok());
            assert!(template.super_frame(template.max_len() - header.len(), &mut frame).is_ok());
            assert!(template.super_frame(template.max_len() - header.len() + 1, &mut frame).is_err());
        }
    }

    #[test]
    fn header_must_end_with_the_tcp_options() {
        let mut header = super_header(false, 0);
        assert!(Template::new(&header).is_ok());
        header.push(0);
        assert!(Template::new(&header).is_err());
        assert!(Template::new(&tcp4(&[])[..40]).is_err());
        assert!(Template::new(&crate::testing::udp4(&[])).is_err());
    }
}
