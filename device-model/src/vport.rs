//! A vPort: the card's end of one cable, with a MAC address, a transmit binding and receive steering.

pub mod state;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::config::TxPolicy;
use crate::counters::VportCounters;
use crate::doors::{Port, PortCapabilities};
use crate::packet::ETHERNET_HEADER;
use crate::rx::{Receive, RxConfigError, RxUpdate};
use crate::shaper::Shaper;

/// What the data path knows of a vPort.
pub struct Vport {
    /// MAC address in transmission order.
    pub mac: [u8; 6],
    /// The cable.
    pub port: Arc<dyn Port>,
    /// What the cable does itself.
    pub capabilities: PortCapabilities,
    /// Bytes of the longest frame without VLAN tag.
    pub max_frame: usize,
    /// Traffic and drops.
    pub counters: VportCounters,
    /// The receive side.
    pub receive: Receive,
    /// The bandwidth clamp of the transmit side.
    pub shaper: Shaper,
    tx_offset: AtomicU32,
    tx_policy: AtomicU8,
}

/// The transmit side has not been configured.
const NO_OFFSET: u32 = u32::MAX;

impl Vport {
    /// A vPort at `port` whose largest IP packet has `mtu` bytes; both directions are off.
    pub fn new(mac: [u8; 6], port: Arc<dyn Port>, mtu: u16) -> Self {
        Self {
            mac,
            capabilities: port.capabilities(),
            port,
            max_frame: usize::from(mtu) + ETHERNET_HEADER,
            counters: VportCounters::default(),
            receive: Receive::default(),
            shaper: Shaper::default(),
            tx_policy: AtomicU8::new(0),
            tx_offset: AtomicU32::new(NO_OFFSET),
        }
    }
    /// MANA_CONFIG_VPORT_TX: send from now on, when the OOB carries `offset` (`tx_vport_offset` of the response);
    /// `None` ends it.
    pub fn configure_tx(&self, offset: Option<u16>) {
        self.tx_offset.store(offset.map_or(NO_OFFSET, u32::from), Ordering::Release);
    }
    /// The offset that the OOB must carry; `None` while the transmit side is not configured.
    pub fn tx_offset(&self) -> Option<u16> {
        u16::try_from(self.tx_offset.load(Ordering::Acquire)).ok()
    }
    /// What may be sent from now on.
    pub fn set_tx_policy(&self, policy: TxPolicy) {
        let TxPolicy { disabled, own_source_only, ip_only, untagged_only } = policy;
        let bits = [disabled, own_source_only, ip_only, untagged_only];
        let bits = bits.into_iter().rev().fold(0, |bits, bit| bits << 1 | u8::from(bit));
        self.tx_policy.store(bits, Ordering::Release);
    }
    /// What may be sent; `None` if everything.
    #[inline]
    pub fn tx_policy(&self) -> Option<TxPolicy> {
        match self.tx_policy.load(Ordering::Acquire) {
            0 => None,
            bits => Some(TxPolicy {
                disabled: bits & 1 != 0,
                own_source_only: bits & 2 != 0,
                ip_only: bits & 4 != 0,
                untagged_only: bits & 8 != 0,
            }),
        }
    }
    /// MANA_CONFIG_VPORT_RX. When this returns no frame is delivered by the old configuration.
    ///
    /// # Errors
    /// [`RxConfigError`] if that configuration can't be; nothing has changed then.
    pub fn configure_rx(&self, update: &RxUpdate) -> Result<(), RxConfigError> {
        self.receive.configure(update)
    }
    /// Both directions off and not clamped, as at the start. What the host allows stays.
    pub fn reset(&self) {
        self.configure_tx(None);
        self.shaper.set(None);
        self.receive.reset();
    }
}

/// Frames and bytes by destination, gathered over a batch so that the shared counters are touched once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    classes: [(u64, u64); 3],
}

impl Traffic {
    /// One frame of `len` bytes to `destination`, its first six bytes.
    #[inline]
    pub fn count(&mut self, destination: [u8; 6], len: usize) {
        let class = if destination[0] & 1 == 0 {
            0
        } else if destination == [0xff; 6] {
            2
        } else {
            1
        };
        let (frames, bytes) = &mut self.classes[class];
        *frames += 1;
        *bytes += len as u64;
    }
    /// Bytes of all frames.
    pub fn bytes(&self) -> u64 {
        self.classes.iter().map(|&(_, bytes)| bytes).sum()
    }
    /// Add what was gathered to the transmit counters.
    pub fn add_sent(&self, to: &VportCounters) {
        let [unicast, multicast, broadcast] = self.classes;
        for (counter, n) in [
            (&to.tx_bytes, unicast.1 + multicast.1 + broadcast.1),
            (&to.tx_ucast_pkts, unicast.0),
            (&to.tx_ucast_bytes, unicast.1),
            (&to.tx_mcast_pkts, multicast.0),
            (&to.tx_mcast_bytes, multicast.1),
            (&to.tx_bcast_pkts, broadcast.0),
            (&to.tx_bcast_bytes, broadcast.1),
        ] {
            add(counter, n);
        }
    }
    /// Add what was gathered to the receive counters.
    pub fn add_received(&self, to: &VportCounters) {
        let [unicast, multicast, broadcast] = self.classes;
        for (counter, n) in [
            (&to.rx_bytes, unicast.1 + multicast.1 + broadcast.1),
            (&to.rx_ucast_pkts, unicast.0),
            (&to.rx_ucast_bytes, unicast.1),
            (&to.rx_mcast_pkts, multicast.0),
            (&to.rx_mcast_bytes, multicast.1),
            (&to.rx_bcast_pkts, broadcast.0),
            (&to.rx_bcast_bytes, broadcast.1),
        ] {
            add(counter, n);
        }
    }
}

fn add(counter: &crate::counters::Counter, n: u64) {
    if n != 0 {
        counter.add(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_goes_to_its_class() {
        let counters = VportCounters::default();
        let mut traffic = Traffic::default();
        traffic.count([2, 0, 0, 0, 0, 1], 60);
        traffic.count([0x33, 0x33, 0, 0, 0, 1], 70);
        traffic.count([0xff; 6], 80);
        traffic.count([0xff, 0xff, 0xff, 0xff, 0xff, 0xfe], 90);
        traffic.add_sent(&counters);
        traffic.add_received(&counters);
        for (name, value) in counters.fields().0 {
            let expected = match name.split_once('_').unwrap().1 {
                "bytes" => 300,
                "ucast_pkts" | "bcast_pkts" => 1,
                "mcast_pkts" => 2,
                "ucast_bytes" => 60,
                "mcast_bytes" => 160,
                "bcast_bytes" => 80,
                _ => 0,
            };
            assert_eq!(value, expected, "{name}");
        }
    }
}
