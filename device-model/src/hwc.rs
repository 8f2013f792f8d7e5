//! The hardware channel: four one-page queues through which the driver sends commands and gets answers.
//!
//! A request lies where the send WQE's scatter/gather list says, the response goes where the oldest receive WQE's
//! says. Each answered request makes two completions, of the send and of the receive queue. No request is taken
//! before there is a buffer for its response and room for both completions.
//!
//! Source: `mana_hwc_init_queues`, `mana_hwc_rx_event_handler`, `mana_hwc_post_tx_wqe` (hw_channel.c); the sheet's
//! section 4.

mod faults;
pub mod state;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use crate::card::Card;
use crate::command::{self, Command, CommandResult, Context, Request};
use crate::count;
use crate::device::Ran;
use crate::dma::GuestRam;
use crate::host::{Channel, Point, Profile};
use crate::observe::{Event, Fields, QueueKind};
use crate::queues::{Core, HWC_QUEUE, Slot};
use crate::region::RingMemory;
use crate::ring::{CompletionQueue, EventQueue, WorkQueue, Wqe};
use crate::rules::Rule;
use crate::status::{CommandError, Status};
use crate::table::{Device, Objects, Origin};
use crate::wire::hwc::{MAX_MESSAGE, RequestHeader, ResponseHeader, RxOob, TxOob, init_data};
use crate::wire::queue::{Cqe, EventEntry};
use crate::wire::smc::EstablishHwc;
use faults::Late;

/// Requests in flight that the card announces; the driver uses one whatever is announced.
const QUEUE_DEPTH: u32 = 1;
/// Completions of one request.
const COMPLETIONS: u32 = 2;

/// Why a channel can't be established.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EstablishError {
    /// The vector is beyond the MSI-X table.
    #[error("MSI-X vector {0} is beyond the table")]
    Vector(u16),
    /// The event queue takes no events: not guest memory.
    #[error("the event queue is not guest memory")]
    EventQueue,
}

/// An established channel.
pub struct Hwc {
    sq: WorkQueue,
    rq: WorkQueue,
    request: Request,
    response: Box<[u8; MAX_MESSAGE]>,
    wqe: Wqe,
    buffer: Wqe,
    /// Responses that the simulated host has put off.
    late: Late,
}

/// What became of the next request.
enum Step {
    /// One was answered.
    Answered,
    /// There is none up to this tail, or something it needs is missing.
    Rest(u32),
}

