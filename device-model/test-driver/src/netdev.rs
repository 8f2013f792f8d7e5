//! A port: its queues, and the commands that open and close it (sections 13.2 to 13.4 of the interface).

use std::collections::VecDeque;

use crate::driver::{Driver, EQ_BYTES};
use crate::error::Result;
use crate::generation::EqScope;
use crate::mana::{RxSteering, VportInfo, WqSpec};
use crate::memory::{Dma, RingMemory};
use crate::queues::{CompletionQueue, WorkQueue, WqKind};

/// Bytes of a send queue.
const SQ_BYTES: u32 = 8192;
/// Bytes of a send queue's CQ.
const TX_CQ_BYTES: u32 = 16384;
/// How long a fence's completion may take.
const FENCE_TIMEOUT_NS: u64 = 10_000_000_000;
/// How long sent packets may take to complete when the port goes down.
const DRAIN_TIMEOUT_NS: u64 = 120_000_000_000;
/// `wq_type` of a send queue.
pub const WQ_TYPE_SQ: u32 = 1;
/// `wq_type` of a receive queue.
pub const WQ_TYPE_RQ: u32 = 2;

/// The key that Windows documentation uses for its RSS examples.
pub const RSS_KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// A packet that was posted and is not completed.
#[derive(Debug)]
pub(crate) struct Pending {
    pub units: u32,
    pub suppressed: bool,
    pub buffers: Vec<Dma>,
}

/// A send queue with its completion queue.
pub struct TxRing {
    /// The work queue.
    pub wq: WorkQueue,
    /// Id of the completion queue.
    pub cq: u32,
    /// Handle of the WQ object.
    pub object: u64,
    /// Types of the completions that came, in order.
    pub completions: Vec<u8>,
    pub(crate) pending: VecDeque<Pending>,
}

/// A receive queue with its completion queue and its buffers.
pub struct RxRing {
    /// The work queue.
    pub wq: WorkQueue,
    /// Id of the completion queue.
    pub cq: u32,
    /// Handle of the WQ object.
    pub object: u64,
    /// Bytes of a buffer: MTU and Ethernet header.
    pub buffer_len: u32,
    /// Fences that completed.
    pub fences: u32,
    pub(crate) buffers: Dma,
    /// Buffers posted and buffers completed since the queue was made.
    pub(crate) posted: u32,
    pub(crate) completed: u32,
}

/// A frame as the driver hands it to the stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Receive queue.
    pub queue: usize,
    /// The frame.
    pub bytes: Vec<u8>,
    /// RSS hash.
    pub hash: u32,
    /// Hash type bits; 0 without a hash.
    pub hash_type: u16,
    /// VLAN id of the stripped tag.
    pub vlan: Option<u16>,
    /// IP header checksum found right.
    pub ip_ok: bool,
    /// TCP checksum found right.
    pub tcp_ok: bool,
    /// UDP checksum found right.
    pub udp_ok: bool,
    /// A checksum found wrong.
    pub csum_failed: bool,
}

/// A port.
pub struct Netdev {
    /// vPort index.
    pub index: u32,
    /// What MANA_QUERY_VPORT_CONFIG said.
    pub info: VportInfo,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Open.
    pub up: bool,
    /// Queue pairs to open; `None` for the generation's default.
    pub queues: Option<u32>,
    /// WQEs of a receive queue.
    pub rx_entries: u32,
    /// Bytes of a receive queue's CQ.
    pub rx_cq_bytes: u32,
    /// `tx_vport_offset`.
    pub vport_offset: u16,
    /// Indirection table: entry → queue.
    pub table: Vec<usize>,
    /// Toeplitz key.
    pub key: [u8; 40],
    /// Ask for receive completions of up to four packets.
    pub coalescing: bool,
    /// Ask for receive completions of up to eight packets.
    pub coalescing8: bool,
    /// Moderation to ask for: completions, microseconds.
    pub moderation: (u16, u16),
    /// Moderation that the device granted to the last queue: completions, microseconds.
    pub granted: Option<(u16, u16)>,
    /// Send side.
    pub tx: Vec<TxRing>,
    /// Receive side.
    pub rx: Vec<RxRing>,
    /// Frames received.
    pub received: VecDeque<Received>,
    /// Truncated frames.
    pub truncated: u64,
    /// Receive completions that brought packets.
    pub rx_completions: u64,
    pub(crate) eqs: Vec<usize>,
}

