//! The peer against a guest that is a second smoltcp interface.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpCidr, Ipv4Cidr,
};

use super::super::tests::with_frame;
use super::*;

/// A clock that only moves when the test says so.
#[derive(Default)]
struct ManualClock(AtomicU64);

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The guest's NIC: sends straight into the peer.
struct Nic {
    peer: Peer,
    mtu: usize,
    received: VecDeque<Vec<u8>>,
    longest: usize,
}

struct Sender<'a>(&'a Peer);
struct Receiver(Vec<u8>);

impl smoltcp::phy::TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        let _ = with_frame(&frame, |frame| self.0.send(frame));
        result
    }
}

impl smoltcp::phy::RxToken for Receiver {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl Device for Nic {
    type RxToken<'a> = Receiver;
    type TxToken<'a> = Sender<'a>;
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities
    }
    fn receive(&mut self, _now: Instant) -> Option<(Receiver, Sender<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Receiver(frame), Sender(&self.peer)))
    }
    fn transmit(&mut self, _now: Instant) -> Option<Sender<'_>> {
        Some(Sender(&self.peer))
    }
}

struct Guest {
    clock: Arc<ManualClock>,
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'static>,
}

const PEER_V4: IpAddress = IpAddress::v4(10, 0, 2, 2);
const PEER_V6: IpAddress = IpAddress::v6(0xfe80, 0, 0, 0, 0, 0, 0, 2);

impl Guest {
    fn new(mtu: u16) -> Self {
        let clock = Arc::new(ManualClock::default());
        let peer = Peer::new(Network::numbered(0), mtu, Arc::clone(&clock) as Arc<dyn Clock>);
        let mut nic = Nic { peer, mtu: mtu.into(), received: VecDeque::new(), longest: 0 };
        let config = Config::new(EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]).into());
        let mut interface = Interface::new(config, &mut nic, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap();
            addresses.push(IpCidr::new(IpAddress::v6(0xfe80, 0, 0, 0, 0, 0, 0, 15), 64)).unwrap();
        });
        Self { clock, nic, interface, sockets: SocketSet::new(Vec::new()) }
    }

    /// Run both ends for up to 30 s of their time, until `done`.
    fn run(&mut self, mut done: impl FnMut(&mut SocketSet<'static>, &mut Interface) -> bool) {
        while !done(&mut self.sockets, &mut self.interface) {
            let now_ns = self.clock.0.fetch_add(200_000, Ordering::Relaxed);
            assert!(now_ns < 30_000_000_000, "nothing more happens");
            self.interface.poll(instant(now_ns), &mut self.nic, &mut self.sockets);
            let Nic { peer, received, longest, .. } = &mut self.nic;
            peer.flush();
            let mut deliver = |batch: &[crate::net::Frame<'_>]| {
                *longest = batch.iter().map(|f| f.bytes.len()).chain([*longest]).max().unwrap();
                received.extend(batch.iter().map(|frame| frame.bytes.to_vec()));
            };
            while peer.poll(64, &mut deliver).more {}
        }
    }

    fn connect(&mut self, port: u16, from: u16) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 128 * 1024]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.connect(self.interface.context(), (PEER_V4, port), from).unwrap();
        self.sockets.add(socket)
    }

    fn udp(&mut self) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 128 * 1024]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(5000).unwrap();
        self.sockets.add(socket)
    }

    /// Send `payload` to a UDP port and wait for one answer.
    fn ask(&mut self, to: (IpAddress, u16), payload: &[u8]) -> Vec<u8> {
        let handle = self.udp();
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(payload, to).unwrap();
        let mut answer = None;
        self.run(|sockets, _| {
            answer = sockets.get_mut::<udp::Socket<'_>>(handle).recv().ok().map(|(bytes, _)| bytes.to_vec());
            answer.is_some()
        });
        self.sockets.remove(handle);
        answer.unwrap()
    }
}

fn instant(now_ns: u64) -> Instant {
    Instant::from_micros(now_ns.cast_signed() / 1000)
}