impl Hwc {
    /// Make the four queues and tell the driver about them.
    ///
    /// # Errors
    /// [`EstablishError`]; nothing exists then.
    pub fn establish(
        card: &Card,
        shown: &Channel,
        ram: &GuestRam<'_>,
        message: &EstablishHwc,
    ) -> Result<Self, EstablishError> {
        if message.msix >= card.config.msix_table_size {
            return Err(EstablishError::Vector(message.msix));
        }
        let page = Device::Hwc.doorbell_page();
        let queues = &card.queues;
        queues.open_eq(HWC_QUEUE, page, EventQueue::new(RingMemory::page(message.eq), message.msix));
        queues.open_cq(HWC_QUEUE, page, CompletionQueue::new(RingMemory::page(message.cq), HWC_QUEUE));
        queues.open_hwc(page);
        let value = |kind, value| EventEntry::HwcInitData { kind, value };
        let events = [
            // First: until it has seen this one, the driver does not know where to ring.
            EventEntry::HwcInitEqIdDb { eq: HWC_QUEUE as u16, doorbell: page as u16 },
            value(init_data::CQ_ID, shown.cq.unwrap_or(HWC_QUEUE)),
            value(init_data::RQ_ID, shown.rq.unwrap_or(HWC_QUEUE)),
            value(init_data::SQ_ID, shown.sq.unwrap_or(HWC_QUEUE)),
            value(init_data::QUEUE_DEPTH, shown.queue_depth.unwrap_or(QUEUE_DEPTH)),
            value(init_data::MAX_REQUEST, shown.max_request.unwrap_or(MAX_MESSAGE as u32)),
            value(init_data::MAX_RESPONSE, shown.max_response.unwrap_or(MAX_MESSAGE as u32)),
            value(init_data::MAX_NUM_CQS, shown.max_cqs.unwrap_or(queues.limits().cqs)),
            value(init_data::PD_ID, shown.pd.unwrap_or(Device::Hwc.pd())),
            value(init_data::GPA_MKEY, Device::Hwc.gpa_mkey()),
            EventEntry::HwcInitDone,
        ];
        if !events.into_iter().all(|event| queues.post_event(ram, HWC_QUEUE, event)) {
            Self::close(card);
            return Err(EstablishError::EventQueue);
        }
        Ok(Self {
            sq: WorkQueue::send(RingMemory::page(message.sq)),
            rq: WorkQueue::receive(RingMemory::page(message.rq)),
            request: Request::new(),
            response: Box::new([0; MAX_MESSAGE]),
            wqe: Wqe::default(),
            buffer: Wqe::default(),
            late: Late::default(),
        })
    }
    /// The channel's queues end: the card touches their memory no more.
    pub fn close(card: &Card) {
        for kind in [QueueKind::Sq, QueueKind::Rq, QueueKind::Cq, QueueKind::Eq] {
            card.queues.close(kind, HWC_QUEUE);
        }
    }
    /// Answer requests, at most `budget`. `seq` numbers them.
    pub fn run(
        &mut self,
        card: &Card,
        offer: &Profile,
        objects: &mut Objects,
        seq: &mut u64,
        budget: usize,
    ) -> Ran {
        let Some(slot) = card.queues.sq(HWC_QUEUE) else { return Ran::Idle };
        let Some(memory) = card.core.dma.map() else {
            // Enabling bus mastering wakes the queue again.
            return if slot.rest(slot.tail()) { Ran::More } else { Ran::Idle };
        };
        let ram = GuestRam::new(&memory);
        for _ in 0..budget.max(1) {
            if let Step::Rest(tail) = self.step(card, offer, &ram, objects, seq)
                && !slot.rest(tail)
            {
                return Ran::Idle;
            }
        }
        Ran::More
    }
    fn step(
        &mut self,
        card: &Card,
        offer: &Profile,
        ram: &GuestRam<'_>,
        objects: &mut Objects,
        seq: &mut u64,
    ) -> Step {
        let tail = card.queues.sq(HWC_QUEUE).map_or(0, Slot::look);
        if !self.late.is_empty() && self.deliver_late(card, ram) {
            return Step::Answered;
        }
        match self.sq.fetch(&self.sq.view(ram), tail, &mut self.wqe) {
            Ok(false) => return Step::Rest(tail),
            Ok(true) => {}
            Err(error) => {
                bad_request(card, &error);
                self.sq.discard(tail);
                return Step::Rest(tail);
            }
        }
        if !self.reserve(card, ram) {
            return Step::Rest(tail);
        }
        self.check_oob(card);
        match self.read_request(ram) {
            Ok(()) => {
                *seq += 1;
                match self.execute(card, offer, ram, objects, *seq) {
                    Some((len, told)) => {
                        let response = self.response.get(..len).unwrap_or_default();
                        let sent = write_response(&self.buffer, ram, response);
                        // What found no room was not sent; beyond that, only the host lies about it.
                        let told = if told == len { sent } else { told };
                        self.complete(card, ram, true, Some(told));
                        self.rq.advance(&self.buffer);
                    }
                    None => self.complete(card, ram, true, None),
                }
            }
            Err(cause) => {
                bad_request(card, &cause);
                self.complete(card, ram, true, None);
            }
        }
        self.sq.advance(&self.wqe);
        Step::Answered
    }
    /// Deliver a response that was put off, if one is due and there is a buffer for it.
    #[cold]
    fn deliver_late(&mut self, card: &Card, ram: &GuestRam<'_>) -> bool {
        let now_ns = card.core.tracer.now_ns();
        if !self.late.any_due(now_ns) || !self.reserve(card, ram) {
            return false;
        }
        let Some((response, told)) = self.late.take(now_ns) else { return false };
        write_response(&self.buffer, ram, &response);
        self.complete(card, ram, false, Some(told as usize));
        self.rq.advance(&self.buffer);
        true
    }
    /// What the host holds back until its faults are cleared comes now.
    pub fn release_held(&mut self, card: &Card) {
        self.late.release();
        card.queues.resume(HWC_QUEUE);
    }
    /// Whether there is a buffer for the response and room for its completions. If not, the doorbell that brings
    /// them runs the channel again.
    fn reserve(&mut self, card: &Card, ram: &GuestRam<'_>) -> bool {
        let tail = card.queues.rq(HWC_QUEUE).map_or(0, Slot::tail);
        match self.rq.fetch(&self.rq.view(ram), tail, &mut self.buffer) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                bad_request(card, &error);
                self.rq.discard(tail);
                return false;
            }
        }
        let Some(slot) = card.queues.cq(HWC_QUEUE) else { return false };
        slot.lock().as_mut().is_some_and(|cq| {
            let room = cq.free() >= COMPLETIONS;
            if !room {
                cq.wait_for_room(HWC_QUEUE);
            }
            room
        })
    }
    /// The OOB names the channel's own queues; a driver that names others has lost its way, but can be answered.
    fn check_oob(&self, card: &Card) {
        let oob = TxOob::read_from_prefix(self.wqe.oob()).map(|(oob, _)| oob).unwrap_or_default();
        let (cq, sq) = (oob.vscq.get() & 0xff_ffff, oob.vsq.get() & 0xff_ffff);
        if (cq, sq) != (HWC_QUEUE, HWC_QUEUE) {
            card.core.broken(Rule::HwcMessage, || format!("the OOB names CQ {cq} and SQ {sq}"));
        }
    }
    /// Copy the request out of guest memory: from here on the guest can't change it.
    fn read_request(&mut self, ram: &GuestRam<'_>) -> Result<(), CommandError> {
        let sgl = self.wqe.sgl();
        let len = sgl.iter().fold(0_usize, |len, sge| len.saturating_add(sge.size.get() as usize));
        if sgl.iter().any(|sge| sge.mem_key.get() != Device::Hwc.gpa_mkey()) {
            return Err(CommandError::invalid("the request is not under the channel's memory key"));
        }
        let room = self.request.start(len);
        let mut room = room.ok_or_else(|| CommandError::invalid(format!("a request of {len} bytes")))?;
        for sge in sgl {
            let (piece, rest) = room.split_at_mut_checked(sge.size.get() as usize).unwrap_or_default();
            ram.read(sge.address.get(), piece).map_err(|error| CommandError::dma(error.to_string()))?;
            room = rest;
        }
        Ok(())
    }
    /// Parse and do the command; the answer is the length of the response and the length that its completion tells,
    /// unless none comes now.
    fn execute(
        &mut self,
        card: &Card,
        offer: &Profile,
        ram: &GuestRam<'_>,
        objects: &mut Objects,
        seq: u64,
    ) -> Option<(usize, usize)> {
        let Core { tracer, counters, .. } = &*card.core;
        let header = self.request.header();
        let (code, version) = (header.msg_type.get(), header.msg_version.get());
        let command = command::name(code).unwrap_or("UNKNOWN");
        let (claimed, len) = (header.msg_size.get(), self.request.len());
        if claimed as usize != len {
            card.core
                .broken(Rule::HwcMessage, || format!("{command} of {len} bytes says that it has {claimed}"));
        }
        let started = tracer.stamp_ns();
        let parsed = match offer.knows(code) {
            true => Command::parse(&self.request),
            false => Err(CommandError::unsupported("the profile has no such command")),
        };
        tracer.emit(|| {
            let fields = parsed.as_ref().map(Command::fields).unwrap_or_default();
            Event::HwcRequest { seq, command, code, version, fields }
        });
        if card.core.host.count_command(|| tracer.now_ns()) {
            card.queues.run_host(tracer.now_ns());
        }
        let hits = match card.core.host.watches(Point::Command) {
            true => faults::strike(card, code, command, seq),
            false => Vec::new(),
        };
        let refusal = faults::refusal(&hits);
        let is_refused = refusal.is_some();
        let result = refusal.map_or(parsed, Err).and_then(|parsed| {
            let origin = Origin { seq, code };
            parsed.execute(&mut Context { card, offer, objects, memory: ram.memory(), origin })
        });
        if let Err(error) = &result
            && !is_refused
        {
            let unknown = error.status == Status::Unsupported;
            let counter =
                if unknown { &counters.hwc_unknown_commands } else { &counters.hwc_failed_commands };
            count!(counter, "{command} ({code:#x}) answered {:#x}: {error}", error.status as u32);
            if error.status == Status::NotFound {
                card.core.broken(Rule::KnownObject, || format!("{command}: {error}"));
            }
        }
        let len = command::response(&header, &result, &mut self.response);
        let mut told = len;
        let mut comes = true;
        if !hits.is_empty() {
            let response = self.response.get_mut(..len).unwrap_or_default();
            told = faults::garble(card, ram, &hits, code, response) as usize;
            comes = faults::post_later(card, &mut self.late, &hits, response, told as u32);
        }
        if !faults::is_silent(&hits) {
            let status =
                ResponseHeader::read_from_prefix(self.response.as_slice()).map(|(head, _)| head.status);
            let status = status.map_or(0, U32::get);
            tracer.emit(|| {
                let duration_ns = tracer.stamp_ns().saturating_sub(started);
                response_event(seq, &header, command, &result, status, duration_ns)
            });
        }
        comes.then_some((len, told))
    }
    /// Post the completion of the send WQE, if `send`, and, with the bytes that were sent, of the receive WQE.
    fn complete(&self, card: &Card, ram: &GuestRam<'_>, send: bool, sent: Option<usize>) {
        let posted = card.queues.complete(ram, HWC_QUEUE, |cq| {
            let view = cq.view(ram);
            if send {
                cq.post(&view, &[0; Cqe::DATA], HWC_QUEUE, true)?;
            }
            let Some(sent) = sent else { return Ok(()) };
            let oob = RxOob {
                wqe_offset: self.rq.head().into(),
                tx_oob_data_size: U32::new(sent as u32),
                ..RxOob::default()
            };
            let mut data = [0; Cqe::DATA];
            data.iter_mut().zip(oob.as_bytes()).for_each(|(to, from)| *to = *from);
            cq.post(&view, &data, HWC_QUEUE, false)
        });
        if !matches!(posted, Some(Ok(()))) {
            count!(card.core.counters.hwc_lost_responses, "the channel's completion could not be posted");
        }
    }
}

