//! What the card costs: one core, in process, release build, no observer attached.
//!
//! | name | one iteration |
//! |---|---|
//! | `bar0_read` | one 4-byte register read through [`ManaDevice::bar_read`] |
//! | `doorbell_sq` | one SQ doorbell through [`ManaDevice::bar_write`] on a queue whose worker is awake |
//! | `hwc_roundtrip` | GDMA_QUERY_MAX_RESOURCES: send WQE written, SQ doorbell, card runs, event and both completions seen, buffer posted again (RQ doorbell), CQ and EQ armed again (two doorbells) |
//! | `tx_64`, `tx_1500` | a batch: the driver writes a WQE (one entry) a packet, rings the SQ once, the card runs (budget 64) into a port that takes every frame, the driver takes every CQE and rings the CQ once |
//! | `rx_64`, `rx_1500` | a batch a queue: the port offers frames (64 at a time, the queues in turn), the card hashes, checks checksums, copies each into a buffer of 1,514 bytes and completes it; the driver takes every CQE, writes as many WQEs, rings RQ and CQ once a queue |
//! | `tso_64k` | one WQE of 54 + 65,160 bytes, cut into 45 frames of 1,448 payload bytes with both checksums made, or left to the port |
//! | `rss_hash` | Toeplitz over 12 bytes (IPv4 and ports) and 36 bytes (IPv6 and ports) |
//! | `memcpy` | the copies of `rx_64` and `rx_1500` alone: the same frames into the same buffers in the same order |
//!
//! Frames are UDP over IPv4; 256 different ones, so that every packet is another flow; their 256 source buffers stay
//! in the cache, as those of a socket that has just been read do. Interrupts are not part of the packet benchmarks,
//! except `armed`: its queues are armed after every batch (CQ and EQ doorbells), so that every batch posts an event
//! and sends an interrupt. `asleep` runs the card on another thread that sleeps in between: what is shown is mostly the host's
//! time to wake it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mana_device::ManaDevice;
use mana_device::config::DeviceConfig;
use mana_device::doors::{PortCapabilities, RxChecksum, Work};
use mana_device::steer::Toeplitz;
use mana_test_driver::World;
use mana_test_driver::lean::{Channel, Machine, Receive, offered};
use mana_test_driver::packet::{Flow, Protocol};
use std::hint::black_box;

/// Frames that are different from each other.
const FRAMES: usize = 256;
/// Packets per doorbell, with one queue.
const BATCHES: [usize; 4] = [1, 32, 64, 256];
/// Queues, with this many packets per doorbell.
const QUEUES: [u32; 3] = [1, 4, 16];
const BATCH: usize = 64;
/// Receive buffers of all queues together where queue counts are compared: all touch the same amount of memory.
const BUFFERS: u32 = 2048;
/// Ethernet, IPv4 and UDP headers.
const UDP4_HEADERS: usize = 42;

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(40);
    group
}

/// [`FRAMES`] frames of `len` bytes whose flows go to the queues of `machine` in turn.
fn frames(machine: &Machine, queues: usize, len: usize) -> Vec<Vec<u8>> {
    let mut flows = (0..).map(|n| Flow::v4([2, 0, 0, 0, 0, 1], n));
    let mut wanted = (0..queues).cycle();
    let mut next = || {
        let queue = wanted.next().expect("a queue");
        flows.find(|flow| machine.queue_of(&flow.hash_input(true)) == queue).expect("a flow for each queue")
    };
    (0..FRAMES).map(|_| next().frame(Protocol::Udp, &vec![0x5a; len - UDP4_HEADERS])).collect()
}

fn registers(criterion: &mut Criterion) {
    let machine = Machine::new(1, PortCapabilities::default());
    let device = machine.device();
    let mut group = group(criterion, "bar0_read");
    group.bench_function("4 bytes", |bencher| {
        bencher.iter(|| {
            let mut data = [0; 4];
            device.bar_read(0, black_box(0x10), &mut data).expect("a register");
            data
        });
    });
}

fn doorbells(criterion: &mut Criterion) {
    let machine = Machine::new(1, PortCapabilities::default());
    let sender = machine.senders(&[vec![0; 60]]).pop().expect("a queue");
    sender.ring();
    let mut group = group(criterion, "doorbell_sq");
    group.bench_function("awake", |bencher| bencher.iter(|| sender.ring()));
}

