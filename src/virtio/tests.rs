//! A small driver against the devices: through the function's registers and rings in memory, as a guest's would.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mana_device::doors::{Memory, MsiMessage, MsiSink, Port, PortCapabilities, PortDropped, TxFrame};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::pci::{Doorbells, Host, VirtioPci};
use super::state::Saved;
use super::*;
use crate::clock::MonotonicClock;
use crate::net::{Deliver, Polled};
use crate::testing::Random;
use crate::workers::{Function, Piece};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Guest memory: the queues' rings, then 64 KiB for each of the driver's buffers.
const MEMORY: usize = 16 << 20;
const BUFFERS: u64 = 0x10_0000;
const SIZE: u16 = 16;
const NOTIFY: u64 = 0x3000;

/// Vectors that fired, and doorbells that are placed.
#[derive(Default)]
struct Machine {
    fired: Mutex<Vec<u16>>,
    placed: Mutex<Vec<u64>>,
}

impl MsiSink for Machine {
    fn route(&self, _: u16, _: MsiMessage) {}
    fn fire(&self, vector: u16) {
        self.fired.lock().unwrap().push(vector);
    }
}

impl Doorbells for Machine {
    fn place(&self, address: u64, _: &EventFd) -> std::io::Result<()> {
        self.placed.lock().unwrap().push(address);
        Ok(())
    }
    fn remove(&self, address: u64, _: &EventFd) -> std::io::Result<()> {
        self.placed.lock().unwrap().retain(|placed| *placed != address);
        Ok(())
    }
}

/// A driver and its device.
struct Driver<B> {
    function: VirtioPci<B>,
    machine: Arc<Machine>,
    memory: Memory,
    /// Next index of each queue's available ring.
    next: Vec<u16>,
    /// Used entries seen of each queue.
    seen: Vec<u16>,
}

impl<B: Backend> Driver<B> {
    /// A function that firmware has left at 0x1_0000_0000, with all vectors unmasked.
    fn new(backend: B) -> Self {
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let driver = Self::on(backend, memory);
        driver.configure(0x10, &0_u32.to_le_bytes());
        driver.configure(0x14, &1_u32.to_le_bytes());
        driver.configure(0x04, &6_u16.to_le_bytes());
        driver.configure(0x42, &0x8000_u16.to_le_bytes());
        for vector in 0..=driver.next.len() as u64 {
            driver.write(0x4000 + 16 * vector + 12, &0_u32.to_le_bytes());
        }
        driver
    }

    /// A function as it is at power-on, in a machine with this memory.
    fn on(backend: B, memory: Memory) -> Self {
        let machine = Arc::new(Machine::default());
        let queues = backend.queue_sizes().len();
        let host = Host {
            memory: memory.clone(),
            msi: machine.clone(),
            doorbells: machine.clone(),
            workers: Mailboxes::named("test", 1).unwrap(),
            clock: Arc::new(MonotonicClock::new()),
        };
        let function = VirtioPci::new(backend, host).unwrap();
        Self { function, machine, memory, next: vec![0; queues], seen: vec![0; queues] }
    }

    /// The same driver, whose function is another that has become what this one was.
    fn moved(self, open: impl FnOnce() -> B) -> Self {
        let Self { function, memory, next, seen, .. } = self;
        let bytes = postcard::to_stdvec(&function.save()).unwrap();
        // A disk has one owner.
        drop(function);
        let driver = Self { next, seen, ..Self::on(open(), memory) };
        let state = postcard::from_bytes(&bytes).unwrap();
        driver.function.load(&state).unwrap();
        assert_eq!(driver.function.save(), state, "it is what it became");
        driver.function.go_on();
        driver
    }

