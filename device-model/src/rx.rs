//! Receive: frames from the cable become bytes in receive WQEs' buffers, and completions.
//!
//! A batch of frames is sorted by queue first, so that each queue is filled and completed once. A vPort's receive
//! side, which has its rings, is held for as long as a batch takes: once steering has been changed or switched off, no
//! frame goes by what it was, and a ring that has been taken away is not touched.
//!
//! Source: `mana_process_rx_cqe` and `mana_cfg_vport_steering` (mana_en.c); the sheet's sections 7.5 and 8.4.

pub mod state;

use std::sync::{Mutex, MutexGuard};

use arrayvec::ArrayVec;

use crate::config::MAX_QUEUES_PER_VPORT;
use crate::count;
use crate::dma::{DmaError, GuestRam};
use crate::doors::{RxChecksum, RxFrame};
use crate::offload::verify;
use crate::packet::{ETHERNET_HEADER, Headers, MAC_ADDRESSES, VLAN_TAG};
use crate::queues::{Queues, Slot, WqObject};
use crate::region::RingView;
use crate::ring::{CompletionQueue, PostError, WqeError};
use crate::rules::Rule;
use crate::steer::{HASH_KEY_SIZE, Hash, HashTypes, Steering, Toeplitz};
use crate::sync::lock;
use crate::vport::{Traffic, Vport};
use crate::wire::queue::{Cqe, Sge};
use crate::wire::rx::{MAX_COALESCED, RxCompletion, RxMeta, RxType};

/// Frames that are sorted and delivered at once.
const BATCH: usize = 64;
/// Receive queues of a vPort.
const MAX_QUEUES: usize = MAX_QUEUES_PER_VPORT as usize;
/// Id of no receive queue.
const NO_QUEUE: u32 = u32::MAX;

/// Packets that one completion may announce.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coalescing {
    /// One.
    #[default]
    Off,
    /// Up to four (`cqe_coalescing_enable`).
    Four,
    /// Up to eight (`cqe8_coalescing_enable`, where QUERY_DEV_CONFIG offered it).
    Eight,
}

impl Coalescing {
    const fn packets(self) -> usize {
        match self {
            Self::Off => 1,
            Self::Four => 4,
            Self::Eight => MAX_COALESCED,
        }
    }
}

/// What MANA_CONFIG_VPORT_RX changes; `None` leaves a thing as it is. Queues are named by RQ id.
#[derive(Clone, Debug, Default)]
pub struct RxUpdate {
    /// Deliver at all.
    pub enable: Option<bool>,
    /// Spread by hash.
    pub rss: Option<bool>,
    /// Where packets go that are not hashed.
    pub default_rq: Option<u32>,
    /// Toeplitz key.
    pub key: Option<[u8; HASH_KEY_SIZE]>,
    /// Header fields to hash.
    pub hash_types: Option<HashTypes>,
    /// Queues by hash.
    pub table: Option<Vec<u32>>,
    /// Packets per completion.
    pub coalescing: Option<Coalescing>,
}

/// A configuration that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RxConfigError {
    /// The indirection table's size is not a power of two from 1 to 512.
    #[error("an indirection table of {0} entries")]
    TableSize(usize),
    /// More queues than a vPort can have.
    #[error("more than {MAX_QUEUES} receive queues")]
    TooManyQueues,
}

/// Most entries of an indirection table (`MANA_INDIRECT_TABLE_MAX_SIZE`).
pub const MAX_TABLE: usize = 512;

/// The receive side of a vPort.
#[derive(Default)]
pub struct Receive {
    state: Mutex<State>,
}

/// What the driver has configured. Steering names queues by their position in `queues`.
#[derive(Default)]
pub struct State {
    enabled: bool,
    coalescing: Coalescing,
    steering: Steering<u8>,
    queues: ArrayVec<Steered, MAX_QUEUES>,
    rings: Vec<WqObject>,
}

/// A queue that steering knows.
#[derive(Clone, Copy)]
struct Steered {
    id: u32,
    /// Its ring's index in [`State::rings`], if there is one.
    ring: Option<usize>,
}

