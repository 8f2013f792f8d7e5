//! Many threads at one card: doorbells, workers, cables and commands, all at once, while queues come and go.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use mana_device::ManaDevice;
use mana_device::config::{DeviceConfig, VportConfig};
use mana_device::doors::{PortCapabilities, RxChecksum, RxFrame, Work};
use mana_test_driver::lean::Channel;
use mana_test_driver::mana::code as mana;
use mana_test_driver::message::{Request, Response};
use mana_test_driver::packet::{Flow, Protocol};
use mana_test_driver::world::ManualClock;
use mana_test_driver::{DeviceId, Registration, World, gdma};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Times that everything is made and destroyed.
const ROUNDS: u32 = 60;
/// Queue pairs.
const PAIRS: usize = 4;
/// Bytes of a ring.
const RING: u64 = 4096;
/// CQE_RX_OBJECT_FENCE, for which no WQE stands.
const FENCE: u32 = 3;
/// Completions of a ring.
const ENTRIES: u32 = RING as u32 / 64;
/// What freed memory is filled with.
const FREED: [u8; RING as usize] = [0x6b; RING as usize];
const MANA: DeviceId = DeviceId { kind: 2, instance: 0 };
/// No queue.
const NONE: u32 = 0xff_ffff;

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A work queue with its completion queue, as all threads know it.
struct Pair {
    is_send: bool,
    wq_ring: u64,
    cq_ring: u64,
    wq: AtomicU32,
    cq: AtomicU32,
    /// How often it was made.
    generation: AtomicU32,
}

/// What a vCPU knows of a pair.
#[derive(Clone, Copy, Default)]
struct Known {
    generation: u32,
    /// Bytes posted, and bytes completed.
    tail: u32,
    consumed: u32,
    /// Completions taken.
    head: u32,
}

struct Shared {
    device: &'static ManaDevice,
    clock: &'static ManualClock,
    memory: GuestMemoryMmap,
    pairs: Vec<Pair>,
    eq: AtomicU32,
    buffers: u64,
    doorbells: u64,
    key: u32,
    stop: AtomicBool,
    doorbells_rung: AtomicU64,
    delivered: AtomicU64,
}

