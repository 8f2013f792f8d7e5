//! Frames for the tests, with sums and hashes computed the slow and obvious way.

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;

/// Ends of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source MAC address.
    pub source_mac: [u8; 6],
    /// Destination MAC address.
    pub destination_mac: [u8; 6],
    /// Source and destination address.
    pub addresses: Addresses,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// Source and destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// IPv4.
    V4([u8; 4], [u8; 4]),
    /// IPv6.
    V6([u8; 16], [u8; 16]),
}

/// Transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Flow {
    /// IPv4 flow number `n` towards `mac`.
    pub fn v4(mac: [u8; 6], n: u16) -> Self {
        Self {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: mac,
            addresses: Addresses::V4([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]], [10, 0, 2, 15]),
            source_port: 1024 + n,
            destination_port: 7,
        }
    }

    /// IPv6 flow number `n` towards `mac`.
    pub fn v6(mac: [u8; 6], n: u16) -> Self {
        let mut source = [0xfd; 16];
        source[14..].copy_from_slice(&n.to_be_bytes());
        Self { addresses: Addresses::V6(source, [0xfe; 16]), ..Self::v4(mac, n) }
    }

    /// A frame of this flow with right checksums.
    pub fn frame(&self, protocol: Protocol, payload: &[u8]) -> Vec<u8> {
        let mut transport = self.transport(protocol, payload);
        let check = !fold(self.pseudo_sum(protocol, transport.len()) + sum(&transport));
        let at = checksum_offset(protocol);
        let check = if protocol == Protocol::Udp && check == 0 { 0xffff } else { check };
        transport[at..at + 2].copy_from_slice(&check.to_be_bytes());
        self.wrap(protocol, &transport)
    }

    /// A frame of this flow whose transport checksum is the pseudo-header's sum: CHECKSUM_PARTIAL.
    pub fn partial_frame(&self, protocol: Protocol, payload: &[u8]) -> Vec<u8> {
        let mut transport = self.transport(protocol, payload);
        let partial = fold(self.pseudo_sum(protocol, transport.len()));
        let at = checksum_offset(protocol);
        transport[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        self.wrap(protocol, &transport)
    }

    /// Bytes before the transport header.
    pub fn transport_offset(&self) -> usize {
        ETHERNET + if matches!(self.addresses, Addresses::V4(..)) { 20 } else { 40 }
    }

    /// Bytes that RSS hashes: addresses, and ports if `ports`.
    pub fn hash_input(&self, ports: bool) -> Vec<u8> {
        let mut input = self.address_bytes();
        if ports {
            input.extend(self.source_port.to_be_bytes());
            input.extend(self.destination_port.to_be_bytes());
        }
        input
    }

    fn address_bytes(&self) -> Vec<u8> {
        match self.addresses {
            Addresses::V4(source, destination) => [source, destination].concat(),
            Addresses::V6(source, destination) => [source, destination].concat(),
        }
    }

    fn transport(&self, protocol: Protocol, payload: &[u8]) -> Vec<u8> {
        let mut bytes = [self.source_port.to_be_bytes(), self.destination_port.to_be_bytes()].concat();
        match protocol {
            Protocol::Tcp => bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0xff, 0xff, 0, 0, 0, 0]),
            Protocol::Udp => bytes.extend([length(8 + payload.len()), [0, 0]].concat()),
        }
        bytes.extend(payload);
        bytes
    }

    fn pseudo_sum(&self, protocol: Protocol, len: usize) -> u64 {
        sum(&self.address_bytes()) + protocol as u64 + len as u64
    }

    fn wrap(&self, protocol: Protocol, transport: &[u8]) -> Vec<u8> {
        let mut frame = [self.destination_mac, self.source_mac].concat();
        match self.addresses {
            Addresses::V4(..) => {
                let mut ip = vec![0x45, 0];
                ip.extend(length(20 + transport.len()));
                ip.extend([0, 1, 0x40, 0, 64, protocol as u8, 0, 0]);
                ip.extend(self.address_bytes());
                let check = !fold(sum(&ip));
                ip[10..12].copy_from_slice(&check.to_be_bytes());
                frame.extend([8, 0]);
                frame.extend(ip);
            }
            Addresses::V6(..) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(length(transport.len()));
                frame.extend([protocol as u8, 64]);
                frame.extend(self.address_bytes());
            }
        }
        frame.extend(transport);
        frame
    }
}

/// `frame` with an 802.1Q tag.
pub fn tagged(frame: &[u8], tci: u16) -> Vec<u8> {
    let (addresses, rest) = frame.split_at(12);
    [addresses, &[0x81, 0], &tci.to_be_bytes(), rest].concat()
}

/// The Toeplitz hash, bit by bit.
pub fn toeplitz(key: &[u8; 40], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], i: usize| u32::from(bytes[i / 8] >> (7 - i % 8) & 1);
    let window = |at: usize| (0..32).fold(0, |window, i| window << 1 | bit(key, at + i));
    (0..input.len() * 8).filter(|&i| bit(input, i) == 1).fold(0, |hash, i| hash ^ window(i))
}

/// Whether the transport checksum of an untagged frame without options or extension headers is right.
pub fn checksum_ok(frame: &[u8]) -> bool {
    let v4 = frame[12..14] == [8, 0];
    let (addresses, protocol, start) = if v4 { (26..34, frame[23], 34) } else { (22..54, frame[20], 54) };
    let transport = &frame[start..];
    let pseudo = sum(&frame[addresses]) + u64::from(protocol) + transport.len() as u64;
    let ip_ok = !v4 || fold(sum(&frame[14..34])) == 0xffff;
    ip_ok && fold(pseudo + sum(transport)) == 0xffff
}

fn checksum_offset(protocol: Protocol) -> usize {
    match protocol {
        Protocol::Tcp => 16,
        Protocol::Udp => 6,
    }
}

fn length(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("a packet is short").to_be_bytes()
}

/// Sum of big-endian 16-bit words, the last one padded.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | word.get(1).map_or(0, |&low| u64::from(low))).sum()
}

/// One's-complement fold to 16 bits.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netdev::RSS_KEY;

    /// The first IPv4 and IPv6 lines of Microsoft's "Verifying the RSS Hash Calculation".
    #[test]
    fn toeplitz_matches_the_published_values() {
        let flow = Flow {
            source_mac: [0; 6],
            destination_mac: [0; 6],
            addresses: Addresses::V4([66, 9, 149, 187], [161, 142, 100, 80]),
            source_port: 2794,
            destination_port: 1766,
        };
        assert_eq!(toeplitz(&RSS_KEY, &flow.hash_input(false)), 0x323e_8fc2);
        assert_eq!(toeplitz(&RSS_KEY, &flow.hash_input(true)), 0x51cc_c178);
    }

    #[test]
    fn frames_carry_right_checksums() {
        for flow in [Flow::v4([1; 6], 3), Flow::v6([1; 6], 3)] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let frame = flow.frame(protocol, b"odd");
                assert!(checksum_ok(&frame), "{flow:?} {protocol:?}");
                let mut broken = frame.clone();
                *broken.last_mut().unwrap() ^= 1;
                assert!(!checksum_ok(&broken), "{flow:?} {protocol:?}");
            }
        }
    }
}