impl State {
    /// The position of queue `id`, which is added if it is new.
    fn position(queues: &mut ArrayVec<Steered, MAX_QUEUES>, id: u32) -> Result<u8, RxConfigError> {
        let position = match queues.iter().position(|known| known.id == id) {
            Some(position) => position,
            None => {
                queues.try_push(Steered { id, ring: None }).map_err(|_| RxConfigError::TooManyQueues)?;
                queues.len() - 1
            }
        };
        Ok(position as u8)
    }
    /// Name queues as `update` does, and the ones that it leaves alone as before.
    fn set_queues(&mut self, update: &RxUpdate) -> Result<(), RxConfigError> {
        let old = &self.queues;
        let id = |position: &u8| old.get(usize::from(*position)).map_or(NO_QUEUE, |known| known.id);
        let default = update.default_rq.or_else(|| self.steering.default_queue.as_ref().map(id));
        let kept = || self.steering.indirection.iter().map(id).collect();
        let table = update.table.clone().unwrap_or_else(kept);
        let mut queues = ArrayVec::new();
        let default = default.map(|id| Self::position(&mut queues, id)).transpose()?;
        let indirection =
            table.iter().map(|&id| Self::position(&mut queues, id)).collect::<Result<_, _>>()?;
        self.steering.default_queue = default;
        self.steering.indirection = indirection;
        self.queues = queues;
        self.find_rings();
        Ok(())
    }
    /// Queues or rings have changed.
    fn find_rings(&mut self) {
        for queue in &mut self.queues {
            queue.ring = self.rings.iter().position(|wq| wq.id == queue.id);
        }
    }
}

impl Receive {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
    /// The vPort has the receive queue `wq` from now on.
    pub fn open(&self, wq: WqObject) {
        let mut state = self.lock();
        state.rings.push(wq);
        state.find_rings();
    }
    /// Queue `id` is gone: when this returns the card touches its ring no more. Should another get its id, no old
    /// configuration leads to it.
    pub fn close(&self, id: u32) {
        let mut state = self.lock();
        state.rings.retain(|wq| wq.id != id);
        state.queues.iter_mut().filter(|known| known.id == id).for_each(|known| known.id = NO_QUEUE);
        state.find_rings();
    }
    /// Do `work` with queue `id`, if there is one.
    pub fn with_queue<R>(&self, id: u32, work: impl FnOnce(&mut WqObject) -> R) -> Option<R> {
        self.lock().rings.iter_mut().find(|wq| wq.id == id).map(work)
    }
    /// Change the configuration. When this returns no frame goes by the old one any more.
    ///
    /// # Errors
    /// [`RxConfigError`]; nothing has changed then.
    pub fn configure(&self, update: &RxUpdate) -> Result<(), RxConfigError> {
        if let Some(table) = &update.table
            && !(table.len().is_power_of_two() && table.len() <= MAX_TABLE)
        {
            return Err(RxConfigError::TableSize(table.len()));
        }
        let toeplitz = update.key.as_ref().map(Toeplitz::new);
        let mut state = self.lock();
        if update.default_rq.is_some() || update.table.is_some() {
            state.set_queues(update)?;
        }
        if let Some(toeplitz) = toeplitz {
            state.steering.toeplitz = toeplitz;
        }
        state.enabled = update.enable.unwrap_or(state.enabled);
        state.coalescing = update.coalescing.unwrap_or(state.coalescing);
        state.steering.rss = update.rss.unwrap_or(state.steering.rss);
        state.steering.hash_types = update.hash_types.unwrap_or(state.steering.hash_types);
        Ok(())
    }
    /// Back to nothing configured. Queues stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        let rings = std::mem::take(&mut state.rings);
        *state = State { rings, ..State::default() };
    }
}