/// Ends the other threads, even if the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    /// Until all is over; lets the others have a CPU, of which there may be few.
    fn running(&self) -> bool {
        std::thread::yield_now();
        !self.stop.load(Ordering::Relaxed)
    }
    fn ring(&self, register: u64, value: u64) {
        self.device.bar_write(0, self.doorbells + register, &value.to_le_bytes()).unwrap();
        self.doorbells_rung.fetch_add(1, Ordering::Relaxed);
    }
    /// A vCPU: posts WQEs to every second pair and takes completions, as a driver does, and now and then rings what
    /// makes no sense.
    fn vcpu(&self, number: usize) {
        let mut random = Random(number as u64 + 1);
        let mut known = vec![Known::default(); self.pairs.len()];
        while self.running() {
            let index = random.below(self.pairs.len() as u64 / 2) as usize * 2 + number;
            let (pair, known) = (&self.pairs[index], &mut known[index]);
            let (wq, cq) = (pair.wq.load(Ordering::Acquire), pair.cq.load(Ordering::Acquire));
            let generation = pair.generation.load(Ordering::Acquire);
            if known.generation != generation {
                *known = Known { generation, head: ENTRIES, ..Known::default() };
            }
            if wq == NONE {
                self.nonsense(&mut random);
                continue;
            }
            while let Some(kind) = self.completed(pair, known) {
                known.head += 1;
                known.consumed += if kind == FENCE { 0 } else { 32 };
            }
            let arm = random.below(2) << 63;
            self.ring(0x800, u64::from(cq) | u64::from(known.head % (8 * ENTRIES)) << 32 | arm);
            // A ring that was made anew meanwhile makes nonsense of this, but of no more than a ring.
            while known.tail.wrapping_sub(known.consumed) < RING as u32 {
                // The ring may be gone by now: then the card must not look.
                let wqe = self.wqe(pair, cq, &mut random);
                let at = pair.wq_ring + u64::from(known.tail) % RING;
                self.memory.write_slice(&wqe, GuestAddress(at)).unwrap();
                known.tail += 32;
            }
            let register = if pair.is_send { 0x000 } else { 0x400 };
            self.ring(register, u64::from(wq) | u64::from(known.tail) << 32);
            match random.below(200) {
                0 => self.nonsense(&mut random),
                1..=20 => self.ring(0x820, u64::from(cq) | random.below(200) << 32 | 1 << 47 | 1 << 63),
                _ => {}
            }
        }
    }
    /// The type of the next completion, if it is there.
    fn completed(&self, pair: &Pair, known: &Known) -> Option<u32> {
        let at = pair.cq_ring + u64::from(known.head % ENTRIES) * 64;
        let word = |offset| self.memory.load::<u32>(GuestAddress(at + offset), Ordering::Acquire).unwrap();
        let last = word(60);
        let new =
            last >> 29 == known.head / ENTRIES % 8 && last & 0xff_ffff == pair.wq.load(Ordering::Acquire);
        new.then(|| word(0) & 0x3f)
    }
    fn wqe(&self, pair: &Pair, cq: u32, random: &mut Random) -> [u8; 32] {
        let mut wqe = [0; 32];
        wqe[4..8].copy_from_slice(&(1_u32 | 2 << 8).to_le_bytes());
        wqe[8..12].copy_from_slice(&(cq << 8).to_le_bytes());
        let address = self.buffers + random.below(64) * 2048;
        wqe[16..24].copy_from_slice(&address.to_le_bytes());
        wqe[24..28].copy_from_slice(&self.key.to_le_bytes());
        let len: u32 = if pair.is_send { 14 + random.below(1500) as u32 } else { 1514 };
        wqe[28..32].copy_from_slice(&len.to_le_bytes());
        wqe
    }
    /// A doorbell of any kind for any queue, with any value.
    fn nonsense(&self, random: &mut Random) {
        let register = [0x000, 0x400, 0x408, 0x800, 0x820, 0xff8][random.below(6) as usize];
        self.ring(register, random.next() & !0xff_fff0);
    }
    /// A worker: every piece of the card belongs to one of two.
    fn worker(&self, index: u32) {
        while self.running() {
            self.clock.advance(10_000);
            for sq in (1..=PAIRS as u32).filter(|sq| sq % 2 == index) {
                let _ = self.device.run(Work::Transmit { sq }, 16);
            }
            if index == 0 {
                let _ = self.device.run(Work::Hwc, 16);
            } else {
                self.device.run_timers();
            }
        }
    }
    /// A cable.
    fn cable(&self) {
        let frames: Vec<_> = (0..64)
            .map(|n| Flow::v4([2; 6], n).frame(Protocol::Udp, &vec![7; 16 * usize::from(n)]))
            .collect();
        let offered: Vec<_> =
            frames.iter().map(|bytes| RxFrame { bytes, checksum: RxChecksum::Unknown }).collect();
        while self.running() {
            let got = self.device.deliver(0, &offered);
            self.delivered.fetch_add(got as u64, Ordering::Relaxed);
        }
    }
}

/// The driver's commands, without the driver.
struct Commands {
    channel: Channel,
    activity: u32,
}

