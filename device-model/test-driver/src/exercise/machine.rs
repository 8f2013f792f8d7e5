//! One card and the machine around it, made once and reset for every case, and a driver's least: registers, the
//! hardware channel, commands.

use std::ops::Range;
use std::sync::Arc;

use mana_device::config::{BarLocation, DeviceConfig, TxPolicy, VportConfig};
use mana_device::doors::{Clock, Memory, Port, PortCapabilities, RxFrame, Work};
use mana_device::observe::Observer;
use mana_device::state::State;
use mana_device::{Host, ManaDevice, Ran};

use super::digest;
use super::doors::{self, Cable, Due, VECTORS, Vectors};
use super::model::{Model, dword, field};
use super::port::Registration;
use super::ram::{Holder, Image, PAGE, Ram, address};
use crate::queues::doorbell;
use crate::smc::Establish;
use crate::world::ManualClock;

/// Pages of the hardware channel's event, completion, receive and send queue.
pub const CHANNEL: [usize; 4] = [0, 1, 2, 3];
/// Page that requests are written to.
pub const REQUEST: usize = 4;
/// Page that responses are written to.
pub const RESPONSE: usize = 5;
/// First page that the data path's rings and buffers are made of.
pub const FREE: usize = 6;
/// vPorts of the card.
pub const VPORTS: usize = 2;
/// Queue pairs of each vPort.
pub const MAX_QUEUES: u16 = 4;
/// Entries of an indirection table.
pub const TABLE: u16 = 16;
/// Bytes of an answer that are looked at.
const ANSWER: usize = 64;
/// Entries of the channel's completion queue.
const CHANNEL_CQES: u32 = PAGE as u32 / 64;
/// Requests or packets in one go.
const BUDGET: usize = 16;
/// A card that is still busy after as many goes will never be idle: a case has fewer WQEs than that.
const MAX_GOES: usize = 1 << 16;
/// The shared-memory window in BAR0.
const SHM: Range<u64> = 0x40..0x60;
/// BAR of the MSI-X table and the pending bits.
pub const MSIX_BAR: u8 = 4;
/// Where the pending bits are.
pub const PBA: u64 = 0x800;

/// The driver's end of the hardware channel.
#[derive(Clone, Copy, Default)]
pub struct Channel {
    /// Bytes posted to the send queue.
    pub sq_tail: u32,
    /// Bytes posted to the receive queue.
    pub rq_tail: u32,
    /// Completions taken, from the number of entries on.
    pub cq_head: u32,
    /// Events taken, from the number of entries on.
    pub eq_head: u32,
    /// Memory key of its buffers.
    pub key: u32,
}

/// The start of a response that has arrived.
#[derive(Clone, Copy)]
pub struct Answer {
    bytes: [u8; ANSWER],
    len: usize,
}

impl Answer {
    /// Its bytes, as many as arrived and are kept.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
    /// Status of the command.
    pub fn status(&self) -> u32 {
        dword(self.bytes(), 24)
    }
    /// The dword at `at`.
    pub fn dword(&self, at: usize) -> u32 {
        dword(self.bytes(), at)
    }
}

/// A card that cases can be played to, one after another.
pub struct Machine {
    /// The card.
    pub device: ManaDevice,
    /// Guest memory.
    pub ram: Ram,
    /// What must be alive.
    pub model: Model,
    /// The driver's end of the hardware channel.
    pub channel: Channel,
    /// Interrupts.
    pub vectors: Arc<Vectors>,
    /// The cables, in vPort order; the second does offloads.
    pub cables: [Arc<Cable>; VPORTS],
    /// The clock.
    pub clock: Arc<ManualClock>,
    due: Arc<Due>,
    power_on: (State, Vec<u8>),
    /// With the first and with the second port open.
    up: [Option<Box<Moment>>; VPORTS],
    /// Nothing was done since the last reset.
    fresh: bool,
    doorbells: u64,
    seen: u64,
}

