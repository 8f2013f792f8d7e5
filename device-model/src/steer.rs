//! Receive-side scaling: which receive queue a packet goes to.
//!
//! The driver gives a Toeplitz key, the header fields to hash and an indirection table
//! (MANA_CONFIG_VPORT_RX, `mana_cfg_vport_steering`); what is not hashed goes to the default object. The hash
//! is Microsoft's ("Verifying the RSS Hash Calculation").

use std::sync::{Arc, LazyLock};

use crate::packet::{Headers, Ip, IpVersion, Protocol};

/// Bytes of a Toeplitz key (`MANA_HASH_KEY_SIZE`).
pub const HASH_KEY_SIZE: usize = 40;
/// Most bytes that are hashed: two IPv6 addresses and two ports.
const HASH_INPUT: usize = 36;

/// A Toeplitz key, expanded so that a byte of input costs one look-up.
///
/// The hash is linear: each input bit that is set adds (XOR) the 32 key bits that start at its position. An
/// entry holds that sum for one byte value at one position.
pub struct Toeplitz {
    key: [u8; HASH_KEY_SIZE],
    table: Arc<Table>,
}

type Table = [[u32; 256]; HASH_INPUT];

/// The table of the key that there is after a reset: resets are frequent, and it is large.
static ZERO_KEY: LazyLock<Arc<Table>> = LazyLock::new(|| Arc::new([[0; 256]; HASH_INPUT]));

impl Toeplitz {
    /// Expand `key`, whose bytes are in the order of ethtool and of Microsoft's examples.
    pub fn new(key: &[u8; HASH_KEY_SIZE]) -> Self {
        if *key == [0; HASH_KEY_SIZE] {
            return Self { key: *key, table: ZERO_KEY.clone() };
        }
        let mut table = [[0; 256]; HASH_INPUT];
        for (at, sums) in table.iter_mut().enumerate() {
            // The 40 key bits that the eight bits of this input byte slide over.
            let window = key.iter().skip(at).take(5).fold(0u64, |bits, &byte| bits << 8 | u64::from(byte));
            // Each bit, from the last on, doubles what is known.
            for bit in 0..8 {
                let (known, rest) = sums.split_at_mut(1 << bit);
                let key_bits = (window >> (bit + 1)) as u32;
                rest.iter_mut().zip(known).for_each(|(sum, known)| *sum = *known ^ key_bits);
            }
        }
        Self { key: *key, table: Arc::new(table) }
    }
    /// The key.
    pub fn key(&self) -> &[u8; HASH_KEY_SIZE] {
        &self.key
    }
    /// The hash of `addresses` (source, destination) followed by `ports` (source, destination), all as in the
    /// packet.
    #[inline]
    pub fn hash(&self, addresses: &[u8], ports: &[u8]) -> u32 {
        let fold = |hash: u32, (sums, &byte): (&[u32; 256], &u8)| hash ^ sums[usize::from(byte)];
        let hash = self.table.iter().zip(addresses).fold(0, fold);
        self.table.iter().skip(addresses.len()).zip(ports).fold(hash, fold)
    }
}

/// Header fields to hash: `rss_hash_types` of the request, `rx_hashtype` of the completion
/// (`enum` `NDIS_HASH_*` order, mana.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashTypes(pub u16);

impl HashTypes {
    /// Addresses of IPv4.
    pub const IPV4: u16 = 1 << 0;
    /// Addresses and ports of TCP over IPv4.
    pub const TCP_IPV4: u16 = 1 << 1;
    /// Addresses and ports of UDP over IPv4.
    pub const UDP_IPV4: u16 = 1 << 2;
    /// Addresses of IPv6.
    pub const IPV6: u16 = 1 << 3;
    /// Addresses and ports of TCP over IPv6.
    pub const TCP_IPV6: u16 = 1 << 4;
    /// Addresses and ports of UDP over IPv6.
    pub const UDP_IPV6: u16 = 1 << 5;
    /// Addresses of IPv6, mobile ones resolved.
    pub const IPV6_EX: u16 = 1 << 6;
    /// Addresses and ports of TCP over IPv6, mobile addresses resolved.
    pub const TCP_IPV6_EX: u16 = 1 << 7;
    /// Addresses and ports of UDP over IPv6, mobile addresses resolved.
    pub const UDP_IPV6_EX: u16 = 1 << 8;
    /// What requests without the field mean, and what the driver asks for.
    pub const DEFAULT: Self = Self(0x3f);

