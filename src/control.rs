//! The way to the simulated host while a machine runs: requests and answers, one JSON object a line.
//!
//! A request is `{"id": ANY, "words": ["fault", "add", ...]}`; the language of the words is in
//! [`mana_device::host::words`]. Where a machine has several functions, a first word `device=N` says which is meant, by
//! default the first. The answer is `{"id": ANY, "ok": true, ...}` with what was asked for, or
//! `{"id": ANY, "ok": false, "error": "one sentence"}`.
//!
//! Requests come through the socket of `--control` and from the guest itself, through the agent's port
//! ([`crate::legacy::AgentPort`]).

pub mod desk;
mod socket;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mana_device::ManaDevice;
use mana_device::host::{Answer, Profile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use desk::{Desk, Wish};

pub use socket::{ControlSocket, Respond, ask};

/// Longest request, bytes.
pub const MAX_REQUEST: usize = 64 << 10;

/// A request.
#[derive(Debug, Deserialize, Serialize)]
struct Request {
    /// Comes back in the answer.
    #[serde(default)]
    id: Value,
    words: Vec<String>,
}

/// An answer that says yes.
#[derive(Serialize)]
struct Done {
    id: Value,
    ok: bool,
    #[serde(flatten)]
    answer: Answer,
}

/// An answer that says no.
#[derive(Serialize)]
struct Refused {
    id: Value,
    ok: bool,
    error: String,
}

/// The answer to `request` that says no, because of `error`.
pub fn refusal(request: &str, error: &str) -> String {
    let id = serde_json::from_str::<Request>(request).map(|request| request.id).unwrap_or_default();
    serde_json::to_string(&Refused { id, ok: false, error: error.to_owned() }).unwrap_or_default()
}

/// If `request` is `verb FILE`: the same for the file `there`, and the file that it names.
pub fn with_file(request: &str, verb: &str, there: &str) -> Option<(String, PathBuf)> {
    let mut request: Request = serde_json::from_str(request).ok()?;
    match request.words.as_mut_slice() {
        [word, file] if word == verb => {
            let here = std::mem::replace(file, there.to_owned());
            Some((serde_json::to_string(&request).ok()?, here.into()))
        }
        _ => None,
    }
}

/// The profile `name` of those that come with the card, or in a file.
///
/// # Errors
/// One sentence that names the file and the key that is wrong, or the names there are.
pub fn profile(name: &str) -> Result<Profile, String> {
    if !name.contains(['/', '.']) {
        return Profile::named(name);
    }
    let text = std::fs::read_to_string(name).map_err(|error| format!("{name}: {error}"))?;
    Profile::parse(&text).map_err(|error| format!("{name}: {error}"))
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Whoever runs the machine, and may name files.
    User,
    /// The guest, which has no business with this machine's files.
    Guest,
}

/// Whom requests are for.
#[derive(Default)]
pub struct Control {
    devices: Mutex<Vec<Arc<ManaDevice>>>,
    /// Where the machine's own thread takes wishes, if there is a machine.
    machine: OnceLock<Arc<Desk>>,
    /// Held while a request is done, and while the machine is saved.
    busy: Mutex<()>,
}

impl Control {
    /// From now on requests are for `devices`.
    pub fn set_devices(&self, devices: Vec<Arc<ManaDevice>>) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = devices;
    }

    /// Wishes for the machine wait at `desk`.
    pub fn set_machine(&self, desk: Arc<Desk>) {
        // There is one for as long as the process lives.
        let _ = self.machine.set(desk);
    }

    /// Nothing is done to the devices from here while the answer lives.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Do what `request` of `asker` asks for; the answer, without a line feed.
    pub fn answer(&self, request: &str, asker: Asker) -> String {
        let answer = match serde_json::from_str::<Request>(request) {
            Ok(Request { id, words }) => match self.execute(&words, asker) {
                Ok(answer) => serde_json::to_string(&Done { id, ok: true, answer }),
                Err(error) => serde_json::to_string(&Refused { id, ok: false, error }),
            },
            Err(error) => {
                let error = format!("not a request such as {{\"id\": 1, \"words\": [\"ledger\"]}}: {error}");
                serde_json::to_string(&Refused { id: Value::Null, ok: false, error })
            }
        };
        // Every answer has a JSON form.
        answer.unwrap_or_default()
    }

    fn execute(&self, words: &[String], asker: Asker) -> Result<Answer, String> {
        match (Wish::parse(words), asker) {
            (Some(wish), Asker::User) => {
                let machine = self.machine.get();
                return machine
                    .ok_or("the machine is another process's: only `boot` can do that")?
                    .ask(wish?);
            }
            (Some(_), Asker::Guest) => return Err("a guest can't do that to its own machine".into()),
            (None, _) => {}
        }
        let (index, words) = match words.first().and_then(|word| word.strip_prefix("device=")) {
            Some(text) => {
                let index = text.parse().map_err(|_| format!("device must be a number, not `{text}`"))?;
                (index, words.get(1..).unwrap_or_default())
            }
            None => (0, words),
        };
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let device: Option<Arc<ManaDevice>> = devices.get::<usize>(index).cloned();
        let known = devices.len();
        drop(devices);
        let device = device.ok_or_else(|| format!("there is no device {index}, but {known} from 0 on"))?;
        let _hold = self.hold();
        match (asker, words) {
            (Asker::User, [verb, file]) if verb == "profile" && file.contains(['/', '.']) => {
                device.set_profile(&profile(file)?).map(|()| Answer::default())
            }
            _ => device.control(words),
        }
    }
}