/// A machine at one moment.
struct Moment {
    card: State,
    memory: Image,
    model: Model,
    channel: Channel,
    vectors: doors::State,
    seen: u64,
    registration: Registration,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// A card with two vPorts, the RDMA function, few vectors and few doorbell pages: small, so that a reset is quick.
    ///
    /// # Panics
    /// The host has no memory.
    pub fn new() -> Self {
        Self::with(None)
    }
    /// As [`new`](Self::new); `observer` is told of every step, so that whatever the guest sends is also described.
    ///
    /// # Panics
    /// The host has no memory.
    pub fn with(observer: Option<Arc<dyn Observer>>) -> Self {
        let vport = |last| VportConfig { mac: [2, 0, 0, 0, 0, last], max_queues: MAX_QUEUES };
        let config = DeviceConfig {
            vports: vec![vport(1), vport(2)],
            max_msix: VECTORS as u32,
            msix_table_size: VECTORS as u16,
            msix_table: BarLocation { bar: MSIX_BAR, offset: 0 },
            msix_pba: BarLocation { bar: MSIX_BAR, offset: PBA as u32 },
            rdma: true,
            doorbell_pages: 16,
            indirection_entries: TABLE,
            ..DeviceConfig::default()
        };
        let ram = Ram::default();
        let (vectors, due, clock) =
            (Arc::<Vectors>::default(), Arc::<Due>::default(), Arc::<ManualClock>::default());
        let all = PortCapabilities { checksum: true, segmentation: true };
        let cables = [PortCapabilities::default(), all].map(|does| Arc::new(Cable::new(does)));
        let host = Host {
            memory: Memory::new(ram.mmap()),
            msi: vectors.clone(),
            clock: clock.clone(),
            waker: due.clone(),
            ports: cables.iter().map(|cable| cable.clone() as Arc<dyn Port>).collect(),
            observer,
        };
        let device = ManaDevice::new(config, host).expect("the card takes this configuration");
        let power_on = device.save();
        let power_on = (power_on.clone(), power_on.to_bytes().expect("a state has its bytes"));
        let mut machine = Self {
            device,
            ram,
            model: Model::default(),
            channel: Channel::default(),
            vectors,
            cables,
            clock,
            due,
            power_on,
            up: [None, None],
            fresh: true,
            doorbells: 0,
            seen: 0,
        };
        machine.doorbells = u64::from_le_bytes(machine.read(0, 0x08));
        machine.seen = 0;
        machine.fresh = true;
        machine
    }
    /// The end of a case: memory is looked at, then the machine is reset.
    ///
    /// # Panics
    /// The card wrote where it had no business, or keeps something over the reset.
    pub fn end(&mut self) {
        if self.vectors.has_mastered() {
            self.ram.check();
        }
        self.vectors.reset();
        self.device.reset();
        let left: u64 = self.device.ledger().0.iter().map(|(_, count)| count).sum();
        assert_eq!(left, 0, "a reset leaves objects behind: {:?}", self.device.ledger());
        assert_eq!(self.device.run_timers(), None, "a reset leaves deadlines behind");
        for port in 0..VPORTS {
            self.device.set_tx_policy(port, TxPolicy::default());
        }
        self.due.clear();
        self.cables.iter().for_each(|cable| cable.reset());
        self.ram.reset();
        self.model = Model::default();
        self.channel = Channel::default();
        self.seen = 0;
        self.fresh = true;
    }
    /// Nothing was done since the last reset.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }
    /// Keep this moment, with vPort `port` open.
    pub fn remember(&mut self, port: usize, registration: Registration) {
        self.up[port] = Some(Box::new(Moment {
            card: self.device.save(),
            memory: self.ram.image(),
            model: self.model.clone(),
            channel: self.channel,
            vectors: self.vectors.state(),
            seen: self.seen,
            registration,
        }));
    }
    /// A machine as new becomes what it was when vPort `port` was open.
    ///
    /// # Panics
    /// The card refuses its own state.
    pub fn recall(&mut self, port: usize) -> Option<Registration> {
        let moment = self.up[port].as_deref()?;
        self.fresh = false;
        self.ram.set(&moment.memory);
        self.model.clone_from(&moment.model);
        self.channel = moment.channel;
        self.vectors.set(&moment.vectors);
        self.seen = moment.seen;
        let registration = moment.registration;
        let loaded = self.device.load(&moment.card);
        assert!(loaded.is_ok(), "the card can't be as it was: {loaded:?}");
        self.device.resume();
        self.settle();
        Some(registration)
    }
    /// The state of the card before anybody has touched it, as bytes.
    pub fn power_on_bytes(&self) -> &[u8] {
        &self.power_on.1
    }
    /// Become what the card was before anybody had touched it, what no reset resets included.
    ///
    /// # Panics
    /// The card refuses.
    pub fn power_on(&mut self) {
        let loaded = self.device.load(&self.power_on.0);
        assert!(loaded.is_ok(), "the card can't be as it was: {loaded:?}");
    }
    /// A number for everything that the card has shown since the last reset, but for the counters in responses:
    /// those survive one.
    pub fn digest(&self) -> u64 {
        let cables =
            self.cables.iter().fold(self.seen, |sum, cable| digest(sum, &cable.digest().to_le_bytes()));
        digest(cables, &self.vectors.digest().to_le_bytes()) ^ self.ram.digest(RESPONSE)
    }
    /// What the card showed counts for [`digest`](Self::digest).
    pub fn see(&mut self, bytes: &[u8]) {
        self.seen = digest(self.seen, bytes);
    }