    /// The first of `types` that is asked for.
    #[inline]
    fn first_of(self, types: [u16; 2]) -> Option<u16> {
        types.into_iter().find(|bit| self.0 & bit != 0)
    }
    /// The type to hash `ip` as, mobile addresses aside.
    #[inline]
    fn plain(self, ip: &Ip) -> Option<u16> {
        let protocol = ip.transport.map(|transport| transport.protocol);
        self.first_of(match (ip.version, protocol) {
            (IpVersion::V4, Some(Protocol::Tcp)) => [Self::TCP_IPV4, Self::IPV4],
            (IpVersion::V4, Some(Protocol::Udp)) => [Self::UDP_IPV4, Self::IPV4],
            (IpVersion::V4, None) => [Self::IPV4; 2],
            (IpVersion::V6, Some(Protocol::Tcp)) => [Self::TCP_IPV6, Self::IPV6],
            (IpVersion::V6, Some(Protocol::Udp)) => [Self::UDP_IPV6, Self::IPV6],
            (IpVersion::V6, None) => [Self::IPV6; 2],
        })
    }
    /// The type to hash an IPv6 packet with mobile addresses as.
    fn extended(self, ip: &Ip) -> Option<u16> {
        self.first_of(match ip.transport.map(|transport| transport.protocol) {
            Some(Protocol::Tcp) => [Self::TCP_IPV6_EX, Self::IPV6_EX],
            Some(Protocol::Udp) => [Self::UDP_IPV6_EX, Self::IPV6_EX],
            None => [Self::IPV6_EX; 2],
        })
    }
}

/// The types that cover the ports.
const WITH_PORTS: u16 = HashTypes::TCP_IPV4
    | HashTypes::UDP_IPV4
    | HashTypes::TCP_IPV6
    | HashTypes::UDP_IPV6
    | HashTypes::TCP_IPV6_EX
    | HashTypes::UDP_IPV6_EX;

/// A packet's hash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hash {
    /// The value; 0 if the packet was not hashed.
    pub value: u32,
    /// The one bit of [`HashTypes`] that says what was hashed; 0 if nothing was.
    pub hash_type: u16,
}

/// How a vPort spreads packets over receive queues; `Q` is whatever names a queue.
pub struct Steering<Q> {
    /// Hash at all; else everything goes to the default queue.
    pub rss: bool,
    /// What to hash.
    pub hash_types: HashTypes,
    /// The key.
    pub toeplitz: Toeplitz,
    /// Queues by the low bits of the hash; a power of two of them, or none.
    pub indirection: Vec<Q>,
    /// Where packets go that are not hashed.
    pub default_queue: Option<Q>,
}

impl<Q: Copy> Steering<Q> {
    /// Nothing configured: no queue for anything.
    pub fn new() -> Self {
        Self {
            rss: false,
            hash_types: HashTypes::DEFAULT,
            toeplitz: Toeplitz::new(&[0; HASH_KEY_SIZE]),
            indirection: Vec::new(),
            default_queue: None,
        }
    }
    /// The hash of a packet; none if the driver doesn't want one of its kind.
    #[inline]
    pub fn hash(&self, frame: &[u8], headers: &Headers) -> Hash {
        match headers.ip {
            Some(ip) if self.rss => self.hash_ip(frame, &ip).unwrap_or_default(),
            _ => Hash::default(),
        }
    }
    /// The queue for a packet with this hash.
    #[inline]
    pub fn queue(&self, hash: Hash) -> Option<Q> {
        if hash.hash_type == 0 || self.indirection.is_empty() {
            return self.default_queue;
        }
        let index = hash.value as usize & (self.indirection.len() - 1);
        self.indirection.get(index).copied()
    }
    #[inline]
    fn hash_ip(&self, frame: &[u8], ip: &Ip) -> Option<Hash> {
        let mobile = ip.home_address.is_some() || ip.routed_destination.is_some();
        if mobile && let Some(hash_type) = self.hash_types.extended(ip) {
            return self.hash_mobile(frame, ip, hash_type);
        }
        let hash_type = self.hash_types.plain(ip)?;
        let addresses = match ip.version {
            IpVersion::V4 => frame.get(ip.offset + 12..ip.offset + 20)?,
            IpVersion::V6 => frame.get(ip.offset + 8..ip.offset + 40)?,
        };
        let value = self.toeplitz.hash(addresses, ports(frame, ip, hash_type)?);
        Some(Hash { value, hash_type })
    }
    /// Hash the addresses that a mobile node means instead of the ones it is reached by.
    #[cold]
    fn hash_mobile(&self, frame: &[u8], ip: &Ip, hash_type: u16) -> Option<Hash> {
        let mut addresses = [0; 32];
        let source = ip.home_address.unwrap_or(ip.offset + 8);
        let destination = ip.routed_destination.unwrap_or(ip.offset + 24);
        addresses[..16].copy_from_slice(frame.get(source..source + 16)?);
        addresses[16..].copy_from_slice(frame.get(destination..destination + 16)?);
        let value = self.toeplitz.hash(&addresses, ports(frame, ip, hash_type)?);
        Some(Hash { value, hash_type })
    }
}

impl<Q: Copy> Default for Steering<Q> {
    fn default() -> Self {
        Self::new()
    }
}

