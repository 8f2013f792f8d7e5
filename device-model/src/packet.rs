//! Where the headers of an Ethernet frame are: one pass over its first bytes.
//!
//! Both directions need it: steering hashes addresses and ports, the offloads rewrite lengths and checksums.
//! Nothing here trusts the frame; what can't be followed is reported as absent.

/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of an 802.1ad service tag.
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Destination, source, EtherType.
pub const ETHERNET_HEADER: usize = 14;
/// An 802.1Q tag: EtherType and TCI.
pub const VLAN_TAG: usize = 4;
/// Bytes before a VLAN tag: destination and source address.
pub const MAC_ADDRESSES: usize = 12;
/// IPv4 header without options.
pub const IPV4_HEADER: usize = 20;
/// IPv6 header without extensions.
pub const IPV6_HEADER: usize = 40;
/// TCP header without options.
pub const TCP_HEADER: usize = 20;
/// UDP header.
pub const UDP_HEADER: usize = 8;

/// Tags that are looked through before the packet counts as not IP.
const MAX_TAGS: usize = 2;
/// Extension headers that are looked through before the packet counts as without transport header.
const MAX_EXTENSIONS: usize = 8;

/// Version of the Internet Protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpVersion {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

/// Transport protocols that have offloads and port hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
    /// Bytes from the start of the header to the checksum.
    pub const fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
    const fn header_len(self) -> usize {
        match self {
            Self::Tcp => TCP_HEADER,
            Self::Udp => UDP_HEADER,
        }
    }
    const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// A transport header that lies in the parsed bytes as a whole (options excepted).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// What it is.
    pub protocol: Protocol,
    /// Bytes from the start of the frame.
    pub offset: usize,
}

/// An IP header and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Which one.
    pub version: IpVersion,
    /// Bytes from the start of the frame to the header.
    pub offset: usize,
    /// Bytes from there to the payload, options or extension headers included.
    pub header_len: usize,
    /// Bytes of the packet by its length field, header included. Not checked against the frame.
    pub len: usize,
    /// A piece of a larger packet; it has no transport header.
    pub fragment: bool,
    /// The TCP or UDP header.
    pub transport: Option<Transport>,
    /// Source address in a Home Address option (RFC 6275), bytes from the start of the frame.
    pub home_address: Option<usize>,
    /// Final destination in a type 2 routing header (RFC 6275), bytes from the start of the frame.
    pub routed_destination: Option<usize>,
}

impl Ip {
    /// Bytes from the start of the frame to the end of the packet.
    pub const fn end(&self) -> usize {
        self.offset + self.len
    }
}

/// The headers of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    /// TCI of the outermost tag, if it is 802.1Q.
    pub vlan: Option<u16>,
    /// The IP header, if the frame carries one that is complete.
    pub ip: Option<Ip>,
}

impl Headers {
    /// Parse a frame, or at least its first bytes.
    #[inline]
    pub fn parse(frame: &[u8]) -> Self {
        let mut headers = Self::default();
        let mut offset = ETHERNET_HEADER;
        for depth in 0..=MAX_TAGS {
            match be16(frame, offset - 2) {
                Some(ETHERTYPE_IPV4) => headers.ip = parse_ipv4(frame, offset),
                Some(ETHERTYPE_IPV6) => headers.ip = parse_ipv6(frame, offset),
                Some(tag @ (ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN)) => {
                    if depth == 0 && tag == ETHERTYPE_VLAN {
                        headers.vlan = be16(frame, offset);
                    }
                    offset += VLAN_TAG;
                    continue;
                }
                _ => {}
            }
            break;
        }
        headers
    }
    /// The transport header, if there is one.
    pub fn transport(&self) -> Option<Transport> {
        self.ip.and_then(|ip| ip.transport)
    }
}