    /// Configuration read of 1, 2 or 4 bytes.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.device.config_read(offset, data);
        self.see(data);
    }
    /// Configuration write of 1, 2 or 4 bytes.
    ///
    /// # Panics
    /// What it sets off is wrong.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.fresh = false;
        self.vectors.config(offset, data);
        let flr = data.iter().zip(offset..).any(|(byte, at)| at == 0x69 && byte & 0x80 != 0);
        if flr {
            self.model.end(&mut self.ram);
            self.vectors.reset_function();
        }
        let effect = self.device.config_write(offset, data);
        assert!(!flr || effect.bars_changed, "a function-level reset moves the BARs");
        if flr {
            self.model.compare(&self.device.ledger());
        }
        self.see(&[effect.bars_changed.into()]);
    }
    /// Read from a BAR; all ones where nothing answers.
    pub fn read<const N: usize>(&mut self, bar: u8, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.bar_read(bar, offset, &mut data);
        data
    }
    /// Read from a BAR.
    ///
    /// # Panics
    /// An access that hits nothing does not read as all ones.
    pub fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.device.bar_read(bar, offset, data).is_err() {
            assert!(data.iter().all(|&byte| byte == 0xff), "a read of nothing is all ones");
        }
        self.see(data);
    }
    /// Write to a BAR.
    pub fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.fresh = false;
        let aligned = matches!(data.len(), 4 | 8) && offset.is_multiple_of(data.len() as u64);
        if bar == MSIX_BAR && offset < VECTORS as u64 * 16 && aligned {
            for (at, bytes) in data.chunks_exact(4).enumerate() {
                self.vectors.table(offset as usize + 4 * at, dword(bytes, 0));
            }
        }
        let request = if bar == 0 { self.expect_request(offset, data) } else { None };
        let taken = self.device.bar_write(bar, offset, data).is_ok();
        if let Some(eq) = request {
            self.requested(eq);
        }
        self.see(&[taken.into()]);
    }
    /// Doorbell `register` of `page`.
    pub fn ring(&mut self, page: u32, register: u64, value: u64) {
        let offset = self.doorbells + u64::from(page) * PAGE as u64 + register;
        // A write that nothing takes is the guest's own fault.
        let _ = self.device.bar_write(0, offset, &value.to_le_bytes());
    }
    /// Where doorbell page 0 is.
    pub fn doorbells(&self) -> u64 {
        self.doorbells
    }
    /// Program a vector of the MSI-X table.
    pub fn vector(&mut self, vector: u16, data: u32, masked: bool) {
        let at = u64::from(vector) * 16;
        self.bar_write(MSIX_BAR, at, &0xfee0_0000_u64.to_le_bytes());
        self.bar_write(MSIX_BAR, at + 8, &data.to_le_bytes());
        self.bar_write(MSIX_BAR, at + 12, &u32::from(masked).to_le_bytes());
    }
    /// Memory Space, Bus Master, and MSI-X with all vectors unmasked.
    pub fn enable(&mut self) {
        self.config_write(0x04, &[6, 0]);
        self.config_write(0x52, &[0, 0x80]);
        (0..VECTORS as u16).for_each(|vector| self.vector(vector, vector.into(), false));
    }

    /// Have the card do what it was woken for.
    ///
    /// # Panics
    /// It is never idle.
    pub fn settle(&mut self) {
        for _ in 0..MAX_GOES {
            let Some(work) = self.due.take() else { return };
            let mut goes = MAX_GOES;
            while self.device.run(work, BUDGET) == Ran::More {
                goes -= 1;
                assert!(goes > 0, "{work:?} never becomes idle");
            }
        }
        panic!("the card is never idle");
    }
    /// Run one piece of the card, whether it was woken or not, and no further than its budget.
    pub fn run(&mut self, work: Work, budget: usize) {
        let _ = self.device.run(work, budget);
    }
    /// Time goes by.
    ///
    /// # Panics
    /// The card leaves a deadline that has passed.
    pub fn pass(&mut self, ns: u64) {
        self.clock.advance(ns);
        let deadline = self.device.run_timers();
        assert!(deadline.is_none_or(|deadline| deadline > self.clock.now_ns()), "a deadline has passed");
    }
    /// Frames come in on the cable of vPort `port`.
    ///
    /// # Panics
    /// The card takes more than there are.
    pub fn deliver(&mut self, port: usize, frames: &[RxFrame<'_>]) {
        let taken = self.device.deliver(port, frames);
        assert!(taken <= frames.len(), "{taken} of {} frames are delivered", frames.len());
        self.see(&taken.to_le_bytes());
    }

    /// ESTABLISH_HWC with these pages and this vector; whether the card says that it worked.
    pub fn establish(&mut self, establish: &Establish) -> bool {
        for (dword, at) in establish.dwords().iter().zip((0x40..).step_by(4)) {
            self.bar_write(0, at, &dword.to_le_bytes());
        }
        self.bar_write(0, 0x5c, &1_u32.to_le_bytes());
        self.model.channel
    }
    /// The guest is about to complete a shared-memory request with a write of `data` at `offset`. What the driver had
    /// ends; what a new channel needs is granted.
    fn expect_request(&mut self, offset: u64, data: &[u8]) -> Option<u64> {
        if offset < SHM.start || offset.checked_add(data.len() as u64) != Some(SHM.end) {
            return None;
        }
        let mut window = [0; 32];
        for (dword, at) in window.chunks_exact_mut(4).zip((SHM.start..).step_by(4)) {
            self.device.bar_read(0, at, dword).ok()?;
        }
        window[(offset - SHM.start) as usize..].copy_from_slice(data);
        match window[28] & 7 {
            1 => {}
            2 if self.model.channel => {
                self.model.end(&mut self.ram);
                return None;
            }
            _ => return None,
        }
        self.model.end(&mut self.ram);
        let high = u64::from(u16::from_le_bytes([window[24], window[25]]));
        let page = |index: usize| {
            let low = u64::from_le_bytes(field(&window, 6 * index)) & 0xffff_ffff_ffff;
            (low | (high >> (4 * index) & 0xf) << 48) << 12
        };
        let ring = |page: u64| page..page.saturating_add(PAGE as u64);
        for own in [page(0), page(1)] {
            self.ram.clear(own);
            self.model.grant_ring(&mut self.ram, Holder::Channel, ring(own));
        }
        for own in [page(2), page(3), address(REQUEST)] {
            self.model.reads(&mut self.ram, Holder::Channel, ring(own));
        }
        self.model.grant_ring(&mut self.ram, Holder::Channel, ring(address(RESPONSE)));
        if (0..CHANNEL.len()).any(|index| page(index) != address(CHANNEL[index])) {
            // This driver looks at its own pages only.
            self.model.lose(&mut self.ram);
        }
        Some(page(0))
    }
    /// The answer to a request for a channel whose event queue is at `eq` is there.
    fn requested(&mut self, eq: u64) {
        let mut header = [0; 4];
        self.device.bar_read(0, SHM.end - 4, &mut header).expect("the window answers");
        self.model.channel = header[1] == 0;
        if !self.model.channel {
            self.model.end(&mut self.ram);
        }
        // The tenth event is the memory key's.
        let told = if eq == address(CHANNEL[0]) { self.ram.read(eq + 9 * 16) } else { [0; 4] };
        self.channel = Channel {
            cq_head: CHANNEL_CQES,
            eq_head: PAGE as u32 / 16,
            key: u32::from_le_bytes(told) & 0xff_ffff,
            ..Channel::default()
        };
    }
    /// As a driver establishes its channel.
    pub fn open(&mut self, msix: u16) -> bool {
        let [eq, cq, rq, sq] = CHANNEL.map(address);
        self.establish(&Establish { eq, cq, rq, sq, msix })
    }
    /// DESTROY_HWC.
    ///
    /// # Panics
    /// Something outlives the channel.
    pub fn close(&mut self) {
        self.bar_write(0, 0x5c, &2_u32.to_le_bytes());
        self.model.compare(&self.device.ledger());
    }
    /// Write `request` to its page, post it and a buffer of `room` bytes for the response. Nothing is rung for.
    pub fn post(&mut self, request: &[u8], room: u32) {
        let Channel { key, sq_tail, rq_tail, .. } = self.channel;
        let ring = |page: usize, tail: u32| address(CHANNEL[page]) + u64::from(tail) % PAGE as u64;
        let mut wqe = [0; 64];
        self.ram.write(address(REQUEST), &request[..request.len().min(PAGE)]);
        wqe[4..8].copy_from_slice(&(1_u32 | 6 << 8).to_le_bytes());
        wqe[32..48].copy_from_slice(&sge(address(REQUEST), key, request.len() as u32));
        self.ram.write(ring(3, sq_tail), &wqe);
        wqe = [0; 64];
        wqe[4..8].copy_from_slice(&(1_u32 | 2 << 8).to_le_bytes());
        wqe[16..32].copy_from_slice(&sge(address(RESPONSE), key, room));
        self.ram.write(ring(2, rq_tail), &wqe[..32]);
        self.channel.sq_tail = sq_tail.wrapping_add(64);
        self.channel.rq_tail = rq_tail.wrapping_add(32);
    }
    /// Send `request` and have the card answer it.
    ///
    /// # Panics
    /// The answer is not one to this request, or the ledger is wrong after it.
    pub fn command(&mut self, request: &[u8]) -> Option<Answer> {
        self.command_into(request, PAGE as u32)
    }
    /// As [`command`](Self::command), with a buffer of `room` bytes for the response.
    ///
    /// # Panics
    /// As [`command`](Self::command).
    pub fn command_into(&mut self, request: &[u8], room: u32) -> Option<Answer> {
        self.post(request, room);
        self.ring(0, doorbell::RQ, u64::from(self.channel.rq_tail) << 32);
        self.ring(0, doorbell::SQ, u64::from(self.channel.sq_tail) << 32);
        self.settle();
        let answer = self.reap(request);
        if let Some(answer) = &answer {
            self.model.answered(&mut self.ram, request, answer.bytes());
        } else if self.model.channel {
            // It may have been done all the same.
            self.model.lose(&mut self.ram);
        }
        self.model.compare(&self.device.ledger());
        answer
    }
    /// Take the channel's completions: no more than two for one request.
    fn reap(&mut self, request: &[u8]) -> Option<Answer> {
        if !self.model.channel {
            return None;
        }
        if !self.model.is_kept() {
            self.channel.cq_head += 2;
            self.ring_cq();
            return None;
        }
        let (mut sent, mut taken) = (None, 0);
        loop {
            let at = address(CHANNEL[1]) + u64::from(self.channel.cq_head % CHANNEL_CQES) * 64;
            let cqe: [u8; 64] = self.ram.read(at);
            if dword(&cqe, 60) >> 29 != self.channel.cq_head / CHANNEL_CQES % 8 {
                break;
            }
            self.channel.cq_head += 1;
            taken += 1;
            assert!(taken <= 2, "more than two completions for one request");
            if dword(&cqe, 60) & 1 << 24 == 0 {
                sent = Some(dword(&cqe, 24) as usize);
            }
        }
        self.ring_cq();
        let mut answer = Answer { bytes: self.ram.read(address(RESPONSE)), len: sent?.min(ANSWER) };
        answer.bytes[answer.len..].fill(0);
        if answer.len >= 32 {
            let echoed = |response: usize, from: usize, len: usize| {
                answer.bytes[response..response + len] == request[from..from + len]
            };
            let names = echoed(4, 20, 4) && echoed(10, 10, 2) && echoed(20, 36, 4);
            assert!(names, "an answer names its request");
            assert!(answer.dword(12) <= PAGE as u32, "a response is no longer than a page");
        }
        self.see(&answer.status().to_le_bytes());
        (answer.len >= 32).then_some(answer)
    }
    fn ring_cq(&mut self) {
        let head = u64::from(self.channel.cq_head % (8 * CHANNEL_CQES)) << 32;
        self.ring(0, doorbell::CQ, head | 1 << 63);
    }
    /// The driver handles the channel's events: all are taken, and the queue is armed.
    pub fn take_events(&mut self) {
        let entries = PAGE as u32 / 16;
        loop {
            let at = address(CHANNEL[0]) + u64::from(self.channel.eq_head % entries) * 16;
            let word = u32::from_le_bytes(self.ram.read(at + 12));
            if word >> 29 != self.channel.eq_head / entries % 8 {
                break;
            }
            self.channel.eq_head += 1;
        }
        self.ring(0, doorbell::EQ, u64::from(self.channel.eq_head % (8 * entries)) << 32 | 1 << 63);
    }
}

/// A scatter/gather entry.
pub fn sge(address: u64, key: u32, len: u32) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&address.to_le_bytes());
    entry[8..12].copy_from_slice(&key.to_le_bytes());
    entry[12..].copy_from_slice(&len.to_le_bytes());
    entry
}
