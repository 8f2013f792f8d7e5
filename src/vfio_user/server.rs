//! A socket and a thread for each function, and one client at a time on it.

use std::fs;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, bail};

use super::connection;
use super::session::{Function, Session};
use crate::seccomp::{self, Role};

/// Told when a client has left and its session is torn down.
pub type OnLeft = Box<dyn Fn() + Send>;

/// A server that runs. Dropping it ends the connection, waits for the teardown and removes the socket.
pub struct Server {
    path: PathBuf,
    /// The thread's listener, to wake it.
    listener: UnixListener,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    stopping: bool,
    client: Option<UnixStream>,
}

impl Server {
    /// Listen at `path` and serve `function` there. `before_end` runs when a client has left and its state is still
    /// there, `on_left` when it is gone.
    ///
    /// # Errors
    /// The path can't be listened at.
    pub fn start(
        path: &Path,
        function: Function,
        before_end: OnLeft,
        on_left: OnLeft,
    ) -> anyhow::Result<Self> {
        let listener = listen(path)?;
        let ours = listener.try_clone().context("no descriptor for a vfio-user server")?;
        let state = Arc::<Mutex<State>>::default();
        let shared = state.clone();
        let thread = std::thread::Builder::new().name("vfio-user".into());
        let name = path.to_owned();
        let serve = move || {
            if let Err(error) = seccomp::enter(Role::VfioUser) {
                log::error!("{}: {error:#}", name.display());
                return;
            }
            while let Some((stream, socket)) = next_client(&listener, &shared, &name) {
                log::info!("{}: a client has come", name.display());
                let mut session = Session::new(&function, Some(socket));
                let ended = connection::serve(&stream, &mut session);
                shared.lock().unwrap_or_else(PoisonError::into_inner).client = None;
                // Whoever waits for us to be done with the guest's memory sees the end of the stream at the end.
                before_end();
                session.end();
                drop(stream);
                match ended {
                    Ok(()) => log::info!("{}: the client has left", name.display()),
                    Err(error) => log::warn!("{}: the client is cut off: {error:#}", name.display()),
                }
                on_left();
            }
        };
        let thread = thread.spawn(serve).context("no thread for a vfio-user server")?;
        Ok(Self { path: path.to_owned(), listener: ours, state, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.stopping = true;
            if let Some(client) = &state.client {
                // Gone already is as good.
                let _ = client.shutdown(Shutdown::Both);
            }
        }
        // Wakes the thread where it waits for a client, even if somebody has removed the socket.
        if let Err(error) = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both) {
            log::error!("{}: the listener can't be shut down: {error}", self.path.display());
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("{}: the vfio-user server panicked", self.path.display());
        }
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            log::warn!("--socket: {} can't be removed: {error}", self.path.display());
        }
    }
}

/// The next client, with a second descriptor of its socket, or `None` when the server is to end.
fn next_client(listener: &UnixListener, state: &Mutex<State>, path: &Path) -> Option<(UnixStream, OwnedFd)> {
    loop {
        let accepted = listener.accept();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopping {
            return None;
        }
        match accepted.and_then(|(stream, _)| Ok((stream.try_clone()?, stream.try_clone()?, stream))) {
            Ok((stream, socket, ours)) => {
                state.client = Some(ours);
                return Some((stream, socket.into()));
            }
            Err(error) => {
                log::warn!("{}: a client can't be served: {error}", path.display());
                // No descriptors are left, most likely: others must give some back first.
                drop(state);
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}

/// A socket at `path`. One that nobody listens at any more is left over from a server that was killed, and goes.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let name = path.display();
    if let Ok(there) = fs::symlink_metadata(path) {
        if !there.file_type().is_socket() {
            bail!("--socket: {name} exists and is no socket");
        }
        match UnixStream::connect(path) {
            Ok(_) => bail!("--socket: somebody listens at {name} already"),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                fs::remove_file(path).with_context(|| format!("--socket: {name} is left over and stays"))?;
            }
            Err(error) => bail!("--socket: {name} exists: {error}"),
        }
    }
    UnixListener::bind(path).with_context(|| format!("--socket: can't listen at {name}"))
}