/// The IP header at `offset`, whatever lies before it.
pub fn parse_ip(frame: &[u8], offset: usize) -> Option<Ip> {
    match frame.get(offset)? >> 4 {
        4 => parse_ipv4(frame, offset),
        6 => parse_ipv6(frame, offset),
        _ => None,
    }
}

#[inline]
fn parse_ipv4(frame: &[u8], offset: usize) -> Option<Ip> {
    let header = frame.get(offset..)?.first_chunk::<IPV4_HEADER>()?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    if header[0] >> 4 != 4 || header_len < IPV4_HEADER || frame.len() < offset + header_len {
        return None;
    }
    // More Fragments, or an offset that is not zero.
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    let transport = if fragment { None } else { transport_at(frame, header[9], offset + header_len) };
    Some(Ip {
        version: IpVersion::V4,
        offset,
        header_len,
        len: usize::from(u16::from_be_bytes([header[2], header[3]])),
        fragment,
        transport,
        home_address: None,
        routed_destination: None,
    })
}

#[inline]
fn parse_ipv6(frame: &[u8], offset: usize) -> Option<Ip> {
    let header = frame.get(offset..)?.first_chunk::<IPV6_HEADER>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let mut ip = Ip {
        version: IpVersion::V6,
        offset,
        header_len: IPV6_HEADER,
        len: IPV6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]])),
        fragment: false,
        transport: None,
        home_address: None,
        routed_destination: None,
    };
    let next = header[6];
    match Protocol::from_number(next) {
        Some(_) => ip.transport = transport_at(frame, next, offset + IPV6_HEADER),
        None => follow_extensions(frame, &mut ip, next),
    }
    Some(ip)
}

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Walk the extension headers (RFC 8200, section 4) to the transport header.
fn follow_extensions(frame: &[u8], ip: &mut Ip, mut next: u8) {
    for _ in 0..MAX_EXTENSIONS {
        let at = ip.offset + ip.header_len;
        let Some(&[following, len]) = frame.get(at..).and_then(|rest| rest.first_chunk()) else { return };
        let len = match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => 8 + usize::from(len) * 8,
            AUTHENTICATION => 8 + usize::from(len) * 4,
            FRAGMENT => 8,
            _ => return,
        };
        let Some(body) = frame.get(at..at + len) else { return };
        match next {
            FRAGMENT => ip.fragment = be16(body, 2).is_some_and(|word| word & 0xfff9 != 0),
            ROUTING => ip.routed_destination = routed_destination(body).map(|offset| at + offset),
            DESTINATION_OPTIONS => ip.home_address = home_address(body).map(|offset| at + offset),
            _ => {}
        }
        ip.header_len += len;
        if ip.fragment {
            return;
        }
        if Protocol::from_number(following).is_some() {
            ip.transport = transport_at(frame, following, at + len);
            return;
        }
        next = following;
    }
}

/// Offset of the address in a routing header of type 2 that is not used up (RFC 6275, 6.4).
fn routed_destination(body: &[u8]) -> Option<usize> {
    match body {
        [_, 2, 2, 1, ..] if body.len() == 24 => Some(8),
        _ => None,
    }
}

/// Offset of the address in a Home Address option among destination options (RFC 6275, 6.3).
fn home_address(body: &[u8]) -> Option<usize> {
    const PAD1: u8 = 0;
    const HOME_ADDRESS: u8 = 201;
    let mut at = 2;
    while let Some(&kind) = body.get(at) {
        if kind == PAD1 {
            at += 1;
            continue;
        }
        let len = usize::from(*body.get(at + 1)?);
        if kind == HOME_ADDRESS && len == 16 && at + 18 <= body.len() {
            return Some(at + 2);
        }
        at += 2 + len;
    }
    None
}

#[inline]
fn transport_at(frame: &[u8], number: u8, offset: usize) -> Option<Transport> {
    let protocol = Protocol::from_number(number)?;
    (frame.len() >= offset + protocol.header_len()).then_some(Transport { protocol, offset })
}

