//! A guest for tests: smoltcp on a cable, with the offloads that a real guest's card would have.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use mana_device::checksum::{Sum, pseudo_header};
use mana_device::doors::{PartialChecksum, Segmentation, TxFrame, TxOffload};
use mana_device::packet::{Headers, IpVersion, Protocol};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, IpCidr};
use vm_memory::VolatileSlice;

use super::batch::{Batch, Outlet};
use super::{Accepts, Cable};

const MTU: u16 = 1500;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// What its card leaves to the cable, and takes from it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Card {
    /// TCP checksums and segmentation of what it sends are the cable's business.
    pub sends_unfinished: bool,
    /// It takes unfinished frames.
    pub accepts: Accepts,
}

struct Nic<'a> {
    cable: &'a dyn Cable,
    card: Card,
    received: VecDeque<Vec<u8>>,
    /// A frame that may grow into a super-frame.
    growing: Option<Growing>,
    /// Longest frames that came and went.
    longest: (usize, usize),
}

struct Growing {
    frame: Vec<u8>,
    headers: Headers,
    header_len: usize,
    mss: usize,
}

impl Nic<'_> {
    fn receive(&mut self) {
        let (received, longest) = (&mut self.received, &mut self.longest.0);
        let (mut outlet, mut batch) = (Outlet::default(), Batch::default());
        outlet.limit(MTU);
        while self
            .cable
            .poll(64, &mut |frames| {
                batch.clear();
                for frame in frames {
                    *longest = frame.bytes.len().max(*longest);
                    batch.room(frame.bytes.len()).copy_from_slice(frame.bytes);
                    batch.commit(0..frame.bytes.len(), frame.checksum, frame.offload);
                }
                let count = batch.len();
                outlet.hand_over(&mut batch, 0..count, &mut |frames| {
                    received.extend(frames.iter().map(|frame| frame.bytes.to_vec()));
                });
            })
            .more
        {}
        assert_eq!(outlet.dropped(), 0);
    }

    /// Send a frame, or let it wait for the next ones of its connection.
    fn put(&mut self, frame: Vec<u8>) {
        let headers = Headers::parse(&frame);
        let tcp = headers.transport().filter(|found| found.protocol == Protocol::Tcp);
        let Some(tcp) = tcp.filter(|_| self.card.sends_unfinished) else {
            self.finish_growing();
            return self.send(&frame, TxOffload::default());
        };
        let header_len = tcp.offset + usize::from(frame[tcp.offset + 12] >> 4) * 4;
        let payload = frame.len() - header_len;
        if let Some(growing) = &mut self.growing
            && growing.fits(&frame, header_len)
        {
            growing.frame.extend_from_slice(&frame[header_len..]);
            if payload < growing.mss {
                self.finish_growing();
            }
            return;
        }
        self.finish_growing();
        self.growing = Some(Growing { frame, headers, header_len, mss: payload });
        if payload == 0 {
            self.finish_growing();
        }
    }

    fn finish_growing(&mut self) {
        let Some(Growing { mut frame, headers, header_len, mss }) = self.growing.take() else { return };
        let (Some(mut ip), Some(tcp)) = (headers.ip, headers.transport()) else { return };
        ip.len = frame.len() - ip.offset;
        match ip.version {
            IpVersion::V4 => {
                frame[ip.offset + 2..ip.offset + 4].copy_from_slice(&(ip.len as u16).to_be_bytes());
                mana_device::offload::fill_ip(&mut frame, &ip).unwrap();
            }
            IpVersion::V6 => {
                frame[ip.offset + 4..ip.offset + 6].copy_from_slice(&(ip.len as u16 - 40).to_be_bytes());
            }
        }
        let sum: Sum = pseudo_header(&frame, &ip, Protocol::Tcp, frame.len() - tcp.offset).unwrap();
        frame[tcp.offset + 16..tcp.offset + 18].copy_from_slice(&sum.fold().to_be_bytes());
        let ipv6 = ip.version == IpVersion::V6;
        let cut = Segmentation { mss: mss as u16, header_len: header_len as u16, ipv6 };
        let checksum = Some(PartialChecksum { start: tcp.offset as u16, offset: 16 });
        let segmentation = (frame.len() > header_len + mss).then_some(cut);
        self.send(&frame, TxOffload { checksum, segmentation });
    }

    fn send(&mut self, frame: &[u8], offload: TxOffload) {
        self.longest.1 = frame.len().max(self.longest.1);
        let mut bytes = frame.to_vec();
        let slices = [VolatileSlice::from(bytes.as_mut_slice())];
        // What is dropped, TCP sends again.
        let _ = self.cable.send(&TxFrame { slices: &slices, len: frame.len(), offload });
    }
}

