//! Requests to the simulated host of a job: they come in at a socket here and go to the job's own in level 1.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ChildStdin;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::job;
use super::link::Order;
use crate::control::{Respond, refusal, with_file};
use crate::snapshot::Unfinished;

/// How long an answer may take: level 1 waits for the job to come up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a machine may take to be saved and come here.
const FILE_PATIENCE: Duration = Duration::from_secs(600);

/// The way to a job in level 1.
pub(super) struct Relay {
    orders: Arc<Mutex<ChildStdin>>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u32,
    /// Answers so far, and who waits for each.
    answers: HashMap<u32, (Vec<u8>, Sender<Vec<u8>>)>,
    /// Files that are on their way here, and who waits for each.
    files: HashMap<u32, (Unfinished, Sender<Result<(), String>>)>,
}

impl Relay {
    pub(super) fn new(orders: Arc<Mutex<ChildStdin>>) -> Self {
        Self { orders, waiting: Mutex::default() }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part of an answer has come; an empty one ends it.
    pub(super) fn answered(&self, number: u32, part: &[u8]) {
        let mut waiting = self.waiting();
        if let Some((answer, _)) = waiting.answers.get_mut(&number).filter(|_| !part.is_empty()) {
            answer.extend_from_slice(part);
        } else if let Some((answer, who)) = waiting.answers.remove(&number) {
            // Who has lost patience is gone.
            let _ = who.send(answer);
        }
    }
}

impl Relay {
    /// A part of a file has come; one without bytes ends it, and says how long it is.
    pub(super) fn file_part(&self, number: u32, offset: u64, bytes: &[u8]) {
        let mut waiting = self.waiting();
        let Some((file, _)) = waiting.files.get(&number) else { return };
        let last = bytes.is_empty();
        let written =
            if last { file.file().set_len(offset) } else { file.file().write_all_at(bytes, offset) };
        if (last || written.is_err())
            && let Some((file, who)) = waiting.files.remove(&number)
        {
            let whole = written.and_then(|()| file.finish());
            // Who has lost patience is gone.
            let _ = who.send(whole.map_err(|error| error.to_string()));
        }
    }

    fn number(&self) -> u32 {
        let mut waiting = self.waiting();
        waiting.last = waiting.last.wrapping_add(1);
        waiting.last
    }

    /// The job's answer to `request`; empty if there is none.
    fn ask(&self, number: u32, request: &str, patience: Duration) -> String {
        let (tell, hear) = mpsc::channel();
        self.waiting().answers.insert(number, (Vec::new(), tell));
        let order = Order::Control(number, request.as_bytes().to_vec());
        let sent = order.write(&mut *super::lock(&self.orders));
        let answer = sent.ok().and_then(|()| hear.recv_timeout(patience).ok()).unwrap_or_default();
        self.waiting().answers.remove(&number);
        String::from_utf8(answer).unwrap_or_default()
    }

    /// Have the job save itself into a file there, and bring that here.
    fn save(&self, request: &str, there: &str, here: &Path) -> Result<String, String> {
        let number = self.number();
        let name = |error: &dyn std::fmt::Display| format!("save {}: {error}", here.display());
        let file = Unfinished::create(here).map_err(|error| name(&error))?;
        let answer = self.ask(number, request, FILE_PATIENCE);
        let value: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
        if value["ok"] != true {
            return Ok(answer);
        }
        let (tell, hear) = mpsc::channel();
        self.waiting().files.insert(number, (file, tell));
        let order = Order::Fetch(number, PathBuf::from(there));
        order.write(&mut *super::lock(&self.orders)).map_err(|error| name(&error))?;
        let came = hear.recv_timeout(FILE_PATIENCE);
        self.waiting().files.remove(&number);
        came.unwrap_or_else(|_| Err("it does not come out of the nested run".into()))
            .map_err(|error| name(&error))?;
        Ok(answer)
    }
}

impl Respond for Relay {
    fn respond(&self, request: &str) -> String {
        let there = format!("{}/saved", job::OUTPUTS);
        let answer = match with_file(request, "save", &there) {
            Some((request, here)) => match self.save(&request, &there, &here) {
                Ok(answer) => answer,
                Err(error) => return refusal(&request, &error),
            },
            None => self.ask(self.number(), request, PATIENCE),
        };
        if answer.is_empty() {
            return refusal(request, "the machine in the nested run does not answer");
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::thread;

    use super::*;

    #[test]
    fn a_request_goes_there_and_its_answer_comes_back_in_parts() {
        let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let relay = Arc::new(Relay::new(Arc::new(Mutex::new(cat.stdin.take().unwrap()))));
        let asking = Arc::clone(&relay);
        let request = r#"{"id":5,"words":["ledger"]}"#;
        let asker = thread::spawn(move || asking.respond(request));
        let order = Order::read(cat.stdout.as_mut().unwrap()).unwrap();
        assert_eq!(order, Order::Control(1, request.as_bytes().to_vec()));
        relay.answered(2, b"of nobody");
        for part in [&br#"{"id":5,"#[..], br#""ok":true}"#, b""] {
            relay.answered(1, part);
        }
        assert_eq!(asker.join().unwrap(), r#"{"id":5,"ok":true}"#);
        // A machine that has gone answers nothing.
        cat.kill().unwrap();
        cat.wait().unwrap();
        let refused = relay.respond(request);
        assert!(refused.starts_with(r#"{"id":5,"ok":false,"#), "{refused}");
    }
}
