//! Transmit: send WQEs become frames on the cable, and completions.
//!
//! A frame goes to the port as slices of guest memory, uncopied, unless its bytes must change: then it passes
//! through the queue's scratch buffer, read from guest memory once. What the port can do itself (checksums,
//! segmentation) is left to it.
//!
//! Source: `mana_start_xmit` and `mana_poll_tx_cq` (mana_en.c); the sheet's sections 8.1 to 8.3.

use arrayvec::ArrayVec;
use vm_memory::VolatileSlice;

use crate::Ran;
use crate::config::TxPolicy;
use crate::counters::Counter;
use crate::dma::{self, DmaError, GuestRam};
use crate::doors::{PortDropped, Segmentation, TxFrame, TxOffload};
use crate::offload::{HeaderError, TxChecksums};
use crate::packet::{
    ETHERNET_HEADER, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, IpVersion, MAC_ADDRESSES,
    VLAN_TAG, be16,
};
use crate::queues::{Core, Queues, Slot, WqObject};
use crate::ring::{CompletionQueue, Wqe, WqeError};
use crate::rules::Rule;
use crate::segment::Template;
use crate::timers::Timer;
use crate::vport::{Traffic, Vport};
use crate::wire::queue::{BASIC_UNIT, Cqe, Sge};
use crate::wire::tx::{TxCompletion, TxOob, TxStatus};

/// WQEs between two looks at the completion queue, and completions posted at once.
const BATCH: usize = 64;
/// Most pieces of guest memory in one frame: 30 entries fit into a WQE; an entry may straddle regions of memory.
const MAX_BUFFERS: usize = 40;
/// Most pieces handed to a port: a header of the card's own, and a tag that splits the piece it is inserted into.
const MAX_SLICES: usize = MAX_BUFFERS + 3;
/// Most header bytes of a segmentation request (its first entry).
const MAX_LSO_HEADER: usize = 256;
/// Most payload of a segmentation request: what the driver raises the limit to (`GSO_MAX_SIZE`, 8 * 65535).
const MAX_LSO_PAYLOAD: usize = 8 * 65535;
/// First bytes of a frame that are looked at: destination, source, EtherType, and the one behind a tag.
const PEEK: usize = ETHERNET_HEADER + VLAN_TAG;
/// VLAN id that must not be used (IEEE 802.1Q, table 9-2).
const RESERVED_VLAN_ID: u16 = 0xfff;

/// Why a queue can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Wqe(#[from] WqeError),
    #[error("memory key {0:#x}")]
    MemoryKey(u32),
    #[error(transparent)]
    Dma(#[from] DmaError),
    #[error("a WQE without scatter/gather list")]
    NoBuffers,
    #[error("inline data, which only RDMA has")]
    InlineData,
    #[error("segmentation with {entries} entries, the first of {first} bytes")]
    LsoEntries { entries: usize, first: usize },
}

impl Broken {
    fn rule(self) -> Rule {
        match self {
            Self::Wqe(WqeError::Tail { .. }) => Rule::DoorbellTail,
            Self::MemoryKey(_) => Rule::MemoryKey,
            Self::LsoEntries { .. } => Rule::LsoHeaders,
            Self::Wqe(_) | Self::Dma(_) | Self::NoBuffers | Self::InlineData => Rule::WqeShape,
        }
    }
}

/// Why a WQE was not sent.
enum Failure {
    /// This one is refused; the queue goes on.
    Refused(TxStatus),
    /// The queue stops.
    Broken(Broken),
}

impl<E: Into<Broken>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Broken(error.into())
    }
}

impl From<HeaderError> for Failure {
    fn from(_: HeaderError) -> Self {
        Self::Refused(TxStatus::HeaderProcessingError)
    }
}