/// Write `response` into the receive buffer; the answer is how many bytes got there.
fn write_response(buffer: &Wqe, ram: &GuestRam<'_>, response: &[u8]) -> usize {
    let mut rest = response;
    let mut sent = 0;
    for sge in buffer.sgl() {
        let (piece, later) = rest.split_at(rest.len().min(sge.size.get() as usize));
        if sge.mem_key.get() != Device::Hwc.gpa_mkey() || ram.write(sge.address.get(), piece).is_err() {
            break;
        }
        sent += piece.len();
        rest = later;
    }
    sent
}

fn bad_request(card: &Card, cause: &dyn std::fmt::Display) {
    count!(card.core.counters.hwc_bad_requests, "the hardware channel's request can't be read: {cause}");
    card.core.broken(Rule::HwcMessage, || cause.to_string());
}

fn response_event(
    seq: u64,
    header: &RequestHeader,
    command: &'static str,
    result: &CommandResult,
    status: u32,
    duration_ns: u64,
) -> Event {
    let (own_version, fields) = match result {
        Ok(reply) => (reply.version, reply.fields()),
        Err(_) => (1, Fields::default()),
    };
    let version = own_version.min(header.resp_msg_version.get());
    let code = header.msg_type.get();
    Event::HwcResponse { seq, command, code, version, status, duration_ns, fields }
}
