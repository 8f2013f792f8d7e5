//! The cables of a machine, by what their netdevs say.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use mana_device::doors::Clock;

use super::inbox::Inbox;
use super::switch::Switch;
use super::uplink::Uplink;
use super::{Cable, Loopback, Null, Pcap, Peer, Stream, SwitchPort, Tap, peer};
use crate::config::{Netdev, NetdevKind};

/// Opens cables, and remembers what several of them share.
pub struct Exchange {
    clock: Arc<dyn Clock>,
    shared: Mutex<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Inboxes of the ends of loopbacks, by netdev id, each made by whichever end is opened first.
    loopbacks: HashMap<String, Arc<Inbox>>,
    /// By name.
    switches: HashMap<String, Arc<Switch>>,
}

impl Exchange {
    /// No cable is open yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, shared: Mutex::default() }
    }

    /// Open what `netdev` describes, the `index`-th of the machine (it numbers the peers' networks), for IP packets
    /// of at most `mtu` bytes.
    ///
    /// # Errors
    /// One sentence that names the option, what is wrong and what would help.
    pub fn open(&self, netdev: &Netdev, index: usize, mtu: u16) -> anyhow::Result<Arc<dyn Cable>> {
        let clock = || Arc::clone(&self.clock);
        let cable: Arc<dyn Cable> = match &netdev.kind {
            NetdevKind::Peer => Arc::new(Peer::new(peer::Network::numbered(index), mtu, clock())),
            NetdevKind::Tap { ifname } => Arc::new(Tap::open(ifname, mtu)?),
            NetdevKind::Stream { path, server } => {
                Arc::new(Stream::open(&netdev.id, path, *server, mtu, &self.clock)?)
            }
            NetdevKind::Loopback { peer } => Arc::new(self.loopback(&netdev.id, peer, mtu)),
            NetdevKind::Switch { name, path: None } => Arc::new(SwitchPort::new(self.switch(name).0, mtu)),
            NetdevKind::Switch { path: Some(path), .. } => Arc::new(self.spanning_switch(path, mtu)?),
            NetdevKind::Null => Arc::new(Null),
        };
        Ok(match &netdev.pcap {
            Some(file) => Arc::new(Pcap::create(&netdev.id, file, cable, clock())?),
            None => cable,
        })
    }

    fn loopback(&self, id: &str, peer: &str, mtu: u16) -> Loopback {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut inbox = |id: &str| {
            let entry = shared.loopbacks.entry(id.to_owned());
            Arc::clone(entry.or_insert_with(|| Arc::new(Inbox::new())))
        };
        let (own, other) = (inbox(id), inbox(peer));
        own.limit(mtu);
        Loopback::new(own, other)
    }

    /// The switch of that name, and whether it is new.
    fn switch(&self, name: &str) -> (Arc<Switch>, bool) {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = false;
        let entry = shared.switches.entry(name.to_owned());
        let switch = entry.or_insert_with(|| {
            new = true;
            Arc::new(Switch::new())
        });
        (Arc::clone(switch), new)
    }

    fn spanning_switch(&self, path: &Path, mtu: u16) -> anyhow::Result<SwitchPort> {
        // No name has a slash in front: `--netdev` sees to that.
        let (switch, new) = self.switch(&format!("/{}", path.display()));
        let uplink = new.then(|| Uplink::open(path, switch.clone(), self.clock.clone())).transpose()?;
        Ok(SwitchPort::with_uplink(switch, mtu, uplink))
    }
}

#[cfg(test)]
mod tests {
    use mana_device::doors::TxFrame;

    use super::super::batch::tests::{checksums_hold, cut_at, partial_tcp4};
    use super::super::tests::{drain, with_frame};
    use super::*;
    use crate::clock::MonotonicClock;

    fn exchange() -> Exchange {
        Exchange::new(Arc::new(MonotonicClock::new()))
    }

    fn netdev(id: &str, kind: NetdevKind) -> Netdev {
        Netdev { id: id.into(), kind, pcap: None }
    }

    fn send(cable: &dyn Cable, bytes: &[u8]) {
        with_frame(bytes, |frame| cable.send(frame)).unwrap();
        cable.flush();
    }

    #[test]
    fn a_loopback_joins_two_ports_of_different_mtu() {
        let exchange = exchange();
        let end = |id: &str, peer: &str, mtu| {
            exchange.open(&netdev(id, NetdevKind::Loopback { peer: peer.into() }), 0, mtu).unwrap()
        };
        let (a, b) = (end("a", "b", 9000), end("b", "a", 1500));
        send(a.as_ref(), &[1; 1000]);
        send(a.as_ref(), &[2; 5000]);
        send(b.as_ref(), &[3; 60]);
        assert_eq!(drain(b.as_ref()), [vec![1; 1000]], "what is too long for the other end is dropped");
        assert_eq!(drain(a.as_ref()), [vec![3; 60]]);
    }

    #[test]
    fn super_frames_are_cut_for_who_takes_none() {
        let exchange = exchange();
        let port = |id: &str| {
            exchange.open(&netdev(id, NetdevKind::Switch { name: "s".into(), path: None }), 0, 1500).unwrap()
        };
        let (a, b, c) = (port("a"), port("b"), port("c"));
        c.accept(super::super::Accepts { checksum: true, tcp4: true, tcp6: true });
        let large = partial_tcp4(&[9; 20_000]);
        with_frame(&large, |frame| a.send(&TxFrame { offload: cut_at(1400), ..*frame })).unwrap();
        a.flush();
        let cut = drain(b.as_ref());
        assert!(cut.len() == 15 && cut.iter().all(|frame| checksums_hold(frame)));
        assert_eq!(drain(c.as_ref()), [large]);
    }

    #[test]
    fn switches_of_different_names_are_apart() {
        let exchange = exchange();
        let port = |id: &str, name: &str| {
            exchange.open(&netdev(id, NetdevKind::Switch { name: name.into(), path: None }), 0, 1500).unwrap()
        };
        let (a, b, other) = (port("a", "s"), port("b", "s"), port("c", "t"));
        send(a.as_ref(), &[0xff; 60]);
        assert_eq!((drain(b.as_ref()).len(), drain(other.as_ref()).len()), (1, 0));
    }
}
