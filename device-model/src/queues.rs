//! All queues of the function, by kind and id, and the doorbells that reach them.
//!
//! A slot for every possible id is there from the start, so that a doorbell finds its queue without a lock: it
//! checks the page, stores the tail, and wakes whoever runs the queue if nobody is running it. Completion and event
//! queues are rung in place, under their own lock.
//!
//! Lock order: send queue or a vPort's receive side, completion queue; event queue alone; deadlines alone; MSI-X entries alone. The interrupt
//! leaves with no queue's lock held.

pub mod state;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::bar0::Doorbell;
use crate::config::DeviceConfig;
use crate::count;
use crate::counters::Counters;
use crate::dma::{Dma, GuestRam};
use crate::doors::{Waker, Work};
use crate::host::{CqeStrikes, HELD, Later, Plan, Point, Profile, strike_event, strike_interrupt};
use crate::observe::{Event, QueueKind, Tracer};
use crate::pci::msix::Msix;
use crate::pending::Pending;
use crate::ring::{CompletionQueue, EventQueue, Moderation, Notify, PostError, Rung, WorkQueue, Wqe};
use crate::rules::{Rule, Rules};
use crate::sync::lock;
use crate::timers::{Timer, Timers};
use crate::wire::queue::EventEntry;

/// Id of each queue of the hardware channel, in each kind's own numbering.
pub const HWC_QUEUE: u32 = 0;

/// A slot whose queue does not exist has no page.
const NO_PAGE: u32 = u32::MAX;

/// How often a deadline is put off while bus mastering is off, nanoseconds.
const BUS_MASTER_RETRY_NS: u64 = 1_000_000;

/// What every part of the device reports to and reaches out through.
pub struct Core {
    /// Events.
    pub tracer: Tracer,
    /// Counters.
    pub counters: Arc<Counters>,
    /// Rules.
    pub rules: Rules,
    /// Guest memory.
    pub dma: Dma,
    /// Interrupts.
    pub msix: Msix,
    /// Whoever runs the queues.
    pub waker: Arc<dyn Waker>,
    /// What the simulated host does wrong.
    pub host: Arc<Plan>,
    /// Deadlines.
    pub timers: Timers,
}

impl Core {
    /// The driver broke `rule`.
    pub fn broken(&self, rule: Rule, detail: impl FnOnce() -> String) {
        self.counters.rule_violations.bump();
        self.rules.broken(&self.tracer, rule, detail);
    }
    /// Have `timer` come due at `at_ns`.
    pub fn add_timer(&self, at_ns: u64, timer: Timer) {
        if self.timers.add(at_ns, timer) {
            self.waker.wake(Work::Timers);
        }
    }
    /// The simulated host wants `what` to come at `due_ns`, or when its faults are cleared.
    #[cold]
    pub fn put_off(&self, due_ns: u64, what: Later) {
        if !self.host.put_off(due_ns, what) {
            count!(self.counters.events_lost, "too much waits for its time: {what} is lost");
        } else if due_ns != HELD {
            self.add_timer(due_ns, Timer::Host);
        }
    }
    /// Interrupt on `vector`.
    #[inline]
    fn interrupt(&self, vector: u16) {
        let copies = match self.host.watches(Point::Msix) {
            false => 1,
            true => strike_interrupt(self, vector),
        };
        (0..copies).for_each(|_| self.msix.signal(vector));
    }
}

/// A place for the queue with one id.
pub struct Slot<Q> {
    page: AtomicU32,
    pending: Pending,
    /// A queue was here, whose last word may still come.
    parting: AtomicBool,
    queue: Mutex<Option<Q>>,
}

