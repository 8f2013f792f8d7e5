//! Plays bytes to a session as a hostile client would, without a socket: the body of the fuzz target, which tests on
//! stable replay too.
//!
//! The input is a list of reads. Each begins with a control byte and a 16-bit little-endian length, then as many bytes
//! follow as the socket is to bring. The control byte's two low bits say how many descriptors come along, the next two
//! what they are: memory, an eventfd, a pipe, or a closed door (`/dev/null`). Bit 4 puts a VERSION request before the
//! bytes, so that the first read need not guess one.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use mana_device::config::DeviceConfig;
use mana_device::doors::{Clock, Memory, Waker, Work};
use mana_device::{Host, ManaDevice};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::frames::{Frames, MAX_MESSAGE};
use super::irqs::EventDescriptors;
use super::session::{Function, Session};
use super::wire::{Header, flags};
use crate::net::Null;

/// Bytes of the memory that a descriptor holds.
const MEMORY: u64 = 1 << 20;
/// What a run of a queue may do.
const BUDGET: usize = 64;

struct Stopped;

impl Clock for Stopped {
    fn now_ns(&self) -> u64 {
        0
    }
}

#[derive(Default)]
struct Due(Mutex<Vec<Work>>);

impl Due {
    fn take(&self) -> Vec<Work> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Waker for Due {
    fn wake(&self, work: Work) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(work);
    }
}

/// A function that clients can be played to, one after another.
pub struct Exercise {
    function: Function,
    due: Arc<Due>,
    /// Memory, eventfd, pipe, `/dev/null`.
    files: [OwnedFd; 4],
}

impl Exercise {
    /// A function with its MSI-X table in BAR4, a null port, and a clock that stands.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new() -> anyhow::Result<Self> {
        let config = DeviceConfig::default();
        let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::default());
        let events = Arc::new(EventDescriptors::new(config.msix_table_size));
        let due = Arc::<Due>::default();
        let host = Host {
            memory: memory.clone(),
            msi: events.clone(),
            clock: Arc::new(Stopped),
            waker: due.clone(),
            ports: vec![Arc::new(Null)],
            observer: None,
        };
        let device = Arc::new(ManaDevice::new(config.clone(), host)?);
        let memfd = memfd_create("exercise", MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, MEMORY)?;
        let files = [
            memfd,
            eventfd(0, EventfdFlags::CLOEXEC)?,
            rustix::pipe::pipe()?.0,
            open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?,
        ];
        Ok(Self { function: Function { device, config, memory, events }, due, files })
    }

    /// Play `input` as one client; the answer is the replies.
    ///
    /// # Panics
    /// The server breaks a promise: a reply is malformed, missing or one too many, or something of the client stays.
    pub fn play(&self, input: &[u8]) -> Vec<u8> {
        let mut session = Session::new(&self.function, None);
        let mut frames = Frames::default();
        let mut replies = Vec::new();
        let mut rest = input;
        while let Some((control, bytes)) = next_read(&mut rest) {
            if control & 0x10 != 0 && !self.read(&mut session, &mut frames, VERSION, 0, 0, &mut replies) {
                break;
            }
            let kind = usize::from(control >> 2 & 3);
            if !self.read(&mut session, &mut frames, bytes, control & 3, kind, &mut replies) {
                break;
            }
        }
        self.end(session);
        replies
    }

    /// One read of the socket. `false` when the connection ends.
    fn read(
        &self,
        session: &mut Session,
        frames: &mut Frames,
        bytes: &[u8],
        descriptors: u8,
        kind: usize,
        replies: &mut Vec<u8>,
    ) -> bool {
        for (index, piece) in bytes.chunks(MAX_MESSAGE).enumerate() {
            let number = if index == 0 { descriptors } else { 0 };
            let copies = (0..number).filter_map(|_| self.files.get(kind)?.try_clone().ok()).collect();
            frames.room()[..piece.len()].copy_from_slice(piece);
            if frames.received(piece.len(), copies).is_err() {
                return false;
            }
            loop {
                let Ok(frame) = frames.next_frame() else { return false };
                let Some(frame) = frame else { break };
                let (header, before) = (frame.header, replies.len());
                let handled = session.handle(frame, replies);
                check_reply(&header, &replies[before..], handled.is_ok());
                if handled.is_err() {
                    return false;
                }
                for work in self.due.take() {
                    let _ = self.function.device.run(work, BUDGET);
                }
            }
        }
        true
    }

    fn end(&self, session: Session) {
        session.end();
        self.due.take();
        let alive: u64 = self.function.device.ledger().0.iter().map(|(_, count)| count).sum();
        assert_eq!(alive, 0, "objects outlive their client: {:?}", self.function.device.ledger());
        assert_eq!(self.function.memory.memory().num_regions(), 0, "memory outlives its client");
    }
}

/// Control byte and bytes of the next read.
fn next_read<'a>(rest: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let ([control, low, high], after) = rest.split_first_chunk()?;
    let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
    let (bytes, after) = after.split_at(length);
    *rest = after;
    Some((*control, bytes))
}

/// A VERSION request: header, 0.1, no capabilities.
const VERSION: &[u8] = b"\0\0\x01\0\x17\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0{}\0";

fn check_reply(request: &Header, reply: &[u8], goes_on: bool) {
    let posted = request.flags.get() & flags::NO_REPLY != 0;
    if reply.is_empty() {
        assert!(posted || !goes_on, "a request is not answered");
        return;
    }
    assert!(!posted, "a posted request is answered");
    let (header, _) = Header::read_from_prefix(reply).expect("a reply has a header");
    assert_eq!(header.size.get() as usize, reply.len(), "a reply is as long as it says");
    assert_eq!((header.id, header.command), (request.id, request.command), "a reply names its request");
    let failed = header.flags.get() == flags::REPLY | flags::ERROR;
    assert!(failed || header.flags.get() == flags::REPLY);
    assert_eq!(failed, header.error.get() != 0, "an error has a number, success has none");
    assert!(!failed || reply.len() == size_of::<Header>());
}

/// An input for [`Exercise::play`] that brings each of `messages` in a read of its own; with them come descriptors,
/// `(kind, number)`.
pub fn reads(messages: &[(Vec<u8>, usize, u8)]) -> Vec<u8> {
    let mut input = Vec::new();
    for (index, (bytes, kind, number)) in messages.iter().enumerate() {
        let version = if index == 0 { 0x10 } else { 0 };
        input.push(version | (*kind as u8 & 3) << 2 | number & 3);
        input.extend((bytes.len() as u16).to_le_bytes());
        input.extend(bytes);
    }
    input
}

/// A request.
pub fn request(command: u16, flags: u32, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let size = size_of::<Header>() + body.len();
    let header = Header {
        id: (command * 3).into(),
        command: command.into(),
        size: (size as u32).into(),
        flags: flags.into(),
        error: 0.into(),
    };
    [header.as_bytes(), &body].concat()
}