/// The ports, where the type covers them.
#[inline]
fn ports<'a>(frame: &'a [u8], ip: &Ip, hash_type: u16) -> Option<&'a [u8]> {
    match ip.transport {
        Some(transport) if hash_type & WITH_PORTS != 0 => frame.get(transport.offset..transport.offset + 4),
        _ => Some(&[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use std::net::{IpAddr, SocketAddr};

    /// The key of "Verifying the RSS Hash Calculation".
    const KEY: [u8; HASH_KEY_SIZE] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
        0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
        0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    /// Destination, source, hash of the addresses, hash of addresses and ports: the published table.
    const VECTORS: [(&str, &str, u32, u32); 8] = [
        ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
        ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
        ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
        ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
        ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
        ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x2cc1_8cd5, 0x4020_7d3d),
        ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0x0f0c_461c, 0xdde5_1bbf),
        (
            "[fe80::200:f8ff:fe21:67cf]:38024",
            "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    fn frame(source: SocketAddr, destination: SocketAddr, tcp: bool) -> Vec<u8> {
        let ethernet = PacketBuilder::ethernet2([1; 6], [2; 6]);
        let ip = match (source.ip(), destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ethernet.ipv4(source.octets(), destination.octets(), 64)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ethernet.ipv6(source.octets(), destination.octets(), 64)
            }
            _ => unreachable!(),
        };
        let mut frame = Vec::new();
        if tcp {
            ip.tcp(source.port(), destination.port(), 0, 0).write(&mut frame, &[]).unwrap();
        } else {
            ip.udp(source.port(), destination.port()).write(&mut frame, &[]).unwrap();
        }
        frame
    }

    fn steering(types: u16) -> Steering<u16> {
        Steering { rss: true, hash_types: HashTypes(types), toeplitz: Toeplitz::new(&KEY), ..Steering::new() }
    }

    #[test]
    fn published_vectors() {
        for (destination, source, addresses, ports) in VECTORS {
            let (source, destination): (SocketAddr, SocketAddr) =
                (source.parse().unwrap(), destination.parse().unwrap());
            let v4 = source.is_ipv4();
            for (tcp, l4) in [
                (true, if v4 { HashTypes::TCP_IPV4 } else { HashTypes::TCP_IPV6 }),
                (false, if v4 { HashTypes::UDP_IPV4 } else { HashTypes::UDP_IPV6 }),
            ] {
                let l3 = if v4 { HashTypes::IPV4 } else { HashTypes::IPV6 };
                let frame = frame(source, destination, tcp);
                let headers = Headers::parse(&frame);
                let hash = |types| steering(types).hash(&frame, &headers);
                assert_eq!(hash(0x3f), Hash { value: ports, hash_type: l4 }, "{source} {destination}");
                assert_eq!(hash(0x3f & !l4), Hash { value: addresses, hash_type: l3 });
                assert_eq!(hash(0x3f & !l4 & !l3), Hash::default());
            }
        }
    }

    #[test]
    fn fragments_hash_addresses_only() {
        let (destination, source, addresses, _) = VECTORS[0];
        let mut frame = frame(source.parse().unwrap(), destination.parse().unwrap(), true);
        frame[20] |= 0x20;
        let hash = steering(0x3f).hash(&frame, &Headers::parse(&frame));
        assert_eq!(hash, Hash { value: addresses, hash_type: HashTypes::IPV4 });
    }

    #[test]
    fn mobile_addresses_replace_the_packets_own_when_asked_for() {
        let (destination, source, addresses, _) = VECTORS[5];
        let home: SocketAddr = source.parse().unwrap();
        let IpAddr::V6(home) = home.ip() else { unreachable!() };
        let care_of = "[2001:db8::9]:7".parse().unwrap();
        let mut frame = frame(care_of, destination.parse().unwrap(), false);
        frame.truncate(54);
        frame[20] = 60; // destination options: PadN(2), Home Address, then no next header
        frame.extend([59, 2, 1, 2, 0, 0, 201, 16]);
        frame.extend(home.octets());
        let headers = Headers::parse(&frame);
        let extended = steering(HashTypes::IPV6 | HashTypes::IPV6_EX).hash(&frame, &headers);
        assert_eq!(extended, Hash { value: addresses, hash_type: HashTypes::IPV6_EX });
        let plain = steering(HashTypes::IPV6).hash(&frame, &headers);
        assert_eq!(plain.hash_type, HashTypes::IPV6);
        assert_ne!(plain.value, addresses);
    }

    #[test]
    fn spreads_by_the_low_bits_and_falls_back_to_the_default() {
        let mut steering = steering(0x3f);
        let hashed = |value| Hash { value, hash_type: HashTypes::IPV4 };
        assert_eq!(steering.queue(hashed(1)), None);
        steering.default_queue = Some(9);
        assert_eq!(steering.queue(hashed(1)), Some(9), "no table yet");
        steering.indirection = vec![0, 1, 2, 3];
        assert_eq!(steering.queue(hashed(0xffff_fff6)), Some(2));
        assert_eq!(steering.queue(Hash::default()), Some(9));
        steering.rss = false;
        let frame = frame("1.2.3.4:5".parse().unwrap(), "6.7.8.9:10".parse().unwrap(), true);
        assert_eq!(steering.hash(&frame, &Headers::parse(&frame)), Hash::default());
    }
}