/// Send up to `budget` WQEs of send queue `id`.
pub fn run(queues: &Queues, vports: &[Vport], id: u32, budget: usize) -> Ran {
    let Some(slot) = queues.sq(id) else { return Ran::Idle };
    let Some(memory) = queues.core().dma.map() else { return rest(slot, slot.tail()) };
    let ram = GuestRam::new(&memory);
    let mut left = budget.max(1);
    let mut flush = None;
    let ran = loop {
        if left == 0 {
            break Ran::More;
        }
        let tail = slot.look();
        let mut queue = slot.lock();
        let Some(wq) = queue.as_mut().filter(|wq| !wq.stopped) else { break rest(slot, tail) };
        let Some(vport) = vports.get(wq.vport) else { break rest(slot, tail) };
        let room = reserve(queues, wq, left.min(BATCH));
        let mut done = Done::default();
        let mut sender = Sender::new(queues.core(), vport, &ram, wq);
        sender.send_batch(wq, tail, room, &mut done);
        sender.traffic.add_sent(&vport.counters);
        let hold = hold_back(queues.core(), wq, done.held_until);
        let (cq, empty) = (wq.cq, wq.stopped || done.held_until.is_some() || wq.ring.head() == tail);
        drop(queue);
        if let Some(until) = hold {
            queues.add_timer(until, Timer::Shaping { sq: id });
        }
        post(queues, &ram, id, cq, &done.completions);
        flush = Some(vport);
        left = left.saturating_sub(done.consumed);
        if empty || room == 0 {
            break rest(slot, tail);
        }
    };
    if let Some(vport) = flush {
        vport.port.flush();
    }
    ran
}

/// The clamp holds the queue back until `until`. The answer is when it is to be woken, if nobody will do so anyway.
fn hold_back(core: &Core, wq: &mut WqObject, until: Option<u64>) -> Option<u64> {
    let until = until?;
    // One deadline a queue: it asks again when that has passed.
    if wq.held_until.is_some_and(|woken| woken > core.tracer.now_ns()) {
        return None;
    }
    wq.held_until = Some(until);
    Some(until)
}

/// Nothing left up to `seen`.
fn rest(slot: &Slot<WqObject>, seen: u32) -> Ran {
    if slot.rest(seen) { Ran::More } else { Ran::Idle }
}

/// How many of `wanted` WQEs have room for their completions; with none, the queue waits for the driver to make
/// some.
#[inline]
fn reserve(queues: &Queues, wq: &mut WqObject, wanted: usize) -> usize {
    if (wq.room as usize) < wanted {
        wq.room = queues.cq(wq.cq).map_or(0, |slot| {
            slot.lock().as_mut().map_or(0, |cq| {
                let room = cq.room();
                if room == 0 {
                    cq.wait_for_room(wq.id);
                }
                room
            })
        });
    }
    wanted.min(wq.room as usize)
}

#[inline]
fn post(queues: &Queues, ram: &GuestRam<'_>, sq: u32, cq: u32, completions: &[(TxStatus, u32)]) {
    if completions.is_empty() {
        return;
    }
    let post = |cq: &mut CompletionQueue| {
        let view = cq.view(ram);
        completions
            .iter()
            .filter(|&&(status, offset)| {
                let data: [u8; Cqe::DATA] = zerocopy::transmute!(TxCompletion::new(status, offset));
                cq.post(&view, &data, sq, true).is_err()
            })
            .count()
    };
    if let Some(lost @ 1..) = queues.complete(ram, cq, post) {
        queues.core().counters.completions_lost.add(lost as u64);
    }
}

/// What became of a batch.
#[derive(Default)]
struct Done {
    /// WQEs consumed.
    consumed: usize,
    /// The bandwidth clamp allows the next one then, nanoseconds of the device's clock.
    held_until: Option<u64>,
    /// Type, and offset in basic units, of each completion.
    completions: ArrayVec<(TxStatus, u32), BATCH>,
}

/// A frame still in guest memory.
struct Frame<'m> {
    buffers: ArrayVec<VolatileSlice<'m>, MAX_BUFFERS>,
    len: usize,
    head: [u8; PEEK],
}

impl<'m> Frame<'m> {
    #[inline]
    fn new() -> Self {
        Self { buffers: ArrayVec::new(), len: 0, head: [0; PEEK] }
    }
    /// Find the buffers of `sgl`. In place, because a frame is too large to be moved about.
    #[inline]
    fn gather(&mut self, ram: &GuestRam<'m>, sgl: &[Sge], mem_key: u32) -> Result<(), Broken> {
        for sge in sgl {
            if sge.mem_key.get() != mem_key {
                return Err(Broken::MemoryKey(sge.mem_key.get()));
            }
            let len = sge.size.get() as usize;
            if len == 0 {
                continue;
            }
            ram.slices(sge.address.get(), len, &mut self.buffers)?;
            self.len += len;
        }
        match self.buffers.first() {
            Some(first) if dma::load(first, 0, &mut self.head).is_some() => {}
            Some(_) => {
                copy(&self.buffers, &mut self.head);
            }
            None if sgl.is_empty() => return Err(Broken::NoBuffers),
            // A frame of no bytes is too short, but no danger to the queue.
            None => {}
        }
        Ok(())
    }
    /// The frame's first bytes, as many as there are of both.
    fn copy_to(&self, to: &mut [u8]) -> usize {
        copy(&self.buffers, to)
    }
    /// The driver put a VLAN tag in itself.
    fn has_tag(&self) -> bool {
        be16(&self.head, MAC_ADDRESSES) == Some(ETHERTYPE_VLAN)
    }
}