impl Commands {
    fn send(&mut self, request: Request) -> Response {
        self.activity += 1;
        self.channel.exchange(&request.activity(self.activity))
    }
    /// A command that must succeed.
    fn expect(&mut self, request: Request) -> Response {
        let code = request.code();
        let response = self.send(request);
        assert_eq!(response.status(), 0, "command {code:#x}");
        response
    }
    fn region(&mut self, page: u64) -> u64 {
        let request = Request::new(gdma::code::CREATE_DMA_REGION, MANA, 72, 40);
        let request = request.u64(40, RING).u32(56, 1).u32(60, 1).u64(64, page);
        self.expect(request).u64(32)
    }
    fn register(&mut self) -> Registration {
        let response = self.expect(Request::new(gdma::code::REGISTER_DEVICE, MANA, 40, 44));
        Registration { pdid: response.u32(32), gpa_mkey: response.u32(36), db_id: response.u32(40) }
    }
    fn create_eq(&mut self, registration: Registration, page: u64) -> u32 {
        let region = self.region(page);
        self.expect(gdma::create_eq_request(MANA, registration, region, RING as u32, 0)).u32(32)
    }
    /// Ids of work queue and completion queue, and the handle of both.
    fn create_pair(&mut self, vport: u64, pair: &Pair, eq: u32) -> (u32, u32, u64) {
        let regions = [self.region(pair.wq_ring), self.region(pair.cq_ring)];
        let request = Request::new(mana::CREATE_WQ_OBJ, MANA, 96, 56).versions(3, 2).u64(40, vport);
        let request = request.u32(48, if pair.is_send { 1 } else { 2 }).u64s(56, &regions);
        let request = request.u32(72, RING as u32).u32(76, RING as u32).u32(84, eq).u8(89, 1);
        let made = self.expect(request);
        (made.u32(32), made.u32(36), made.u64(40))
    }
    fn destroy_pair(&mut self, pair: &Pair, handle: u64) {
        let kind = if pair.is_send { 1 } else { 2 };
        self.expect(Request::new(mana::DESTROY_WQ_OBJ, MANA, 56, 32).u32(40, kind).u64(48, handle));
    }
    fn steer(&mut self, vport: u64, table: &[u64], on: bool) {
        let request = Request::new(mana::CONFIG_VPORT_RX, MANA, 120 + 8 * table.len(), 40).versions(5, 2);
        let request = request.u64(40, vport).u16(48, table.len() as u16).u16(50, 120);
        let request = request.u32(52, on.into()).u32(56, on.into()).u8(60, on.into()).u8(61, on.into());
        let request = request.u8(62, on.into()).u64(64, table[0]).put(72, &[0x5a; 40]).u16(116, 0x3f);
        self.expect(request.u64s(120, table));
    }
}

#[test]
fn everything_at_once_while_queues_come_and_go() {
    let vports = vec![VportConfig { mac: [2, 0, 0, 0, 0, 1], max_queues: PAIRS as u16 }];
    let config = DeviceConfig { vports, ..DeviceConfig::default() };
    let world: &'static World =
        Box::leak(Box::new(World::unobserved(config, 2, PortCapabilities::default())));
    let mut commands = Commands { channel: Channel::establish(world), activity: 0 };
    let page = || world.memory.alloc(RING).address();
    let pairs = (0..2 * PAIRS).map(|index| Pair {
        // Two of a kind in turn, so that each vCPU has both kinds.
        is_send: index / 2 % 2 == 0,
        wq_ring: page(),
        cq_ring: page(),
        wq: NONE.into(),
        cq: NONE.into(),
        generation: 0.into(),
    });
    let shared = Shared {
        device: &world.device,
        clock: &world.clock,
        memory: world.memory.mmap(),
        pairs: pairs.collect(),
        eq: NONE.into(),
        buffers: world.memory.alloc(64 * 2048).address(),
        doorbells: commands.channel.doorbell_page(1).offset,
        key: 0x200,
        stop: AtomicBool::new(false),
        doorbells_rung: AtomicU64::new(0),
        delivered: AtomicU64::new(0),
    };
    let eq_page = page();
    let shared = &shared;
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&shared.stop);
        scope.spawn(|| shared.vcpu(0));
        scope.spawn(|| shared.vcpu(1));
        scope.spawn(|| shared.worker(0));
        scope.spawn(|| shared.worker(1));
        scope.spawn(|| shared.cable());
        rounds(&mut commands, shared, eq_page);
        // The machine is reset with everything alive and everybody busy.
        build(&mut commands, shared, eq_page);
        world.device.reset();
    });
    world.assert_empty_ledger();
    assert!(shared.delivered.load(Ordering::Relaxed) > 0, "frames got through");
    assert!(world.counter("tx_ucast_pkts") + world.counter("tx_mcast_pkts") > 0, "frames got out");
    assert!(shared.doorbells_rung.load(Ordering::Relaxed) > 10_000);
}