fn channel(criterion: &mut Criterion) {
    let world = World::unobserved(DeviceConfig::default(), 2, PortCapabilities::default());
    let mut channel = Channel::establish(Box::leak(Box::new(world)));
    let mut group = group(criterion, "hwc_roundtrip");
    group.bench_function("own loop", |bencher| {
        bencher.iter(|| {
            channel.post();
            channel.run();
            channel.reap();
        });
    });
    let worker = Sleeper::start(channel.device(), Work::Hwc);
    group.bench_function("asleep", |bencher| {
        bencher.iter(|| {
            channel.post();
            worker.wake();
            channel.reap();
        });
    });
}

/// A worker that sleeps whenever it has nothing to do.
struct Sleeper {
    due: Arc<AtomicBool>,
    thread: std::thread::Thread,
}

impl Sleeper {
    fn start(device: &'static ManaDevice, work: Work) -> Self {
        let due = Arc::new(AtomicBool::new(false));
        let theirs = due.clone();
        let handle = std::thread::spawn(move || {
            loop {
                while !theirs.swap(false, Ordering::Acquire) {
                    std::thread::park();
                }
                let _ = device.run(work, 64);
            }
        });
        Self { due, thread: handle.thread().clone() }
    }
    fn wake(&self) {
        self.due.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn transmit(criterion: &mut Criterion) {
    for (name, len) in [("tx_64", 64), ("tx_1500", 1500)] {
        let mut group = group(criterion, name);
        let batches = BATCHES.map(|batch| (1, batch, format!("batch {batch}")));
        let queues = QUEUES.map(|queues| (queues, BATCH, format!("{queues} queues")));
        for (queues, batch, id) in batches.into_iter().chain(queues) {
            let machine = Machine::new(queues, PortCapabilities::default());
            let mut senders = machine.senders(&frames(&machine, queues as usize, len));
            group.throughput(Throughput::Elements(u64::from(queues) * batch as u64));
            group.bench_function(id, |bencher| {
                bencher.iter(|| {
                    for sender in &mut senders {
                        sender.post(batch);
                        sender.run();
                        sender.reap(batch);
                    }
                });
            });
        }
        let machine = Machine::new(1, PortCapabilities::default());
        let mut sender = machine.senders(&frames(&machine, 1, len)).pop().expect("a queue");
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function("armed", |bencher| {
            let (mut batches, before) = (0, machine.interrupts());
            bencher.iter(|| {
                sender.post(BATCH);
                sender.run();
                sender.reap_after_interrupt(BATCH);
                batches += 1;
            });
            assert_eq!(machine.interrupts() - before, batches, "an interrupt for each batch");
        });
        // is_outer_ipv4, comp_udp_csum: what Linux asks of every UDP packet.
        for (port, capabilities) in [
            ("checksum made", PortCapabilities::default()),
            ("checksum left to the port", PortCapabilities { checksum: true, segmentation: true }),
        ] {
            let machine = Machine::new(1, capabilities);
            let sender = machine.senders(&frames(&machine, 1, len)).pop().expect("a queue");
            let mut sender = sender.with_oob(1 << 2 | 1 << 6, 0);
            group.bench_function(port, |bencher| {
                bencher.iter(|| {
                    sender.post(BATCH);
                    sender.run();
                    sender.reap(BATCH);
                });
            });
        }
    }
}

fn transmit_asleep(criterion: &mut Criterion) {
    let machine = Machine::new(1, PortCapabilities::default());
    let mut sender = machine.senders(&frames(&machine, 1, 64)).pop().expect("a queue");
    let worker = Sleeper::start(machine.device(), sender.work());
    let mut group = group(criterion, "tx_64");
    group.throughput(Throughput::Elements(1));
    group.bench_function("asleep", |bencher| {
        bencher.iter(|| {
            sender.post(1);
            worker.wake();
            sender.reap_one_waiting();
        });
    });
}

fn receive(criterion: &mut Criterion) {
    for (name, len) in [("rx_64", 64), ("rx_1500", 1500)] {
        let mut group = group(criterion, name);
        for batch in BATCHES {
            let machine = Machine::new(1, PortCapabilities::default());
            receive_in(&mut group, &format!("batch {batch}"), &machine, batch, len, RxChecksum::Unknown);
        }
        for queues in QUEUES {
            let machine = Machine::with_buffers(queues, BUFFERS / queues, PortCapabilities::default());
            receive_in(&mut group, &format!("{queues} queues"), &machine, BATCH, len, RxChecksum::Unknown);
        }
        let machine = Machine::new(16, PortCapabilities::default());
        receive_in(&mut group, "16 queues of 512 buffers", &machine, BATCH, len, RxChecksum::Unknown);
        let machine = Machine::new(1, PortCapabilities::default());
        receive_in(&mut group, "checksum vouched for", &machine, BATCH, len, RxChecksum::Valid);
    }
}

fn receive_in(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: &str,
    machine: &Machine,
    batch: usize,
    len: usize,
    checksum: RxChecksum,
) {
    let mut receivers = machine.receivers();
    let frames = frames(machine, receivers.len(), len);
    let offered = offered(&frames, checksum);
    let total = batch * receivers.len();
    let mut turns = offered.chunks(total.min(FRAMES)).cycle();
    group.throughput(Throughput::Elements(total as u64));
    group.bench_function(id, |bencher| {
        bencher.iter(|| {
            let mut delivered = 0;
            while delivered < total {
                delivered += machine.deliver(turns.next().expect("endless"));
            }
            let got: u32 = receivers.iter_mut().map(Receive::poll).sum();
            assert_eq!(got as usize, total, "every frame arrives");
        });
    });
    assert_eq!(machine.counter("rx_discards_nowqe"), 0);
}

fn copies(criterion: &mut Criterion) {
    let mut group = group(criterion, "memcpy");
    for len in [64, 1500] {
        let machine = Machine::new(1, PortCapabilities::default());
        let frames = frames(&machine, 1, len);
        let buffers = machine.buffers(&machine.receivers()[0]);
        let mut pairs = frames.iter().cycle().zip(buffers.iter().cycle());
        group.throughput(Throughput::Elements(BATCH as u64));
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            bencher.iter(|| {
                for (frame, buffer) in pairs.by_ref().take(BATCH) {
                    buffer.copy_from(frame.as_slice());
                }
            });
        });
    }
}

