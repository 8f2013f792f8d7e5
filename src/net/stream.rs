//! A stream socket with QEMU's framing (`--netdev stream,path=SOCKET`): QEMU's `-netdev stream`, passt, or another
//! mana-vmm at the other end of the cable.
//!
//! As a server it has one client at a time; further ones wait in the socket's queue. As a client it must find its
//! server when it starts; should that go away, it looks for it again every second. Meanwhile frames are dropped, as on
//! an unplugged cable.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow, bail};
use arrayvec::ArrayVec;
use mana_device::doors::{Clock, Port, PortDropped, RxChecksum, TxFrame};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::framing::{Arrival, Input, Output};
use super::{Cable, Deliver, FRAME_OVERHEAD, Frame, Polled};
use crate::log_limited;

/// Frames handed over at once.
const HANDFUL: usize = 64;
/// Between two attempts to find the server again.
const RETRY_NS: u64 = 1_000_000_000;

/// Whose socket it is.
enum Role {
    Server(UnixListener),
    Client { retry_at: Option<u64> },
}

/// `--netdev stream`.
pub struct Stream {
    name: String,
    path: PathBuf,
    clock: Arc<dyn Clock>,
    /// Readable while something is to be done: the worker waits for this.
    epoll: Epoll,
    max_frame: usize,
    /// Only the poller's, like `input`; taken before `output`.
    role: Mutex<Role>,
    input: Mutex<Option<Input>>,
    output: Mutex<Option<Outgoing>>,
}

