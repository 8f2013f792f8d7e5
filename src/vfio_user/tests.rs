//! Clients at real sockets, well-behaved and hostile, and hand-made messages without one.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mana_device::config::DeviceConfig;
use mana_device::doors::{Memory, MsiSink};
use mana_device::observe::{Event, Observer};
use mana_device::{Host, ManaDevice};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::exercise::{Exercise, reads, request};
use super::irqs::EventDescriptors;
use super::server::Server;
use super::session::Function;
use super::wire::{
    DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, OneWrite, RegionAccess, RegionInfo, flags, irq, region,
};
use crate::clock::MonotonicClock;
use crate::net::Null;
use crate::workers::Mailboxes;

/// Longest wait for something that takes microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Log(Mutex<Vec<Event>>);

impl Observer for Log {
    fn event(&self, _: u64, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

fn function() -> (Function, Arc<Log>, Arc<EventDescriptors>) {
    let config = DeviceConfig::default();
    let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::default());
    let events = Arc::new(EventDescriptors::new(config.msix_table_size));
    let log = Arc::new(Log::default());
    let host = Host {
        memory: memory.clone(),
        msi: events.clone(),
        clock: Arc::new(MonotonicClock::new()),
        waker: Mailboxes::new(1).unwrap(),
        ports: vec![Arc::new(Null)],
        observer: Some(log.clone()),
    };
    let device = Arc::new(ManaDevice::new(config.clone(), host).unwrap());
    (Function { device, config, memory, events: events.clone() }, log, events)
}

/// A function at a socket in a folder of its own.
struct Served {
    folder: tempfile::TempDir,
    server: Option<Server>,
    log: Arc<Log>,
    events: Arc<EventDescriptors>,
    memory: Memory,
    left: Receiver<()>,
}

impl Served {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (function, log, events) = function();
        let memory = function.memory.clone();
        let (tell, left) = channel();
        let on_left = Box::new(move || tell.send(()).unwrap_or_default());
        let server = Server::start(&folder.path().join("s"), function, Box::new(|| ()), on_left).unwrap();
        Self { folder, server: Some(server), log, events, memory, left }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(stream)
    }

    fn greeted(&self) -> Client {
        let mut client = self.client();
        let (header, body) = client.ask(&request(1, 0, &[&[0, 0, 1, 0], b"{}\0"]), &[]);
        assert_eq!((header.flags.get(), header.error.get()), (flags::REPLY, 0));
        assert_eq!((&body[..4], body.last()), (&[0, 0, 1, 0][..], Some(&0)));
        let text: serde_json::Value = serde_json::from_slice(&body[4..body.len() - 1]).unwrap();
        assert_eq!(text["capabilities"]["write_multiple"], true);
        client
    }

    fn await_left(&self) {
        self.left.recv_timeout(PATIENCE).expect("the client's session ends");
    }

    fn events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.log.0.lock().unwrap())
    }
}

struct Client(UnixStream);