impl<Q> Slot<Q> {
    fn empty() -> Self {
        Self {
            page: AtomicU32::new(NO_PAGE),
            pending: Pending::default(),
            parting: AtomicBool::new(false),
            queue: Mutex::new(None),
        }
    }
    /// The queue, if there is one, until the guard goes.
    pub fn lock(&self) -> MutexGuard<'_, Option<Q>> {
        lock(&self.queue)
    }
    /// Work queues: the tail of the latest doorbell, bytes.
    pub fn tail(&self) -> u32 {
        self.pending.tail()
    }
    /// The same, for who is about to run the queue.
    pub fn look(&self) -> u32 {
        self.pending.look()
    }
    /// No queue has this id.
    pub fn is_free(&self) -> bool {
        self.page.load(Ordering::Acquire) == NO_PAGE
    }
    fn open(&self, page: u32, queue: Option<Q>) {
        *self.lock() = queue;
        self.pending.reset();
        self.parting.store(false, Ordering::Relaxed);
        self.page.store(page, Ordering::Release);
    }
    /// Take the queue out; whoever was using it has finished when this returns.
    fn close(&self) -> Option<Q> {
        self.page.store(NO_PAGE, Ordering::Release);
        let queue = self.lock().take();
        self.parting.fetch_or(queue.is_some(), Ordering::Relaxed);
        queue
    }
    /// The one doorbell that may come after the queue's end.
    fn take_last_word(&self) -> bool {
        self.parting.swap(false, Ordering::Relaxed)
    }
    /// The runner has found nothing left up to `seen`. `true` if a doorbell came meanwhile and the runner must go on.
    #[must_use]
    pub fn rest(&self, seen: u32) -> bool {
        self.pending.rest(seen)
    }
}

/// What a send or receive queue is made of.
#[derive(Debug)]
pub struct WqObject {
    /// Id, in the numbering of its kind.
    pub id: u32,
    /// The ring.
    pub ring: WorkQueue,
    /// Id of its completion queue.
    pub cq: u32,
    /// Index of its vPort.
    pub vport: usize,
    /// Memory key that its scatter/gather entries must carry.
    pub mem_key: u32,
    /// Completions for which the completion queue is known to have room, so that it need not be asked before every
    /// batch.
    pub room: u32,
    /// A WQE made no sense, so that the next can't be told: nothing more is taken from the ring.
    pub stopped: bool,
    /// Where frames are put together whose bytes change on the way out. Grows to the largest, then stays.
    pub scratch: Vec<u8>,
    /// Where WQEs are read to.
    pub wqe: Box<Wqe>,
    /// The vPort's bandwidth clamp holds the queue back until then, and it will be woken: nanoseconds of the device's
    /// clock.
    pub held_until: Option<u64>,
}

impl WqObject {
    /// A queue that has consumed nothing yet.
    pub fn new(id: u32, ring: WorkQueue, cq: u32, vport: usize, mem_key: u32) -> Self {
        Self {
            id,
            ring,
            cq,
            vport,
            mem_key,
            room: 0,
            stopped: false,
            scratch: Vec::new(),
            wqe: Box::default(),
            held_until: None,
        }
    }
}

/// How many ids of each kind there are, the hardware channel's included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Event queues.
    pub eqs: u32,
    /// Completion queues.
    pub cqs: u32,
    /// Send queues.
    pub sqs: u32,
    /// Receive queues.
    pub rqs: u32,
    /// The lowest id that is given out, of each kind.
    pub first: FirstIds,
}

/// Lowest ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstIds {
    /// Of event queues.
    pub eq: u32,
    /// Of completion queues.
    pub cq: u32,
    /// Of send queues.
    pub sq: u32,
    /// Of receive queues.
    pub rq: u32,
}

impl Default for FirstIds {
    /// Those behind the hardware channel's.
    fn default() -> Self {
        let first = HWC_QUEUE + 1;
        Self { eq: first, cq: first, sq: first, rq: first }
    }
}

impl FirstIds {
    fn of(profile: &Profile) -> Self {
        let first = |id: Option<u16>| id.map_or(HWC_QUEUE + 1, u32::from);
        let ids = &profile.ids;
        Self { eq: first(ids.eq), cq: first(ids.cq), sq: first(ids.sq), rq: first(ids.rq) }
    }
}

