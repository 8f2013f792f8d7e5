//! Writes trace files.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use mana_device::observe::{Event, Observer};
use serde::Serialize;

use super::END;
use crate::seccomp::{self, Role};

/// How long an event may wait before it is in the file: what a killed process may lose at most.
const CADENCE: Duration = Duration::from_millis(50);
/// Bytes that may wait; the event that makes it more writes them itself.
const MAX_WAITING: usize = 1 << 20;

/// A line of the file.
#[derive(Serialize)]
struct Line<'a> {
    t_ns: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<usize>,
    #[serde(flatten)]
    event: &'a Event,
}

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Latest time seen, nanoseconds.
    last_ns: u64,
    closing: bool,
}

struct Shared {
    path: PathBuf,
    waiting: Mutex<Waiting>,
    /// Signalled when `waiting` stops being empty, and at the end.
    filled: Condvar,
    /// Taken before `waiting`, so that lines are written in order. `None` once a write has failed.
    file: Mutex<Option<File>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write everything that waits.
    fn flush(&self) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut self.waiting().lines);
        if let Some(open) = file.as_mut()
            && let Err(error) = open.write_all(&lines)
        {
            log::error!("--trace {}: {error}; nothing more is traced", self.path.display());
            *file = None;
        }
    }

    fn event(&self, t_ns: u64, device: Option<usize>, event: &Event) {
        let (first, full) = {
            let mut waiting = self.waiting();
            waiting.last_ns = waiting.last_ns.max(t_ns);
            let lines = &mut waiting.lines;
            let first = lines.is_empty();
            // Writing to memory can't fail, and every event has a JSON form.
            let _ = serde_json::to_writer(&mut *lines, &Line { t_ns, device, event });
            lines.push(b'\n');
            (first, lines.len() > MAX_WAITING)
        };
        if first {
            self.filled.notify_one();
        }
        if full {
            self.flush();
        }
    }

    /// Write what comes, until closing. Sleeps while nothing comes.
    fn write_on_cadence(&self) {
        loop {
            let waiting = self
                .filled
                .wait_while(self.waiting(), |waiting| waiting.lines.is_empty() && !waiting.closing)
                .unwrap_or_else(PoisonError::into_inner);
            let (waiting, _) = self
                .filled
                .wait_timeout_while(waiting, CADENCE, |waiting| !waiting.closing)
                .unwrap_or_else(PoisonError::into_inner);
            let closing = waiting.closing;
            drop(waiting);
            self.flush();
            if closing {
                return;
            }
        }
    }
}

/// A trace file (`--trace FILE`) that devices write to through [`observer`](Self::observer).
///
/// Events reach the file within 50 ms, the last ones when this is dropped or [flushed](Self::flush): do either
/// before ending the process.
pub struct TraceFile {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl TraceFile {
    /// Begin a new trace in `path`.
    ///
    /// # Errors
    /// The file can't be written, or there is no thread to write it.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let option = || format!("--trace {}: the file can't be written", path.display());
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            waiting: Mutex::default(),
            filled: Condvar::new(),
            file: Mutex::new(Some(File::create(path).with_context(option)?)),
        });
        let writer = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("trace".into());
        let write = move || {
            if let Err(error) = seccomp::enter(Role::Trace) {
                log::error!("--trace: {error:#}");
            }
            writer.write_on_cadence();
        };
        let thread = thread.spawn(write).with_context(option)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// An observer for one device. `device` is its number, `None` if it is the machine's only one.
    pub fn observer(&self, device: Option<usize>) -> Arc<dyn Observer> {
        Arc::new(TraceWriter { shared: Arc::clone(&self.shared), device })
    }

    /// Bring every event so far into the file.
    pub fn flush(&self) {
        self.shared.flush();
    }
}

impl Drop for TraceFile {
    fn drop(&mut self) {
        {
            let mut waiting = self.shared.waiting();
            let end = format!("{{\"t_ns\":{},\"event\":\"{END}\"}}\n", waiting.last_ns);
            waiting.lines.extend(end.into_bytes());
            waiting.closing = true;
        }
        self.shared.filled.notify_one();
        if let Some(thread) = self.thread.take() {
            // The thread has nothing that panics; if it did, there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// One device's way into the file.
struct TraceWriter {
    shared: Arc<Shared>,
    device: Option<usize>,
}

impl Observer for TraceWriter {
    fn event(&self, t_ns: u64, event: &Event) {
        self.shared.event(t_ns, self.device, event);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use mana_device::observe::Fields;

    use super::*;

    #[test]
    fn writes_the_contracts_lines_in_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = TraceFile::create(file.path()).unwrap();
        trace.observer(None).event(5, &Event::MsixFire { vector: 3 });
        let response = Event::HwcResponse {
            seq: 7,
            command: "GDMA_QUERY_MAX_RESOURCES",
            code: 2,
            version: 1,
            status: 0,
            duration_ns: 900,
            fields: Fields(vec![("max_msix", 64)]),
        };
        trace.observer(Some(1)).event(6, &response);
        drop(trace);
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            concat!(
                r#"{"t_ns":5,"event":"msix.fire","vector":3}"#,
                "\n",
                r#"{"t_ns":6,"device":1,"event":"hwc.response","seq":7,"command":"GDMA_QUERY_MAX_RESOURCES","#,
                r#""code":2,"version":1,"status":0,"duration_ns":900,"max_msix":64}"#,
                "\n",
                r#"{"t_ns":6,"event":"trace.end"}"#,
                "\n"
            )
        );
    }

    #[test]
    fn brings_events_into_the_file_while_it_runs() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = TraceFile::create(file.path()).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        for count in 1..=3 {
            trace.observer(None).event(1, &Event::PciFlr);
            while std::fs::read_to_string(file.path()).unwrap().lines().count() != count {
                assert!(Instant::now() < end, "the event is not in the file");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn loses_nothing_of_a_storm_from_several_threads() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = TraceFile::create(file.path()).unwrap();
        std::thread::scope(|scope| {
            for device in 0..4 {
                let observer = trace.observer(Some(device));
                scope.spawn(move || {
                    (0..20_000).for_each(|t_ns| observer.event(t_ns, &Event::MsixFire { vector: 0 }));
                });
            }
        });
        drop(trace);
        let text = std::fs::read_to_string(file.path()).unwrap();
        let mut next = [0; 4];
        for line in text.lines().filter(|line| !line.contains(END)) {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let device = line["device"].as_u64().unwrap() as usize;
            assert_eq!(line["t_ns"], next[device]);
            next[device] += 1;
        }
        assert_eq!(next, [20_000; 4]);
    }

    #[test]
    fn says_which_option_names_an_unwritable_file() {
        let error = TraceFile::create(Path::new("/nowhere/t.jsonl")).err().unwrap();
        assert!(format!("{error:#}").starts_with("--trace /nowhere/t.jsonl: "), "{error:#}");
    }
}