    fn configure(&self, register: u16, data: &[u8]) {
        let _ = self.function.config_write(register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(0, offset, data).unwrap();
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(0, offset, &mut data).unwrap();
        data
    }

    fn status(&self) -> u8 {
        let [status] = self.read(0x14);
        status
    }

    /// From reset to DRIVER_OK with `features`; the answer is the status then.
    fn start(&mut self, features: u64) -> u8 {
        self.write(0x14, &[0]);
        self.next.fill(0);
        self.seen.fill(0);
        self.write(0x14, &[1 | 2]);
        let features = features | 1 << 32;
        for half in 0..2_u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.write(0x14, &[1 | 2 | 8]);
        self.write(0x10, &0_u16.to_le_bytes());
        for queue in 0..self.next.len() as u16 {
            self.write(0x16, &queue.to_le_bytes());
            self.write(0x18, &SIZE.to_le_bytes());
            self.write(0x1a, &(queue + 1).to_le_bytes());
            let rings = Self::rings(queue.into());
            for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
                self.write(register, &address.to_le_bytes()[..4]);
                self.write(register + 4, &address.to_le_bytes()[4..]);
            }
            self.memory().write_slice(&[0; 0x3000], GuestAddress(rings[0])).unwrap();
            self.write(0x1c, &1_u16.to_le_bytes());
        }
        self.write(0x14, &[1 | 2 | 8 | 4]);
        self.status()
    }

    /// Descriptors, available ring, used ring.
    fn rings(queue: u64) -> [u64; 3] {
        let at = 0x1_0000 + queue * 0x3000;
        [at, at + 0x1000, at + 0x2000]
    }

    fn memory(&self) -> impl std::ops::Deref<Target = GuestMemoryMmap> {
        self.memory.memory()
    }

    fn describe(&self, queue: usize, index: u16, descriptor: (u64, u32, u16, u16)) {
        let at = Self::rings(queue as u64)[0] + 16 * u64::from(index);
        self.describe_at(at, descriptor);
    }

    fn describe_at(&self, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
        self.memory().write_obj(address, GuestAddress(at)).unwrap();
        self.memory().write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory().write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory().write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Make the chain that starts at descriptor `head` available.
    fn offer(&mut self, queue: usize, head: u16) {
        let [_, available, _] = Self::rings(queue as u64);
        let slot = u64::from(self.next[queue] % SIZE);
        self.next[queue] += 1;
        self.memory().write_obj(head, GuestAddress(available + 4 + 2 * slot)).unwrap();
        self.memory().write_obj(self.next[queue], GuestAddress(available + 2)).unwrap();
    }

    fn run(&self, queue: usize) {
        while self.function.run(Piece::Queue(queue as u32), 64) == Ran::More {}
    }

    /// Head and length of what was used since the last call.
    fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let used = Self::rings(queue as u64)[2];
        let index: u16 = self.memory().read_obj(GuestAddress(used + 2)).unwrap();
        let mut new = Vec::new();
        while self.seen[queue] != index {
            let at = used + 4 + 8 * u64::from(self.seen[queue] % SIZE);
            let entry: [u32; 2] = [0, 4].map(|part| self.memory().read_obj(GuestAddress(at + part)).unwrap());
            new.push((entry[0], entry[1]));
            self.seen[queue] += 1;
        }
        new
    }

    /// Offer a chain of buffers, those with bytes to be read and those with room to be written, and run it. The answer
    /// is the length used, and what the written buffers hold.
    fn request(
        &mut self,
        queue: usize,
        readable: &[&[u8]],
        writable: &[usize],
    ) -> (Vec<(u32, u32)>, Vec<u8>) {
        let count = readable.len() + writable.len();
        let address = |index: usize| BUFFERS + 0x1_0000 * (index as u64 + 32 * queue as u64);
        for index in 0..count {
            let (len, write) = match readable.get(index) {
                Some(bytes) => {
                    self.memory().write_slice(bytes, GuestAddress(address(index))).unwrap();
                    (bytes.len(), 0)
                }
                None => (writable[index - readable.len()], WRITE),
            };
            let next = if index + 1 < count { NEXT } else { 0 };
            self.describe(queue, index as u16, (address(index), len as u32, write | next, index as u16 + 1));
        }
        self.offer(queue, 0);
        self.run(queue);
        let mut written = Vec::new();
        for (index, len) in (readable.len()..).zip(writable) {
            let mut part = vec![0; *len];
            self.memory().read_slice(&mut part, GuestAddress(address(index))).unwrap();
            written.extend(part);
        }
        (self.used(queue), written)
    }
}