/// A stream without a period that a misplaced block could hide in.
fn stream(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let step = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

/// Send `data` over each of `connections` to echo, all at once, and check what comes back.
fn echo_over_tcp(mtu: u16, connections: u16, length: usize) -> Guest {
    let mut guest = Guest::new(mtu);
    let mut flows: Vec<_> = (0..connections)
        .map(|index| (guest.connect(7, 10_000 + index), stream(length, index.into()), 0, Vec::new()))
        .collect();
    guest.run(|sockets, _| {
        let mut finished = 0;
        for (handle, data, sent, back) in &mut flows {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if socket.may_send() {
                *sent += socket.send_slice(&data[*sent..]).unwrap();
                if *sent == data.len() {
                    socket.close();
                }
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
            }
            finished += usize::from(*sent == data.len() && !socket.may_recv());
        }
        finished == flows.len()
    });
    for (_, data, _, back) in &flows {
        assert!(data == back, "{} of {} bytes came back intact", back.len(), data.len());
    }
    guest
}

#[test]
fn echoes_a_mebibyte_over_tcp() {
    let guest = echo_over_tcp(1500, 1, 1 << 20);
    assert_eq!(guest.nic.longest, 1514, "full frames are used");
}

#[test]
fn uses_jumbo_frames_when_the_mtu_allows() {
    assert_eq!(echo_over_tcp(9000, 1, 1 << 20).nic.longest, 9014);
}

#[test]
fn serves_many_connections_at_once() {
    echo_over_tcp(1500, 100, 20_000);
}

#[test]
fn refuses_connections_beyond_its_limit_and_frees_closed_ones() {
    let mut guest = Guest::new(1500);
    let count = services::MAX_CONNECTIONS as u16 + 10;
    let handles: Vec<_> = (0..count).map(|index| guest.connect(9, 20_000 + index)).collect();
    let states = |sockets: &SocketSet<'static>, state| {
        handles.iter().filter(|&&h| sockets.get::<tcp::Socket<'_>>(h).state() == state).count()
    };
    guest.run(|sockets, _| {
        states(sockets, tcp::State::Established) == services::MAX_CONNECTIONS
            && states(sockets, tcp::State::Closed) == 10
    });
    guest.sockets.iter_mut().for_each(|(_, socket)| {
        let smoltcp::socket::Socket::Tcp(socket) = socket else { return };
        socket.close();
    });
    guest.run(|sockets, _| states(sockets, tcp::State::TimeWait) == services::MAX_CONNECTIONS);
    let again = guest.connect(9, 30_000);
    guest.run(|sockets, _| sockets.get::<tcp::Socket<'_>>(again).state() == tcp::State::Established);
}

#[test]
fn refuses_a_port_without_a_service() {
    let mut guest = Guest::new(1500);
    let handle = guest.connect(80, 10_000);
    guest.run(|sockets, _| sockets.get::<tcp::Socket<'_>>(handle).state() == tcp::State::Closed);
}

#[test]
fn generates_the_character_pattern_over_tcp() {
    let mut guest = Guest::new(1500);
    let handle = guest.connect(19, 10_000);
    let mut text = Vec::new();
    guest.run(|sockets, _| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), text.extend_from_slice(bytes))).unwrap();
        }
        text.len() > 100_000
    });
    let lines: Vec<_> = text[..74 * 200].chunks(74).collect();
    assert!(lines[0].starts_with(b" !\"#$%&'()*+,-./0123") && lines[0].ends_with(b"efg\r\n"));
    assert!(lines[1].starts_with(b"!\"#$") && lines[94].starts_with(b"~ !"));
    assert_eq!(lines[95], lines[0]);
}

#[test]
fn echoes_datagrams_fragmented_ones_too() {
    let mut guest = Guest::new(1500);
    for length in [0, 1, 1472, 1473, 30_000] {
        let payload = stream(length, 3);
        assert!(guest.ask((PEER_V4, 7), &payload) == payload, "{length} bytes");
    }
    assert_eq!(guest.ask((PEER_V6, 7), b"six"), b"six");
    assert_eq!(guest.ask((PEER_V4, 19), b"?").len(), 512);
}

#[test]
fn leases_addresses_by_dhcp() {
    let mut guest = Guest::new(9000);
    guest.interface.update_ip_addrs(|addresses| addresses.truncate(0));
    let mut socket = dhcpv4::Socket::new();
    socket.set_receive_packet_buffer(vec![0; 1024].leak());
    let handle = guest.sockets.add(socket);
    let mut lease = None;
    guest.run(|sockets, _| {
        if let Some(dhcpv4::Event::Configured(config)) = sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
        {
            let (packet, options) = (config.packet.unwrap(), config.address);
            let mtu = packet.options().find(|option| option.kind == 26).map(|option| option.data.to_vec());
            lease = Some((options, config.router, config.server.address, mtu));
        }
        lease.is_some()
    });
    let address = Ipv4Cidr::new(Ipv4Addr::new(10, 0, 2, 15), 24);
    assert_eq!(lease, Some((address, None, Ipv4Addr::new(10, 0, 2, 2), Some(vec![0x23, 0x28]))));
}

/// Ping with a payload of `length` bytes; the answer must be the same.
fn ping(guest: &mut Guest, to: IpAddress, length: usize) {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 70_000]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let handle = guest.sockets.add(socket);
    let payload = stream(length, 9);
    let caps = guest.nic.capabilities().checksum;
    let mut sent = false;
    let mut answered = false;
    guest.run(|sockets, interface| {
        let socket = sockets.get_mut::<icmp::Socket<'_>>(handle);
        if !sent {
            sent = true;
            let (ident, seq_no, data) = (77, 1, payload.as_slice());
            if to == PEER_V4 {
                let request = Icmpv4Repr::EchoRequest { ident, seq_no, data };
                let bytes = socket.send(request.buffer_len(), to).unwrap();
                request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &caps);
            } else {
                let request = Icmpv6Repr::EchoRequest { ident, seq_no, data };
                let from = interface.get_source_address_ipv6(&Ipv6Addr::from([0xfe80, 0, 0, 0, 0, 0, 0, 2]));
                let bytes = socket.send(request.buffer_len(), to).unwrap();
                let mut packet = Icmpv6Packet::new_unchecked(bytes);
                request.emit(&from, &Ipv6Addr::from([0xfe80, 0, 0, 0, 0, 0, 0, 2]), &mut packet, &caps);
            }
        }
        if let Ok((reply, from)) = socket.recv() {
            assert_eq!(from, to);
            answered = reply[8..] == payload;
        }
        answered
    });
    guest.sockets.remove(handle);
}