/// MANA_FENCE_RQ: a completion on queue `rq` of `vport`, after those of all packets steered so far. Without a free
/// slot in the completion queue it is held until the driver has made one.
///
/// # Errors
/// [`PostError`] if it is lost: too many are held, or the ring is not guest memory.
pub fn fence(queues: &Queues, ram: &GuestRam<'_>, vport: &Vport, rq: u32) -> Result<(), PostError> {
    // Batches that are under way complete first.
    let queue = vport.receive.with_queue(rq, |wq| {
        // The fence takes some of the room that the queue knows of.
        wq.room = 0;
        (wq.cq, wq.ring.head())
    });
    let Some((cq, offset)) = queue else { return Ok(()) };
    let completion = RxCompletion::new(RxType::Fence, RxMeta::default(), offset);
    let data: [u8; Cqe::DATA] = zerocopy::transmute!(completion);
    queues.complete(ram, cq, |cq| cq.post_or_hold(ram, &data, rq, false)).unwrap_or(Ok(()))
}

/// Frames from the cable of `vport`. The answer is how many were delivered.
pub fn deliver(queues: &Queues, vport: &Vport, frames: &[RxFrame<'_>]) -> usize {
    frames.chunks(BATCH).map(|batch| deliver_batch(queues, vport, batch)).sum()
}

fn deliver_batch(queues: &Queues, vport: &Vport, frames: &[RxFrame<'_>]) -> usize {
    let mut state = vport.receive.lock();
    let State { enabled, coalescing, steering, queues: steered, rings } = &mut *state;
    if !*enabled {
        vport.counters.rx_err_vport_disabled.add(frames.len() as u64);
        return 0;
    }
    let Some(memory) = queues.core().dma.map() else {
        vport.counters.rx_discards_nowqe.add(frames.len() as u64);
        return 0;
    };
    let ram = GuestRam::new(&memory);
    let mut sorted = Sorted::new(steering, vport, frames);
    let mut delivery = Delivery {
        queues,
        vport,
        ram: &ram,
        coalescing: *coalescing,
        traffic: Traffic::default(),
        delivered: 0,
    };
    while let Some((position, members)) = sorted.next_queue() {
        let ring = steered.get(position).and_then(|queue| rings.get_mut(queue.ring?));
        delivery.fill(ring, members, &sorted.packets, frames);
    }
    delivery.traffic.add_received(&vport.counters);
    delivery.delivered
}

/// What steering found out about a frame.
#[derive(Clone, Copy, Default)]
struct Packet {
    meta: RxMeta,
    hash: u32,
    tagged: bool,
}

/// A batch of frames, as a list for each queue.
struct Sorted {
    packets: ArrayVec<Packet, BATCH>,
    /// Members of each queue, a bit a frame.
    members: [u64; MAX_QUEUES],
    /// Queues that have members.
    used: u64,
}
const _: () = assert!(BATCH <= 64 && MAX_QUEUES <= 64);

impl Sorted {
    fn new(steering: &Steering<u8>, vport: &Vport, frames: &[RxFrame<'_>]) -> Self {
        let mut sorted = Self { packets: ArrayVec::new(), members: [0; MAX_QUEUES], used: 0 };
        for (at, frame) in frames.iter().enumerate() {
            if frame.bytes.len() < ETHERNET_HEADER {
                vport.counters.rx_runts.bump();
                sorted.packets.push(Packet::default());
                continue;
            }
            let headers = Headers::parse(frame.bytes);
            let hash = steering.hash(frame.bytes, &headers);
            sorted.packets.push(describe(frame, &headers, hash));
            let position = steering.queue(hash).map_or(usize::MAX, usize::from);
            match sorted.members.get_mut(position) {
                Some(members) => {
                    *members |= 1 << at;
                    sorted.used |= 1 << position;
                }
                None => {
                    vport.counters.rx_discards_nowqe.bump();
                }
            }
        }
        sorted
    }
    /// The next queue's position and members.
    fn next_queue(&mut self) -> Option<(usize, u64)> {
        let position = self.used.trailing_zeros() as usize;
        self.used &= self.used.wrapping_sub(1);
        self.members.get(position).map(|&members| (position, members))
    }
}

/// The numbers of the bits that are set.
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = set.trailing_zeros();
        set &= set.wrapping_sub(1);
        (bit < u64::BITS).then_some(bit as usize)
    })
}

