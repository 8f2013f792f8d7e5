//! The channel from the guest's agent: a port that takes frames by string output, many bytes an exit.
//!
//! A frame is a kind byte, a little-endian 16-bit length, and the payload: `O` and `E` are standard output and error
//! of the `--exec` command, `L` is a line of the agent's log, `S` is the command's exit status as decimal text. `X` asks
//! how often CPUs left the guest; the next reads of the port are the answer, two decimal numbers and a line feed: exits
//! to us, and exits at all, which the host's KVM counts (left out where it doesn't tell). `H` is a request to the
//! simulated host ([`crate::control`]); the next reads are the length of its answer (32 bits, little-endian) and the
//! answer.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

use crate::control::{Asker, Control};
use crate::exits::ExitCounts;
use crate::layout::AGENT_PORT;
use crate::warn_limited;

const HEADER: usize = 3;
/// Longer than any answer of the simulated host.
const MAX_ANSWER: usize = 1 << 20;

/// One port, [`AGENT_PORT`]; reads answer its own number, which says that somebody listens.
#[derive(Default)]
pub struct AgentPort {
    state: Mutex<State>,
}

/// What is kept of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    frame: Vec<u8>,
    exec_status: Option<i32>,
    answer: Vec<u8>,
}

#[derive(Default)]
struct State {
    /// The frame that is being received, header included.
    frame: Vec<u8>,
    exec_status: Option<i32>,
    /// A whole frame has come.
    spoken: bool,
    /// Bytes that the guest is still to read.
    answer: VecDeque<u8>,
    exits: Option<Arc<ExitCounts>>,
    control: Option<Arc<Control>>,
}

impl AgentPort {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answer questions about exits with `counts`.
    pub fn set_exits(&self, counts: Arc<ExitCounts>) {
        self.state().exits = Some(counts);
    }

    /// Answer requests to the simulated host with `control`.
    pub fn set_control(&self, control: Arc<Control>) {
        self.state().control = Some(control);
    }

    /// What is kept: a frame that is half sent, and an answer that is half read.
    pub fn save(&self) -> AgentState {
        let State { frame, exec_status, answer, spoken: _, exits: _, control: _ } = &*self.state();
        AgentState {
            frame: frame.clone(),
            exec_status: *exec_status,
            answer: answer.iter().copied().collect(),
        }
    }

    /// Become what `saved` says.
    ///
    /// # Errors
    /// The frame is one that would have been taken long ago.
    pub fn load(&self, saved: &AgentState) -> anyhow::Result<()> {
        let AgentState { frame, exec_status, answer } = saved;
        let whole = header(frame).is_some_and(|(_, length)| frame.len() >= HEADER + usize::from(length));
        anyhow::ensure!(!whole, "a whole frame waits at the agent's port");
        anyhow::ensure!(answer.len() <= MAX_ANSWER, "an answer of {} bytes for the agent", answer.len());
        let mut state = self.state();
        (state.frame, state.exec_status) = (frame.clone(), *exec_status);
        state.answer = answer.iter().copied().collect();
        Ok(())
    }

    /// The guest's agent runs.
    pub fn has_spoken(&self) -> bool {
        self.state().spoken
    }

    /// The `--exec` command's exit status, once it has ended.
    pub fn exec_status(&self) -> Option<i32> {
        self.state().exec_status
    }
}

impl DevicePio for AgentPort {
    fn pio_read(&self, _: PioAddress, _: PioAddressOffset, data: &mut [u8]) {
        let mut state = self.state();
        data.fill_with(|| state.answer.pop_front().unwrap_or(AGENT_PORT as u8));
    }

    fn pio_write(&self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
        let mut state = self.state();
        for byte in data {
            state.frame.push(*byte);
            if let Some((kind, length)) = header(&state.frame)
                && state.frame.len() == HEADER + usize::from(length)
            {
                state.spoken = true;
                let frame = std::mem::take(&mut state.frame);
                state.receive(kind, frame.get(HEADER..).unwrap_or_default());
            }
        }
    }
}