#[cfg(test)]
mod tests {
    use mana_device::Host;
    use mana_device::config::DeviceConfig;
    use mana_device::doors::{Clock, MsiMessage, MsiSink, Waker, Work};
    use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

    use super::*;
    use crate::clock::MonotonicClock;
    use crate::net::Null;

    struct Nobody;
    impl MsiSink for Nobody {
        fn route(&self, _: u16, _: MsiMessage) {}
        fn fire(&self, _: u16) {}
    }
    impl Waker for Nobody {
        fn wake(&self, _: Work) {}
    }

    /// Requests for one device.
    pub(super) fn control() -> Arc<Control> {
        let host = Host {
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::default()),
            msi: Arc::new(Nobody),
            clock: Arc::new(MonotonicClock::new()) as Arc<dyn Clock>,
            waker: Arc::new(Nobody),
            ports: vec![Arc::new(Null)],
            observer: None,
        };
        let control = Arc::new(Control::default());
        control.set_devices(vec![Arc::new(ManaDevice::new(DeviceConfig::default(), host).unwrap())]);
        control
    }

    #[test]
    fn answers_carry_the_requests_id_and_say_yes_or_no() {
        let control = control();
        let answer = |request: &str| control.answer(request, Asker::User);
        assert_eq!(
            answer(r#"{"id": "a", "words": ["fault", "add", "command=any", "do=drop"]}"#),
            r#"{"id":"a","ok":true,"fault":1}"#
        );
        assert_eq!(
            answer(r#"{"words": ["device=0", "fault", "list"]}"#),
            r#"{"id":null,"ok":true,"faults":[{"id":1,"text":"command=any do=drop","hits":0}]}"#
        );
        assert_eq!(answer(r#"{"id":2,"words":["mark","here"]}"#), r#"{"id":2,"ok":true}"#);
        assert!(answer(r#"{"id":2,"words":["ledger"]}"#).contains(r#""ledger":{"hardware_channels":0,"#));
        assert!(
            answer(r#"{"id":3,"words":["fly"]}"#)
                .starts_with(r#"{"id":3,"ok":false,"error":"there is no `fly`"#)
        );
        assert!(
            answer(r#"{"id":3,"words":["device=1","ledger"]}"#)
                .contains("there is no device 1, but 1 from 0")
        );
        assert!(answer(r#"{"id":3,"words":["device=x","ledger"]}"#).contains("must be a number"));
        let from_file = r#"{"words":["profile","/nowhere/x.toml"]}"#;
        assert!(answer(from_file).contains("/nowhere/x.toml: No such file"));
        assert!(control.answer(from_file, Asker::Guest).contains("there is no profile `/nowhere/x.toml`"));
        assert!(answer("ledger").contains("not a request such as"));
    }
}