struct Outgoing {
    output: Output,
    /// The socket's file, and whether the poller waits for room in it.
    file: RawFd,
    awaits_room: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream {
    /// Listen at `path`, or connect to who does, for IP packets of at most `mtu` bytes. `id` is the netdev's.
    ///
    /// # Errors
    /// One sentence that says what is in the way.
    pub fn open(
        id: &str,
        path: &Path,
        server: bool,
        mtu: u16,
        clock: &Arc<dyn Clock>,
    ) -> anyhow::Result<Self> {
        let name = format!("--netdev stream,id={id},path={}", path.display());
        let epoll = Epoll::new().with_context(|| format!("{name}: no epoll"))?;
        let role = if server {
            Role::Server(listen(path).with_context(|| name.clone())?)
        } else {
            Role::Client { retry_at: None }
        };
        let stream = Self {
            name,
            path: path.to_owned(),
            clock: Arc::clone(clock),
            epoll,
            max_frame: usize::from(mtu) + FRAME_OVERHEAD,
            role: Mutex::new(role),
            input: Mutex::default(),
            output: Mutex::default(),
        };
        stream.start().with_context(|| stream.name.clone())?;
        Ok(stream)
    }

    fn start(&self) -> anyhow::Result<()> {
        match &*lock(&self.role) {
            Role::Server(listener) => {
                self.watch(ControlOperation::Add, listener.as_raw_fd(), EventSet::IN)?;
            }
            Role::Client { .. } => {
                let socket =
                    UnixStream::connect(&self.path).map_err(|error| anyhow!(explain_connect(&error)))?;
                self.plug(socket)?;
            }
        }
        Ok(())
    }

    fn watch(&self, operation: ControlOperation, file: RawFd, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(operation, file, EpollEvent::new(events, file as u64))
    }

    /// `socket` is the cable from now on.
    fn plug(&self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let file = socket.as_raw_fd();
        let output = Output::new(socket.try_clone()?);
        self.watch(ControlOperation::Add, file, EventSet::IN)?;
        *lock(&self.input) = Some(Input::new(socket));
        *lock(&self.output) = Some(Outgoing { output, file, awaits_room: false });
        Ok(())
    }

    /// The connection is over.
    fn unplug(&self, role: &mut Role, why: &io::Error) {
        match why.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                log::info!("{}: the other side has closed the connection", self.name);
            }
            _ => log::warn!("{}: {why}; the connection is closed", self.name),
        }
        if let Some(outgoing) = lock(&self.output).take() {
            let _ = self.watch(ControlOperation::Delete, outgoing.file, EventSet::empty());
        }
        *lock(&self.input) = None;
        match role {
            Role::Server(listener) => {
                let _ = self.watch(ControlOperation::Add, listener.as_raw_fd(), EventSet::IN);
            }
            Role::Client { retry_at } => *retry_at = Some(self.clock.now_ns() + RETRY_NS),
        }
    }

    /// Look for the other side; whether it is there now.
    fn seek(&self, role: &mut Role) -> bool {
        let found = match role {
            Role::Server(listener) => match listener.accept() {
                Ok((socket, _)) => {
                    let _ = self.watch(ControlOperation::Delete, listener.as_raw_fd(), EventSet::empty());
                    Some(socket)
                }
                Err(_) => None,
            },
            Role::Client { retry_at } => {
                let now = self.clock.now_ns();
                if retry_at.is_some_and(|at| at > now) {
                    return false;
                }
                let socket = UnixStream::connect(&self.path).ok();
                *retry_at = if socket.is_some() { None } else { Some(now + RETRY_NS) };
                socket
            }
        };
        let Some(socket) = found else { return false };
        match self.plug(socket) {
            Ok(()) => log::info!("{}: connected", self.name),
            Err(error) => log::warn!("{}: {error}", self.name),
        }
        true
    }

    /// Write what waits, and see to it that the poller is told when there is room for what is left.
    fn write(&self, outgoing: &mut Outgoing) {
        // An end of the connection shows when it is read.
        let all = outgoing.output.flush().unwrap_or(true);
        if outgoing.awaits_room == all {
            outgoing.awaits_room = !all;
            let events = if all { EventSet::IN } else { EventSet::IN | EventSet::OUT };
            if let Err(error) = self.watch(ControlOperation::Modify, outgoing.file, events) {
                log::error!("{}: {error}", self.name);
            }
        }
    }

    /// Hand over frames until `left` is used up; whether there may be more.
    fn take(&self, input: &mut Input, mut left: usize, deliver: Deliver<'_>) -> io::Result<bool> {
        loop {
            let mut places: ArrayVec<_, HANDFUL> = ArrayVec::new();
            while !places.is_full() {
                let Some(place) = input.next()? else { break };
                if place.len() <= self.max_frame {
                    places.push(place);
                } else {
                    log_limited!(
                        Warn,
                        "{}: a frame of {} bytes is too long, and dropped",
                        self.name,
                        place.len()
                    );
                }
            }
            if places.is_empty() {
                if input.read()? == Arrival::Nothing {
                    return Ok(false);
                }
                continue;
            }
            left = left.saturating_sub(places.len());
            let frames: ArrayVec<_, HANDFUL> = places
                .into_iter()
                .map(|place| Frame::plain(input.bytes(place), RxChecksum::Unknown))
                .collect();
            deliver(&frames);
            if left == 0 {
                return Ok(true);
            }
        }
    }
}

impl Port for Stream {
    fn send(&self, frame: &TxFrame<'_>) -> Result<(), PortDropped> {
        lock(&self.output).as_mut().ok_or(PortDropped)?.output.put(frame)
    }
    fn flush(&self) {
        if let Some(outgoing) = &mut *lock(&self.output) {
            self.write(outgoing);
        }
    }
}