impl Limits {
    /// Queues beyond what the vPorts and the channel need: event queues of the RDMA function and of a second driver
    /// that shares the card.
    const SPARE_EQS: u32 = 64 + 1;

    /// Room for every queue that a driver of the card `config` describes may make.
    pub fn of(config: &DeviceConfig) -> Self {
        let pairs: u32 = config.vports.iter().map(|vport| u32::from(vport.max_queues)).sum();
        let first = FirstIds::of(&config.profile);
        Self {
            eqs: first.eq + pairs + Self::SPARE_EQS,
            cqs: first.cq + 2 * pairs,
            sqs: first.sq + pairs,
            rqs: first.rq + pairs,
            first,
        }
    }
}

impl Limits {
    /// Work queue objects that there can be.
    pub fn wqs(&self) -> u32 {
        self.sqs + self.rqs
    }
    /// Deadlines that there can be: each queue has one at a time.
    pub fn timers(&self) -> usize {
        (self.cqs + self.sqs) as usize
    }
}

/// Every queue of the function.
pub struct Queues {
    core: Arc<Core>,
    limits: Limits,
    eqs: Box<[Slot<EventQueue>]>,
    cqs: Box<[Slot<CompletionQueue>]>,
    sqs: Box<[Slot<WqObject>]>,
    /// Doorbells only: the rings are with the receive sides of their vPorts.
    rqs: Box<[Slot<()>]>,
}

fn slots<Q>(count: u32) -> Box<[Slot<Q>]> {
    (0..count).map(|_| Slot::empty()).collect()
}

impl Queues {
    /// No queues yet, room for `limits`.
    pub fn new(core: Arc<Core>, limits: Limits) -> Self {
        let Limits { eqs, cqs, sqs, rqs, first: _ } = limits;
        Self { core, limits, eqs: slots(eqs), cqs: slots(cqs), sqs: slots(sqs), rqs: slots(rqs) }
    }
    /// How many queues there can be.
    pub fn limits(&self) -> Limits {
        self.limits
    }
    /// What the device shares.
    pub fn core(&self) -> &Core {
        &self.core
    }
    /// Slot of a send queue; `None` for an id beyond the limits.
    pub fn sq(&self, id: u32) -> Option<&Slot<WqObject>> {
        self.sqs.get(id as usize)
    }
    /// Slot of a receive queue; `None` for an id beyond the limits.
    pub fn rq(&self, id: u32) -> Option<&Slot<()>> {
        self.rqs.get(id as usize)
    }
    /// Slot of a completion queue; `None` for an id beyond the limits.
    pub fn cq(&self, id: u32) -> Option<&Slot<CompletionQueue>> {
        self.cqs.get(id as usize)
    }
    /// Slot of an event queue; `None` for an id beyond the limits.
    pub fn eq(&self, id: u32) -> Option<&Slot<EventQueue>> {
        self.eqs.get(id as usize)
    }