/// The big-endian 16-bit word at `offset`.
#[inline]
pub fn be16(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|&word| u16::from_be_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Ipv4HeaderSlice, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

    fn built(builder: etherparse::PacketBuilderStep<etherparse::UdpHeader>, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        builder.write(&mut frame, payload).unwrap();
        frame
    }

    #[test]
    fn finds_udp_behind_a_tag() {
        let builder = PacketBuilder::ethernet2(MACS.0, MACS.1)
            .single_vlan(etherparse::VlanId::try_new(5).unwrap())
            .ipv6([1; 16], [2; 16], 64)
            .udp(1, 2);
        let headers = Headers::parse(&built(builder, b"hello"));
        assert_eq!(headers.vlan, Some(5));
        let ip = headers.ip.unwrap();
        assert_eq!((ip.version, ip.offset, ip.len), (IpVersion::V6, 18, 40 + 8 + 5));
        assert_eq!(ip.transport, Some(Transport { protocol: Protocol::Udp, offset: 58 }));
    }

    /// Ethernet + IPv6 whose payload is `extensions`, then a UDP header.
    fn with_extensions(first: u8, extensions: &[u8]) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv6([1; 16], [2; 16], 64).udp(1, 2);
        let mut frame = built(builder, &[]);
        frame[20] = first;
        let udp = frame.split_off(54);
        frame.extend_from_slice(extensions);
        frame.extend(udp);
        frame
    }

    #[test]
    fn walks_extension_headers() {
        let mut extensions = vec![ROUTING, 0, 1, 4, 0, 0, 0, 0]; // hop-by-hop: PadN
        extensions.extend([DESTINATION_OPTIONS, 2, 2, 1, 0, 0, 0, 0]);
        extensions.extend([0xd0; 16]);
        extensions.extend([17, 2, 0, 0, 201, 16]); // two Pad1, then the home address
        extensions.extend([0x40; 16]);
        extensions.extend([0, 0]);
        let frame = with_extensions(HOP_BY_HOP, &extensions);
        let ip = Headers::parse(&frame).ip.unwrap();
        assert_eq!(ip.transport, Some(Transport { protocol: Protocol::Udp, offset: 54 + extensions.len() }));
        assert_eq!(frame[ip.routed_destination.unwrap()..][..16], [0xd0; 16]);
        assert_eq!(frame[ip.home_address.unwrap()..][..16], [0x40; 16]);
    }

    #[test]
    fn fragments_have_no_transport() {
        let whole = with_extensions(FRAGMENT, &[17, 0, 0, 0, 0, 0, 0, 9]);
        assert!(Headers::parse(&whole).transport().is_some(), "an atomic fragment is a whole packet");
        let piece = with_extensions(FRAGMENT, &[17, 0, 0, 1, 0, 0, 0, 9]);
        let ip = Headers::parse(&piece).ip.unwrap();
        assert!(ip.fragment && ip.transport.is_none());

        let builder = PacketBuilder::ethernet2(MACS.0, MACS.1).ipv4([1; 4], [2; 4], 64).udp(1, 2);
        let mut frame = built(builder, &[0; 16]);
        frame[20] |= 0x20; // More Fragments
        let ip = Headers::parse(&frame).ip.unwrap();
        assert!(ip.fragment && ip.transport.is_none());
    }

    #[test]
    fn gives_up_on_endless_extensions_and_tags() {
        let ip = Headers::parse(&with_extensions(HOP_BY_HOP, &[0; 8 * 40])).ip.unwrap();
        assert_eq!(ip.transport, None);
        let tags: Vec<u8> = [0; 12].into_iter().chain([0x81, 0, 0, 1].repeat(30)).collect();
        assert_eq!(Headers::parse(&tags), Headers { vlan: Some(1), ip: None });
    }

    fn arbitrary_frame() -> impl Strategy<Value = Vec<u8>> {
        let payload = proptest::collection::vec(any::<u8>(), 0..200);
        let options = proptest::collection::vec(Just(1u8), 0..=10);
        (any::<[u8; 32]>(), any::<(bool, bool, u8)>(), options, payload).prop_map(
            |(addresses, (v6, tcp, tags), options, payload)| {
                let (source, destination) = addresses.split_at(16);
                let ethernet = PacketBuilder::ethernet2(MACS.0, MACS.1);
                let id = |n| etherparse::VlanId::try_new(n).unwrap();
                let ip = if v6 {
                    let header = etherparse::Ipv6Header {
                        source: source.try_into().unwrap(),
                        destination: destination.try_into().unwrap(),
                        hop_limit: 9,
                        ..Default::default()
                    };
                    etherparse::IpHeaders::Ipv6(header, Default::default())
                } else {
                    let mut header = etherparse::Ipv4Header {
                        source: source[..4].try_into().unwrap(),
                        destination: destination[..4].try_into().unwrap(),
                        time_to_live: 9,
                        ..Default::default()
                    };
                    header.options = options.repeat(4).as_slice().try_into().unwrap();
                    etherparse::IpHeaders::Ipv4(header, Default::default())
                };
                let ip = match tags % 3 {
                    0 => ethernet.ip(ip),
                    1 => ethernet.single_vlan(id(7)).ip(ip),
                    _ => ethernet.double_vlan(id(7), id(8)).ip(ip),
                };
                let mut frame = Vec::new();
                if tcp {
                    ip.tcp(1, 2, 3, 4).write(&mut frame, &payload).unwrap();
                } else {
                    ip.udp(1, 2).write(&mut frame, &payload).unwrap();
                }
                frame
            },
        )
    }

    proptest! {
        #[test]
        fn agrees_with_etherparse(frame in arbitrary_frame()) {
            let theirs = SlicedPacket::from_ethernet(&frame).unwrap();
            let ours = Headers::parse(&frame).ip.unwrap();
            let start = frame.as_ptr() as usize;
            let (version, offset) = match theirs.net.as_ref().unwrap() {
                NetSlice::Ipv4(ip) => (IpVersion::V4, ip.header().slice().as_ptr() as usize - start),
                NetSlice::Ipv6(ip) => (IpVersion::V6, ip.header().slice().as_ptr() as usize - start),
                NetSlice::Arp(_) => unreachable!(),
            };
            prop_assert_eq!((ours.version, ours.offset, ours.end()), (version, offset, frame.len()));
            if version == IpVersion::V4 {
                let header = Ipv4HeaderSlice::from_slice(&frame[offset..]).unwrap();
                prop_assert_eq!(ours.header_len, header.slice().len());
            }
            let (protocol, offset) = match theirs.transport.unwrap() {
                TransportSlice::Tcp(tcp) => (Protocol::Tcp, tcp.slice().as_ptr() as usize - start),
                TransportSlice::Udp(udp) => (Protocol::Udp, udp.slice().as_ptr() as usize - start),
                _ => unreachable!(),
            };
            prop_assert_eq!(ours.transport, Some(Transport { protocol, offset }));
        }

        #[test]
        fn never_reports_beyond_what_it_was_given(mut frame in arbitrary_frame(), cut in 0usize..300,
                                                  flips in proptest::collection::vec(any::<(u16, u8)>(), 0..8)) {
            frame.truncate(cut);
            for (at, value) in flips {
                let at = usize::from(at) % frame.len().max(1);
                if let Some(byte) = frame.get_mut(at) {
                    *byte ^= value;
                }
            }
            if let Some(ip) = Headers::parse(&frame).ip {
                prop_assert!(ip.offset + ip.header_len <= frame.len());
                if let Some(transport) = ip.transport {
                    prop_assert!(transport.offset + transport.protocol.header_len() <= frame.len());
                }
                for address in [ip.home_address, ip.routed_destination].into_iter().flatten() {
                    prop_assert!(address + 16 <= frame.len());
                }
            }
        }
    }
}
