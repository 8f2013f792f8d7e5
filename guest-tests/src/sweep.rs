//! A sweep: one guest does as many points as it lives for, and another goes on where it died.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::crash;
use crate::run::{Job, Outcome, Run, Settings};
use crate::scenario::{Scenario, Step, Sweep};
use crate::trace::Trace;
use crate::verdict::Verdict;

/// Guests that one sweep may use up.
const MOST_GUESTS: usize = 8;

/// How far a sweep has come.
#[derive(Debug, Default)]
struct State {
    points: Vec<Value>,
    /// Faults that are done with, and how many commands there were.
    done: usize,
    /// The next command to strike.
    next: u64,
    /// Points' problems, and those of the guests.
    problems: Vec<String>,
    /// The worst exit code.
    code: i32,
}

/// Runs `job`, whose scenario is a sweep.
pub fn run(job: &Job, sweep: &Sweep, settings: &Settings) -> Outcome {
    let start = Instant::now();
    let mut state = State { next: 1, ..State::default() };
    let mut guests = 0;
    let (mut coverage, mut repeated) = (None, None);
    while state.done < sweep.faults.len() {
        if guests == MOST_GUESTS {
            state.problems.push(format!("{MOST_GUESTS} guests are used up, and the sweep is not over"));
            break;
        }
        guests += 1;
        let guest_job = Job { scenario: with_steps(&job.scenario, sweep, &state), ..job.clone() };
        match guest_job.attempt(settings) {
            // As with other runs, once.
            Ok(run) if repeated.is_none() && run.broken_ground().is_some() => {
                repeated = run.broken_ground();
                continue;
            }
            Ok(run) => {
                let before = (state.done, state.next);
                state.note(&run, sweep);
                coverage = run.coverage().or(coverage);
                if before == (state.done, state.next) {
                    state.problems.extend(guest_job.problems(&run, settings));
                    break;
                }
            }
            Err(error) => {
                state.problems.push(format!("{error:#}"));
                break;
            }
        }
        if state.done < sweep.faults.len() {
            // The next guest's files would take the place of this one's.
            let folder = job.folder(settings);
            let _ = fs::rename(&folder, folder.with_extension(format!("guest-{guests}")));
        }
    }
    let verdict = Verdict::judge(state.code, state.problems, job.expected_failure(settings));
    Outcome { sweep: state.points, coverage, repeated, ..Outcome::new(verdict, start) }
}

/// The scenario with steps in place of the sweep: what is still to be done.
fn with_steps(scenario: &Scenario, sweep: &Sweep, state: &State) -> Scenario {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let step = |(index, fault): (usize, &String)| {
        let first = if index == state.done { state.next } else { 1 };
        let mut line = format!("sweep --from {first} --most {}", sweep.most);
        let mut option = |name: &str, value: &str| line += &format!(" --{name} {}", quoted(value));
        option("do", fault);
        option("command", &sweep.command);
        option("action", &sweep.action);
        option("recover", &sweep.recover);
        sweep.prepare.iter().for_each(|command| option("prepare", command));
        scenario.expect.log_allows.iter().for_each(|text| option("allow", text));
        Step { run: line, ..Step::default() }
    };
    let steps = sweep.faults.iter().enumerate().skip(state.done).map(step);
    Scenario { step: steps.chain(scenario.step.iter().cloned()).collect(), ..scenario.clone() }
}

impl State {
    /// What one guest did.
    fn note(&mut self, run: &Run, sweep: &Sweep) {
        let mut begun = None;
        for line in run.stdout.lines() {
            let Ok(event) = serde_json::from_str::<Value>(line) else { continue };
            match event["sweep"].as_str() {
                Some("begin") => begun = event["n"].as_u64(),
                Some("point") => {
                    begun = None;
                    self.point(event["point"].clone(), &run.trace);
                }
                Some("end") => {
                    begun = None;
                    self.done += 1;
                    self.next = 1;
                }
                _ => {}
            }
        }
        if let (Some(n), true) = (begun, self.done < sweep.faults.len()) {
            let what = match crash::report(&run.console) {
                Some(report) if run.guest_died() => format!("{}\n{report}", crash::summary(&report)),
                _ => format!("the guest does not come to the end of it (exit code {})", run.code),
            };
            self.code = self.code.max(run.code);
            let point =
                json!({ "n": n, "do": sweep.faults[self.done], "action": "the guest died", "problem": what });
            self.point(point, &run.trace);
        }
    }

    fn point(&mut self, mut point: Value, trace: &Trace) {
        let (n, fault) = (point["n"].as_u64().unwrap_or_default(), point["do"].as_str().unwrap_or_default());
        let command = trace.struck(&format!("sweep {fault} {n}"));
        if let Some(problem) = point["problem"].as_str() {
            let name = command.as_deref().unwrap_or("no command");
            self.problems.push(format!("command {n} ({name}), {fault}: {problem}"));
        }
        self.next = n + 1;
        point["command"] = command.into();
        self.points.push(point);
    }
}
