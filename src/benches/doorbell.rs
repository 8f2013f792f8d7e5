//! What a doorbell costs on its way through a vfio-user socket.
//!
//! The queue is a send queue that the test driver has made, whose worker is awake: the doorbell itself is what
//! `doorbell_sq` of mana-device measures. Server and client are threads of one process, so that each figure is both
//! sides' work and what passes between them, on as many CPUs as there are.
//!
//! | benchmark | one iteration |
//! |---|---|
//! | `direct` | one write to BAR0 through the device's door, without a socket |
//! | `answered` | one write that the client waits for, as for a register read: there and back |
//! | `posted` | one of 64 posted writes, each a message of its own, and a 64th of the read that waits for their end: what a guest that rings quickly costs |
//! | `gathered` | one of 64 posted writes in one message (`VFIO_USER_REGION_WRITE_MULTI`), as QEMU sends them while the socket is full, and a 64th of the read |

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mana_device::config::DeviceConfig;
use mana_device::doors::{Memory, PortCapabilities};
use mana_test_driver::lean::Machine;
use mana_test_driver::packet::{Flow, Protocol};
use mana_vmm::vfio_user::exercise::request;
use mana_vmm::vfio_user::irqs::EventDescriptors;
use mana_vmm::vfio_user::server::Server;
use mana_vmm::vfio_user::session::Function;
use mana_vmm::vfio_user::wire::{OneWrite, RegionAccess, flags, region};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::IntoBytes;

/// Doorbells for one wait.
const BATCH: usize = 64;
const BAR0: u32 = 0;
/// A register at which nothing happens when it is read.
const REGISTER: u64 = 0;

/// `enum vfio_user_command`.
mod command {
    pub const VERSION: u16 = 1;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const REGION_WRITE_MULTI: u16 = 15;
}

struct Client(UnixStream);

impl Client {
    fn send(&mut self, message: &[u8]) {
        self.0.write_all(message).expect("the server reads");
    }

    fn ask(&mut self, message: &[u8]) {
        self.send(message);
        let mut header = [0; 16];
        self.0.read_exact(&mut header).expect("a reply");
        assert_eq!(header[12..], [0; 4], "the server refuses");
        let size = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let mut body = [0; 512];
        self.0.read_exact(&mut body[..size - header.len()]).expect("the rest of the reply");
    }
}

fn access(command: u16, flags: u32, index: u32, offset: u64, data: &[u8], count: u32) -> Vec<u8> {
    let access = RegionAccess { offset: offset.into(), region: index.into(), count: count.into() };
    request(command, flags, &[access.as_bytes(), data])
}

fn doorbells(criterion: &mut Criterion) {
    let machine = Machine::new(1, PortCapabilities::default());
    let frame = Flow::v4([2, 0, 0, 0, 0, 1], 1).frame(Protocol::Udp, &[0; 22]);
    let sender = machine.senders(&[frame]).pop().expect("a send queue");
    let (offset, value) = sender.doorbell();
    let value = value.to_le_bytes();

    let folder = tempfile::tempdir().expect("a folder for the socket");
    let path = folder.path().join("socket");
    let config = DeviceConfig::default();
    let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::default());
    let events = Arc::new(EventDescriptors::new(config.msix_table_size));
    let function = Function { device: machine.shared_device(), config, memory, events };
    let _server = Server::start(&path, function, Box::new(|| ()), Box::new(|| ())).expect("a server");
    let mut client = Client(UnixStream::connect(&path).expect("the server listens"));
    client.ask(&request(command::VERSION, 0, &[&[0, 0, 1, 0], b"{}\0"]));
    // Memory Space Enable off and on, so that the session has seen it.
    for command in [4_u16, 6] {
        client.ask(&access(command::REGION_WRITE, 0, region::CONFIG, 4, &command.to_le_bytes(), 2));
    }

    let single = |flags, value| access(command::REGION_WRITE, flags, BAR0, offset, value, 8);
    let several = |value: &[u8; 8]| {
        let access = RegionAccess { offset: offset.into(), region: BAR0.into(), count: 8.into() };
        let writes = OneWrite { access, data: *value }.as_bytes().repeat(BATCH);
        let count = (BATCH as u64).to_le_bytes();
        request(command::REGION_WRITE_MULTI, flags::NO_REPLY, &[&count, &writes])
    };
    let wait = access(command::REGION_READ, 0, BAR0, REGISTER, &[], 4);
    let (answered, posted, gathered) = (single(0, &value), single(flags::NO_REPLY, &value), several(&value));

    // Doorbells of a queue that does not exist are counted: all of them arrive, and none of ours is among them.
    let dead = 0xffff_u64.to_le_bytes();
    for message in [&posted, &gathered, &single(flags::NO_REPLY, &dead), &several(&dead)] {
        client.send(message);
    }
    client.ask(&wait);
    assert_eq!(machine.counter("doorbell_dead"), 1 + BATCH as u64);

    let mut group = criterion.benchmark_group("vfio_user_doorbell");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(40);
    group.bench_function("direct", |bencher| bencher.iter(|| sender.ring()));
    group.bench_function("answered", |bencher| bencher.iter(|| client.ask(&answered)));
    let batches = |iterations: u64| iterations.div_ceil(BATCH as u64);
    group.bench_function("posted", |bencher| {
        bencher.iter_custom(|iterations| {
            let start = std::time::Instant::now();
            for _ in 0..batches(iterations) {
                (0..BATCH).for_each(|_| client.send(&posted));
                client.ask(&wait);
            }
            share(start.elapsed(), iterations)
        });
    });
    group.bench_function("gathered", |bencher| {
        bencher.iter_custom(|iterations| {
            let start = std::time::Instant::now();
            for _ in 0..batches(iterations) {
                client.send(&gathered);
                client.ask(&wait);
            }
            share(start.elapsed(), iterations)
        });
    });
    group.finish();
}

/// Of a time for whole batches, what `iterations` doorbells took.
fn share(elapsed: Duration, iterations: u64) -> Duration {
    let rung = iterations.div_ceil(BATCH as u64) * BATCH as u64;
    elapsed.mul_f64(iterations as f64 / rung as f64)
}

criterion_group!(benches, doorbells);
criterion_main!(benches);