impl Cable for Stream {
    fn readable(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn poll(&self, budget: usize, deliver: Deliver<'_>) -> Polled {
        let role = &mut *lock(&self.role);
        let connected = lock(&self.input).is_some() || self.seek(role);
        let mut more = false;
        if connected {
            // Room may have come.
            self.flush();
            let taken = match &mut *lock(&self.input) {
                Some(input) => self.take(input, budget.max(1), deliver),
                None => Ok(false),
            };
            match taken {
                Ok(left) => more = left,
                Err(error) => self.unplug(role, &error),
            }
        }
        let deadline = match role {
            Role::Client { retry_at } => *retry_at,
            Role::Server(_) => None,
        };
        Polled { more, deadline }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if matches!(*lock(&self.role), Role::Server(_)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listen at `path`, in the place of a socket that is left over from who listens no more.
pub(super) fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let in_use = |error: &io::Error| error.kind() == ErrorKind::AddrInUse;
    let listener = match UnixListener::bind(path) {
        Err(error) if in_use(&error) => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                bail!("a file that is no socket is there already; give another path");
            }
            match UnixStream::connect(path) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Ok(_) => bail!("another program listens there already; server=off connects to it"),
                Err(error) => bail!("there is a socket already, which can't be connected to: {error}"),
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(|error| anyhow!("no socket can be made there: {error}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn explain_connect(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound => {
            "there is no such socket; start its server first (passt, or QEMU's -netdev stream with server=on), or \
             let this side be it with server=on"
                .into()
        }
        ErrorKind::ConnectionRefused => {
            "nobody listens at this socket any more; start its server anew, or let this side be it with server=on"
                .into()
        }
        _ => format!("can't connect: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tests::{drain, with_frame};
    use super::*;
    use crate::clock::MonotonicClock;

    fn open(path: &Path, server: bool) -> anyhow::Result<Stream> {
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::new());
        Stream::open("n0", path, server, 1500, &clock)
    }

    /// Poll until `wanted` frames have come.
    fn await_frames(stream: &Stream, wanted: usize) -> Vec<Vec<u8>> {
        let (mut frames, end) = (Vec::new(), Instant::now() + Duration::from_secs(20));
        while frames.len() < wanted {
            assert!(Instant::now() < end, "{} of {wanted} frames came", frames.len());
            frames.extend(drain(stream));
        }
        frames
    }

    fn send(stream: &Stream, bytes: &[u8]) -> bool {
        let sent = with_frame(bytes, |frame| stream.send(frame)).is_ok();
        stream.flush();
        sent
    }

    #[test]
    fn connects_two_and_survives_the_loss_of_either() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let server = open(&path, true).unwrap();
        assert!(!send(&server, &[1; 60]), "nobody is there");
        let client = open(&path, false).unwrap();
        assert!(send(&client, &[2; 60]));
        assert_eq!(await_frames(&server, 1), [vec![2; 60]]);
        assert!(send(&server, &[3; 1514]));
        assert_eq!(await_frames(&client, 1), [vec![3; 1514]]);

        drop(client);
        let client = open(&path, false).unwrap();
        assert!(send(&client, &[4; 60]));
        assert_eq!(await_frames(&server, 1), [vec![4; 60]]);

        drop(server);
        assert!(drain(&client).is_empty());
        assert!(!send(&client, &[5; 60]));
        assert!(client.poll(1, &mut |_| {}).deadline.is_some());
        let server = open(&path, true).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while !send(&client, &[6; 60]) {
            assert!(Instant::now() < end, "it never comes back");
            std::thread::sleep(Duration::from_millis(20));
            drain(&client);
        }
        assert_eq!(await_frames(&server, 1), [vec![6; 60]]);
    }

    #[test]
    fn the_workers_file_is_readable_exactly_while_there_is_something_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let server = open(&path, true).unwrap();
        let ready = |stream: &Stream| {
            let mut file = libc::pollfd { fd: stream.readable().unwrap(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, which outlives the call.
            unsafe { libc::poll(&raw mut file, 1, 0) == 1 }
        };
        assert!(!ready(&server));
        let client = open(&path, false).unwrap();
        assert!(ready(&server));
        drain(&server);
        assert!(!ready(&server) && !ready(&client));
        // More than the socket takes: the rest goes when there is room.
        let frames = 400;
        (0..frames).for_each(|n| assert!(send(&client, &[n as u8; 1500])));
        assert!(!ready(&client), "there is no room yet");
        let mut seen = 0;
        while seen < frames {
            seen += drain(&server).len();
            if ready(&client) {
                drain(&client);
            }
        }
        drain(&client);
        assert!(!ready(&client) && !ready(&server));
    }

    #[test]
    fn errors_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let text = |result: anyhow::Result<Stream>| format!("{:#}", result.err().unwrap());
        let missing = text(open(&path, false));
        assert!(
            missing.starts_with("--netdev stream,id=n0,path=") && missing.contains("server=on"),
            "{missing}"
        );
        let _server = open(&path, true).unwrap();
        assert!(text(open(&path, true)).contains("server=off connects to it"));
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(text(open(&file, true)).contains("no socket"));
        assert!(file.exists());
    }

    #[test]
    fn a_left_over_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(open(&path, true).unwrap());
        assert!(!path.exists(), "a server takes its socket with it");
    }
}
