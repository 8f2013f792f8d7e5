//! What is running right now, in one line below the results, where somebody watches.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

/// Columns that the line takes at most.
const WIDTH: usize = 110;

/// The line. Where standard output is no terminal there is none.
#[derive(Debug)]
pub struct Progress {
    all: usize,
    is_terminal: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Vec<String>,
    done: usize,
    failed: usize,
}

impl Progress {
    /// Of `all` runs.
    pub fn new(all: usize) -> Self {
        Self { all, is_terminal: io::stdout().is_terminal(), state: Mutex::default() }
    }

    /// A run begins.
    pub fn begins(&self, name: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.push(name.to_owned());
        self.draw(&state);
    }

    /// A run is over; `print` prints its result, given how many are done.
    pub fn ends(&self, name: &str, failed: bool, print: impl FnOnce(usize)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.retain(|running| running != name);
        state.done += 1;
        state.failed += usize::from(failed);
        self.clear();
        print(state.done);
        self.draw(&state);
    }

    fn clear(&self) {
        if self.is_terminal {
            print!("\r\x1b[K");
        }
    }

    fn draw(&self, state: &State) {
        if self.is_terminal {
            print!("\r\x1b[K{}", line(state, self.all));
            // Nobody is hurt if it comes later.
            let _ = io::stdout().flush();
        }
    }
}

fn line(state: &State, all: usize) -> String {
    if state.running.is_empty() {
        return String::new();
    }
    let failed = if state.failed > 0 { format!(", {} failed", state.failed) } else { String::new() };
    let text = format!("{} of {all} done{failed}; running: {}", state.done, state.running.join(", "));
    text.chars().take(WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_no_wider_than_a_terminal() {
        let mut state = State { running: vec!["a".into(), "b".into()], done: 3, failed: 1 };
        assert_eq!(line(&state, 9), "3 of 9 done, 1 failed; running: a, b");
        state.running.push("c".repeat(200));
        assert_eq!(line(&state, 9).chars().count(), WIDTH);
        state.running.clear();
        assert_eq!(line(&state, 9), "");
    }
}
