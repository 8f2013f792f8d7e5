//! A switch that spans machines (`--netdev switch,path=SOCKET`): the first of them listens at the socket, the others
//! connect, and what passes between them are frames in QEMU's framing, so that QEMU's `-netdev stream` can join too.
//!
//! Machines come and go as they like. When the one that listens is gone, each of the others tries to take its place;
//! a lock on the file `SOCKET.lock` sees to it that only one does at a time.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use mana_device::doors::{Clock, PortDropped, TxFrame, TxOffload};
use rustix::fs::{FlockOperation, flock};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Polled;
use super::framing::{Arrival, Input, Output};
use super::stream::listen;
use super::switch::{Member, Switch};

/// Between two attempts to find or be the machine that listens.
const RETRY_NS: u64 = 200_000_000;
/// Events taken at once.
const EVENTS: usize = 16;

/// Frames to another machine.
struct Wire {
    epoll: Arc<Epoll>,
    file: RawFd,
    output: Mutex<Outgoing>,
}

struct Outgoing {
    output: Output,
    /// The poller waits for room in the socket.
    awaits_room: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(epoll: &Epoll, operation: ControlOperation, file: RawFd, events: EventSet) -> io::Result<()> {
    epoll.ctl(operation, file, EpollEvent::new(events, file as u64))
}

impl Member for Wire {
    fn take(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        lock(&self.output).output.put(frame)
    }
    fn flush(&self) {
        let outgoing = &mut *lock(&self.output);
        // An end of the connection shows when it is read.
        let all = outgoing.output.flush().unwrap_or(true);
        if outgoing.awaits_room == all {
            outgoing.awaits_room = !all;
            let events = if all { EventSet::IN } else { EventSet::IN | EventSet::OUT };
            let _ = watch(&self.epoll, ControlOperation::Modify, self.file, events);
        }
    }
}

/// A connection, seen from its receiving side.
struct Neighbour {
    /// Its port of the switch.
    port: u16,
    input: Input,
    wire: Arc<Wire>,
}

struct State {
    /// While this machine is the one that listens.
    listener: Option<UnixListener>,
    /// By file.
    neighbours: HashMap<RawFd, Neighbour>,
    retry_at: Option<u64>,
}

/// The switch's connections. Whoever owns the switch's first port polls them.
pub struct Uplink {
    path: PathBuf,
    switch: Arc<Switch>,
    clock: Arc<dyn Clock>,
    epoll: Arc<Epoll>,
    /// Whoever has it locked tries to be the one that listens. Open from the start, because those who run us open no
    /// files; it stays there, because a file that is removed can be locked twice.
    lock_file: File,
    state: Mutex<State>,
}

impl Uplink {
    /// Join `switch` with the others at `path`.
    ///
    /// # Errors
    /// One sentence that says what is in the way.
    pub fn open(path: &Path, switch: Arc<Switch>, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        let name = format!("--netdev switch,path={}", path.display());
        let epoll = Arc::new(Epoll::new().with_context(|| format!("{name}: no epoll"))?);
        let state = State { listener: None, neighbours: HashMap::new(), retry_at: None };
        let lock_file = File::create(path.with_added_extension("lock"))
            .with_context(|| format!("{name}: no lock file can be made there"))?;
        let state = Mutex::new(state);
        let uplink = Self { path: path.to_owned(), switch, clock, epoll, lock_file, state };
        uplink.settle(&mut lock(&uplink.state)).context(name)?;
        Ok(uplink)
    }

    /// Readable while [`poll`](Self::poll) has something to do.
    pub fn file(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Connect to the machine that listens, or be it.
    fn settle(&self, state: &mut State) -> anyhow::Result<()> {
        let is_gone =
            |error: &io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
        match UnixStream::connect(&self.path) {
            Ok(socket) => return Ok(self.add(state, socket)?),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).context("can't connect"),
        }
        flock(&self.lock_file, FlockOperation::LockExclusive)?;
        let settled = self.settle_alone(state);
        flock(&self.lock_file, FlockOperation::Unlock)?;
        settled
    }

    /// The same while nobody else tries.
    fn settle_alone(&self, state: &mut State) -> anyhow::Result<()> {
        if let Ok(socket) = UnixStream::connect(&self.path) {
            return Ok(self.add(state, socket)?);
        }
        let listener = listen(&self.path)?;
        watch(&self.epoll, ControlOperation::Add, listener.as_raw_fd(), EventSet::IN)?;
        state.listener = Some(listener);
        Ok(())
    }

    fn add(&self, state: &mut State, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let file = socket.as_raw_fd();
        watch(&self.epoll, ControlOperation::Add, file, EventSet::IN)?;
        let output = Mutex::new(Outgoing { output: Output::new(socket.try_clone()?), awaits_room: false });
        let wire = Arc::new(Wire { epoll: Arc::clone(&self.epoll), file, output });
        let port = self.switch.join(wire.clone());
        state.neighbours.insert(file, Neighbour { port, input: Input::new(socket), wire });
        Ok(())
    }

    fn remove(&self, state: &mut State, file: RawFd, why: &io::Error) {
        let Some(neighbour) = state.neighbours.remove(&file) else { return };
        if why.kind() == ErrorKind::InvalidData {
            log::warn!("--netdev switch,path={}: {why}; the connection is closed", self.path.display());
        }
        self.switch.leave(neighbour.port);
        let _ = watch(&self.epoll, ControlOperation::Delete, file, EventSet::empty());
        if state.listener.is_none() {
            state.retry_at = Some(self.clock.now_ns());
        }
    }