impl Growing {
    /// `frame` continues this one.
    fn fits(&self, frame: &[u8], header_len: usize) -> bool {
        let Some(tcp) = self.headers.transport() else { return false };
        let sequence =
            |frame: &[u8]| u32::from_be_bytes(frame[tcp.offset + 4..tcp.offset + 8].try_into().unwrap());
        let same_flow = frame[..12] == self.frame[..12]
            && frame[tcp.offset..tcp.offset + 4] == self.frame[tcp.offset..tcp.offset + 4];
        let plain = frame[tcp.offset + 13] & !0x18 == 0 && self.frame[tcp.offset + 13] & !0x18 == 0;
        let next = sequence(&self.frame).wrapping_add((self.frame.len() - self.header_len) as u32);
        let room = self.frame.len() + frame.len() - header_len <= 65_000;
        same_flow
            && plain
            && room
            && header_len == self.header_len
            && sequence(frame) == next
            && frame.len() - header_len <= self.mss
            && frame.len() > header_len
    }
}

impl phy::Device for Nic<'_> {
    type RxToken<'t>
        = Received
    where
        Self: 't;
    type TxToken<'t>
        = Transmit<'t>
    where
        Self: 't;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(MTU) + 14;
        if self.card.sends_unfinished {
            capabilities.checksum.tcp = Checksum::Rx;
        }
        capabilities
    }

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Transmit<'_>)> {
        let frame = self.received.pop_front()?;
        Some((Received(frame), Transmit(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmit<'_>> {
        Some(Transmit(self))
    }
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Transmit<'t>(&'t mut dyn Outgoing);

trait Outgoing {
    fn frame(&mut self, frame: Vec<u8>);
}

impl Outgoing for Nic<'_> {
    fn frame(&mut self, frame: Vec<u8>) {
        self.put(frame);
    }
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.frame(frame);
        result
    }
}

/// The guest.
pub struct Guest<'a> {
    nic: Nic<'a>,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
}

impl<'a> Guest<'a> {
    /// A guest at `address` on `cable`.
    pub fn new(cable: &'a dyn Cable, card: Card, addresses: &[(IpAddr, u8)]) -> Self {
        cable.accept(card.accepts);
        let mut nic = Nic { cable, card, received: VecDeque::new(), growing: None, longest: (0, 0) };
        let last = match addresses[0].0 {
            IpAddr::V4(address) => address.octets()[3],
            IpAddr::V6(address) => address.octets()[15],
        };
        let config = Config::new(EthernetAddress([0x52, 0x54, 0, 0, 0, last]).into());
        let mut interface = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|list| {
            list.extend(addresses.iter().map(|&(address, prefix)| IpCidr::new(address.into(), prefix)));
        });
        Self { nic, interface, sockets: SocketSet::new(Vec::new()), start: Instant::now() }
    }

    /// Send what is not on its network there.
    pub fn route(&mut self, gateway: std::net::Ipv4Addr) {
        self.interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
    }

    /// One look at everything.
    pub fn step(&mut self) {
        assert!(self.start.elapsed() < PATIENCE, "nothing more happens");
        self.nic.receive();
        let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.nic, &mut self.sockets);
        self.nic.finish_growing();
        self.nic.cable.flush();
    }

    fn socket() -> tcp::Socket<'static> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        tcp::Socket::new(buffer(), buffer())
    }

    /// A connection to `address` and `port`.
    pub fn connect(&mut self, address: IpAddr, port: u16) -> SocketHandle {
        let mut socket = Self::socket();
        let local = 40_000 + (self.start.elapsed().as_nanos() % 10_000) as u16;
        socket.connect(self.interface.context(), (address, port), local).unwrap();
        self.sockets.add(socket)
    }

    /// A socket that waits for a connection to `port`.
    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let mut socket = Self::socket();
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    /// The socket.
    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Send `bytes` to an echo service at `address` and take them back.
    pub fn echo(&mut self, address: IpAddr, port: u16, bytes: &[u8]) -> Vec<u8> {
        let handle = self.connect(address, port);
        let (mut sent, mut back) = (0, Vec::new());
        while back.len() < bytes.len() {
            self.step();
            let socket = self.tcp(handle);
            if socket.can_send() && sent < bytes.len() {
                sent += socket.send_slice(&bytes[sent..]).unwrap();
            }
            while socket.can_recv() {
                socket.recv(|part| (part.len(), back.extend_from_slice(part))).unwrap();
            }
        }
        self.tcp(handle).close();
        self.step();
        back
    }

    /// Longest frames received and sent, bytes.
    pub fn longest(&self) -> (usize, usize) {
        self.nic.longest
    }
}

/// Bytes that are not the same anywhere.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251) as u8).collect()
}
