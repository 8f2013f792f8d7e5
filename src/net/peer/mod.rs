//! The built-in host at the other end of a cable (`--netdev peer`): no root, no set-up, always the same answers.
//!
//! On the `n`-th netdev (from 0) it is 10.0.(2+n).2/24 and fe80::2. It gives the guest 10.0.(2+n).15 and up by
//! DHCP, answers ARP, neighbour discovery and ping, and serves echo (7), discard (9) and chargen (19) over TCP
//! and UDP. It routes nowhere.
//!
//! The TCP/IP stack is smoltcp's. Guest frames are hostile: everything here is bounded, and should the stack
//! panic on one, this peer starts anew and the rest of the machine goes on.

mod dhcp;
mod services;
mod stack;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mana_device::doors::{Clock, Port, PortDropped, TxFrame};

use super::{Cable, Deliver, FRAME_OVERHEAD, Kick, Polled, gather};
use stack::Stack;

/// Bytes of the guest's frames that may wait; more are dropped, as a full switch would. Room for what one turn of a
/// send queue makes of super-frames, and for the windows of 32 TCP connections.
const MAX_WAITING: usize = 8 << 20;
/// Bytes that a waiting frame takes beside its own.
const FRAME_COST: usize = 256;

/// Who the peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The peer's Ethernet address.
    pub mac: [u8; 6],
    /// The peer's address in its /24.
    pub ipv4: Ipv4Addr,
    /// The peer's link-local address.
    pub ipv6: Ipv6Addr,
}

impl Network {
    /// The network of the `index`-th netdev: 10.0.2.0/24, 10.0.3.0/24 and so on.
    pub fn numbered(index: usize) -> Self {
        let [high, low] = (index as u16).wrapping_add(2).to_be_bytes();
        Self {
            mac: [0x52, 0x55, 10, high, low, 2],
            ipv4: Ipv4Addr::new(10, high, low, 2),
            ipv6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
        }
    }
}

/// Frames from the guest that the stack has not seen yet, and buffers to use again.
#[derive(Default)]
struct Inbox {
    waiting: VecDeque<Vec<u8>>,
    /// What `waiting` takes, at most [`MAX_WAITING`].
    bytes: usize,
    spare: Vec<Vec<u8>>,
}

/// The built-in host.
pub struct Peer {
    network: Network,
    mtu: u16,
    clock: Arc<dyn Clock>,
    /// Held only to put or take a frame.
    inbox: Mutex<Inbox>,
    /// Held while polling; taken before `inbox`.
    stack: Mutex<Stack>,
    kick: OnceLock<Kick>,
}

impl Peer {
    /// A host on `network` for IP packets of at most `mtu` bytes (at least 1280, IPv6's minimum).
    pub fn new(network: Network, mtu: u16, clock: Arc<dyn Clock>) -> Self {
        let stack = Mutex::new(Stack::new(network, mtu, clock.now_ns()));
        Self { network, mtu, clock, inbox: Mutex::default(), stack, kick: OnceLock::new() }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Port for Peer {
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        if frame.len > usize::from(self.mtu) + FRAME_OVERHEAD {
            return Err(PortDropped);
        }
        let mut inbox = self.inbox();
        let bytes = inbox.bytes + frame.len + FRAME_COST;
        if bytes > MAX_WAITING {
            return Err(PortDropped);
        }
        inbox.bytes = bytes;
        let mut buffer = inbox.spare.pop().unwrap_or_default();
        gather(frame, &mut buffer);
        inbox.waiting.push_back(buffer);
        Ok(())
    }

    fn flush(&self) {
        if let Some(kick) = self.kick.get() {
            kick();
        }
    }
}

impl Cable for Peer {
    fn on_ready(&self, kick: Kick) {
        // The first owner stays: there is only one.
        let _ = self.kick.set(kick);
    }

    fn poll(&self, _budget: usize, deliver: Deliver<'_>) -> Polled {
        let mut stack = self.stack.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let inbox = &mut *self.inbox();
            stack.take_used(&mut inbox.spare);
            if stack.has_no_input() {
                stack.give(std::mem::take(&mut inbox.waiting));
                inbox.bytes = 0;
            }
        }
        let now_ns = self.clock.now_ns();
        // A stack that has panicked is never looked at again, so nothing of it need be whole.
        let polled = catch_unwind(AssertUnwindSafe(|| stack.poll(now_ns)));
        let Ok(polled) = polled else {
            log::error!("the peer at {} choked on a frame and starts anew", self.network.ipv4);
            *stack = Stack::new(self.network, self.mtu, now_ns);
            return Polled { more: true, deadline: None };
        };
        stack.deliver(deliver);
        polled
    }
}

#[cfg(test)]
mod tests;