#[test]
fn answers_pings() {
    let mut guest = Guest::new(1500);
    // The first one also finds the neighbour.
    for length in [0, 56, 1472, 20_000] {
        ping(&mut guest, PEER_V4, length);
    }
    ping(&mut guest, PEER_V6, 56);
}

#[test]
fn numbers_each_netdevs_network() {
    assert_eq!(Network::numbered(0).ipv4, Ipv4Addr::new(10, 0, 2, 2));
    assert_eq!(Network::numbered(3).ipv4, Ipv4Addr::new(10, 0, 5, 2));
    assert_eq!(Network::numbered(254).ipv4, Ipv4Addr::new(10, 1, 0, 2));
}

#[test]
fn bounds_what_waits() {
    let guest = Guest::new(1500);
    let send = |length| with_frame(&vec![0; length], |frame| guest.nic.peer.send(frame)).is_ok();
    let sent = (0..100_000).take_while(|_| send(1000)).count();
    assert_eq!(sent, MAX_WAITING / (1000 + FRAME_COST));
    while guest.nic.peer.poll(64, &mut |_| ()).more {}
    assert!(send(1000), "there is room again");
    assert!(with_frame(&[0; 1519], |f| guest.nic.peer.send(f)).is_err(), "longer than the MTU");
}

#[test]
fn gives_every_client_an_address_and_no_two_the_same() {
    use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr};
    let mut server = dhcp::Server::new(Ipv4Addr::new(10, 0, 2, 2), 1500);
    let mut ask = |client: u16, message_type, requested_ip| {
        let [high, low] = client.to_be_bytes();
        let request = DhcpRepr {
            message_type,
            transaction_id: 1,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, high, low]),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
        let answer = server.answer(&bytes).unwrap();
        let packet = DhcpPacket::new_checked(answer.as_slice()).unwrap();
        let reply = DhcpRepr::parse(&packet).unwrap();
        (reply.message_type, reply.your_ip)
    };
    let offers: std::collections::BTreeSet<_> =
        (0..200).map(|client| ask(client, DhcpMessageType::Discover, None).1).collect();
    assert_eq!(offers.len(), 200);
    let first = Ipv4Addr::new(10, 0, 2, 15);
    assert_eq!(offers.first(), Some(&first));
    assert_eq!(ask(0, DhcpMessageType::Request, Some(first)), (DhcpMessageType::Ack, first));
    let others = Some(Ipv4Addr::new(10, 0, 2, 16));
    assert_eq!(ask(0, DhcpMessageType::Request, others).0, DhcpMessageType::Nak);
    // All are given: a new client takes the oldest lease.
    assert_eq!(ask(1000, DhcpMessageType::Discover, None).1, first);
}

/// A frame whose headers make sense so far that the stack looks at the rest.
fn hostile_frame() -> impl Strategy<Value = Vec<u8>> {
    let addresses = prop_oneof![Just([10, 0, 2, 15]), Just([0; 4]), Just([255; 4]), Just([10, 0, 2, 2])];
    let ipv4 = (
        addresses,
        prop_oneof![Just(1_u8), Just(2), Just(6), Just(17)],
        prop::collection::vec(any::<u8>(), 0..200),
    )
        .prop_map(|(from, protocol, payload)| {
            let mut frame = [[0x52, 0x55, 10, 0, 2, 2], [2; 6]].concat();
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + payload.len() as u16).to_be_bytes());
            frame.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
            frame.extend(from);
            frame.extend([10, 0, 2, 2]);
            let sum = frame[14..34]
                .chunks(2)
                .fold(0_u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
            let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
            frame[24..26].copy_from_slice(&folded.to_be_bytes());
            frame.extend(payload);
            frame
        });
    let anything = prop::collection::vec(any::<u8>(), 0..1514);
    let kinds = prop_oneof![Just([8, 0]), Just([8, 6]), Just([0x86, 0xdd]), Just([0x81, 0])];
    let typed = (kinds, prop::collection::vec(any::<u8>(), 0..200))
        .prop_map(|(kind, payload)| [&[0xff; 6][..], &[2; 6], &kind, &payload].concat());
    prop_oneof![ipv4, anything, typed]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lives_through_hostile_frames(frames in prop::collection::vec(hostile_frame(), 1..64)) {
        let mut guest = Guest::new(1500);
        for frame in &frames {
            let _ = with_frame(frame, |frame| guest.nic.peer.send(frame));
        }
        guest.nic.peer.flush();
        while guest.nic.peer.poll(64, &mut |_| ()).more {}
        ping(&mut guest, PEER_V4, 8);
    }
}