fn header(frame: &[u8]) -> Option<(u8, u16)> {
    match *frame {
        [kind, low, high, ..] => Some((kind, u16::from_le_bytes([low, high]))),
        _ => None,
    }
}

impl State {
    fn receive(&mut self, kind: u8, payload: &[u8]) {
        match kind {
            b'O' => forward("standard output", std::io::stdout(), payload),
            b'E' => forward("standard error", std::io::stderr(), payload),
            b'X' => {
                let ours = self.exits.as_ref().map_or(0, |counts| counts.sum());
                let all = self.exits.as_ref().and_then(|counts| counts.all());
                let all = all.map_or_else(String::new, |all| all.to_string());
                self.answer = format!("{ours} {all}\n").into_bytes().into();
            }
            b'H' => {
                let request = String::from_utf8_lossy(payload);
                let answer = self
                    .control
                    .as_ref()
                    .map_or_else(String::new, |control| control.answer(&request, Asker::Guest));
                self.answer =
                    (answer.len() as u32).to_le_bytes().into_iter().chain(answer.into_bytes()).collect();
            }
            b'L' => log::info!("agent: {}", String::from_utf8_lossy(payload)),
            b'S' => match std::str::from_utf8(payload).ok().and_then(|text| text.parse().ok()) {
                Some(status) => self.exec_status = Some(status),
                None => warn_limited!("agent: {payload:?} is no exit status"),
            },
            _ => warn_limited!("agent: frame of unknown kind {kind:#x}"),
        }
    }
}

fn forward(name: &str, mut to: impl Write, payload: &[u8]) {
    if let Err(error) = to.write_all(payload).and_then(|()| to.flush()) {
        warn_limited!("agent: {name}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(port: &AgentPort, data: &[u8]) {
        port.pio_write(PioAddress(AGENT_PORT), 0, data);
    }

    #[test]
    fn frames_may_come_in_any_pieces() {
        let port = AgentPort::default();
        write(&port, b"L\x02\x00{}S");
        assert_eq!(port.exec_status(), None);
        write(&port, b"\x02\x001");
        write(&port, b"");
        write(&port, b"7");
        assert_eq!(port.exec_status(), Some(17));
    }

    #[test]
    fn nonsense_does_no_harm() {
        let port = AgentPort::default();
        write(&port, b"S\x01\x00x?\x00\x00S\x00\x00");
        assert_eq!(port.exec_status(), None);
        write(&port, b"S\x01\x000");
        assert_eq!(port.exec_status(), Some(0));
    }

    #[test]
    fn requests_to_the_host_are_answered_with_length_and_words() {
        let port = AgentPort::default();
        let request = |port: &AgentPort| {
            let request = br#"{"id":1,"words":["ledger"]}"#;
            write(port, &[&[b'H', request.len() as u8, 0], &request[..]].concat());
            let mut length = [0; 4];
            port.pio_read(PioAddress(AGENT_PORT), 0, &mut length);
            let mut answer = vec![0; u32::from_le_bytes(length) as usize];
            port.pio_read(PioAddress(AGENT_PORT), 0, &mut answer);
            String::from_utf8(answer).unwrap()
        };
        assert_eq!(request(&port), "");
        port.set_control(Arc::default());
        assert_eq!(request(&port), r#"{"id":1,"ok":false,"error":"there is no device 0, but 0 from 0 on"}"#);
        let mut after = [0];
        port.pio_read(PioAddress(AGENT_PORT), 0, &mut after);
        assert_eq!(after, [0xe9]);
    }

    #[test]
    fn reads_tell_that_somebody_listens() {
        let mut data = [0; 2];
        AgentPort::default().pio_read(PioAddress(AGENT_PORT), 0, &mut data);
        assert_eq!(data, [0xe9; 2]);
    }
}