fn disk(read_only: bool) -> (Driver<block::Disk>, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..64 * 512).map(|n| (n / 512) as u8).collect();
    std::fs::write(file.path(), content).unwrap();
    (Driver::new(block::Disk::open(file.path(), read_only, 3).unwrap()), file)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

#[test]
fn capabilities_lead_to_all_structures() {
    let (driver, _file) = disk(false);
    let dword = |register: u16| {
        let mut data = [0; 4];
        driver.function.config_read(register, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((dword(0), dword(8) >> 8, dword(0x2c)), (0x1042_1af4, 0x01_00_00, 0x1042_1af4));
    let (mut at, mut kinds) = (dword(0x34) as u8, Vec::new());
    while at != 0 {
        let head = dword(at.into());
        if head & 0xff == 9 {
            kinds.push(head >> 24);
        }
        at = (head >> 8) as u8;
    }
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
    // The window into the BAR (4.1.4.9): offset 0x12 of the common structure is the number of queues.
    driver.configure(0x98 + 8, &0x12_u32.to_le_bytes());
    driver.configure(0x98 + 12, &2_u32.to_le_bytes());
    let mut queues = [0; 2];
    driver.function.config_read(0x98 + 16, &mut queues);
    assert_eq!(queues, [1, 0]);
    driver.configure(0x98 + 8, &0x7fff_u32.to_le_bytes());
    driver.function.config_read(0x98 + 16, &mut queues);
}

#[test]
fn features_must_be_among_those_offered() {
    let (mut driver, _file) = disk(false);
    assert_eq!(driver.start(1 << 9), 1 | 2 | 8 | 4);
    assert_eq!(
        driver.start(1 << 5) & (8 | 4),
        0,
        "a disk that can be written does not offer VIRTIO_BLK_F_RO"
    );
    driver.write(0x14, &[0]);
    driver.write(0x14, &[1 | 2 | 8 | 4]);
    assert_eq!(driver.status() & (8 | 4), 0, "VIRTIO_F_VERSION_1 is a must");
}

#[test]
fn doorbells_follow_the_bar_of_a_running_device() {
    let (mut driver, _file) = disk(false);
    let placed = |driver: &Driver<block::Disk>| driver.machine.placed.lock().unwrap().clone();
    assert!(placed(&driver).is_empty());
    driver.start(0);
    assert_eq!(placed(&driver), [0x1_0000_0000 + NOTIFY]);
    driver.configure(0x14, &2_u32.to_le_bytes());
    assert_eq!(placed(&driver), [0x2_0000_0000 + NOTIFY]);
    driver.configure(0x04, &4_u16.to_le_bytes());
    assert!(placed(&driver).is_empty());
    driver.configure(0x04, &6_u16.to_le_bytes());
    assert_eq!(placed(&driver).len(), 1);
    driver.function.reset();
    assert_eq!((placed(&driver), driver.status()), (vec![], 0));
}

#[test]
fn a_disk_reads_writes_flushes_and_has_a_name() {
    let (mut driver, file) = disk(false);
    driver.start(1 << 9 | 1 << 28);
    let (used, read) = driver.request(0, &[&header(0, 5)], &[512, 512, 1]);
    assert_eq!(used, [(0, 1025)]);
    assert_eq!(read, [vec![5; 512], vec![6; 512], vec![0]].concat());
    assert_eq!(*driver.machine.fired.lock().unwrap(), [1]);

    // However the driver cuts it: the header in two, data and status in one.
    let request = header(1, 7);
    let (used, status) = driver.request(0, &[&request[..3], &request[3..], &[0xaa; 700], &[0xbb; 324]], &[1]);
    assert_eq!((used, status), (vec![(0, 1)], vec![0]));
    let content = std::fs::read(file.path()).unwrap();
    assert_eq!(content[7 * 512..7 * 512 + 1024], [vec![0xaa; 700], vec![0xbb; 324]].concat());
    let (used, read) = driver.request(0, &[&header(0, 7)], &[513]);
    assert_eq!((used, &read[510..]), (vec![(0, 513)], &[0xaa, 0xaa, 0][..]));

    assert_eq!(driver.request(0, &[&header(4, 0)], &[1]).1, [0]);
    assert_eq!(&driver.request(0, &[&header(8, 0)], &[20, 1]).1[..16], b"mana-vmm-disk3\0\0");
    assert_eq!(driver.request(0, &[&header(77, 0)], &[1]).1, [2]);
    let capacity: [u8; 8] = driver.read(0x2000);
    assert_eq!(u64::from_le_bytes(capacity), 64);
}

#[test]
fn a_disk_refuses_what_is_beyond_it_or_not_whole() {
    let (mut driver, file) = disk(false);
    driver.start(0);
    let before = std::fs::read(file.path()).unwrap();
    for (sector, len) in [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)] {
        assert_eq!(driver.request(0, &[&header(0, sector)], &[len, 1]).1.last(), Some(&1), "{sector} {len}");
        assert_eq!(driver.request(0, &[&header(1, sector), &vec![9; len]], &[1]).1, [1], "{sector} {len}");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
    let (mut driver, _file) = disk(true);
    assert_eq!(driver.start(1 << 5), 15);
    assert_eq!(driver.request(0, &[&header(1, 0), &[9; 512]], &[1]).1, [1]);
    assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).1[0], 1);
}