/// What is alive: the event queue and the handle of each pair.
fn build(commands: &mut Commands, shared: &Shared, eq_page: u64) -> (u32, Vec<u64>, u64) {
    let registration = commands.register();
    assert_eq!(registration.gpa_mkey, shared.key);
    let vport = commands.expect(Request::new(mana::QUERY_VPORT_CONFIG, MANA, 44, 64)).u64(56);
    let config_tx = Request::new(mana::CONFIG_VPORT_TX, MANA, 56, 36).u64(40, vport);
    commands.expect(config_tx.u32(48, registration.pdid).u32(52, registration.db_id));
    for ring in shared.pairs.iter().flat_map(|pair| [pair.wq_ring, pair.cq_ring]).chain([eq_page]) {
        shared.memory.write_slice(&[0; RING as usize], GuestAddress(ring)).unwrap();
    }
    let eq = commands.create_eq(registration, eq_page);
    shared.eq.store(eq, Ordering::Relaxed);
    let mut handles = Vec::new();
    for pair in &shared.pairs {
        let (wq, cq, handle) = commands.create_pair(vport, pair, eq);
        pair.generation.fetch_add(1, Ordering::Release);
        pair.cq.store(cq, Ordering::Release);
        pair.wq.store(wq, Ordering::Release);
        handles.push(handle);
    }
    (eq, handles, vport)
}

fn rounds(commands: &mut Commands, shared: &Shared, eq_page: u64) {
    let mut random = Random(3);
    for round in 0..ROUNDS {
        let (eq, handles, vport) = build(commands, shared, eq_page);
        let receive = handles.iter().zip(&shared.pairs).filter(|(_, pair)| !pair.is_send);
        let receive: Vec<u64> = receive.map(|(handle, _)| *handle).collect();
        let table: Vec<u64> = (0..64).map(|entry| receive[entry % receive.len()]).collect();
        for _ in 0..8 {
            commands.steer(vport, &table, true);
            commands.expect(Request::new(mana::FENCE_RQ, MANA, 48, 32).u64(40, receive[0]));
            commands.expect(Request::new(mana::QUERY_GF_STAT, MANA, 48, 256).versions(1, 2).u64(40, !0));
            let clamp = Request::new(mana::SET_BW_CLAMP, MANA, 56, 40).u64(40, vport);
            // Slow enough for queues to be full of work when they go.
            commands.expect(clamp.u32(48, random.below(2) as u32).u32(52, 100));
        }
        if round % 2 == 0 {
            commands.steer(vport, &table, false);
        }
        // In any order; each ring belongs to the guest again when the command has been answered.
        let mut order: Vec<usize> = (0..shared.pairs.len()).collect();
        while let Some(index) = (!order.is_empty()).then(|| random.below(order.len() as u64) as usize) {
            let index = order.swap_remove(index);
            let pair = &shared.pairs[index];
            commands.destroy_pair(pair, handles[index]);
            // The completion queue is the card's alone to write.
            shared.memory.write_slice(&FREED, GuestAddress(pair.cq_ring)).unwrap();
            pair.wq.store(NONE, Ordering::Release);
            pair.cq.store(NONE, Ordering::Release);
        }
        let disable = Request::new(gdma::code::DISABLE_QUEUE, MANA, 52, 32);
        commands.expect(disable.u32(40, 4).u32(44, eq).u32(48, 1));
        shared.memory.write_slice(&FREED, GuestAddress(eq_page)).unwrap();
        // Time for deadlines of what is gone.
        shared.clock.advance(100_000_000);
        commands.expect(Request::new(gdma::code::DEREGISTER_DEVICE, MANA, 40, 32));
        for ring in shared.pairs.iter().map(|pair| pair.cq_ring).chain([eq_page]) {
            let mut bytes = [0; RING as usize];
            shared.memory.read_slice(&mut bytes, GuestAddress(ring)).unwrap();
            assert!(bytes == FREED, "the card wrote to a ring that it had given back");
        }
    }
}
