//! A learning Ethernet switch (`--netdev switch`): ports of one machine, or of several over a socket.
//!
//! It learns behind which port a source address is and sends there what is for that address; what is for several, or
//! for an address that nobody has sent from, goes to all other ports. Learned addresses don't age: an address that
//! moves is learned anew with its first frame.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mana_device::doors::{Port, PortCapabilities, PortDropped, TxFrame};

use super::inbox::Inbox;
use super::uplink::Uplink;
use super::{Accepts, Cable, Deliver, Kick, Polled};

/// Slots for addresses, a power of two.
const SLOTS: usize = 1024;
/// Slots that an address may be in.
const WAYS: usize = 4;
/// Bits of an address in a slot; the port's number is above them, plus 1, so that 0 is no entry.
const ADDRESS_BITS: u32 = 48;
const ADDRESS: u64 = (1 << ADDRESS_BITS) - 1;
/// Group bit of an address's first byte.
const GROUP: u64 = 1 << 40;

/// Which port an address is behind. Readers and writers take no lock: an entry is one word.
struct Addresses(Box<[AtomicU64]>);

impl Addresses {
    fn new() -> Self {
        Self((0..SLOTS).map(|_| AtomicU64::new(0)).collect())
    }

    fn slots(&self, address: u64) -> impl Iterator<Item = &AtomicU64> {
        // The golden ratio's bits mix well (Knuth, volume 3, 6.4).
        let hash = address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.trailing_zeros());
        (0..WAYS).map(move |way| &self.0[(hash as usize + way) % SLOTS])
    }

    /// The port's number.
    fn find(&self, address: u64) -> Option<u16> {
        let entries = self.slots(address).map(|slot| slot.load(Ordering::Relaxed));
        let entry = entries.into_iter().find(|entry| entry & ADDRESS == address && *entry > ADDRESS)?;
        u16::try_from((entry >> ADDRESS_BITS) - 1).ok()
    }

    /// `address` is behind `port`. Where all its slots are taken one is lost, which costs its owner a flood.
    fn learn(&self, address: u64, port: u16) {
        let entry = (u64::from(port) + 1) << ADDRESS_BITS | address;
        let mut free = None;
        for slot in self.slots(address) {
            let found = slot.load(Ordering::Relaxed);
            if found == entry {
                return;
            }
            if found & ADDRESS == address && found > ADDRESS {
                slot.store(entry, Ordering::Relaxed);
                return;
            }
            free = free.or((found == 0).then_some(slot));
        }
        if let Some(slot) = free.or_else(|| self.slots(address).next()) {
            slot.store(entry, Ordering::Relaxed);
        }
    }

    /// Nothing is behind `port` any more.
    fn forget(&self, port: u16) {
        for slot in &self.0 {
            let found = slot.load(Ordering::Relaxed);
            if found >> ADDRESS_BITS == u64::from(port) + 1 {
                let _ = slot.compare_exchange(found, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }
}

/// Something that takes frames from the switch.
pub trait Member: Send + Sync {
    /// Take one frame. Must not block.
    ///
    /// # Errors
    /// [`PortDropped`] when there is no room.
    fn take(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped>;
    /// The frames of a batch are all there.
    fn flush(&self);
}

impl Member for Inbox {
    fn take(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        self.put(frame)
    }
    fn flush(&self) {
        self.ring();
    }
}

type Members = Vec<Option<Arc<dyn Member>>>;

/// The switch.
pub struct Switch {
    addresses: Addresses,
    /// By port number. Replaced as a whole, so that the way of a frame takes no lock.
    members: ArcSwap<Members>,
    /// Held while `members` is made anew.
    changing: Mutex<()>,
}

impl Switch {
    /// A switch without members.
    pub fn new() -> Self {
        Self { addresses: Addresses::new(), members: ArcSwap::default(), changing: Mutex::default() }
    }

    /// Plug `member` in; the answer is its port's number.
    pub fn join(&self, member: Arc<dyn Member>) -> u16 {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = Members::clone(&self.members.load());
        let free = members.iter().position(Option::is_none).unwrap_or(members.len());
        if free == members.len() {
            members.push(None);
        }
        members[free] = Some(member);
        self.members.store(Arc::new(members));
        free as u16
    }

    /// Unplug the member at `port`.
    pub fn leave(&self, port: u16) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = Members::clone(&self.members.load());
        if let Some(member) = members.get_mut(usize::from(port)) {
            *member = None;
        }
        self.members.store(Arc::new(members));
        self.addresses.forget(port);
    }

    /// Send on what came from `port`.
    ///
    /// # Errors
    /// [`PortDropped`] if nobody took it although it was for somebody, or it is no frame.
    pub fn forward(&self, port: u16, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        let (destination, source) = addresses(frame).ok_or(PortDropped)?;
        // A group can't send, nor can nobody.
        if source & GROUP == 0 && source != 0 {
            self.addresses.learn(source, port);
        }
        let members = self.members.load();
        let known = if destination & GROUP == 0 { self.addresses.find(destination) } else { None };
        match known {
            Some(known) if known == port => Ok(()),
            Some(known) => match members.get(usize::from(known)) {
                Some(Some(member)) => member.take(frame),
                _ => Ok(()),
            },
            None => {
                let others = (0..).zip(members.iter()).filter(|&(number, _)| number != port);
                let (mut taken, mut dropped) = (false, false);
                for member in others.filter_map(|(_, member)| member.as_ref()) {
                    match member.take(frame) {
                        Ok(()) => taken = true,
                        Err(PortDropped) => dropped = true,
                    }
                }
                if dropped && !taken { Err(PortDropped) } else { Ok(()) }
            }
        }
    }

    /// A batch from `port` is over.
    pub fn flush(&self, port: u16) {
        let members = self.members.load();
        let others = (0..).zip(members.iter()).filter(|&(number, _)| number != port);
        others.filter_map(|(_, member)| member.as_ref()).for_each(|member| member.flush());
    }
}

/// Destination and source address as numbers; `None` for what is shorter than an Ethernet header.
fn addresses(frame: &TxFrame<'_>) -> Option<(u64, u64)> {
    let mut head = [0; 14];
    let mut rest = &mut head[..];
    for slice in frame.slices {
        let copied = slice.copy_to(rest);
        rest = &mut rest[copied..];
        if rest.is_empty() {
            break;
        }
    }
    if !rest.is_empty() {
        return None;
    }
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    Some((number(&head[..6]), number(&head[6..12])))
}

/// A port of the switch in this machine.
pub struct SwitchPort {
    switch: Arc<Switch>,
    port: u16,
    inbox: Arc<Inbox>,
    /// The switch's connections to other machines, if this port's poller has to see to them.
    uplink: Option<Uplink>,
    /// The switch has such connections: frames leave finished.
    spans_machines: bool,
}

impl SwitchPort {
    /// A new port for IP packets of at most `mtu` bytes.
    pub fn new(switch: Arc<Switch>, mtu: u16) -> Self {
        let inbox = Arc::new(Inbox::new());
        inbox.limit(mtu);
        let port = switch.join(inbox.clone());
        Self { switch, port, inbox, uplink: None, spans_machines: false }
    }

    /// The same on a switch that spans machines. The first port gets the `uplink`.
    pub fn with_uplink(switch: Arc<Switch>, mtu: u16, uplink: Option<Uplink>) -> Self {
        Self { uplink, spans_machines: true, ..Self::new(switch, mtu) }
    }
}

impl Port for SwitchPort {
    /// As with [`super::Loopback`], unless frames may leave the machine.
    fn capabilities(&self) -> PortCapabilities {
        PortCapabilities { checksum: !self.spans_machines, segmentation: !self.spans_machines }
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        self.switch.forward(self.port, frame)
    }
    fn flush(&self) {
        self.switch.flush(self.port);
    }
}

impl Cable for SwitchPort {
    fn readable(&self) -> Option<RawFd> {
        self.uplink.as_ref().map(Uplink::file)
    }
    fn on_ready(&self, kick: Kick) {
        self.inbox.on_ready(kick);
    }
    fn accept(&self, accepts: Accepts) {
        self.inbox.accept(accepts);
    }
    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let uplink = self.uplink.as_ref().map(|uplink| uplink.poll(budget)).unwrap_or_default();
        let own = self.inbox.poll(budget, deliver);
        Polled { more: own.more || uplink.more, deadline: uplink.deadline }
    }
    fn dropped(&self) -> u64 {
        self.inbox.dropped()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{drain, with_frame};
    use super::*;

    const BROADCAST: u8 = 0xff;

    /// Addresses are told apart by their last byte.
    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame = if to == BROADCAST { vec![BROADCAST; 6] } else { vec![2, 0, 0, 0, 0, to] };
        frame.extend([2, 0, 0, 0, 0, from, 8, 0]);
        frame.resize(60, 0);
        frame
    }

    fn ports(count: usize) -> Vec<SwitchPort> {
        let switch = Arc::new(Switch::new());
        (0..count).map(|_| SwitchPort::new(switch.clone(), 1500)).collect()
    }

    /// How many frames each port gets when port `from` sends one.
    fn send(ports: &[SwitchPort], from: usize, bytes: &[u8]) -> Vec<usize> {
        with_frame(bytes, |frame| ports[from].send(frame)).unwrap();
        ports[from].flush();
        ports.iter().map(|port| drain(port).len()).collect()
    }

    #[test]
    fn floods_what_it_does_not_know_and_learns() {
        let ports = ports(4);
        assert_eq!(send(&ports, 0, &frame(9, 1)), [0, 1, 1, 1]);
        assert_eq!(send(&ports, 2, &frame(1, 3)), [1, 0, 0, 0]);
        assert_eq!(send(&ports, 0, &frame(3, 1)), [0, 0, 1, 0]);
        assert_eq!(send(&ports, 0, &frame(BROADCAST, 1)), [0, 1, 1, 1]);
        assert_eq!(send(&ports, 2, &frame(3, 3)), [0, 0, 0, 0]);
    }

    #[test]
    fn an_address_may_move_and_a_port_may_go() {
        let ports = ports(3);
        send(&ports, 0, &frame(BROADCAST, 1));
        send(&ports, 1, &frame(BROADCAST, 1));
        assert_eq!(send(&ports, 2, &frame(1, 3)), [0, 1, 0]);
        ports[0].switch.leave(1);
        assert_eq!(send(&ports, 2, &frame(1, 3)), [1, 0, 0]);
        assert_eq!(ports[0].switch.join(Arc::new(Inbox::new())), 1);
    }

    #[test]
    fn what_is_no_frame_or_comes_from_a_group_teaches_nothing() {
        let ports = ports(2);
        assert!(with_frame(&[0; 13], |frame| ports[0].send(frame)).is_err());
        let mut from_group = frame(2, 1);
        from_group[6] = 3;
        send(&ports, 0, &from_group);
        let mut to_group = frame(1, 2);
        to_group[..6].copy_from_slice(&from_group[6..12]);
        assert_eq!(send(&ports, 1, &to_group), [1, 0]);
    }

    #[test]
    fn more_addresses_than_slots_only_cost_floods() {
        let addresses = Addresses::new();
        (1..5000).for_each(|address| addresses.learn(address, (address % 7) as u16));
        let known = (1..5000).filter_map(|address| Some((address, addresses.find(address)?)));
        let known: Vec<_> = known.collect();
        assert!(known.len() > SLOTS / 2, "{}", known.len());
        assert!(known.iter().all(|&(address, port)| u64::from(port) == address % 7));
        addresses.forget(3);
        assert!((1..5000).all(|address| addresses.find(address) != Some(3)));
    }
}