    /// Do `post` with completion queue `id` under its lock, then notify if that is due: for posting a batch. `None`
    /// if there is no such queue.
    pub fn complete<R>(
        &self,
        ram: &GuestRam<'_>,
        id: u32,
        post: impl FnOnce(&mut CompletionQueue) -> R,
    ) -> Option<R> {
        let mut slot = self.cq(id)?.lock();
        let cq = slot.as_mut()?;
        if self.core.host.watches(Point::Cqe) != cq.is_tampered() {
            self.tamper(cq, id);
        }
        let result = post(cq);
        let (notify, eq) = (cq.notification(|| self.core.tracer.now_ns()), cq.parent_eq());
        let overdue = cq.is_overdue();
        drop(slot);
        if overdue {
            self.core.broken(Rule::ConsumerLaps, || format!("CQ {id} has not been rung for seven laps"));
        }
        if self.notify(id, notify) {
            self.post_event(ram, eq, EventEntry::Completion(id));
        }
        Some(result)
    }
    /// Faults for completions were set or cleared.
    #[cold]
    fn tamper(&self, cq: &mut CompletionQueue, id: u32) {
        let strikes = || Box::new(CqeStrikes { core: self.core.clone(), cq: id }) as Box<_>;
        cq.set_tamper((!cq.is_tampered()).then(strikes));
    }
    /// Whether completion queue `id` notifies now; later, if that is what `notify` says.
    #[inline]
    fn notify(&self, id: u32, notify: Notify) -> bool {
        if let Notify::At(at_ns) = notify {
            self.add_timer(at_ns, Timer::Moderation { cq: id });
        }
        notify == Notify::Now
    }
    /// Have `timer` come due at `at_ns`.
    pub fn add_timer(&self, at_ns: u64, timer: Timer) {
        self.core.add_timer(at_ns, timer);
    }
    /// Do what has come due; the answer is the next deadline.
    pub fn run_timers(&self) -> Option<u64> {
        let timers = &self.core.timers;
        timers.begin();
        let now_ns = self.core.tracer.now_ns();
        while let Some(timer) = timers.pop(now_ns) {
            match timer {
                Timer::Moderation { cq } => self.expire(cq, now_ns),
                Timer::Shaping { sq } => self.resume(sq),
                Timer::Host => {
                    self.run_host(now_ns);
                    // It may have put off a response.
                    self.resume(HWC_QUEUE);
                }
            }
        }
        timers.earliest()
    }
    /// Do what the simulated host wants done by now.
    pub fn run_host(&self, now_ns: u64) {
        loop {
            let due = self.core.host.take_due(now_ns);
            if due.is_empty() {
                break;
            }
            for what in due {
                if self.with_ram(|ram| self.raise(ram, what)).is_none() {
                    count!(self.core.counters.events_lost, "{what} is lost: bus mastering is off");
                }
            }
        }
        if let Some(due_ns) = self.core.host.earliest() {
            self.core.add_timer(due_ns, Timer::Host);
        }
    }
    /// Do `what` now, whatever faults are set.
    pub fn raise(&self, ram: &GuestRam<'_>, what: Later) {
        let done = match what {
            Later::Event { eq, eqe } => {
                self.core.tracer.emit(|| Event::HostEvent { detail: what.to_string() });
                self.post_whole_event(ram, eq, EventEntry::Raw(eqe))
            }
            Later::Completion { cq, cqe } => {
                let post = |queue: &mut CompletionQueue| queue.post_raw(&queue.view(ram), &cqe).is_ok();
                self.complete(ram, cq, post) == Some(true)
            }
            Later::Interrupt { vector } => {
                self.core.msix.signal(vector);
                true
            }
        };
        if !done {
            count!(self.core.counters.events_lost, "{what} is lost: there is nobody to take it");
        }
    }
    /// Nothing is to be done later any more.
    pub fn clear_timers(&self) {
        self.core.timers.clear();
        self.core.host.forget_put_off();
    }
    /// The wait of completion queue `id` is over.
    fn expire(&self, id: u32, now_ns: u64) {
        let Some(memory) = self.core.dma.map() else {
            // Bus mastering may come back.
            return self.add_timer(now_ns.saturating_add(BUS_MASTER_RETRY_NS), Timer::Moderation { cq: id });
        };
        let Some(slot) = self.cq(id) else { return };
        let mut queue = slot.lock();
        let Some(cq) = queue.as_mut() else { return };
        let (notify, eq) = (cq.expire(now_ns), cq.parent_eq());
        drop(queue);
        if self.notify(id, notify) {
            self.post_event(&GuestRam::new(&memory), eq, EventEntry::Completion(id));
        }
    }
    /// Post `event` to event queue `id` and interrupt if it is armed. `false` if there is no such queue or the event
    /// is lost; that is counted.
    pub fn post_event(&self, ram: &GuestRam<'_>, id: u32, event: EventEntry) -> bool {
        if !self.core.host.watches(Point::Eqe) {
            return self.post_whole_event(ram, id, event);
        }
        let (eqe, copies) = strike_event(&self.core, id, event.entry());
        (0..copies).all(|_| self.post_whole_event(ram, id, EventEntry::Raw(eqe)))
    }
    /// As [`post_event`](Self::post_event), whatever faults are set.
    fn post_whole_event(&self, ram: &GuestRam<'_>, id: u32, event: EventEntry) -> bool {
        let Some(slot) = self.eq(id) else { return false };
        let mut queue = slot.lock();
        let Some(eq) = queue.as_mut() else { return false };
        let posted = eq.post(ram, event);
        let vector = eq.msix();
        drop(queue);
        match posted {
            Ok(interrupt) => {
                self.core.tracer.emit(|| Event::Eqe { eq: id, kind: event.kind() });
                if interrupt {
                    self.core.interrupt(vector);
                }
                true
            }
            Err(error) => {
                count!(self.core.counters.events_lost, "event lost on EQ {id}: {error}");
                false
            }
        }
    }