impl Client {
    fn send(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        if descriptors.is_empty() {
            return self.0.write_all(bytes).unwrap();
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    fn reply(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; 16];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut body = vec![0; header.size.get() as usize - 16];
        self.0.read_exact(&mut body).unwrap();
        (header, body)
    }

    fn ask(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> (Header, Vec<u8>) {
        self.send(bytes, descriptors);
        self.reply()
    }

    /// The errno of the reply, 0 for success.
    fn errno(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> i32 {
        self.ask(bytes, descriptors).0.error.get() as i32
    }

    /// No reply comes, but the end.
    fn await_end(&mut self) {
        let mut rest = Vec::new();
        let end = self.0.read_to_end(&mut rest);
        assert!(end.is_ok_and(|length| length == 0) || rest.is_empty(), "{rest:?}");
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, i32> {
        let (header, body) = self.ask(&access(9, 0, region, offset, count, &[]), &[]);
        match header.error.get() {
            0 => Ok(body[16..].to_vec()),
            error => Err(error as i32),
        }
    }

    fn config(&mut self, offset: u64, value: u16) {
        assert_eq!(self.errno(&access(10, 0, region::CONFIG, offset, 2, &value.to_le_bytes()), &[]), 0);
    }
}

fn access(command: u16, flags: u32, region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let access = RegionAccess { offset: offset.into(), region: region.into(), count: count.into() };
    request(command, flags, &[access.as_bytes(), data])
}

fn set_irqs(flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let set = IrqSet {
        argsz: 20.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    request(8, 0, &[set.as_bytes(), data])
}

fn map(iova: u64, size: u64) -> Vec<u8> {
    let map =
        DmaMap { argsz: 32.into(), flags: 3.into(), offset: 0.into(), iova: iova.into(), size: size.into() };
    request(2, 0, &[map.as_bytes()])
}

fn unmap(iova: u64, size: u64) -> Vec<u8> {
    let unmap = DmaUnmap { argsz: 24.into(), flags: 0.into(), iova: iova.into(), size: size.into() };
    request(3, 0, &[unmap.as_bytes()])
}

fn memory(bytes: u64) -> OwnedFd {
    let file = memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file
}

const EVENTFD: u32 = irq::DATA_EVENTFD | irq::ACTION_TRIGGER;
const NONE: u32 = irq::DATA_NONE | irq::ACTION_TRIGGER;

#[test]
fn an_independent_client_finds_the_device() {
    let served = Served::new();
    let mut client = vfio_user::Client::new(&served.path()).unwrap();
    let sizes: Vec<u64> = (0..9).map(|index| client.region(index).map_or(0, |region| region.size)).collect();
    assert_eq!(sizes, [0x10_0000, 0, 0, 0, 0x1_0000, 0, 0, 4096, 0]);
    let mut id = [0; 4];
    client.region_read(region::CONFIG, 0, &mut id).unwrap();
    assert_eq!(u32::from_le_bytes(id), 0x00ba_1414);
    let msix = client.get_irq_info(irq::MSIX).unwrap();
    // Without NORESIZE, so that vectors can be added one at a time.
    assert_eq!((msix.flags, msix.count), (1, 64));
    let file = memory(1 << 20);
    client.dma_map(0, 0x10_0000, 1 << 20, file.as_raw_fd()).unwrap();
    client.dma_unmap(0x10_0000, 1 << 20).unwrap();
    client.region_write(region::CONFIG, 4, &6_u16.to_le_bytes()).unwrap();
    let event = eventfd(0, EventfdFlags::empty()).unwrap();
    client.set_irqs(irq::MSIX, EVENTFD, 0, 1, &[event.as_raw_fd()]).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
    served.await_left();
}

#[test]
fn the_device_behind_the_socket_is_whole() {
    let served = Served::new();
    let mut client = served.greeted();
    let info = client.ask(&request(4, 0, &[&[0; 16]]), &[]).1;
    assert_eq!(info, [16_u32, 3, 9, 5].map(u32::to_le_bytes).concat());
    let all = client.read(region::CONFIG, 0, 4096).unwrap();
    assert_eq!(all[..4], 0x00ba_1414_u32.to_le_bytes());
    assert_eq!(client.read(region::CONFIG, 1, 2).unwrap(), all[1..3]);
    // Memory Space is off: nothing answers.
    assert_eq!(client.read(0, 0, 4).unwrap(), [0xff; 4]);
    client.config(4, 6);
    let register = client.read(0, 0, 4).unwrap();
    assert_ne!(register, [0xff; 4]);
    // A reset turns Memory Space off again.
    assert_eq!(client.errno(&request(13, 0, &[]), &[]), 0);
    assert_eq!(client.read(0, 0, 4).unwrap(), [0xff; 4]);
    assert_eq!(client.read(region::CONFIG, 4, 2).unwrap(), [0, 0]);
}

#[test]
fn vectors_come_one_at_a_time_and_show_in_the_trace() {
    let served = Served::new();
    let mut client = served.greeted();
    client.config(4, 6);
    client.config(0x52, 0x8000);
    served.events();
    let events: Vec<_> = (0..3).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect();
    // QEMU enables MSI-X with a vector that has no descriptor yet.
    assert_eq!(client.errno(&set_irqs(EVENTFD, irq::MSIX, 0, 1, &[]), &[]), 0);
    for (vector, event) in (0..).zip(&events) {
        assert_eq!(client.errno(&set_irqs(EVENTFD, irq::MSIX, vector, 1, &[]), &[event.as_fd()]), 0);
    }
    let program = |vector| Event::MsixProgram { vector, address: 0, data: vector.into() };
    let unmask = |vector| Event::MsixUnmask { vector };
    assert_eq!(served.events(), [program(0), unmask(0), program(1), unmask(1), program(2), unmask(2)]);
    let fired = |event: &OwnedFd| rustix::io::read(event, &mut [0; 8]).is_ok();
    served.events.fire(1);
    assert_eq!(events.iter().map(fired).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(client.errno(&set_irqs(NONE, irq::MSIX, 2, 1, &[]), &[]), 0);
    assert_eq!(events.iter().map(fired).collect::<Vec<_>>(), [false, false, true]);
    let bools = irq::DATA_BOOL | irq::ACTION_TRIGGER;
    assert_eq!(client.errno(&set_irqs(bools, irq::MSIX, 0, 3, &[1, 0, 1]), &[]), 0);
    assert_eq!(events.iter().map(fired).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(client.errno(&set_irqs(NONE, irq::MSIX, 0, 0, &[]), &[]), 0);
    served.events.fire(0);
    assert!(!fired(&events[0]));
    let masks: Vec<_> = (0..3).map(|vector| Event::MsixMask { vector }).collect();
    assert_eq!(served.events(), masks);
}

#[test]
fn interrupts_that_make_no_sense_are_refused() {
    let served = Served::new();
    let mut client = served.greeted();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let file = memory(4096);
    let one = [event.as_fd()];
    for (message, descriptors) in [
        (set_irqs(EVENTFD, irq::MSIX, 64, 1, &[]), &one[..]),
        (set_irqs(EVENTFD, irq::MSIX, u32::MAX, 2, &[]), &one),
        (set_irqs(EVENTFD, irq::MSIX, 0, 2, &[]), &one),
        (set_irqs(EVENTFD, irq::MSIX, 0, 0, &[]), &one),
        (set_irqs(EVENTFD, irq::MSIX, 0, 1, &[]), &[file.as_fd()]),
        (set_irqs(EVENTFD, irq::MSIX, 0, 1, &[0; 4]), &one),
        (set_irqs(EVENTFD, 1, 0, 1, &[]), &one),
        (set_irqs(EVENTFD, irq::COUNT, 0, 0, &[]), &[]),
        (set_irqs(NONE, irq::MSIX, 0, 1, &[]), &one),
        (set_irqs(irq::DATA_NONE | 8, irq::MSIX, 0, 1, &[]), &[]),
        (set_irqs(NONE | 4, irq::MSIX, 0, 1, &[]), &[]),
        (set_irqs(0, irq::MSIX, 0, 1, &[]), &[]),
        (set_irqs(u32::MAX, irq::MSIX, 0, 1, &[]), &[]),
        (set_irqs(irq::DATA_BOOL | irq::ACTION_TRIGGER, irq::MSIX, 0, 2, &[1]), &[]),
        (request(8, 0, &[&[0; 19]]), &[]),
    ] {
        assert_eq!(client.errno(&message, descriptors), libc::EINVAL, "{message:?}");
    }
    let irq = |index: u32| {
        let info = IrqInfo { argsz: 16.into(), flags: 0.into(), index: index.into(), count: 0.into() };
        request(7, 0, &[info.as_bytes()])
    };
    assert_eq!(client.errno(&irq(irq::COUNT), &[]), libc::EINVAL);
    assert_eq!(client.ask(&irq(0), &[]).1, [16_u32, 0, 0, 0].map(u32::to_le_bytes).concat());
}

#[test]
fn accesses_and_pieces_of_memory_are_checked() {
    let served = Served::new();
    let mut client = served.greeted();
    client.config(4, 6);
    for (region, offset, count) in [
        (0, 0, 3),
        (0, 0, 0),
        (0, 0, 16),
        (0, 0x10_0000, 4),
        (0, 0xf_fffe, 4),
        (0, u64::MAX, 4),
        (1, 0, 4),
        (6, 0, 4),
        (8, 0, 4),
        (9, 0, 4),
        (u32::MAX, 0, 4),
        (7, 4096, 1),
        (7, 4000, 97),
        (7, 0, u32::MAX),
    ] {
        assert_eq!(client.read(region, offset, count), Err(libc::EINVAL), "{region} {offset:#x} {count}");
        let write = access(10, 0, region, offset, count, &vec![0; count.min(4096) as usize]);
        assert_eq!(client.errno(&write, &[]), libc::EINVAL);
    }
    // A count that the bytes don't bear out.
    assert_eq!(client.errno(&access(10, 0, 0, 0, 8, &[0; 4]), &[]), libc::EINVAL);
    let region_9 = RegionInfo {
        argsz: 32.into(),
        flags: 0.into(),
        index: 9.into(),
        cap_offset: 0.into(),
        size: 0.into(),
        offset: 0.into(),
    };
    assert_eq!(client.errno(&request(5, 0, &[region_9.as_bytes()]), &[]), libc::EINVAL);
    let file = memory(1 << 20);
    assert_eq!(client.errno(&map(0, 1 << 20), &[file.as_fd(), file.as_fd()]), libc::EINVAL);
    assert_eq!(client.errno(&map(0, 2 << 20), &[file.as_fd()]), libc::EINVAL);
    assert_eq!(client.errno(&map(0, 1 << 20), &[file.as_fd()]), 0);
    assert_eq!(client.errno(&map(0x1000, 0x1000), &[file.as_fd()]), libc::EEXIST);
    assert_eq!(client.errno(&unmap(0, 0x1000), &[]), libc::EINVAL);
    assert_eq!(client.errno(&unmap(0, 1 << 20), &[]), 0);
    assert_eq!(client.errno(&unmap(0, 1 << 20), &[]), libc::ENOENT);
    // The stream is in step after all of it.
    assert_eq!(client.read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
}

#[test]
fn unknown_commands_are_refused_with_their_payload() {
    let served = Served::new();
    let mut client = served.greeted();
    for command in [0, 6, 11, 12, 14, 16, 99, u16::MAX / 3] {
        let message = request(command, 0, &[&[0xab; 3000]]);
        assert_eq!(client.errno(&message, &[]), libc::EOPNOTSUPP);
    }
    assert_eq!(client.read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
}

#[test]
fn posted_writes_take_effect_in_order_and_are_not_answered() {
    let served = Served::new();
    let mut client = served.greeted();
    client.send(&access(10, flags::NO_REPLY, region::CONFIG, 4, 2, &[6, 0]), &[]);
    client.send(&access(10, flags::NO_REPLY, 5, 4, 2, &[6, 0]), &[]);
    assert_eq!(client.read(region::CONFIG, 4, 2).unwrap(), [6, 0]);
    let write = |value: u8| OneWrite {
        access: RegionAccess { offset: 0x3c.into(), region: region::CONFIG.into(), count: 1.into() },
        data: [value; 8],
    };
    let wrong = OneWrite { access: RegionAccess { count: 9.into(), ..write(3).access }, data: [3; 8] };
    let count = 3_u64.to_le_bytes();
    let many = [write(1).as_bytes(), wrong.as_bytes(), write(2).as_bytes()].concat();
    client.send(&request(15, flags::NO_REPLY, &[&count, &many]), &[]);
    assert_eq!(client.read(region::CONFIG, 0x3c, 1).unwrap(), [2]);
    assert_eq!(client.errno(&request(15, 0, &[&count, &many]), &[]), libc::EINVAL);
    assert_eq!(client.errno(&request(15, 0, &[&4_u64.to_le_bytes(), &many]), &[]), libc::EINVAL);
    assert_eq!(client.errno(&request(15, 0, &[&count, &many[..71]]), &[]), libc::EINVAL);
    let full = write(7).as_bytes().repeat(200);
    assert_eq!(client.errno(&request(15, 0, &[&200_u64.to_le_bytes(), &full]), &[]), 0);
    assert_eq!(client.read(region::CONFIG, 0x3c, 1).unwrap(), [7]);
}

#[test]
fn a_client_that_breaks_the_stream_ends_only_its_own_connection() {
    let (served, other) = (Served::new(), Served::new());
    let mut bystander = other.greeted();
    let header = |size: u32, flags: u32| {
        let header = Header {
            id: 1.into(),
            command: 9.into(),
            size: size.into(),
            flags: flags.into(),
            error: 0.into(),
        };
        header.as_bytes().to_vec()
    };
    for bytes in
        [header(0, 0), header(15, 0), header(8193, 0), header(u32::MAX, 0), header(16, 1), header(16, 7)]
    {
        let mut client = served.greeted();
        client.send(&bytes, &[]);
        client.await_end();
        served.await_left();
    }
    // Without greeting, with one in another language, with half of one.
    for bytes in
        [request(9, 0, &[&[0; 16]]), request(1, 0, &[&[7, 0, 0, 0], b"{}\0"]), request(1, 0, &[&[0; 3]])]
    {
        let mut client = served.client();
        client.send(&bytes, &[]);
        let mut rest = Vec::new();
        let _ = client.0.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest[12..16] == 22_u32.to_le_bytes(), "{rest:?}");
        served.await_left();
    }
    // Gone in the middle of a message, or leaving descriptors without end.
    let whole = access(10, 0, region::CONFIG, 4, 2, &[6, 0]);
    for cut in 1..whole.len() {
        let mut client = served.greeted();
        client.send(&whole[..cut], &[]);
        drop(client);
        served.await_left();
    }
    let mut client = served.greeted();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    for byte in &whole[..2] {
        client.send(&[*byte], &[event.as_fd(); 200]);
    }
    client.await_end();
    served.await_left();
    assert_eq!(bystander.read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
    assert_eq!(served.greeted().read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
}

#[test]
fn a_client_that_shortens_its_memory_ends_only_its_own_connection() {
    let (served, other) = (Served::new(), Served::new());
    let mut bystander = other.greeted();
    let theirs = memory(1 << 20);
    assert_eq!(bystander.errno(&map(0, 1 << 20), &[theirs.as_fd()]), 0);
    let mut client = served.greeted();
    let file = memory(1 << 20);
    assert_eq!(client.errno(&map(0, 1 << 20), &[file.as_fd()]), 0);
    ftruncate(&file, 0).unwrap();
    served.memory.memory().write_obj(7_u32, GuestAddress(0x1000)).unwrap();
    client.await_end();
    served.await_left();
    assert_eq!(bystander.read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
    other.memory.memory().write_obj(7_u32, GuestAddress(0x1000)).unwrap();
    assert_eq!(served.greeted().read(region::CONFIG, 0, 2).unwrap(), 0x1414_u16.to_le_bytes());
}

#[test]
fn nothing_of_a_client_is_left_for_the_next() {
    let served = Served::new();
    let mut client = served.greeted();
    client.config(4, 6);
    let file = memory(1 << 20);
    assert_eq!(client.errno(&map(0, 1 << 20), &[file.as_fd()]), 0);
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    assert_eq!(client.errno(&set_irqs(EVENTFD, irq::MSIX, 0, 1, &[]), &[event.as_fd()]), 0);
    drop(client);
    served.await_left();
    let last = served.events().pop().unwrap();
    let Event::Ledger { live } = last else { panic!("{last:?} is no ledger") };
    assert!(live.0.iter().all(|(_, count)| *count == 0), "{live:?}");
    served.events.fire(0);
    assert!(rustix::io::read(&event, &mut [0; 8]).is_err());
    let mut next = served.greeted();
    assert_eq!(next.read(region::CONFIG, 4, 2).unwrap(), [0, 0]);
    assert_eq!(next.errno(&map(0, 1 << 20), &[file.as_fd()]), 0);
}

#[test]
fn the_server_ends_while_a_client_is_there_and_takes_its_socket_along() {
    let mut served = Served::new();
    let mut client = served.greeted();
    served.server = None;
    client.await_end();
    assert!(!served.path().exists());
}

#[test]
fn the_server_ends_though_somebody_removed_its_socket() {
    let mut served = Served::new();
    std::fs::remove_file(served.path()).unwrap();
    served.server = None;
}

/// What the fuzz target starts from, and what it has found.
#[test]
fn the_corpus_is_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/device-model/fuzz/corpus/vfio_user");
    let mut replies = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        replies +=
            EXERCISE.with(|exercise| exercise.play(&std::fs::read(file.unwrap().path()).unwrap()).len());
    }
    assert!(replies > 10_000, "the corpus reaches nothing: {replies} bytes of replies");
}

/// Whole sessions, as a client has them: the fuzz target's first inputs. `BLESS=1` writes them.
#[test]
fn the_corpus_holds_whole_sessions() {
    let events = |vector| (set_irqs(EVENTFD, irq::MSIX, vector, 1, &[]), 1, 1);
    let plain = |message| (message, 0, 0);
    let smc = |offset, value: u32| plain(access(10, flags::NO_REPLY, 0, offset, 4, &value.to_le_bytes()));
    let one = OneWrite {
        access: RegionAccess { offset: 0x3c.into(), region: region::CONFIG.into(), count: 1.into() },
        data: [1; 8],
    };
    let info = |index: u32| request(5, 0, &[[32, 0, index, 0, 0, 0, 0, 0].as_bytes()]);
    let start = [
        plain(request(4, 0, &[&[0; 16]])),
        plain(info(0)),
        plain(info(7)),
        plain(request(7, 0, &[[16, 0, 2, 0].as_bytes()])),
        plain(access(9, 0, region::CONFIG, 0, 4096, &[])),
        (map(0, 1 << 20), 0, 1),
        (map(1 << 32, 0x1000), 0, 1),
        plain(map(0xfd00_0000, 1 << 24)),
        plain(access(10, 0, region::CONFIG, 4, 2, &[6, 0])),
        plain(access(10, 0, region::CONFIG, 0x52, 2, &[0, 0x80])),
    ];
    let vectors = [
        plain(set_irqs(EVENTFD, irq::MSIX, 0, 1, &[])),
        events(0),
        events(1),
        plain(set_irqs(NONE, irq::MSIX, 0, 2, &[])),
        plain(set_irqs(NONE, irq::MSIX, 0, 0, &[])),
    ];
    let registers = [
        plain(access(9, 0, 0, 0, 4, &[])),
        plain(access(9, 0, 0, 0x18, 8, &[])),
        plain(access(9, 0, 4, 0x8000, 8, &[])),
        smc(0x1000, 1),
        smc(0x1004, 2),
        smc(0x101c, 0x8000_0001),
        plain(access(10, flags::NO_REPLY, 0, 0x8_0000, 8, &[1; 8])),
        plain(request(15, flags::NO_REPLY, &[&1_u64.to_le_bytes(), one.as_bytes()])),
        plain(request(15, 0, &[&2_u64.to_le_bytes(), one.as_bytes(), one.as_bytes()])),
        plain(access(10, 0, region::CONFIG, 0x68, 2, &[0, 0x80])),
        plain(access(10, 0, region::CONFIG, 4, 2, &[6, 0])),
    ];
    let end = [
        plain(unmap(1 << 32, 0x1000)),
        plain(request(13, 0, &[])),
        plain(request(3, 0, &[[24_u32, 2, 0, 0, 0, 0].as_bytes()])),
        plain(request(99, 0, &[&[1; 40]])),
    ];
    let sessions = [
        ("start", start.to_vec()),
        ("vectors", [&start[..], &vectors].concat()),
        ("registers", [&start[..], &registers].concat()),
        ("whole", [&start[..], &vectors, &registers, &end].concat()),
    ];
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/device-model/fuzz/corpus/vfio_user"));
    for (name, messages) in sessions {
        let file = folder.join(name);
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&file, reads(&messages)).unwrap();
        }
        assert!(std::fs::read(&file).unwrap() == reads(&messages), "{}: BLESS=1 renews it", file.display());
    }
}

#[test]
fn a_socket_in_use_or_no_socket_at_all_is_not_taken_over() {
    let served = Served::new();
    let path = served.path();
    let again = |path: &std::path::Path| {
        let (function, ..) = function();
        Server::start(path, function, Box::new(|| ()), Box::new(|| ()))
            .err()
            .map(|error| format!("{error:#}"))
    };
    assert!(again(&path).unwrap().contains("somebody listens"));
    let file = served.folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(again(&file).unwrap().contains("is no socket"));
    let stale = served.folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert_eq!(again(&stale), None);
}

fn any_message() -> impl Strategy<Value = (Vec<u8>, usize, u8)> {
    let word = || prop_oneof![any::<u32>(), 0..10_u32, Just(32), Just(0x1000)];
    let long = || prop_oneof![any::<u64>(), 0..0x2000_u64, Just(1 << 20), Just(0x10_0000)];
    let body = prop_oneof![
        (word(), 0..4_u32, long(), long(), long()).prop_map(|(a, b, c, d, e)| [
            [a, b].as_bytes(),
            [c, d, e].as_bytes()
        ]
        .concat()),
        (0..64_u32, 0..3_u32, 0..66_u32, 0..3_u32).prop_map(|(flags, index, start, count)| [
            20, flags, index, start, count
        ]
        .as_bytes()
        .to_vec()),
        (long(), 0..10_u32, prop_oneof![0..9_u32, any::<u32>()], prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(
                |(at, region, count, data)| [at.as_bytes(), [region, count].as_bytes(), &data].concat()
            ),
        prop::collection::vec(any::<u8>(), 0..200),
    ];
    let flags = prop_oneof![9 => Just(0_u32), 3 => Just(flags::NO_REPLY), 1 => any::<u32>()];
    let message =
        (0..17_u16, flags, body).prop_map(|(command, flags, body)| request(command, flags, &[&body]));
    (message, 0..4_usize, 0..3_u8)
}

thread_local! {
    static EXERCISE: Exercise = Exercise::new().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_messages_are_survived(messages in prop::collection::vec(any_message(), 0..24)) {
        EXERCISE.with(|exercise| exercise.play(&reads(&messages)));
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        EXERCISE.with(|exercise| exercise.play(&bytes));
    }
}
