//! `mana-vmm serve` as a process: how it ends.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for something that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that is killed when a test gives up on it.
struct Server(Child);

impl Server {
    fn start(socket: &Path, trace: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_mana-vmm"))
            .args(["serve".as_ref(), "--socket".as_ref(), socket, "--trace".as_ref(), trace])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self(child);
        await_true(|| UnixStream::connect(socket).is_ok());
        server
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
        let mut status = None;
        await_true(|| {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already where all is well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn await_true(mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "it takes too long");
        thread::sleep(Duration::from_millis(5));
    }
}

/// All threads leave the signals to the one that winds up, the trace's too, which starts early.
#[test]
fn a_signal_ends_a_server_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, trace) = (folder.path().join("socket"), folder.path().join("trace"));
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut server = Server::start(&socket, &trace);
        let client = UnixStream::connect(&socket).unwrap();
        let status = server.end(signal);
        assert_eq!(status.code(), Some(0), "{signal:?}: {status}");
        assert!(!socket.exists(), "{signal:?} leaves the socket behind");
        let text = fs::read_to_string(&trace).unwrap();
        let events: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let names: Vec<_> = events.iter().rev().map(|event| event["event"].as_str().unwrap()).collect();
        assert_eq!(names[..2], ["trace.end", "ledger"], "{signal:?}");
        drop(client);
    }
}