#[test]
fn bad_chains_lose_only_their_request() {
    let (mut driver, _file) = disk(false);
    driver.start(1 << 28);
    let bad: [&[(u64, u32, u16, u16)]; 7] = [
        // A loop.
        &[(BUFFERS, 16, NEXT, 1), (BUFFERS, 16, NEXT, 0)],
        // To nowhere.
        &[(BUFFERS, 16, NEXT, 999)],
        // Outside memory.
        &[(BUFFERS, 16, NEXT, 1), (u64::MAX - 5, 512, NEXT | WRITE, 2), (BUFFERS, 1, WRITE, 0)],
        // Written before read.
        &[(BUFFERS, 16, NEXT | WRITE, 1), (BUFFERS, 16, 0, 0)],
        // No status, no header.
        &[(BUFFERS, 16, 0, 0)],
        &[(BUFFERS, 16, WRITE, 0)],
        // An indirect table that is no table.
        &[(BUFFERS, 17, INDIRECT, 0)],
    ];
    for (index, chain) in bad.iter().enumerate() {
        (0..).zip(*chain).for_each(|(at, descriptor)| driver.describe(0, at, *descriptor));
        driver.offer(0, 0);
        driver.run(0);
        assert_eq!(driver.used(0), [(0, 0)], "chain {index}");
        assert_eq!(driver.function.bad_requests(), index as u64 + 1);
    }
    // An indirect table that loops.
    driver.describe_at(BUFFERS, (BUFFERS, 16, NEXT, 0));
    driver.describe(0, 0, (BUFFERS, 16, INDIRECT, 0));
    driver.offer(0, 0);
    driver.run(0);
    assert_eq!(driver.used(0), [(0, 0)]);
    assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).1[..1], [1], "the queue goes on");
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_ring_that_makes_no_sense_needs_a_reset() {
    let (mut driver, _file) = disk(false);
    driver.start(0);
    let [_, available, _] = Driver::<block::Disk>::rings(0);
    driver.memory().write_obj(5000_u16, GuestAddress(available + 2)).unwrap();
    driver.run(0);
    assert_eq!(driver.status(), 15 | 64);
    assert_eq!(*driver.machine.fired.lock().unwrap(), [0], "the configuration's vector");
    driver.next[0] = 5000;
    assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).0, [], "nothing goes until then");
    assert_eq!(driver.start(0), 15);
    assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).1[..1], [1]);

    // A ring outside memory shows when the driver is ready.
    driver.write(0x14, &[0]);
    driver.write(0x08, &1_u32.to_le_bytes());
    driver.write(0x0c, &1_u32.to_le_bytes());
    driver.write(0x14, &[1 | 2 | 8]);
    driver.write(0x20, &0xffff_f000_u64.to_le_bytes());
    driver.write(0x1c, &1_u16.to_le_bytes());
    driver.write(0x14, &[15]);
    assert_eq!(driver.status(), 15 | 64);
}

