//! `--control SOCKET`, and `mana-vmm ctl`, which asks there.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, bail};
use serde_json::Value;

use super::{Asker, Control, MAX_REQUEST, Request};
use crate::seccomp::{self, Role};

/// Most clients at a time.
const MAX_CLIENTS: usize = 16;

/// Whoever answers requests: a machine here, or one that is reached some other way.
pub trait Respond: Send + Sync + 'static {
    /// The answer to the line `request`, without a line feed.
    fn respond(&self, request: &str) -> String;
}

impl Respond for Control {
    fn respond(&self, request: &str) -> String {
        self.answer(request, Asker::User)
    }
}

/// A socket that takes requests; dropping it removes it.
pub struct ControlSocket {
    path: PathBuf,
}

impl ControlSocket {
    /// Listen at `path`, and have `responder` answer. A socket that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// The path is taken, or there can't be a socket.
    pub fn open<R: Respond>(path: &Path, responder: &Arc<R>) -> anyhow::Result<Self> {
        let option = || format!("--control {}", path.display());
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(path).is_ok() {
                    bail!("{}: somebody listens there already", option());
                }
                let is_socket = path.symlink_metadata().is_ok_and(|data| data.file_type().is_socket());
                if !is_socket {
                    bail!("{}: there is a file already", option());
                }
                std::fs::remove_file(path).with_context(option)?;
                UnixListener::bind(path).with_context(option)?
            }
            other => other.with_context(option)?,
        };
        let responder = Arc::clone(responder);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || match seccomp::enter(Role::Control) {
                Ok(()) => accept(&listener, &responder),
                Err(error) => log::error!("--control: {error:#}"),
            })
            .context("no thread for the control socket")?;
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for ControlSocket {
    /// The thread stays in `accept` and ends with the process.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept<R: Respond>(listener: &UnixListener, responder: &Arc<R>) {
    let clients = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
            log::warn!("--control: more than {MAX_CLIENTS} clients at a time; one is turned away");
            clients.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (responder, clients) = (Arc::clone(responder), Arc::clone(&clients));
        let thread = std::thread::Builder::new().name("control-client".into());
        let served = thread.spawn(move || {
            if let Err(error) = serve(&client, &*responder) {
                log::info!("--control: a client is gone: {error}");
            }
            clients.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(error) = served {
            log::error!("--control: no thread for a client: {error}");
        }
    }
}

/// Answer line after line.
fn serve<R: Respond>(client: &UnixStream, responder: &R) -> std::io::Result<()> {
    let mut reader = BufReader::new(client);
    loop {
        let mut line = String::new();
        reader.by_ref().take(MAX_REQUEST as u64).read_line(&mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let mut answer = responder.respond(line.trim_end());
        answer.push('\n');
        let mut to = client;
        to.write_all(answer.as_bytes())?;
        if !line.ends_with('\n') {
            return Ok(());
        }
    }
}

/// `mana-vmm ctl SOCKET WORDS...`: print the answer; exit code 1 if it is no.
///
/// # Errors
/// Nobody answers at `socket`.
pub fn ask(socket: &Path, words: &[String]) -> anyhow::Result<ExitCode> {
    let answer = exchange(socket, words)?;
    let parsed: Value = serde_json::from_str(&answer)
        .with_context(|| format!("ctl {}: not an answer: {answer}", socket.display()))?;
    if parsed["ok"] == true {
        println!("{}", answer.trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("mana-vmm: ctl: {}", parsed["error"].as_str().unwrap_or(answer.trim_end()));
    Ok(ExitCode::FAILURE)
}

/// One request, and the line that answers it.
fn exchange(socket: &Path, words: &[String]) -> anyhow::Result<String> {
    let option = || format!("ctl {}: no machine answers at this socket", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(option)?;
    let request = serde_json::to_string(&Request { id: 1.into(), words: words.to_vec() })?;
    stream.write_all(format!("{request}\n").as_bytes()).with_context(option)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).with_context(option)?;
    anyhow::ensure!(!answer.is_empty(), option());
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::super::tests::control;
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn requests_are_answered_line_by_line_and_the_socket_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let socket = ControlSocket::open(&path, &control()).unwrap();
        let answer = exchange(&path, &words("fault add command=any do=drop")).unwrap();
        assert_eq!(answer, "{\"id\":1,\"ok\":true,\"fault\":1}\n");
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"{\"id\":7,\"words\":[\"fault\",\"clear\"]}\nnonsense\n").unwrap();
        let mut lines = BufReader::new(&stream).lines();
        assert_eq!(lines.next().unwrap().unwrap(), r#"{"id":7,"ok":true,"hits":0}"#);
        assert!(lines.next().unwrap().unwrap().contains(r#""ok":false"#));
        let taken = ControlSocket::open(&path, &control()).err().unwrap();
        assert!(taken.to_string().contains("somebody listens"), "{taken}");
        drop(socket);
        assert!(!path.exists());
        let gone = exchange(&path, &words("ledger")).err().unwrap();
        assert!(gone.to_string().contains("no machine answers"), "{gone}");
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        drop(UnixListener::bind(&path).unwrap());
        let _socket = ControlSocket::open(&path, &control()).unwrap();
        assert!(exchange(&path, &words("ledger")).is_ok());
        let file = folder.path().join("file");
        std::fs::write(&file, "text").unwrap();
        assert!(ControlSocket::open(&file, &control()).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"text");
    }
}