/// Fill `to` from `buffers`; the answer is how much there was.
fn copy(buffers: &[VolatileSlice<'_>], to: &mut [u8]) -> usize {
    let mut at = 0;
    for buffer in buffers {
        let Some(rest) = to.get_mut(at..).filter(|rest| !rest.is_empty()) else { break };
        at += buffer.copy_to(rest);
    }
    at
}

/// Sends the WQEs of one queue.
struct Sender<'a, 'm> {
    core: &'a Core,
    vport: &'a Vport,
    ram: &'a GuestRam<'m>,
    offset: Option<u16>,
    policy: Option<TxPolicy>,
    id: u32,
    cq: u32,
    mem_key: u32,
    traffic: Traffic,
}

impl<'a, 'm> Sender<'a, 'm> {
    fn new(core: &'a Core, vport: &'a Vport, ram: &'a GuestRam<'m>, wq: &WqObject) -> Self {
        Self {
            core,
            vport,
            ram,
            offset: vport.tx_offset(),
            policy: vport.tx_policy(),
            id: wq.id,
            cq: wq.cq,
            mem_key: wq.mem_key,
            traffic: Traffic::default(),
        }
    }
    /// Consume up to `room` WQEs before `tail`.
    fn send_batch(&mut self, wq: &mut WqObject, tail: u32, room: usize, done: &mut Done) {
        let clamped = self.vport.shaper.mbps().is_some();
        let WqObject { ring, wqe, scratch, stopped, .. } = wq;
        let view = ring.view(self.ram);
        while done.consumed < room && !*stopped {
            if clamped
                && ring.head() != tail
                && let Err(until) = self.vport.shaper.check(self.core.tracer.now_ns())
            {
                done.held_until = Some(until);
                break;
            }
            let offset = ring.head() / BASIC_UNIT;
            let before = self.traffic.bytes();
            let sent = match ring.fetch(&view, tail, wqe) {
                Ok(false) => break,
                Ok(true) => self.send(wqe, scratch),
                Err(error) => Err(error.into()),
            };
            if clamped {
                self.vport.shaper.spend(self.core.tracer.now_ns(), self.traffic.bytes() - before);
            }
            let completion = match sent {
                Ok(suppressed) => (!suppressed).then_some(TxStatus::Okay),
                Err(Failure::Refused(status)) => {
                    self.refused(status);
                    Some(status)
                }
                Err(Failure::Broken(why)) => {
                    *stopped = true;
                    self.broken(why);
                    Some(TxStatus::GdmaError)
                }
            };
            // There is room: `done` holds a batch, and a batch is no more.
            let _ = completion.map(|status| done.completions.try_push((status, offset)));
            done.consumed += 1;
            ring.advance(wqe);
        }
        wq.room = wq.room.saturating_sub(done.completions.len() as u32);
    }
    /// Send one WQE; the answer is whether its completion is not wanted.
    fn send(&mut self, wqe: &Wqe, scratch: &mut Vec<u8>) -> Result<bool, Failure> {
        let oob = TxOob::parse(wqe.oob()).ok_or(Failure::Refused(TxStatus::InvalidOob))?;
        self.check(&oob)?;
        if wqe.header().sgl_direct() {
            return Err(Broken::InlineData.into());
        }
        let mut frame = Frame::new();
        frame.gather(self.ram, wqe.sgl(), self.mem_key)?;
        if let Some(policy) = self.policy {
            self.check_policy(policy, &oob, &frame.head)?;
        }
        if wqe.header().client_oob_in_sgl() {
            self.send_large(wqe, &oob, &frame, scratch)?;
        } else {
            self.send_one(&oob, &frame, scratch)?;
        }
        Ok(oob.suppress_completion())
    }
    /// The OOB is this queue's and this vPort's.
    fn check(&self, oob: &TxOob) -> Result<(), Failure> {
        let refused = if oob.cq() != self.cq || oob.sq_frame() != self.id >> 10 & 0x3fff {
            TxStatus::InvalidOob
        } else if self.offset.is_none() {
            TxStatus::VportDisabled
        } else if self.offset != Some(oob.vport_offset()) {
            TxStatus::VportIndexOutOfRange
        } else if oob.vlan_tci().is_some_and(|tci| tci & 0xfff == RESERVED_VLAN_ID) {
            TxStatus::VlanTaggingViolation
        } else {
            return Ok(());
        };
        Err(Failure::Refused(refused))
    }
    /// The host lets the vPort send this.
    #[cold]
    fn check_policy(&self, policy: TxPolicy, oob: &TxOob, head: &[u8; PEEK]) -> Result<(), Failure> {
        let outer = be16(head, MAC_ADDRESSES);
        let tagged = outer == Some(ETHERTYPE_VLAN);
        let kind = if tagged { be16(head, MAC_ADDRESSES + VLAN_TAG) } else { outer };
        let is_ip = matches!(kind, Some(ETHERTYPE_ARP | ETHERTYPE_IPV4 | ETHERTYPE_IPV6));
        let refused = if policy.disabled {
            TxStatus::VfDisabled
        } else if policy.own_source_only && head.get(6..12) != Some(&self.vport.mac) {
            TxStatus::SaDrop
        } else if policy.ip_only && !is_ip {
            TxStatus::InvalidEthType
        } else if policy.untagged_only && (tagged || oob.vlan_tci().is_some()) {
            TxStatus::VlanTaggingViolation
        } else {
            return Ok(());
        };
        Err(Failure::Refused(refused))
    }
    /// `len` bytes are no more than the MTU allows.
    fn check_length(&self, frame: &Frame<'_>, len: usize) -> Result<(), Failure> {
        let limit = self.vport.max_frame + if frame.has_tag() { VLAN_TAG } else { 0 };
        if len > limit {
            return Err(Failure::Refused(TxStatus::MtuDrop));
        }
        if len < ETHERNET_HEADER {
            return Err(Failure::Refused(TxStatus::HeaderProcessingError));
        }
        Ok(())
    }
    /// Send a frame that stays one frame.
    fn send_one(&mut self, oob: &TxOob, frame: &Frame<'_>, scratch: &mut Vec<u8>) -> Result<(), Failure> {
        self.check_length(frame, frame.len)?;
        let tag = oob.vlan_tci();
        let asked = oob.compute_ip_checksum() || oob.compute_tcp_checksum() || oob.compute_udp_checksum();
        if !asked {
            self.put(&frame.buffers, frame.len, frame.head, tag, TxOffload::default());
            return Ok(());
        }
        if self.vport.capabilities.checksum && !oob.compute_ip_checksum() {
            let mut head = [0; MAX_LSO_HEADER];
            let len = frame.copy_to(&mut head);
            let checksums = TxChecksums::locate(oob, head.get(..len).unwrap_or_default())?;
            let offload = TxOffload { checksum: checksums.partial(frame.len)?, segmentation: None };
            self.put(&frame.buffers, frame.len, frame.head, tag, offload);
            return Ok(());
        }
        let copy = stage(scratch, frame.len);
        frame.copy_to(copy);
        TxChecksums::locate(oob, copy)?.fill(copy)?;
        let head = copy.first_chunk().copied().unwrap_or(frame.head);
        self.put(&[VolatileSlice::from(copy)], frame.len, head, tag, TxOffload::default());
        Ok(())
    }
    /// Send a TCP super-frame.
    fn send_large(
        &mut self,
        wqe: &Wqe,
        oob: &TxOob,
        frame: &Frame<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let header_len = wqe.sgl().first().map_or(0, |sge| sge.size.get() as usize);
        let entries = wqe.sgl().len();
        let mut header = [0; MAX_LSO_HEADER];
        let Some(header) = header.get_mut(..header_len).filter(|_| entries >= 2) else {
            return Err(Broken::LsoEntries { entries, first: header_len }.into());
        };
        frame.copy_to(header);
        let not_headers = |error: HeaderError| {
            let why = || format!("SQ {}: the {header_len} bytes of the first entry", self.id);
            self.core.broken(Rule::LsoHeaders, why);
            Failure::from(error)
        };
        let (template, v4, v6) = if oob.is_encapsulated() {
            let inner = usize::from(oob.inner_ip_offset());
            let template = Template::encapsulated(header, inner).map_err(not_headers)?;
            (template, !oob.inner_is_ipv6(), oob.inner_is_ipv6())
        } else {
            (Template::new(header).map_err(not_headers)?, oob.is_outer_ipv4(), oob.is_outer_ipv6())
        };
        let payload = frame.len - header_len;
        let mss = usize::from(wqe.header().client_data_unit());
        let said = match template.version() {
            IpVersion::V4 => v4,
            IpVersion::V6 => v6,
        };
        // Of an inner header the OOB need not say where it is.
        let transport = usize::from(oob.transport_offset());
        let located = template.tcp_offset() == transport || oob.is_encapsulated() && transport == 0;
        if !oob.compute_tcp_checksum() {
            return Err(Failure::Refused(TxStatus::InvalidOob));
        }
        if !said || !located || mss == 0 || !(1..=MAX_LSO_PAYLOAD).contains(&payload) {
            return Err(HeaderError.into());
        }
        self.check_length(frame, header_len + mss.min(payload))?;
        let pieces = payload_pieces(&frame.buffers, header_len);
        let tag = oob.vlan_tci();
        let port_can = self.vport.capabilities.segmentation && !oob.is_encapsulated();
        if port_can && payload > mss && frame.len <= template.max_len() {
            self.put_super_frame(&template, &pieces, frame, mss, tag, scratch)
        } else {
            self.put_segments(&template, pieces, payload, mss, tag, scratch)
        }
    }
    /// Leave segmentation to the port, which wants the lengths in place.
    fn put_super_frame(
        &mut self,
        template: &Template<'_>,
        payload: &[VolatileSlice<'_>],
        frame: &Frame<'_>,
        mss: usize,
        tag: Option<u16>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let header_len = template.header_len();
        let header = stage(scratch, header_len);
        template.super_frame(frame.len - header_len, header)?;
        let offload = TxOffload {
            checksum: template.partial(),
            segmentation: Some(Segmentation {
                mss: mss as u16,
                header_len: header_len as u16,
                ipv6: template.version() == IpVersion::V6,
            }),
        };
        let mut slices: ArrayVec<VolatileSlice<'_>, MAX_SLICES> = ArrayVec::new();
        slices.push(VolatileSlice::from(header));
        slices.extend(payload.iter().copied());
        self.put(&slices, frame.len, frame.head, tag, offload);
        Ok(())
    }
    /// Cut the payload into segments and send each.
    fn put_segments(
        &mut self,
        template: &Template<'_>,
        mut payload: ArrayVec<VolatileSlice<'_>, MAX_BUFFERS>,
        len: usize,
        mss: usize,
        tag: Option<u16>,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let header_len = template.header_len();
        let mut pieces = payload.as_mut_slice();
        let mut at = 0;
        for index in 0.. {
            let part = mss.min(len - at);
            let segment = stage(scratch, header_len + part);
            let Some(body) = segment.get_mut(header_len..) else { return Err(HeaderError.into()) };
            pieces = take(pieces, body);
            template.complete(segment, index, at as u32, at + part == len)?;
            let head = segment.first_chunk().copied().unwrap_or_default();
            self.put(&[VolatileSlice::from(segment)], header_len + part, head, tag, TxOffload::default());
            at += part;
            if at == len {
                break;
            }
        }
        Ok(())
    }
    /// Hand a frame to the port, with a tag inserted if there is one. `head` is the start of `slices`.
    #[inline]
    fn put(
        &mut self,
        slices: &[VolatileSlice<'_>],
        len: usize,
        head: [u8; PEEK],
        tag: Option<u16>,
        offload: TxOffload,
    ) {
        match tag {
            None => {
                let sent = self.vport.port.send(&TxFrame { slices, len, offload });
                self.count(sent, head, len);
            }
            Some(tci) => self.put_tagged(slices, len, head, tci, offload),
        }
    }
    fn put_tagged(
        &mut self,
        slices: &[VolatileSlice<'_>],
        len: usize,
        head: [u8; PEEK],
        tci: u16,
        offload: TxOffload,
    ) {
        let [high, low] = tci.to_be_bytes();
        let mut tag = [0x81, 0x00, high, low];
        let slices = insert(slices, VolatileSlice::from(&mut tag[..]));
        let (len, offload) = (len + VLAN_TAG, behind_tag(offload));
        let sent = self.vport.port.send(&TxFrame { slices: &slices, len, offload });
        self.count(sent, head, len);
    }
    #[inline]
    fn count(&mut self, sent: Result<(), PortDropped>, head: [u8; PEEK], len: usize) {
        let [d0, d1, d2, d3, d4, d5, ..] = head;
        match sent {
            Ok(()) => self.traffic.count([d0, d1, d2, d3, d4, d5], len),
            Err(PortDropped) => {
                self.vport.counters.tx_port_dropped.bump();
            }
        }
    }
    #[cold]
    fn refused(&self, status: TxStatus) {
        let counters = &self.vport.counters;
        let counter: &Counter = match status {
            TxStatus::SaDrop => &counters.tx_err_sa_enforcement,
            TxStatus::MtuDrop => &counters.tx_err_mtu_violation,
            TxStatus::InvalidEthType => &counters.tx_err_ethtype_enforcement,
            TxStatus::HeaderProcessingError => &counters.tx_err_header,
            TxStatus::VfDisabled => &counters.tx_err_gf_disabled,
            TxStatus::VportIndexOutOfRange => &counters.tx_err_inval_vport_offset,
            TxStatus::VportDisabled => &counters.tx_err_vport_disabled,
            TxStatus::VlanTaggingViolation => &counters.tx_err_vlan_enforcement,
            TxStatus::Okay | TxStatus::InvalidOob | TxStatus::GdmaError => &counters.tx_err_inval_oob,
        };
        crate::count!(counter, "SQ {}: a frame was refused: {status:?}", self.id);
    }
    #[cold]
    fn broken(&self, why: Broken) {
        if matches!(why, Broken::Dma(_) | Broken::Wqe(WqeError::Dma(_))) {
            self.core.counters.dma_errors.bump();
        }
        crate::count!(self.vport.counters.tx_err_gdma, "SQ {} stops: {why}", self.id);
        self.core.broken(why.rule(), || format!("SQ {}: {why}", self.id));
    }
}

/// The first `len` bytes of `scratch`, which grows only when it has never been as long.
fn stage(scratch: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if scratch.len() < len {
        scratch.resize(len, 0);
    }
    scratch.get_mut(..len).unwrap_or_default()
}

/// `buffers` without their first `skip` bytes.
fn payload_pieces<'m>(
    buffers: &[VolatileSlice<'m>],
    mut skip: usize,
) -> ArrayVec<VolatileSlice<'m>, MAX_BUFFERS> {
    let mut pieces = ArrayVec::new();
    for buffer in buffers {
        let now = skip.min(buffer.len());
        skip -= now;
        pieces.extend(buffer.offset(now).ok().filter(|rest| !rest.is_empty()));
    }
    pieces
}

/// Fill `to` from `pieces`; the answer is what is left of them.
fn take<'s, 'm>(mut pieces: &'s mut [VolatileSlice<'m>], to: &mut [u8]) -> &'s mut [VolatileSlice<'m>] {
    let mut at = 0;
    while at < to.len() {
        let Some(piece) = pieces.first_mut() else { break };
        let taken = to.get_mut(at..).map_or(0, |rest| piece.copy_to(rest));
        at += taken;
        match piece.offset(taken) {
            Ok(rest) if !rest.is_empty() => *piece = rest,
            _ => pieces = pieces.split_first_mut().map_or(&mut [], |(_, rest)| rest),
        }
    }
    pieces
}

/// `slices` with `tag` after the addresses.
fn insert<'s>(
    slices: &[VolatileSlice<'s>],
    tag: VolatileSlice<'s>,
) -> ArrayVec<VolatileSlice<'s>, MAX_SLICES> {
    let mut tagged = ArrayVec::new();
    let mut tag = Some(tag);
    let mut before_tag = MAC_ADDRESSES;
    for slice in slices {
        let at = before_tag.min(slice.len());
        before_tag -= at;
        let Ok((before, after)) = slice.split_at(at) else { continue };
        tagged.extend((!before.is_empty()).then_some(before));
        tagged.extend(if before_tag == 0 { tag.take() } else { None });
        tagged.extend((!after.is_empty()).then_some(after));
    }
    tagged
}

/// The offsets of `offload` once a tag is in front of what they point to.
fn behind_tag(offload: TxOffload) -> TxOffload {
    let TxOffload { mut checksum, mut segmentation } = offload;
    if let Some(checksum) = &mut checksum {
        checksum.start += VLAN_TAG as u16;
    }
    if let Some(segmentation) = &mut segmentation {
        segmentation.header_len += VLAN_TAG as u16;
    }
    TxOffload { checksum, segmentation }
}

#[cfg(test)]
mod tests;