impl Driver<'_> {
    /// `mana_probe_port`.
    pub(crate) fn attach(&mut self, index: u32) -> Result<()> {
        let info = self.query_vport_config(index)?;
        self.netdevs.push(Netdev {
            index,
            info,
            mtu: 1500.min(u32::from(self.config.adapter_mtu) - 14),
            up: false,
            queues: None,
            rx_entries: self.generation.rx_entries,
            rx_cq_bytes: self.generation.rx_cq_bytes,
            vport_offset: 0,
            table: Vec::new(),
            key: RSS_KEY,
            coalescing: false,
            coalescing8: false,
            moderation: (0, 0),
            granted: None,
            tx: Vec::new(),
            rx: Vec::new(),
            received: VecDeque::new(),
            truncated: 0,
            rx_completions: 0,
            eqs: Vec::new(),
        });
        Ok(())
    }

    /// Queue pairs that `port` opens, and whether its event queues share vectors with other ports'.
    pub fn queue_count(&self, port: usize) -> (u32, bool) {
        let netdev = &self.netdevs[port];
        let ports = u32::try_from(self.netdevs.len()).expect("few ports");
        let (budget, shared) = self.generation.queue_budget(self.max_queues, self.usable, ports);
        let wanted = netdev.queues.unwrap_or(budget.min(self.generation.default_queues));
        (wanted.min(budget).min(netdev.info.max_sq).min(netdev.info.max_rq), shared)
    }

    /// `ip link set up`: `mana_alloc_queues`.
    ///
    /// # Errors
    /// The first failure, with everything left as it is: Linux would undo it, a test has seen enough.
    ///
    /// # Panics
    /// The port is up.
    pub fn ifup(&mut self, port: usize) -> Result<()> {
        assert!(!self.netdevs[port].up, "port {port} is up");
        let (queues, shared) = self.queue_count(port);
        let vport = self.netdevs[port].info.handle;
        self.netdevs[port].vport_offset = self.config_vport_tx(vport, self.registration)?;
        if self.generation.eq_scope == EqScope::Port {
            for i in 0..queues {
                let vector = self.eq_vector(i, shared).expect("a queue has a vector");
                let key = self.create_eq(self.mana_device, self.registration, EQ_BYTES, vector)?;
                self.netdevs[port].eqs.push(key);
            }
        }
        (0..queues).try_for_each(|i| self.create_tx(port, i as usize))?;
        (0..queues).try_for_each(|i| self.create_rx(port, i as usize))?;
        let entries = self.netdevs[port].info.indirection as usize;
        self.netdevs[port].table = (0..entries).map(|entry| entry % queues as usize).collect();
        self.steer(port)?;
        self.netdevs[port].up = true;
        Ok(())
    }

    /// Program the port's key and table, then fence: what ifup and `ethtool -X` do.
    ///
    /// # Errors
    /// Those of the commands; a fence that does not complete.
    pub fn steer(&mut self, port: usize) -> Result<()> {
        let netdev = &self.netdevs[port];
        let steering = RxSteering {
            enable: 1,
            rss: u32::from(netdev.rx.len() > 1),
            default_object: Some(netdev.rx[0].object),
            key: Some(netdev.key),
            table: Some(netdev.table.iter().map(|&queue| netdev.rx[queue].object).collect()),
            coalescing: netdev.coalescing,
            coalescing8: netdev.coalescing8,
        };
        let (vport, entries) = (netdev.info.handle, netdev.info.indirection);
        self.config_vport_rx(vport, entries, &steering)?;
        self.fence_all(port)
    }

    /// `ip link set down`: `mana_dealloc_queues`. Nothing to do for a port that is down.
    ///
    /// # Errors
    /// The first failure; the rest is still done.
    pub fn ifdown(&mut self, port: usize) -> Result<()> {
        if !std::mem::take(&mut self.netdevs[port].up) {
            return Ok(());
        }
        let mut first = self.wait(DRAIN_TIMEOUT_NS, "sent packets", |driver| {
            driver.netdevs[port].tx.iter().all(|ring| ring.pending.is_empty())
        });
        let (vport, entries) = (self.netdevs[port].info.handle, self.netdevs[port].info.indirection);
        first = first.and(self.config_vport_rx(vport, entries, &RxSteering::default()));
        first = first.and(self.fence_all(port));
        for ring in std::mem::take(&mut self.netdevs[port].rx) {
            first = first.and(self.destroy_wq_obj(WQ_TYPE_RQ, ring.object));
            self.release(ring.wq, ring.cq, vec![ring.buffers]);
        }
        for ring in std::mem::take(&mut self.netdevs[port].tx) {
            first = first.and(self.destroy_wq_obj(WQ_TYPE_SQ, ring.object));
            let buffers = ring.pending.into_iter().flat_map(|pending| pending.buffers).collect();
            self.release(ring.wq, ring.cq, buffers);
        }
        for key in std::mem::take(&mut self.netdevs[port].eqs) {
            first = first.and(self.destroy_eq(self.mana_device, key));
        }
        first
    }

    /// `mana_fence_rqs`.
    ///
    /// # Errors
    /// Those of the command; `-ETIMEDOUT` if a fence does not complete in 10 s.
    pub fn fence_all(&mut self, port: usize) -> Result<()> {
        (0..self.netdevs[port].rx.len()).try_for_each(|queue| self.fence(port, queue))
    }

    /// `mana_fence_rq`.
    ///
    /// # Errors
    /// As [`fence_all`](Self::fence_all).
    pub fn fence(&mut self, port: usize, queue: usize) -> Result<()> {
        let (object, before) = (self.netdevs[port].rx[queue].object, self.netdevs[port].rx[queue].fences);
        self.fence_rq(object)?;
        let what = format!("fence of receive queue {queue}");
        self.wait(FENCE_TIMEOUT_NS, &what, |driver| driver.netdevs[port].rx[queue].fences > before)
    }

    fn create_tx(&mut self, port: usize, queue: usize) -> Result<()> {
        let (wq, cq, object) = self.create_pair(port, queue, WqKind::Sq, SQ_BYTES, TX_CQ_BYTES)?;
        self.cqs[&cq].doorbell(self.world, true);
        let ring = TxRing { wq, cq, object, completions: Vec::new(), pending: VecDeque::new() };
        self.netdevs[port].tx.push(ring);
        Ok(())
    }

    fn create_rx(&mut self, port: usize, queue: usize) -> Result<()> {
        let netdev = &self.netdevs[port];
        let (entries, cq_bytes, buffer_len) = (netdev.rx_entries, netdev.rx_cq_bytes, netdev.mtu + 14);
        let (wq, cq, object) = self.create_pair(port, queue, WqKind::Rq, entries * 32, cq_bytes)?;
        let stride = u64::from(buffer_len).next_power_of_two();
        let buffers = self.world.memory.alloc(stride * u64::from(entries));
        let mut ring = RxRing { wq, cq, object, buffer_len, fences: 0, buffers, posted: 0, completed: 0 };
        for _ in 0..entries {
            ring.post_one(&self.world.memory, self.registration.gpa_mkey, self.checks_buffers);
            ring.wq.doorbell(self.world);
        }
        self.cqs[&cq].doorbell(self.world, true);
        self.netdevs[port].rx.push(ring);
        Ok(())
    }

    /// A work queue with its completion queue: two regions and MANA_CREATE_WQ_OBJ.
    fn create_pair(
        &mut self,
        port: usize,
        queue: usize,
        kind: WqKind,
        wq_bytes: u32,
        cq_bytes: u32,
    ) -> Result<(WorkQueue, u32, u64)> {
        let wq_ring = RingMemory::new(self.ring_memory(u64::from(wq_bytes)), wq_bytes);
        let cq_ring = RingMemory::new(self.ring_memory(u64::from(cq_bytes)), cq_bytes);
        let wq_region = self.create_dma_region(wq_ring.dma())?;
        let cq_region = self.create_dma_region(cq_ring.dma())?;
        assert_ne!(wq_region, cq_region, "two regions have one handle");
        let eqs = if self.device_eqs.is_empty() { &self.netdevs[port].eqs } else { &self.device_eqs };
        let spec = WqSpec {
            kind: if kind == WqKind::Sq { WQ_TYPE_SQ } else { WQ_TYPE_RQ },
            wq_region,
            cq_region,
            wq_bytes,
            cq_bytes,
            eq: self.eq_id(eqs[queue % eqs.len()]),
            moderation: self.netdevs[port].moderation,
        };
        let object = self.create_wq_obj(self.netdevs[port].info.handle, &spec)?;
        self.netdevs[port].granted = object.moderation;
        let page = self.doorbell_page(self.registration.db_id);
        self.cqs.insert(object.cq, CompletionQueue::new(object.cq, cq_ring, page));
        Ok((WorkQueue::new(kind, object.wq, wq_ring, page), object.cq, object.handle))
    }

    fn release(&mut self, wq: WorkQueue, cq: u32, buffers: Vec<Dma>) {
        self.scheduled.retain(|&other| other != cq);
        let cq = self.cqs.remove(&cq).expect("a ring has its CQ");
        for dma in [wq.into_ring().into_dma(), cq.into_ring().into_dma()].into_iter().chain(buffers) {
            self.world.memory.free(dma);
        }
    }
}