#[test]
fn interrupts_come_only_where_the_driver_wants_them() {
    let (mut driver, _file) = disk(false);
    driver.start(1 << 29);
    let [_, available, _] = Driver::<block::Disk>::rings(0);
    // The event index: after the third request.
    driver.memory().write_obj(2_u16, GuestAddress(available + 4 + 2 * u64::from(SIZE))).unwrap();
    for expected in [0, 0, 1, 1] {
        driver.request(0, &[&header(0, 1)], &[512, 1]);
        assert_eq!(driver.machine.fired.lock().unwrap().len(), expected);
    }
    driver.start(0);
    driver.memory().write_obj(1_u16, GuestAddress(available)).unwrap();
    driver.request(0, &[&header(0, 1)], &[512, 1]);
    assert_eq!(driver.machine.fired.lock().unwrap().len(), 1, "VRING_AVAIL_F_NO_INTERRUPT");
}

#[test]
fn without_bus_mastering_there_is_no_dma() {
    let (mut driver, _file) = disk(false);
    driver.start(0);
    driver.configure(0x04, &2_u16.to_le_bytes());
    assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).0, []);
    driver.configure(0x04, &6_u16.to_le_bytes());
    driver.run(0);
    assert_eq!(driver.used(0), [(0, 513)]);
}

/// A cable that keeps what is sent.
#[derive(Default)]
struct Kept {
    capabilities: PortCapabilities,
    sent: Mutex<Vec<(Vec<u8>, mana_device::doors::TxOffload)>>,
    flushed: AtomicU64,
    accepts: Mutex<crate::net::Accepts>,
}