    /// Take what has come from other machines, about `budget` frames from each.
    pub fn poll(&self, budget: usize) -> Polled {
        let state = &mut *lock(&self.state);
        let now = self.clock.now_ns();
        if state.retry_at.is_some_and(|at| at <= now) {
            let settled = self.settle(state);
            if let Err(error) = &settled {
                crate::log_limited!(Warn, "--netdev switch,path={}: {error:#}", self.path.display());
            }
            state.retry_at = settled.is_err().then_some(now + RETRY_NS);
        }
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        let mut more = count == EVENTS;
        for event in &events[..count] {
            let file = event.data() as RawFd;
            if state.listener.as_ref().is_some_and(|listener| listener.as_raw_fd() == file) {
                self.accept(state);
                continue;
            }
            let Some(neighbour) = state.neighbours.get_mut(&file) else { continue };
            neighbour.wire.flush();
            match forward(&self.switch, neighbour, budget) {
                Ok(left) => more |= left,
                Err(error) => self.remove(state, file, &error),
            }
        }
        Polled { more, deadline: state.retry_at }
    }

    fn accept(&self, state: &mut State) {
        let Some(listener) = &state.listener else { return };
        let added = listener.accept().and_then(|(socket, _)| self.add(state, socket));
        if let Err(error) = added
            && error.kind() != ErrorKind::WouldBlock
        {
            crate::log_limited!(Warn, "--netdev switch,path={}: {error}", self.path.display());
        }
    }
}

/// Pass on frames of `neighbour` until `left` is used up; whether there may be more.
fn forward(switch: &Switch, neighbour: &mut Neighbour, mut left: usize) -> io::Result<bool> {
    let result = loop {
        match neighbour.input.next()? {
            Some(place) => {
                let frame = neighbour.input.bytes_mut(place);
                let len = frame.len();
                let slices = [VolatileSlice::from(frame)];
                // What has no room is dropped there, as on any switch.
                let _ = switch.forward(
                    neighbour.port,
                    &TxFrame { slices: &slices, len, offload: TxOffload::default() },
                );
                left = left.saturating_sub(1);
                if left == 0 {
                    break Ok(true);
                }
            }
            None if neighbour.input.read()? == Arrival::Nothing => break Ok(false),
            None => {}
        }
    };
    switch.flush(neighbour.port);
    result
}

impl Drop for Uplink {
    fn drop(&mut self) {
        if lock(&self.state).listener.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tests::{drain, with_frame};
    use super::super::{Cable, Exchange};
    use super::*;
    use crate::clock::MonotonicClock;
    use crate::config::{Netdev, NetdevKind};

    /// A machine with one port on the switch at `path`.
    fn machine(path: &Path) -> Arc<dyn Cable> {
        let kind = NetdevKind::Switch { name: String::new(), path: Some(path.to_owned()) };
        let exchange = Exchange::new(Arc::new(MonotonicClock::new()));
        exchange.open(&Netdev { id: "n0".into(), kind, pcap: None }, 0, 1500).unwrap()
    }

    fn frame(to: u8, from: u8, mark: u8) -> Vec<u8> {
        let mut frame =
            vec![if to == 0xff { 0xff } else { 2 }, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0, mark];
        frame.resize(60, 0);
        frame
    }

    fn send(machine: &Arc<dyn Cable>, frame: &[u8]) {
        with_frame(frame, |frame| machine.send(frame)).unwrap();
        machine.flush();
    }

    /// Let all machines work until `machine` has a frame.
    fn await_frame(machines: &[&Arc<dyn Cable>], machine: usize) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            for (index, other) in machines.iter().enumerate() {
                let frames = drain(other.as_ref());
                if index == machine && !frames.is_empty() {
                    assert_eq!(frames.len(), 1);
                    return frames[0].clone();
                }
            }
            assert!(Instant::now() < end, "the frame never came");
        }
    }

    fn settle(machines: &[&Arc<dyn Cable>]) {
        for _ in 0..10 {
            machines.iter().for_each(|machine| drop(drain(machine.as_ref())));
        }
    }

    #[test]
    fn machines_find_each_other_and_another_takes_the_place_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("switch");
        let (a, b, c) = (machine(&path), machine(&path), machine(&path));
        settle(&[&a, &b, &c]);
        send(&b, &frame(0xff, 2, 1));
        assert_eq!(await_frame(&[&a, &b, &c], 2), frame(0xff, 2, 1));
        send(&c, &frame(2, 3, 2));
        assert_eq!(await_frame(&[&a, &b, &c], 1), frame(2, 3, 2));
        settle(&[&a, &b, &c]);

        drop(a);
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            settle(&[&b, &c]);
            let _ = with_frame(&frame(0xff, 2, 3), |frame| b.send(frame));
            b.flush();
            if !drain(c.as_ref()).is_empty() {
                break;
            }
            assert!(Instant::now() < end, "nobody took the place");
        }
        settle(&[&b, &c]);
        let d = machine(&path);
        settle(&[&b, &c, &d]);
        send(&d, &frame(2, 4, 4));
        assert_eq!(await_frame(&[&b, &c, &d], 0), frame(2, 4, 4));
        drop((b, c, d));
        assert!(!path.exists());
    }

    #[test]
    fn a_neighbour_that_sends_nonsense_loses_only_its_connection() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("switch");
        let (a, b) = (machine(&path), machine(&path));
        let mut bad = UnixStream::connect(&path).unwrap();
        settle(&[&a, &b]);
        bad.write_all(&[0xff; 100]).unwrap();
        settle(&[&a, &b]);
        assert_eq!(io::Read::read(&mut bad, &mut [0; 4]).unwrap_or(0), 0);
        send(&b, &frame(0xff, 2, 1));
        assert_eq!(await_frame(&[&a, &b], 0), frame(0xff, 2, 1));
    }
}
