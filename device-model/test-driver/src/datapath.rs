//! Packets: the OOB of a send, its completion, receive completions, and the polls (NAPI) that take both.

use crate::driver::Driver;
use crate::memory::GuestMemory;
use crate::netdev::{Pending, Received, RxRing};
use crate::queues::{CompletionQueue, Cqe, EventQueue, Sge, Wqe};

/// Completions that one poll of a send queue takes.
const TX_BUDGET: usize = 64;
/// Completions that one poll of a receive queue takes.
const RX_BUDGET: usize = 512;
/// A receive buffer before the device writes to it.
const FILL: u8 = 0xcc;

/// A packet to send, and what the device is to do with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transmit {
    /// The frame in as many pieces as there are to be SGEs.
    pub pieces: Vec<Vec<u8>>,
    /// It is IPv4.
    pub ipv4: bool,
    /// It is IPv6.
    pub ipv6: bool,
    /// `comp_iphdr_csum`.
    pub ip_csum: bool,
    /// `comp_tcp_csum`.
    pub tcp_csum: bool,
    /// `comp_udp_csum`.
    pub udp_csum: bool,
    /// `trans_off`.
    pub transport_offset: u16,
    /// VLAN TCI to insert.
    pub vlan: Option<u16>,
    /// Cut into TCP segments of this many payload bytes.
    pub mss: Option<u16>,
    /// `suppress_txcqe`.
    pub suppress: bool,
}

impl Transmit {
    /// A frame that is to go out as it is.
    pub fn plain(frame: &[u8]) -> Self {
        Self { pieces: vec![frame.to_vec()], ..Self::default() }
    }

