//! smoltcp's interface between the frames that came from the guest and the frames for it.

use std::collections::VecDeque;

use mana_device::doors::RxChecksum;
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

use super::services::Services;
use super::{Deliver, Network, Polled};
use crate::net::Frame;

/// Frames for the guest that one poll makes before they are delivered.
const MAX_OUT: usize = 256;
/// Buffers kept for the guest's next frames.
const MAX_SPARE: usize = 256;
/// Shortest sleep before a timer of the stack's. Its timers count milliseconds.
const MIN_WAIT_NS: u64 = 1_000_000;
/// Bytes of an Ethernet header; smoltcp's MTU counts them.
const ETHERNET_HEADER: usize = 14;

/// The two frame queues, as smoltcp wants to see a device.
struct Wire {
    mtu: usize,
    input: VecDeque<Vec<u8>>,
    used: Vec<Vec<u8>>,
    /// The first `made` are frames; the rest are buffers to use again.
    output: Vec<Vec<u8>>,
    made: usize,
    /// How large `made` may get.
    limit: usize,
}

impl phy::Device for Wire {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Transmit<'a>;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + ETHERNET_HEADER;
        capabilities
    }

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        if self.made >= self.limit {
            return None;
        }
        let frame = self.input.pop_front()?;
        let Self { used, output, made, .. } = self;
        Some((Received { frame, used }, Transmit { output, made }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        let Self { output, made, limit, .. } = self;
        (*made < *limit).then_some(Transmit { output, made })
    }
}

struct Received<'a> {
    frame: Vec<u8>,
    used: &'a mut Vec<Vec<u8>>,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.frame);
        self.used.push(self.frame);
        result
    }
}

struct Transmit<'a> {
    output: &'a mut Vec<Vec<u8>>,
    made: &'a mut usize,
}

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        if *self.made == self.output.len() {
            self.output.push(Vec::new());
        }
        let frame = &mut self.output[*self.made];
        *self.made += 1;
        frame.resize(len, 0);
        f(frame)
    }
}

/// The peer's TCP/IP stack.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Services,
    wire: Wire,
}

impl Stack {
    /// A stack that has seen nothing yet.
    pub fn new(network: Network, mtu: u16, now_ns: u64) -> Self {
        let mut wire = Wire {
            mtu: usize::from(mtu),
            input: VecDeque::new(),
            used: Vec::new(),
            output: Vec::new(),
            made: 0,
            limit: MAX_OUT,
        };
        let mut config = Config::new(EthernetAddress(network.mac).into());
        config.random_seed = now_ns;
        let mut interface = Interface::new(config, &mut wire, instant(now_ns));
        interface.update_ip_addrs(|addresses| {
            addresses.extend([
                IpCidr::new(network.ipv4.into(), super::dhcp::PREFIX_LENGTH),
                IpCidr::new(network.ipv6.into(), 64),
            ]);
        });
        let mut sockets = SocketSet::new(Vec::new());
        let services = Services::new(&mut sockets, network.ipv4, mtu);
        Self { interface, sockets, services, wire }
    }

    /// Put buffers that are used no more into `spare`.
    pub fn take_used(&mut self, spare: &mut Vec<Vec<u8>>) {
        let room = MAX_SPARE.saturating_sub(spare.len());
        spare.extend(self.wire.used.drain(..).take(room));
    }

    /// Whether the stack has seen all frames that it was given.
    pub fn has_no_input(&self) -> bool {
        self.wire.input.is_empty()
    }

    /// Give the stack frames of the guest's, once it has no others.
    pub fn give(&mut self, frames: VecDeque<Vec<u8>>) {
        self.wire.input = frames;
    }

    /// Let the stack work on the frames it has taken. The frames for the guest wait for
    /// [`deliver`](Self::deliver).
    pub fn poll(&mut self, now_ns: u64) -> Polled {
        let now = instant(now_ns);
        self.interface.poll_maintenance(now);
        loop {
            self.services.accept(&mut self.sockets);
            let received = self.interface.poll_ingress_single(now, &mut self.wire, &mut self.sockets);
            self.finish_fragments(now);
            if received == PollIngressSingleResult::None {
                break;
            }
        }
        loop {
            self.services.serve(&self.interface, &mut self.sockets);
            if !self.transmit(now) {
                break;
            }
        }
        let deadline = self.interface.poll_at(now, &self.sockets);
        let due = deadline.is_some_and(|deadline| deadline <= now);
        Polled {
            more: !self.wire.input.is_empty() || (due && self.wire.made > 0),
            deadline: deadline.map(|deadline| in_nanoseconds(deadline).max(now_ns + MIN_WAIT_NS)),
        }
    }

    /// Make frames of what the sockets hold; the answer is whether there was any.
    fn transmit(&mut self, now: Instant) -> bool {
        let before = self.wire.made;
        while self.interface.poll_egress(now, &mut self.wire, &mut self.sockets) != PollResult::None {
            self.finish_fragments(now);
        }
        self.wire.made > before
    }

    /// smoltcp remembers one fragmented datagram and forgets it when the next one comes, so it goes out whole
    /// now: with no sockets to ask, fragments are all there is to poll for.
    fn finish_fragments(&mut self, now: Instant) {
        let mut none = SocketSet::new([]);
        self.wire.limit = usize::MAX;
        while self.interface.poll_at(now, &none).is_some() {
            self.interface.poll_egress(now, &mut self.wire, &mut none);
        }
        self.wire.limit = MAX_OUT;
    }

    /// Hand the frames for the guest on.
    pub fn deliver(&mut self, deliver: Deliver<'_>) {
        // Their checksums were just computed.
        let frames: Vec<_> = self.wire.output[..self.wire.made]
            .iter()
            .map(|bytes| Frame::plain(bytes, RxChecksum::Valid))
            .collect();
        if !frames.is_empty() {
            deliver(&frames);
        }
        self.wire.made = 0;
    }
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros((ns / 1000).cast_signed())
}

fn in_nanoseconds(instant: Instant) -> u64 {
    u64::try_from(instant.total_micros()).unwrap_or(0).saturating_mul(1000)
}
