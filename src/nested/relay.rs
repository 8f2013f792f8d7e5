//! Requests to the simulated host of a job: they come in at a socket here and go to the job's own in level 1.

use std::collections::HashMap;
use std::process::ChildStdin;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::link::Order;
use crate::control::{Respond, refusal};

/// How long an answer may take: level 1 waits for the job to come up.
const PATIENCE: Duration = Duration::from_secs(60);

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

impl Respond for Relay {
    fn respond(&self, request: &str) -> String {
        let (tell, hear) = mpsc::channel();
        let number = {
            let mut waiting = self.waiting();
            waiting.last = waiting.last.wrapping_add(1);
            let number = waiting.last;
            waiting.answers.insert(number, (Vec::new(), tell));
            number
        };
        let order = Order::Control(number, request.as_bytes().to_vec());
        let sent = order.write(&mut *super::lock(&self.orders));
        let answer = sent.ok().and_then(|()| hear.recv_timeout(PATIENCE).ok()).unwrap_or_default();
        self.waiting().answers.remove(&number);
        match String::from_utf8(answer) {
            Ok(answer) if !answer.is_empty() => answer,
            _ => refusal(request, "the machine in the nested run does not answer"),
        }
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