impl Port for Kept {
    fn capabilities(&self) -> PortCapabilities {
        self.capabilities
    }
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        let mut bytes = vec![0; frame.len];
        let mut rest = &mut bytes[..];
        for slice in frame.slices {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        assert!(rest.is_empty());
        self.sent.lock().unwrap().push((bytes, frame.offload));
        Ok(())
    }
    fn flush(&self) {
        self.flushed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Cable for Kept {
    fn accept(&self, accepts: crate::net::Accepts) {
        *self.accepts.lock().unwrap() = accepts;
    }
    fn poll(&self, _: usize, _: Deliver<'_>) -> Polled {
        Polled::default()
    }
}

fn nic(checksum: bool, segmentation: bool) -> (Driver<net::Nic>, Arc<Kept>) {
    let capabilities = PortCapabilities { checksum, segmentation };
    let cable = Arc::new(Kept { capabilities, ..Kept::default() });
    let config = VirtioNic { netdev: "n0".into(), mac: [2, 0, 0, 0, 0, 1], mtu: 1500, workers: None };
    (Driver::new(net::Nic::new(config, cable.clone())), cable)
}

/// MRG_RXBUF, and what is left to the other side in both directions.
const ALL: u64 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15;

/// A super-frame's header: checksum and segmentation at 1400 bytes to do, no merged buffers.
const CUT: [u8; 12] = [1, 1, 54, 0, 0x78, 5, 34, 0, 16, 0, 0, 0];

#[test]
fn frames_leave_unfinished_where_the_cable_takes_them_and_finished_elsewhere() {
    use crate::net::batch::tests::{PARTIAL, checksums_hold, cut_at, partial_tcp4};
    let large = partial_tcp4(&[7; 5000]);
    let (mut driver, cable) = nic(true, true);
    driver.start(ALL);
    let (used, _) = driver.request(1, &[&CUT, &large[..60], &large[60..]], &[]);
    assert_eq!(used, [(0, 0)]);
    assert_eq!(*cable.sent.lock().unwrap(), [(large.clone(), cut_at(1400))]);
    assert_eq!(cable.flushed.load(Ordering::Relaxed), 1);

    let (mut driver, cable) = nic(false, false);
    driver.start(ALL);
    driver.request(1, &[&[&CUT[..], &large].concat()], &[]);
    let sent = std::mem::take(&mut *cable.sent.lock().unwrap());
    assert!(sent.len() == 4 && sent.iter().all(|(frame, _)| checksums_hold(frame)));

    // A checksum only, to a cable that makes checksums but cuts nothing.
    let (mut driver, cable) = nic(true, false);
    driver.start(ALL);
    let small = partial_tcp4(&[7; 100]);
    driver.request(1, &[&[&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &small[..]].concat()], &[]);
    driver.request(1, &[&[&CUT[..], &large].concat()], &[]);
    let sent = cable.sent.lock().unwrap();
    assert_eq!(sent[0], (small, PARTIAL));
    assert!(sent.len() == 5 && sent[1..].iter().all(|(frame, _)| checksums_hold(frame)));
}

#[test]
fn senseless_frames_are_used_up_and_not_sent() {
    let (mut driver, cable) = nic(true, true);
    driver.start(ALL);
    let none = [0; 12];
    let senseless: [&[&[u8]]; 6] = [
        &[&none[..5]],
        &[&none, &[0; 13]],
        &[&none, &[0; 1519]],
        &[&[1, 0, 0, 0, 0, 0, 100, 0, 16, 0, 0, 0], &[0; 60]],
        &[&[0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0; 60]],
        &[&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &[0; 60]],
    ];
    for (index, frame) in senseless.iter().enumerate() {
        assert_eq!(driver.request(1, frame, &[]).0, [(0, 0)]);
        assert_eq!(driver.function.bad_requests(), index as u64 + 1);
    }
    assert!(cable.sent.lock().unwrap().is_empty());
    driver.request(1, &[&none, &[0; 60]], &[]);
    assert_eq!(cable.sent.lock().unwrap().len(), 1);
}

/// Give the receive queue `count` buffers of `len` bytes.
fn post(driver: &mut Driver<net::Nic>, count: u16, len: u32) {
    for index in 0..count {
        driver.describe(0, index, (BUFFERS + 0x1_0000 * u64::from(index), len, WRITE, 0));
        driver.offer(0, index);
    }
}

fn buffer(driver: &Driver<net::Nic>, index: u32, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    driver.memory().read_slice(&mut bytes, GuestAddress(BUFFERS + 0x1_0000 * u64::from(index))).unwrap();
    bytes
}

#[test]
fn frames_arrive_in_as_many_buffers_as_they_take() {
    let (mut driver, cable) = nic(true, true);
    driver.start(ALL);
    let accepts = *cable.accepts.lock().unwrap();
    assert!(accepts.checksum && accepts.tcp4 && accepts.tcp6);
    post(&mut driver, 8, 1000);
    let frames = [vec![1; 100], vec![2; 1514], vec![3; 60]];
    let valid = frames.iter().map(|bytes| Frame::plain(bytes, mana_device::doors::RxChecksum::Valid));
    driver.function.deliver(0, &valid.collect::<Vec<_>>());
    let used = driver.used(0);
    assert_eq!(used, [(0, 112), (1, 1000), (2, 526), (3, 72)]);
    assert_eq!(*driver.machine.fired.lock().unwrap(), [1], "one interrupt for all");
    let first = buffer(&driver, 0, 112);
    assert_eq!((&first[..12], &first[12..]), (&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0][..], &frames[0][..]));
    let merged = [buffer(&driver, 1, 1000), buffer(&driver, 2, 526)].concat();
    assert_eq!((&merged[10..12], &merged[12..]), (&[2, 0][..], &frames[1][..]));

    // Four buffers are left: a frame that needs five is lost, and they are there for the next.
    driver.function.deliver(0, &[Frame::plain(&[4; 4500], Default::default())]);
    assert_eq!((driver.used(0), driver.function.backend().dropped().0), (vec![], 1));
    driver.function.deliver(0, &[Frame::plain(&[5; 3900], Default::default())]);
    assert_eq!(driver.used(0), [(4, 1000), (5, 1000), (6, 1000), (7, 912)]);
    driver.function.deliver(0, &[Frame::plain(&[6; 60], Default::default())]);
    assert_eq!(driver.function.backend().dropped().0, 2);
}

#[test]
fn a_driver_gets_only_what_it_has_accepted() {
    use crate::net::batch::tests::{cut_at, partial_tcp4};
    let (mut driver, cable) = nic(true, true);
    driver.start(0);
    assert_eq!(*cable.accepts.lock().unwrap(), crate::net::Accepts::default());
    post(&mut driver, 4, 1526);
    let large = partial_tcp4(&[1; 5000]);
    let cut = Frame { offload: cut_at(1400), ..Frame::plain(&large, Default::default()) };
    let plain = Frame::plain(&large[..1514], mana_device::doors::RxChecksum::Valid);
    driver.function.deliver(0, &[cut, plain]);
    assert_eq!(driver.used(0), [(0, 1526)]);
    assert_eq!(buffer(&driver, 0, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "no GUEST_CSUM, no DATA_VALID");
    // Without MRG_RXBUF a buffer that is too small is given back.
    driver.describe(0, 1, (BUFFERS, 1525, WRITE, 0));
    driver.function.deliver(0, &[plain]);
    assert_eq!(driver.used(0), [(1, 0)]);
}

#[test]
fn commands_are_answered() {
    let (mut driver, _cable) = nic(true, true);
    driver.start(1 << 17 | 1 << 18 | 1 << 23);
    assert_eq!(driver.request(2, &[&[0, 0], &[1]], &[1]), (vec![(0, 1)], vec![0]));
    assert_eq!(driver.request(2, &[&[1, 1], &[2, 0, 0, 0, 0, 9]], &[1]).1, [0]);
    assert_eq!(driver.request(2, &[&[4, 0], &[2, 0]], &[1]).1, [1]);
    assert_eq!(driver.request(2, &[&[4]], &[1]).1, [1]);
    let mac: [u8; 6] = driver.read(0x2000);
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
}

#[test]
fn a_saved_disk_goes_on_where_it_was() {
    let (mut driver, file) = disk(false);
    driver.start(1 << 29 | 1 << 9);
    for _ in 0..20 {
        assert_eq!(driver.request(0, &[&header(0, 1)], &[512, 1]).0, [(0, 513)]);
    }
    let doorbells = driver.machine.placed.lock().unwrap().clone();
    // Available, and not looked at when the machine is saved.
    driver.offer(0, 0);
    let mut driver = driver.moved(|| block::Disk::open(file.path(), false, 3).unwrap());
    assert_eq!(*driver.machine.placed.lock().unwrap(), doorbells);
    driver.run(0);
    assert_eq!(driver.used(0), [(0, 513)]);
    let (used, data) = driver.request(0, &[&header(0, 7)], &[512, 1]);
    assert_eq!((used, data), (vec![(0, 513)], [&[7; 512][..], &[0]].concat()));
    let [_, available, _] = Driver::<block::Disk>::rings(0);
    let index: u16 = driver.memory().read_obj(GuestAddress(available + 2)).unwrap();
    driver.memory().write_obj(index, GuestAddress(available + 4 + 2 * u64::from(SIZE))).unwrap();
    driver.request(0, &[&header(0, 7)], &[512, 1]);
    assert_eq!(*driver.machine.fired.lock().unwrap(), [1], "the queue has its vector");
}

#[test]
fn a_saved_nic_asks_its_cable_for_what_the_driver_takes() {
    let (mut driver, _) = nic(true, true);
    driver.start(1 << 1);
    let cable = Arc::new(Kept::default());
    let config = VirtioNic { netdev: "n".into(), mac: [2, 0, 0, 0, 0, 1], mtu: 1500, workers: None };
    let mut driver = driver.moved(|| net::Nic::new(config, cable.clone()));
    assert!(cable.accepts.lock().unwrap().checksum);
    let frame = [&[0; 12][..], &[1; 60]].concat();
    assert_eq!(driver.request(1, &[&frame], &[]).0, [(0, 0)]);
    assert_eq!(cable.sent.lock().unwrap()[0].0, [1; 60]);
}

#[test]
fn what_was_pending_is_sent_after_a_restore() {
    let (mut driver, file) = disk(false);
    driver.start(0);
    // Vector 1 masked: its interrupt waits.
    driver.write(0x4000 + 16 + 12, &1_u32.to_le_bytes());
    driver.request(0, &[&header(0, 1)], &[512, 1]);
    let driver = driver.moved(|| block::Disk::open(file.path(), false, 3).unwrap());
    assert_eq!(driver.read::<4>(0x5000), [2, 0, 0, 0]);
    driver.write(0x4000 + 16 + 12, &0_u32.to_le_bytes());
    assert_eq!(*driver.machine.fired.lock().unwrap(), [1]);
}

#[test]
fn a_state_that_no_driver_brings_about_is_refused_and_any_that_is_taken_runs() {
    let (mut driver, _file) = disk(true);
    driver.start(1 << 29);
    driver.request(0, &[&header(0, 1)], &[512, 1]);
    let state = driver.function.save();
    let sound = postcard::to_stdvec(&state).unwrap();
    let mut random = Random::default();
    let (mut taken, mut refused) = (0, 0);
    for case in 0..20_000 {
        // Behind the configuration space with its length.
        let bytes = random.damaged(&sound, 258, 1 + case % 3);
        let Ok(changed) = postcard::from_bytes::<FunctionState>(&bytes) else { continue };
        if driver.function.load(&changed).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        driver.function.go_on();
        driver.run(0);
    }
    assert!(taken > 500 && refused > 500, "{taken} taken, {refused} refused");
    driver.function.load(&state).unwrap();
    assert_eq!(driver.request(0, &[&header(0, 2)], &[512, 1]).0, [(0, 513)], "none left anything behind");
}

#[test]
fn any_register_takes_any_access() {
    let (driver, _file) = disk(false);
    for offset in
        (0..0x80_u64).chain(0x1000..0x1008).chain(0x2000..0x2010).chain(0x2ff8..0x3410).chain(0x3ff8..0x4030)
    {
        for len in [1, 2, 4, 8] {
            let mut data = [0; 8];
            let _ = driver.function.bar_read(0, offset, &mut data[..len]);
            let _ = driver.function.bar_write(0, offset, &[0xff; 8][..len]);
        }
    }
    for register in 0..0x120 {
        for len in [1, 2, 4] {
            driver.function.config_read(register, &mut [0; 4][..len]);
            driver.configure(register, &[0xff; 4][..len]);
        }
    }
    driver.function.reset();
    assert_eq!(driver.status(), 0);
}