#[inline]
fn describe(frame: &RxFrame<'_>, headers: &Headers, hash: Hash) -> Packet {
    let meta = RxMeta::default().with_hash_type(hash.hash_type);
    let meta = verify(frame.bytes, headers, frame.checksum == RxChecksum::Valid, meta);
    let meta = headers.vlan.map_or(meta, |tci| meta.with_vlan(tci));
    Packet { meta, hash: hash.value, tagged: headers.vlan.is_some() }
}

/// A frame that lies in its WQE's buffers.
#[derive(Clone, Copy)]
struct Filled {
    kind: RxType,
    packet: Packet,
    len: u16,
    wqe_offset: u32,
}

/// Why a receive queue can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Wqe(#[from] WqeError),
    #[error("memory key {0:#x}")]
    MemoryKey(u32),
    #[error(transparent)]
    Dma(#[from] DmaError),
}

impl Broken {
    fn rule(self) -> Rule {
        match self {
            Self::Wqe(WqeError::Tail { .. }) => Rule::DoorbellTail,
            Self::MemoryKey(_) => Rule::MemoryKey,
            Self::Wqe(_) | Self::Dma(_) => Rule::WqeShape,
        }
    }
}

/// The delivery of one batch.
struct Delivery<'a, 'm> {
    queues: &'a Queues,
    vport: &'a Vport,
    ram: &'a GuestRam<'m>,
    coalescing: Coalescing,
    traffic: Traffic,
    delivered: usize,
}