    /// The inline OOB: short, or long with a VLAN tag or a vPort offset above 255.
    pub fn oob(&self, cq: u32, sq: u32, vport_offset: u16) -> Vec<u8> {
        let long = self.vlan.is_some() || vport_offset > 255;
        let short_offset = if vport_offset > 255 { 0 } else { u32::from(vport_offset) };
        let flags = [self.ipv4, self.ipv6, self.ip_csum, self.tcp_csum, self.udp_csum, self.suppress];
        let flags = flags.iter().zip(2..).fold(0, |word, (&flag, bit)| word | u32::from(flag) << bit);
        let first = u32::from(long) | flags | cq << 8;
        let second =
            u32::from(self.transport_offset & 0x3ff) | (sq >> 10 & 0x3fff) << 10 | short_offset << 24;
        let mut oob = [first.to_le_bytes(), second.to_le_bytes()].concat();
        if long {
            let tci = u32::from(self.vlan.unwrap_or(0));
            let tag = u32::from(self.vlan.is_some()) << 3
                | (tci >> 13) << 16
                | (tci >> 12 & 1) << 19
                | (tci & 0xfff) << 20;
            let offset = if vport_offset > 255 { u32::from(vport_offset) << 16 } else { 0 };
            oob.extend([tag, offset, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
        }
        oob
    }
}

impl RxRing {
    fn stride(&self) -> u64 {
        u64::from(self.buffer_len).next_power_of_two()
    }

    fn buffer(&self, index: u32) -> u64 {
        self.buffers.at(u64::from(index % self.wq.units()) * self.stride())
    }

    /// Post the next buffer, without ringing; false if the ring is full.
    pub(crate) fn post_one(&mut self, memory: &GuestMemory, key: u32, fill: bool) -> bool {
        let address = self.buffer(self.posted);
        let sge = Sge { address, key, size: self.buffer_len };
        if self.wq.post(memory, &Wqe { oob: vec![0xa5; 8], sgl: vec![sge], ..Wqe::default() }).is_none() {
            return false;
        }
        if fill {
            memory.write(address, &vec![FILL; usize::try_from(self.stride()).expect("a buffer is small")]);
        }
        self.posted = self.posted.wrapping_add(1);
        true
    }

    /// The next completed buffer: its first `len` bytes.
    fn take(&mut self, memory: &GuestMemory, len: u32, check: bool) -> Vec<u8> {
        assert!(len <= self.buffer_len, "a packet of {len} bytes in a buffer of {}", self.buffer_len);
        let address = self.buffer(self.completed);
        let mut bytes = vec![0; len as usize];
        memory.read(address, &mut bytes);
        if check {
            let mut rest = vec![0; usize::try_from(self.stride()).expect("small") - len as usize];
            memory.read(address + u64::from(len), &mut rest);
            assert!(
                rest.iter().all(|&byte| byte == FILL),
                "the device wrote past the {len} bytes of the packet"
            );
        }
        self.skip();
        bytes
    }

    fn skip(&mut self) {
        self.completed = self.completed.wrapping_add(1);
        self.wq.complete(1);
    }
}

impl Driver<'_> {
    /// `mana_start_xmit`: post `packet` on queue `queue` and ring.
    ///
    /// # Panics
    /// The ring has no room: a test that fills it asks [`try_transmit`](Self::try_transmit).
    pub fn transmit(&mut self, port: usize, queue: usize, packet: &Transmit) {
        assert!(self.try_transmit(port, queue, packet), "send queue {queue} of port {port} is full");
    }

    /// As [`transmit`](Self::transmit); false if the ring has no room.
    pub fn try_transmit(&mut self, port: usize, queue: usize, packet: &Transmit) -> bool {
        let posted = self.post(port, queue, packet);
        self.netdevs[port].tx[queue].wq.doorbell(self.world);
        posted
    }

    /// Write `packet`'s WQE without ringing; false if the ring has no room.
    pub fn post(&mut self, port: usize, queue: usize, packet: &Transmit) -> bool {
        let memory = &self.world.memory;
        let buffers: Vec<_> = packet.pieces.iter().map(|piece| memory.alloc(piece.len() as u64)).collect();
        let key = self.registration.gpa_mkey;
        let sge = |(buffer, piece): (&crate::memory::Dma, &Vec<u8>)| {
            memory.write(buffer.address(), piece);
            Sge {
                address: buffer.address(),
                key,
                size: u32::try_from(piece.len()).expect("a piece is short"),
            }
        };
        let sgl = buffers.iter().zip(&packet.pieces).map(sge).collect();
        let posted = self.post_sgl(port, queue, packet, sgl);
        match posted {
            true => self.last_pending(port, queue).buffers = buffers,
            false => buffers.into_iter().for_each(|buffer| memory.free(buffer)),
        }
        posted
    }

    /// As [`post`](Self::post), with memory that the caller keeps.
    pub fn post_sgl(&mut self, port: usize, queue: usize, packet: &Transmit, sgl: Vec<Sge>) -> bool {
        let vport_offset = self.netdevs[port].vport_offset;
        let ring = &mut self.netdevs[port].tx[queue];
        let head = sgl.first().map_or(0, |sge| sge.size);
        let wqe = Wqe {
            oob: packet.oob(ring.cq, ring.wq.id, vport_offset),
            sgl,
            last_vbytes: packet.mss.map_or(0, |_| head.to_le_bytes()[0]),
            client_oob_in_sgl: packet.mss.is_some(),
            client_data_unit: packet.mss.unwrap_or(0),
        };
        let Some((_, units)) = ring.wq.post(&self.world.memory, &wqe) else { return false };
        ring.pending.push_back(Pending { units, suppressed: packet.suppress, buffers: Vec::new() });
        true
    }

    fn last_pending(&mut self, port: usize, queue: usize) -> &mut Pending {
        self.netdevs[port].tx[queue].pending.back_mut().expect("just posted")
    }

    /// Completion queue `cq`.
    ///
    /// # Panics
    /// The driver has none with that id.
    pub fn completion_queue(&self, cq: u32) -> &CompletionQueue {
        &self.cqs[&cq]
    }

    /// The event queue that queue pair `queue` of `port` notifies.
    pub fn event_queue(&self, port: usize, queue: usize) -> &EventQueue {
        let eqs = if self.device_eqs.is_empty() { &self.netdevs[port].eqs } else { &self.device_eqs };
        &self.irqs.eq(eqs[queue % eqs.len()]).queue
    }

    /// Packets of a send queue that are not completed.
    pub fn in_flight(&self, port: usize, queue: usize) -> usize {
        self.netdevs[port].tx[queue].pending.len()
    }

    /// Frames that `port` received since the last call.
    pub fn take_received(&mut self, port: usize) -> Vec<Received> {
        self.netdevs[port].received.drain(..).collect()
    }

    pub(crate) fn schedule_napi(&mut self, cq: u32) {
        if !self.scheduled.contains(&cq) {
            self.scheduled.push_back(cq);
        }
    }

    pub(crate) fn napi_due(&self) -> bool {
        self.napi && !self.scheduled.is_empty()
    }

    /// Poll every scheduled completion queue until it is empty, then arm it.
    pub(crate) fn run_napi(&mut self) {
        while self.napi_due() {
            let cq = self.scheduled.pop_front().expect("due");
            let (port, queue, is_tx) = self.owner(cq);
            if is_tx { self.poll_tx(port, queue) } else { self.poll_rx(port, queue) }
        }
    }

    /// DIM: moderate completion queue `cq` from now on.
    ///
    /// # Panics
    /// The values don't fit the doorbell.
    pub fn moderate(&self, cq: u32, completions: u16, usec: u16) {
        assert!(completions <= 255 && usec <= 1023, "a doorbell has 8 and 10 bits");
        self.cqs[&cq].moderate(self.world, completions, usec);
    }

    fn owner(&self, cq: u32) -> (usize, usize, bool) {
        for (port, netdev) in self.netdevs.iter().enumerate() {
            if let Some(queue) = netdev.tx.iter().position(|ring| ring.cq == cq) {
                return (port, queue, true);
            }
            if let Some(queue) = netdev.rx.iter().position(|ring| ring.cq == cq) {
                return (port, queue, false);
            }
        }
        panic!("CQ {cq} belongs to no queue");
    }

    fn poll_tx(&mut self, port: usize, queue: usize) {
        let cq = self.netdevs[port].tx[queue].cq;
        loop {
            let mut taken = 0;
            while taken < TX_BUDGET {
                let Some(cqe) = self.poll_cq(cq) else { break };
                self.sent(port, queue, &cqe);
                taken += 1;
            }
            let arm = taken < TX_BUDGET;
            self.cqs[&cq].doorbell(self.world, arm);
            if arm {
                return;
            }
        }
    }

    fn sent(&mut self, port: usize, queue: usize, cqe: &Cqe) {
        let ring = &mut self.netdevs[port].tx[queue];
        assert_eq!(cqe.client(), 1, "WARN: client_type of a send completion");
        assert!(
            cqe.is_sq() && cqe.wq() == ring.wq.id,
            "WARN: a send completion names another queue: {cqe:x?}"
        );
        assert!((32..=42).contains(&cqe.kind()), "no send completion has type {}", cqe.kind());
        ring.completions.push(cqe.kind());
        loop {
            let done = ring.pending.pop_front().expect("a completion without a packet");
            ring.wq.complete(done.units);
            done.buffers.into_iter().for_each(|buffer| self.world.memory.free(buffer));
            if !done.suppressed {
                return;
            }
        }
    }

    fn poll_rx(&mut self, port: usize, queue: usize) {
        let cq = self.netdevs[port].rx[queue].cq;
        loop {
            let mut taken = 0;
            while taken < RX_BUDGET {
                let Some(cqe) = self.poll_cq(cq) else { break };
                self.received(port, queue, &cqe);
                taken += 1;
            }
            if taken == 0 {
                self.cqs[&cq].doorbell(self.world, true);
                return;
            }
            self.refill(port, queue);
            self.cqs[&cq].doorbell(self.world, false);
        }
    }

    /// Post every free buffer and ring once.
    pub fn refill(&mut self, port: usize, queue: usize) {
        let (key, fill) = (self.registration.gpa_mkey, self.checks_buffers);
        let ring = &mut self.netdevs[port].rx[queue];
        while ring.post_one(&self.world.memory, key, fill) {}
        ring.wq.doorbell(self.world);
    }

    fn received(&mut self, port: usize, queue: usize, cqe: &Cqe) {
        let netdev = &mut self.netdevs[port];
        let ring = &mut netdev.rx[queue];
        assert!(
            !cqe.is_sq() && cqe.wq() == ring.wq.id,
            "WARN: a receive completion names another queue: {cqe:x?}"
        );
        assert_eq!(cqe.client(), 1, "client_type of a receive completion");
        let pieces = match cqe.kind() {
            1 => {
                let unused =
                    (1..4).flat_map(|ppi| [8, 12, 16].map(|at| cqe.u32(12 * ppi + at))).any(|word| word != 0);
                assert!(!unused, "unused packet infos are zero");
                vec![(u32::from(cqe.u16(8)), cqe.u32(16))]
            }
            2 => four(cqe),
            7 => eight(cqe),
            3 => {
                ring.fences += 1;
                return;
            }
            4 => {
                ring.skip();
                netdev.truncated += 1;
                return;
            }
            other => panic!("a receive completion of type {other} leaks its buffer"),
        };
        let most = match (netdev.coalescing8, netdev.coalescing) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 1,
        };
        assert!(
            pieces.len() <= most,
            "{} packets in a completion, where {most} were asked for",
            pieces.len()
        );
        netdev.rx_completions += 1;
        for (len, hash) in pieces {
            assert_ne!(len, 0, "a packet of no bytes leaks its buffer");
            let bytes = ring.take(&self.world.memory, len, self.checks_buffers);
            netdev.received.push_back(describe(queue, bytes, hash, cqe.u32(4)));
        }
    }
}

