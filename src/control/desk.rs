//! Wishes that only the thread which runs the machine can grant: it has the CPUs and the files.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use mana_device::host::Answer;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What is wished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The guest is to stand still.
    Pause,
    /// It is to go on.
    Resume,
    /// The machine is to be in this file; then the guest goes on as before.
    Save(PathBuf),
}

impl Wish {
    /// What `words` mean, if it is a wish.
    pub fn parse(words: &[String]) -> Option<Result<Self, String>> {
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        Some(match *words.as_slice() {
            ["pause"] => Ok(Self::Pause),
            ["resume"] => Ok(Self::Resume),
            ["save", file] => Ok(Self::Save(file.into())),
            ["save", ..] => Err("`save` wants the name of a file".into()),
            ["pause" | "resume", ..] => Err("nothing follows `pause` and `resume`".into()),
            _ => return None,
        })
    }
}

/// What came of it.
pub type Granted = Result<Answer, String>;

/// A wish, and where to say what came of it.
type Entry = (Wish, Sender<Granted>);

/// Where wishes wait.
pub struct Desk {
    waiting: Mutex<VecDeque<Entry>>,
    bell: EventFd,
}

impl Desk {
    /// No wish waits.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new() -> anyhow::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK).context("no event descriptor")?;
        Ok(Self { waiting: Mutex::default(), bell })
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wish for something and wait for what comes of it.
    pub fn ask(&self, wish: Wish) -> Granted {
        let (tell, hear) = mpsc::channel();
        self.waiting().push_back((wish, tell));
        self.bell.write(1).map_err(|error| error.to_string())?;
        hear.recv().unwrap_or_else(|_| Err("the machine has ended".into()))
    }

    /// The wish that has waited longest.
    pub fn take(&self) -> Option<Entry> {
        self.waiting().pop_front()
    }

    /// Refuse what waits, since nobody takes it any more.
    pub fn close(&self) {
        self.waiting().clear();
    }

    /// Readable while wishes may wait; whoever waits for it reads it.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn wishes_have_words() {
        assert_eq!(Wish::parse(&words("pause")), Some(Ok(Wish::Pause)));
        assert_eq!(Wish::parse(&words("save /tmp/x")), Some(Ok(Wish::Save("/tmp/x".into()))));
        assert!(Wish::parse(&words("save")).unwrap().is_err());
        assert!(Wish::parse(&words("resume now")).unwrap().is_err());
        assert_eq!(Wish::parse(&words("ledger")), None);
    }

    #[test]
    fn who_asks_hears_what_came_of_it() {
        let desk = Arc::new(Desk::new().unwrap());
        let asker = {
            std::thread::spawn({
                let desk = desk.clone();
                move || desk.ask(Wish::Pause)
            })
        };
        let (wish, answer) = loop {
            if let Some(entry) = desk.take() {
                break entry;
            }
            std::thread::yield_now();
        };
        assert_eq!(wish, Wish::Pause);
        answer.send(Ok(Answer::one("ms", 3))).unwrap();
        assert_eq!(asker.join().unwrap(), Ok(Answer::one("ms", 3)));
        assert_eq!(desk.bell().read().unwrap(), 1);
    }

    #[test]
    fn a_machine_that_has_ended_refuses() {
        let desk = Arc::new(Desk::new().unwrap());
        let asker = {
            std::thread::spawn({
                let desk = desk.clone();
                move || desk.ask(Wish::Resume)
            })
        };
        while desk.waiting().is_empty() {
            std::thread::yield_now();
        }
        desk.close();
        assert!(asker.join().unwrap().unwrap_err().contains("ended"));
    }
}