fn segmentation(criterion: &mut Criterion) {
    const MSS: usize = 1448;
    let mut group = group(criterion, "tso_64k");
    for (name, capabilities) in [
        ("cut", PortCapabilities::default()),
        ("left to the port", PortCapabilities { checksum: true, segmentation: true }),
    ] {
        let machine = Machine::new(1, capabilities);
        let payload = machine.placed(&vec![0x5a; 45 * MSS]);
        let mut header = Flow::v4([2, 0, 0, 0, 0, 1], 1).partial_frame(Protocol::Tcp, &[]);
        header[16..18].fill(0);
        header[24..26].fill(0);
        let header = machine.placed(&header);
        let sender = machine.senders(&[vec![0; 60]]).pop().expect("a queue");
        // is_outer_ipv4, comp_iphdr_csum, comp_tcp_csum.
        let mut sender = sender.with_oob(1 << 2 | 1 << 4 | 1 << 5, 34);
        group.throughput(Throughput::Bytes(u64::from(header.1 + payload.1)));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                sender.post_large(header, payload, MSS as u32);
                sender.run();
                sender.reap(1);
            });
        });
        assert_eq!(machine.counter("tx_err_header"), 0);
    }
}

fn hashes(criterion: &mut Criterion) {
    let toeplitz = Toeplitz::new(&mana_test_driver::netdev::RSS_KEY);
    let mut group = group(criterion, "rss_hash");
    for (name, addresses) in [("IPv4 and ports", 8), ("IPv6 and ports", 32)] {
        let (addresses, ports) = (vec![0xa5; addresses], [1, 2, 3, 4]);
        group.bench_function(name, |bencher| {
            bencher.iter(|| toeplitz.hash(black_box(&addresses), black_box(&ports)));
        });
    }
}

criterion_group!(
    benches,
    registers,
    doorbells,
    channel,
    transmit,
    receive,
    copies,
    segmentation,
    hashes,
    transmit_asleep
);
criterion_main!(benches);
