//! The hardware channel: four one-page queues, one command in flight, its request and its response in a page each.

use crate::driver::Driver;
use crate::error::{Errno, Error, Result};
use crate::gdma::DeviceId;
use crate::memory::{Dma, PAGE, RingMemory, Zone};
use crate::message::{RESPONSE_HEADER, Request, Response, STATUS_MORE_ENTRIES, STATUS_UNSUPPORTED};
use crate::queues::{CompletionQueue, Cqe, DoorbellPage, Eqe, EventQueue, Sge, WorkQueue, WqKind, Wqe};
use crate::smc::{Establish, Smc};

/// Until event 129 the doorbell index is all ones.
const UNKNOWN: u32 = u32::MAX;
/// How long INIT_DONE may take.
const INIT_TIMEOUT_NS: u64 = 60_000_000_000;
/// How long a command may take by default.
const COMMAND_TIMEOUT_NS: u64 = 30_000_000_000;
/// How long a test event may take.
const TEST_TIMEOUT_NS: u64 = 30_000_000_000;
/// Completions that one completion event makes the driver look for.
const COMPLETIONS_PER_EVENT: u32 = 2;

/// What the init events said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InitData {
    /// EQ id and doorbell page index (event 129).
    pub eq: Option<(u32, u32)>,
    /// Type 1: CQ id.
    pub cq: Option<u32>,
    /// Type 2: RQ id.
    pub rq: Option<u32>,
    /// Type 3: SQ id.
    pub sq: Option<u32>,
    /// Type 4: queue depth.
    pub depth: Option<u32>,
    /// Type 5: largest request.
    pub max_request: Option<u32>,
    /// Type 6: largest response.
    pub max_response: Option<u32>,
    /// Type 7: size of the table of CQs.
    pub max_cqs: Option<u32>,
    /// Type 8: PD id.
    pub pd: Option<u32>,
    /// Type 9: memory key.
    pub gpa_mkey: Option<u32>,
    /// Event 131.
    pub done: bool,
}

/// The channel's state in the driver.
pub(crate) struct Hwc {
    pub init: InitData,
    pub eq: usize,
    cq_ring: Option<RingMemory>,
    rq: WorkQueue,
    sq: WorkQueue,
    request: Dma,
    response: Dma,
    /// Where in the RQ the outstanding WQE lies, bytes.
    posted: u32,
    in_flight: bool,
    answer: Option<Vec<u8>>,
    send_completions: u32,
    pub timeout_ns: u64,
}