/// Packets of a completion of type 2.
fn four(cqe: &Cqe) -> Vec<(u32, u32)> {
    let infos = (0..4).map(|i| (u32::from(cqe.u16(8 + 12 * i)), cqe.u32(16 + 12 * i)));
    infos.take_while(|&(len, _)| len != 0).collect()
}

/// Packets of a completion of type 7.
fn eight(cqe: &Cqe) -> Vec<(u32, u32)> {
    let infos = (0..4).flat_map(|i| {
        let at = 8 + 12 * i;
        [(u32::from(cqe.u16(at + 4)), cqe.u32(at)), (u32::from(cqe.u16(at + 6)), cqe.u32(at + 8))]
    });
    infos.take_while(|&(len, _)| len != 0).collect()
}

fn describe(queue: usize, bytes: Vec<u8>, hash: u32, flags: u32) -> Received {
    let bit = |bit: u32| flags >> bit & 1 == 1;
    assert!(!bit(31) && !bit(15), "reserved flags of a receive completion are set");
    Received {
        queue,
        bytes,
        hash,
        hash_type: u16::try_from(flags >> 16 & 0x1ff).expect("masked"),
        vlan: bit(12).then(|| u16::try_from(flags & 0xfff).expect("masked")),
        ip_ok: bit(25),
        tcp_ok: bit(27),
        udp_ok: bit(29),
        csum_failed: bit(26) || bit(28) || bit(30),
    }
}