impl Delivery<'_, '_> {
    /// Deliver the frames in `members` to queue `wq`, if there is one.
    fn fill(&mut self, wq: Option<&mut WqObject>, members: u64, packets: &[Packet], frames: &[RxFrame<'_>]) {
        let mut filled = ArrayVec::new();
        let wq = wq.filter(|wq| !wq.stopped);
        let queue = wq.map(|wq| {
            self.fill_buffers(wq, members, packets, frames, &mut filled);
            (wq.id, wq.cq)
        });
        if let Some(missing @ 1..) = (members.count_ones() as usize).checked_sub(filled.len()) {
            self.vport.counters.rx_discards_nowqe.add(missing as u64);
        }
        let Some((rq, cq)) = queue.filter(|_| !filled.is_empty()) else { return };
        let lost = self.queues.complete(self.ram, cq, |cq| self.post(cq, rq, &filled));
        if let Some(lost @ 1..) = lost {
            self.queues.core().counters.completions_lost.add(lost as u64);
        }
    }
    /// Fill buffers while there are WQEs and room for their completions.
    #[inline]
    fn fill_buffers(
        &mut self,
        wq: &mut WqObject,
        members: u64,
        packets: &[Packet],
        frames: &[RxFrame<'_>],
        filled: &mut ArrayVec<Filled, BATCH>,
    ) {
        let tail = self.queues.rq(wq.id).map_or(0, Slot::tail);
        if wq.room < members.count_ones() {
            let room = |slot: &Slot<CompletionQueue>| slot.lock().as_ref().map(CompletionQueue::room);
            wq.room = self.queues.cq(wq.cq).and_then(room).unwrap_or(0);
        }
        let view = wq.ring.view(self.ram);
        for at in bits(members).take(wq.room as usize) {
            let (Some(frame), Some(&packet)) = (frames.get(at), packets.get(at)) else { break };
            match self.fill_one(wq, &view, tail, frame, packet) {
                // There is room: a batch has no more members.
                Ok(Some(one)) => drop(filled.try_push(one)),
                Ok(None) => break,
                Err(why) => {
                    wq.stopped = true;
                    self.broken(wq.id, why);
                    break;
                }
            }
        }
        wq.room = wq.room.saturating_sub(filled.len() as u32);
    }
    /// Write a frame into the next WQE's buffers; `None` if there is no WQE.
    #[inline]
    fn fill_one(
        &mut self,
        wq: &mut WqObject,
        view: &RingView<'_, '_>,
        tail: u32,
        frame: &RxFrame<'_>,
        packet: Packet,
    ) -> Result<Option<Filled>, Broken> {
        let WqObject { ring, wqe, mem_key, .. } = wq;
        let wqe_offset = ring.head();
        if !ring.fetch(view, tail, wqe)? {
            return Ok(None);
        }
        let (len, written) = match wqe.sgl() {
            // Nearly always: one buffer, and nothing to be taken out.
            [only] if !packet.tagged && frame.bytes.len() <= only.size.get() as usize => {
                check_key(only, *mem_key)?;
                self.ram.write(only.address.get(), frame.bytes)?;
                (frame.bytes.len(), frame.bytes.len())
            }
            sgl => {
                let (head, body) = if packet.tagged {
                    let (head, rest) = frame.bytes.split_at(MAC_ADDRESSES);
                    (head, rest.get(VLAN_TAG..).unwrap_or_default())
                } else {
                    (frame.bytes, &[][..])
                };
                (head.len() + body.len(), scatter(self.ram, sgl, *mem_key, head, body)?)
            }
        };
        ring.advance(wqe);
        let kind = if written < len {
            self.vport.counters.rx_truncated.bump();
            RxType::Truncated
        } else {
            self.delivered += 1;
            self.traffic.count(frame.bytes.first_chunk().copied().unwrap_or_default(), len);
            RxType::Okay
        };
        let len = u16::try_from(written).unwrap_or(u16::MAX);
        Ok(Some(Filled { kind, packet, len, wqe_offset }))
    }
    /// Post the completions of `filled`, several packets in one where the driver wants that and what the
    /// completion says of them is the same. The answer is how many were lost.
    fn post(&self, cq: &mut CompletionQueue, rq: u32, filled: &[Filled]) -> usize {
        let view = cq.view(self.ram);
        let mut lost = 0;
        let mut rest = filled;
        while let Some(first) = rest.first() {
            let same = |other: &&Filled| other.kind == RxType::Okay && other.packet.meta == first.packet.meta;
            let run = rest.iter().take(self.coalescing.packets()).take_while(same).count().max(1);
            let (group, after) = rest.split_at(run);
            let kind = match run {
                1 => first.kind,
                2..=4 => RxType::Coalesced4,
                _ => RxType::Coalesced8,
            };
            let mut completion = RxCompletion::new(kind, first.packet.meta, first.wqe_offset);
            completion.set_packets(group.iter().map(|one| (one.len, one.packet.hash)));
            let data: [u8; Cqe::DATA] = zerocopy::transmute!(completion);
            lost += usize::from(cq.post(&view, &data, rq, false).is_err());
            rest = after;
        }
        lost
    }
    #[cold]
    fn broken(&self, rq: u32, why: Broken) {
        let core = self.queues.core();
        if matches!(why, Broken::Dma(_) | Broken::Wqe(WqeError::Dma(_))) {
            core.counters.dma_errors.bump();
        }
        count!(self.vport.counters.rx_err_gdma, "RQ {rq} stops: {why}");
        core.broken(why.rule(), || format!("RQ {rq}: {why}"));
    }
}

/// The entry carries the queue's memory key.
#[inline]
fn check_key(sge: &Sge, mem_key: u32) -> Result<(), Broken> {
    match sge.mem_key.get() {
        key if key == mem_key => Ok(()),
        other => Err(Broken::MemoryKey(other)),
    }
}

/// Write `head` and `body`, one behind the other, to the buffers of `sgl`; the answer is how much had room.
fn scatter<'f>(
    ram: &GuestRam<'_>,
    sgl: &[Sge],
    mem_key: u32,
    mut head: &'f [u8],
    mut body: &'f [u8],
) -> Result<usize, Broken> {
    let mut written = 0;
    for sge in sgl {
        check_key(sge, mem_key)?;
        let (mut address, mut room) = (sge.address.get(), sge.size.get() as usize);
        while room > 0 {
            if head.is_empty() {
                (head, body) = (body, &[]);
            }
            let (now, later) = head.split_at(room.min(head.len()));
            if now.is_empty() {
                return Ok(written);
            }
            ram.write(address, now)?;
            written += now.len();
            room -= now.len();
            address = address.wrapping_add(now.len() as u64);
            head = later;
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests;