impl Driver<'_> {
    /// ESTABLISH, the init events, and the first test event: `mana_hwc_create_channel`.
    pub(crate) fn create_hwc(&mut self, zone: Zone) -> Result<()> {
        let page = || RingMemory::new(self.world.memory.alloc_in(zone, PAGE), 4096);
        let (eq, cq, rq, sq) = (page(), page(), page(), page());
        let establish = Establish {
            eq: eq.dma().address(),
            cq: cq.dma().address(),
            rq: rq.dma().address(),
            sq: sq.dma().address(),
            msix: 0,
        };
        let nowhere = DoorbellPage { offset: u64::MAX };
        let hwc = Hwc {
            init: InitData::default(),
            eq: self.irqs.register(0, EventQueue::new(UNKNOWN, eq, nowhere)),
            cq_ring: Some(cq),
            rq: WorkQueue::new(WqKind::Rq, UNKNOWN, rq, nowhere),
            sq: WorkQueue::new(WqKind::Sq, UNKNOWN, sq, nowhere),
            request: self.world.memory.alloc_in(zone, PAGE),
            response: self.world.memory.alloc_in(zone, PAGE),
            posted: 0,
            in_flight: false,
            answer: None,
            send_completions: 0,
            timeout_ns: COMMAND_TIMEOUT_NS,
        };
        self.hwc = Some(hwc);
        self.smc().establish(&establish)?;
        self.wait(INIT_TIMEOUT_NS, "INIT_DONE", |driver| driver.hwc_ref().init.done)?;
        self.start_hwc_queues()?;
        self.test_eq(self.hwc_ref().eq, DeviceId::HWC)
    }

    fn start_hwc_queues(&mut self) -> Result<()> {
        let init = self.hwc_ref().init;
        let missing = |what| Error::proto(format!("INIT_DONE came without {what}"));
        let (_, page) = init.eq.ok_or_else(|| missing("event 129"))?;
        let page = self.doorbell_page(page);
        let cq = init.cq.ok_or_else(|| missing("a CQ id"))?;
        let rq = init.rq.ok_or_else(|| missing("an RQ id"))?;
        let sq = init.sq.ok_or_else(|| missing("an SQ id"))?;
        let max_cqs = init.max_cqs.ok_or_else(|| missing("the number of CQs"))?;
        init.gpa_mkey.ok_or_else(|| missing("a memory key"))?;
        init.pd.ok_or_else(|| missing("a PD"))?;
        if cq >= max_cqs {
            return Err(Error::proto(format!("the channel's CQ id {cq} is not below {max_cqs}")));
        }
        let hwc = self.hwc_mut();
        hwc.rq.set_identity(rq, page);
        hwc.sq.set_identity(sq, page);
        let ring = hwc.cq_ring.take().expect("the channel is set up once");
        self.cqs.insert(cq, CompletionQueue::new(cq, ring, page));
        self.post_response_buffer();
        Ok(())
    }

    /// DESTROY, and the memory back.
    pub(crate) fn destroy_hwc(&mut self) -> Result<()> {
        let Some(hwc) = self.hwc.take() else { return Ok(()) };
        // Linux leaves out DESTROY if it was never told how many CQs there are.
        let result = if hwc.init.max_cqs.is_some_and(|max| max != 0) { self.smc().destroy() } else { Ok(()) };
        let _ = self.world.settle();
        let cq =
            hwc.init.cq.and_then(|cq| self.cqs.remove(&cq)).map(CompletionQueue::into_ring).or(hwc.cq_ring);
        let eq = self.irqs.deregister(hwc.eq).into_ring();
        for ring in [Some(eq), cq, Some(hwc.rq.into_ring()), Some(hwc.sq.into_ring())].into_iter().flatten() {
            self.world.memory.free(ring.into_dma());
        }
        self.world.memory.free(hwc.request);
        self.world.memory.free(hwc.response);
        result
    }

    /// The aperture.
    pub fn smc(&self) -> Smc<'_> {
        Smc::new(self.world, self.registers.shm)
    }
    /// What the init events said.
    pub fn init_data(&self) -> InitData {
        self.hwc_ref().init
    }
    /// Event queue of the channel (a key for [`Driver::test_eq`]).
    pub fn hwc_eq(&self) -> usize {
        self.hwc_ref().eq
    }
    pub(crate) fn hwc_ref(&self) -> &Hwc {
        self.hwc.as_ref().expect("the channel is up")
    }
    pub(crate) fn hwc_mut(&mut self) -> &mut Hwc {
        self.hwc.as_mut().expect("the channel is up")
    }
    pub(crate) fn hwc_cq(&self) -> Option<u32> {
        self.hwc.as_ref()?.init.cq
    }
    /// Whether the doorbell of event queue `key` may be rung: the channel's only once event 129 came.
    pub(crate) fn hwc_ready_to_ring(&self, key: usize) -> bool {
        self.hwc.as_ref().is_none_or(|hwc| hwc.eq != key || hwc.init.eq.is_some())
    }

    /// Events 129, 130 and 131.
    pub(crate) fn hwc_init_event(&mut self, key: usize, eqe: Eqe) {
        let detail = eqe.details[0];
        let page = self.doorbell_page(detail >> 16);
        let hwc = self.hwc.as_mut().expect("init events come while the channel is set up");
        assert_eq!(hwc.eq, key, "an init event on an event queue that is not the channel's");
        let value = Some(detail & 0xff_ffff);
        match (eqe.kind, detail >> 24) {
            (129, _) => {
                assert_eq!(hwc.init, InitData::default(), "event 129 is not the first one");
                hwc.init.eq = Some((detail & 0xffff, detail >> 16));
                self.irqs.eq_mut(key).queue.set_identity(detail & 0xffff, page);
            }
            (130, 1) => hwc.init.cq = value,
            (130, 2) => hwc.init.rq = value,
            (130, 3) => hwc.init.sq = value,
            (130, 4) => hwc.init.depth = value,
            (130, 5) => hwc.init.max_request = value,
            (130, 6) => hwc.init.max_response = value,
            (130, 7) => hwc.init.max_cqs = value,
            (130, 8) => hwc.init.pd = value,
            (130, 9) => hwc.init.gpa_mkey = value,
            (131, _) => hwc.init.done = true,
            _ => (),
        }
    }

    /// `mana_hwc_comp_event`: take what is there, then arm.
    pub(crate) fn hwc_completion_event(&mut self, cq: u32) {
        let mut taken = 0;
        while taken < COMPLETIONS_PER_EVENT {
            let Some(cqe) = self.poll_cq(cq) else { break };
            self.hwc_completion(&cqe);
            taken += 1;
        }
        assert_ne!(taken, 0, "WARN: a completion event for the channel's CQ without a completion");
        self.cqs[&cq].doorbell(self.world, true);
    }

    fn hwc_completion(&mut self, cqe: &Cqe) {
        let hwc = self.hwc_mut();
        if cqe.is_sq() {
            assert_eq!(cqe.wq(), hwc.sq.id, "WARN: a send completion of the channel names another SQ");
            hwc.send_completions += 1;
            hwc.sq.complete(2);
            return;
        }
        assert_eq!(cqe.wq(), hwc.rq.id, "WARN: a receive completion of the channel names another RQ");
        assert_eq!(cqe.u32(16), 0, "rx_oob.wqe_addr_high");
        let offset = cqe.u32(12) / 32 * 32 % 4096;
        assert_eq!(offset, hwc.posted % 4096, "the channel's response is not in the oldest posted buffer");
        let len = cqe.u32(24);
        assert!(u64::from(len) <= PAGE, "a response of {len} bytes in a buffer of one page");
        let mut bytes = vec![0; len as usize];
        let mut page = [0; PAGE as usize];
        let response = hwc.response.address();
        hwc.rq.complete(1);
        self.world.memory.read(response, &mut page);
        bytes.copy_from_slice(&page[..len as usize]);
        let untouched = page[len as usize..].iter().all(|&byte| byte == FILL);
        assert!(untouched, "the device wrote past the {len} bytes of its response");
        // The buffer goes back before the waiter wakes.
        self.post_response_buffer();
        self.accept(bytes);
    }

    /// `mana_hwc_handle_resp`.
    fn accept(&mut self, bytes: Vec<u8>) {
        let response = Response::new(bytes.clone(), RESPONSE_HEADER);
        let hwc = self.hwc_mut();
        assert_eq!(response.u16(10), 0, "hwc_msg_id of a response is not the request's");
        if std::mem::take(&mut hwc.in_flight) {
            hwc.answer = Some(bytes);
        } else {
            panic!("a response that no command waits for: {response:x?}");
        }
    }

    fn post_response_buffer(&mut self) {
        let key = self.hwc_ref().init.gpa_mkey.unwrap_or(0);
        let world = self.world;
        let hwc = self.hwc_mut();
        world.memory.write(hwc.response.address(), &[FILL; PAGE as usize]);
        let sge = Sge { address: hwc.response.address(), key, size: 4096 };
        // 8 bytes of OOB that Linux leaves uninitialised.
        let wqe = Wqe { oob: vec![0xa5; 8], sgl: vec![sge], ..Wqe::default() };
        let (start, units) = hwc.rq.post(&world.memory, &wqe).expect("the RQ holds one buffer");
        assert_eq!(units, 1, "a receive WQE with one SGE is one basic unit");
        hwc.posted = start;
        hwc.rq.doorbell(world);
    }

    /// Send `request` and return what came back, whatever its status.
    ///
    /// # Errors
    /// `-ETIMEDOUT`; `-EPROTO` if the response is shorter than a header or longer than asked for.
    pub fn exchange(&mut self, request: &Request) -> Result<Response> {
        self.exchange_sized(request, request.bytes().len())
    }

    /// As [`exchange`](Self::exchange), with a buffer length in the WQE that need not be the message's.
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange).
    pub fn exchange_sized(&mut self, request: &Request, len: usize) -> Result<Response> {
        self.post_request(request, len);
        let timeout = self.hwc_ref().timeout_ns;
        let what = format!("command {:#x}", request.code());
        let waited = self.wait(timeout, &what, |driver| driver.hwc_ref().answer.is_some());
        let hwc = self.hwc_mut();
        if let Err(error) = waited {
            hwc.in_flight = false;
            if self.generation.gives_up_after_timeout {
                self.hwc_mut().timeout_ns = 1_000_000;
            }
            return Err(error);
        }
        let answer = hwc.answer.take().expect("waited for it");
        if answer.len() < RESPONSE_HEADER || answer.len() > request.response_len() {
            let (got, asked) = (answer.len(), request.response_len());
            return Err(Error::proto(format!("{what}: {got} bytes came back, {asked} were asked for")));
        }
        Ok(Response::new(answer, request.response_len()))
    }

    /// Write the request and ring, without waiting: [`take_answer`](Self::take_answer) has what comes.
    pub fn post_request(&mut self, request: &Request, len: usize) {
        let world = self.world;
        let (cq, key) = (self.hwc_ref().init.cq.unwrap_or(0), self.hwc_ref().init.gpa_mkey.unwrap_or(0));
        let hwc = self.hwc_mut();
        hwc.answer = None;
        hwc.in_flight = true;
        world.memory.write(hwc.request.address(), request.bytes());
        let sge = Sge { address: hwc.request.address(), key, size: u32::try_from(len).unwrap_or(u32::MAX) };
        let mut oob = vec![0; 24];
        oob[16..20].copy_from_slice(&cq.to_le_bytes());
        oob[20..24].copy_from_slice(&hwc.sq.id.to_le_bytes());
        let wqe = Wqe { oob, sgl: vec![sge], ..Wqe::default() };
        if hwc.sq.post(&world.memory, &wqe).is_none() {
            // Linux does not check for room: without send completions it writes on.
            hwc.sq.complete(2);
            let _ = hwc.sq.post(&world.memory, &wqe);
        }
        hwc.sq.doorbell(world);
    }

    /// The answer to [`post_request`](Self::post_request), if it came.
    pub fn take_answer(&mut self) -> Option<Response> {
        let bytes = self.hwc_mut().answer.take()?;
        Some(Response::new(bytes, RESPONSE_HEADER))
    }

    /// Send `request`; the status must be 0 or 0x105 (`mana_hwc_send_request`).
    ///
    /// # Errors
    /// As [`exchange`](Self::exchange), and for any other status.
    pub fn send(&mut self, request: &Request) -> Result<Response> {
        let response = self.exchange(request)?;
        match response.status() {
            0 | STATUS_MORE_ENTRIES => Ok(response),
            status => {
                let unsupported = status == STATUS_UNSUPPORTED && self.generation.knows_unsupported;
                let errno = if unsupported { Errno::Eopnotsupp } else { Errno::Eproto };
                let what = format!("command {:#x}: status {status:#x}", request.code());
                Err(Error { errno, what, status: Some(status) })
            }
        }
    }

    /// `mana_gd_test_eq`: the event must come on this very queue.
    ///
    /// # Errors
    /// Those of the command; `-ETIMEDOUT` without an event.
    pub fn test_eq(&mut self, key: usize, device: DeviceId) -> Result<()> {
        let (id, before) = (self.irqs.eq(key).queue.id, self.irqs.eq(key).tests);
        let elsewhere: u32 = self.irqs.eqs.values().map(|eq| eq.tests).sum();
        self.generate_test_eqe(device, id)?;
        self.wait(TEST_TIMEOUT_NS, &format!("test event on EQ {id}"), |driver| {
            driver.irqs.eqs.values().map(|eq| eq.tests).sum::<u32>() > elsewhere
        })?;
        if self.irqs.eq(key).tests != before + 1 {
            return Err(Error::proto(format!("the test event of EQ {id} came on another queue")));
        }
        Ok(())
    }

    /// Send completions of the channel so far.
    pub fn hwc_send_completions(&self) -> u32 {
        self.hwc_ref().send_completions
    }
}

/// The response buffer before the device writes to it.
const FILL: u8 = 0x5a;