    /// A doorbell through `page`.
    pub fn doorbell(&self, page: u32, doorbell: Doorbell) {
        let live = match doorbell {
            Doorbell::Sq { id, tail } => self.ring_sq(page, id, tail),
            Doorbell::Rq { id, tail, wqe_count } => self.ring_rq(page, id, tail, wqe_count),
            Doorbell::Cq { id, tail, arm } => self.ring_cq(page, id, tail, arm),
            Doorbell::Eq { id, tail, arm } => self.ring_eq(page, id, tail, arm),
            Doorbell::CqModeration { id, usec, completions } => {
                self.ring_moderation(page, id, usec, completions)
            }
            // Accepted and without effect: armed completions are not offered.
            Doorbell::RqClientData => true,
        };
        if !live {
            self.core.counters.doorbell_dead.bump();
            if !self.is_last_word(doorbell) {
                self.core.broken(Rule::DoorbellLiveQueue, || format!("{doorbell:?} on page {page}"));
            }
        }
    }
    /// A doorbell that may come when its queue is gone, and breaks no rule: an interrupt's handler first wakes whoever
    /// waits for the event, and then rings for the EQ (`mana_gd_process_eq_events`, gdma_main.c). The last answer of the
    /// hardware channel is what the driver's unload waits for, which tears the channel down at once; the CQ is rung that
    /// late, too (`mana_hwc_comp_event`, hw_channel.c), and before 6.11 the receive buffer is posted that late. A test
    /// event is what the destruction of an EQ waits for (`mana_gd_test_eq`); one handler at most is on its way then.
    fn is_last_word(&self, doorbell: Doorbell) -> bool {
        match doorbell {
            Doorbell::Eq { id: HWC_QUEUE, .. }
            | Doorbell::Cq { id: HWC_QUEUE, .. }
            | Doorbell::Rq { id: HWC_QUEUE, .. } => true,
            Doorbell::Eq { id, arm: true, .. } => self.eqs.get(id as usize).is_some_and(Slot::take_last_word),
            _ => false,
        }
    }
    fn ring_sq(&self, page: u32, id: u32, tail: u32) -> bool {
        let Some(slot) = live(&self.sqs, page, id) else { return false };
        if slot.pending.ring(tail) {
            self.core.waker.wake(if id == HWC_QUEUE { Work::Hwc } else { Work::Transmit { sq: id } });
        }
        true
    }
    fn ring_rq(&self, page: u32, id: u32, tail: u32, wqe_count: u8) -> bool {
        let Some(slot) = live(&self.rqs, page, id) else { return false };
        slot.pending.post(tail);
        if wqe_count != 0 {
            self.core.broken(Rule::RqDoorbellCount, || format!("count {wqe_count} for RQ {id}"));
        }
        if id == HWC_QUEUE {
            self.resume(HWC_QUEUE);
        }
        true
    }
    fn ring_cq(&self, page: u32, id: u32, tail: u32, arm: bool) -> bool {
        let Some(slot) = live(&self.cqs, page, id) else { return false };
        if !self.core.dma.is_enabled() {
            return true;
        }
        let mut queue = slot.lock();
        let Some(cq) = queue.as_mut() else { return false };
        let rung = cq.ring(tail, arm);
        let held = if rung.freed && cq.is_holding() { self.with_ram(|ram| cq.post_held(ram)) } else { None };
        let (notify, eq) = (cq.notification(|| self.core.tracer.now_ns()), cq.parent_eq());
        let waiter = cq.take_waiter();
        drop(queue);
        self.rung(QueueKind::Cq, id, tail, rung, held);
        if self.notify(id, notify) {
            self.with_ram(|ram| self.post_event(ram, eq, EventEntry::Completion(id)));
        }
        if let Some(sq) = waiter {
            self.resume(sq);
        }
        true
    }
    fn ring_moderation(&self, page: u32, id: u32, usec: Option<u16>, completions: Option<u16>) -> bool {
        let Some(slot) = live(&self.cqs, page, id) else { return false };
        let mut queue = slot.lock();
        let Some(cq) = queue.as_mut() else { return false };
        let old = cq.moderation();
        cq.moderate(Moderation {
            usec: usec.unwrap_or(old.usec),
            completions: completions.unwrap_or(old.completions),
        });
        if !self.core.dma.is_enabled() {
            return true;
        }
        let (notify, eq) = (cq.notification(|| self.core.tracer.now_ns()), cq.parent_eq());
        drop(queue);
        if self.notify(id, notify) {
            self.with_ram(|ram| self.post_event(ram, eq, EventEntry::Completion(id)));
        }
        true
    }
    fn ring_eq(&self, page: u32, id: u32, tail: u32, arm: bool) -> bool {
        let Some(slot) = live(&self.eqs, page, id) else { return false };
        if !self.core.dma.is_enabled() {
            return true;
        }
        let mut queue = slot.lock();
        let Some(eq) = queue.as_mut() else { return false };
        let rung = eq.ring(tail, arm);
        let held = if rung.freed && eq.is_holding() { self.with_ram(|ram| eq.post_held(ram)) } else { None };
        let (interrupt, vector) = (eq.take_notification(), eq.msix());
        drop(queue);
        self.rung(QueueKind::Eq, id, tail, rung, held);
        if interrupt {
            self.core.interrupt(vector);
        }
        true
    }
    /// Do `work` with guest memory, unless bus mastering is off.
    fn with_ram<R>(&self, work: impl FnOnce(&GuestRam<'_>) -> R) -> Option<R> {
        let memory = self.core.dma.map()?;
        Some(work(&GuestRam::new(&memory)))
    }
    /// Account for a consumer's doorbell, and for the kept entries that it has made room for.
    #[inline]
    fn rung(&self, kind: QueueKind, id: u32, tail: u32, rung: Rung, held: Option<Result<(), PostError>>) {
        if rung.impossible {
            self.core.counters.doorbell_tail.bump();
            self.core.broken(Rule::ConsumerTail, || format!("tail {tail} for {kind:?} {id}"));
        }
        if rung.backward {
            self.core.broken(Rule::ConsumerForward, || format!("tail {tail} for {kind:?} {id} goes back"));
        }
        if let Some(Err(error)) = held {
            count!(self.core.counters.completions_lost, "entry lost on {kind:?} {id}: {error}");
        }
    }
    /// Have send queue `id` run again if it has something posted: what it waited for has come.
    pub fn resume(&self, id: u32) {
        let Some(slot) = self.sq(id) else { return };
        if !slot.is_free() && slot.pending.resume() {
            self.core.waker.wake(if id == HWC_QUEUE { Work::Hwc } else { Work::Transmit { sq: id } });
        }
    }
    /// Have every live send queue run again.
    pub fn resume_all(&self) {
        (0..self.sqs.len() as u32).for_each(|id| self.resume(id));
    }

    /// Lowest free id of a kind, the channel's own left out; `None` when all are taken. Ids are given out and taken
    /// back under the control plane's lock.
    pub fn free_id(&self, kind: QueueKind) -> Option<u32> {
        match kind {
            QueueKind::Eq => first_free(&self.eqs, self.limits.first.eq),
            QueueKind::Cq => first_free(&self.cqs, self.limits.first.cq),
            QueueKind::Sq => first_free(&self.sqs, self.limits.first.sq),
            QueueKind::Rq => first_free(&self.rqs, self.limits.first.rq),
        }
    }
    /// Event queue `id` exists from now on and is rung through `page`.
    pub fn open_eq(&self, id: u32, page: u32, eq: EventQueue) {
        let (msix, entries) = (Some(eq.msix()), eq.entries());
        if let Some(slot) = self.eq(id) {
            slot.open(page, Some(eq));
            self.created(QueueKind::Eq, id, None, msix, entries);
        }
    }
    /// Completion queue `id` exists from now on and is rung through `page`.
    pub fn open_cq(&self, id: u32, page: u32, cq: CompletionQueue) {
        let (eq, entries) = (Some(cq.parent_eq()), cq.entries());
        if let Some(slot) = self.cq(id) {
            slot.open(page, Some(cq));
            self.created(QueueKind::Cq, id, eq, None, entries);
        }
    }
    /// Send queue `wq` exists from now on and is rung through `page`.
    pub fn open_sq(&self, page: u32, wq: WqObject) {
        let (id, entries) = (wq.id, wq.ring.entries());
        if let Some(slot) = self.sq(id) {
            slot.open(page, Some(wq));
            self.created(QueueKind::Sq, id, None, None, entries);
        }
    }
    /// Receive queue `id` with WQEs for `entries` basic units exists from now on and is rung through `page`.
    pub fn open_rq(&self, page: u32, id: u32, entries: u32) {
        if let Some(slot) = self.rq(id) {
            slot.open(page, Some(()));
            self.created(QueueKind::Rq, id, None, None, entries);
        }
    }
    /// The work queues of the hardware channel, whose rings the channel itself keeps, are rung through `page`.
    pub fn open_hwc(&self, page: u32) {
        self.sq(HWC_QUEUE).into_iter().for_each(|slot| slot.open(page, None));
        self.rq(HWC_QUEUE).into_iter().for_each(|slot| slot.open(page, None));
    }
    fn created(&self, kind: QueueKind, id: u32, eq: Option<u32>, msix: Option<u16>, entries: u32) {
        self.core.tracer.emit(|| Event::QueueCreate { kind, id, eq, msix, entries });
    }
    /// End a queue: when this returns the card touches its ring no more.
    pub fn close(&self, kind: QueueKind, id: u32) {
        let index = id as usize;
        let existed = match kind {
            QueueKind::Eq => self.eqs.get(index).is_some_and(|slot| slot.close().is_some()),
            QueueKind::Cq => self.cqs.get(index).is_some_and(|slot| slot.close().is_some()),
            QueueKind::Sq => self.sqs.get(index).is_some_and(|slot| slot.close().is_some()),
            QueueKind::Rq => self.rqs.get(index).is_some_and(|slot| slot.close().is_some()),
        };
        if existed {
            self.core.tracer.emit(|| Event::QueueDestroy { kind, id });
        }
    }
}

/// The slot of `id` if its queue exists and is rung through `page`.
fn live<Q>(slots: &[Slot<Q>], page: u32, id: u32) -> Option<&Slot<Q>> {
    slots.get(id as usize).filter(|slot| slot.page.load(Ordering::Acquire) == page)
}

fn first_free<Q>(slots: &[Slot<Q>], first: u32) -> Option<u32> {
    let free = slots.iter().enumerate().skip(first as usize).find(|(_, slot)| slot.is_free());
    free.map(|(id, _)| id as u32)
}
