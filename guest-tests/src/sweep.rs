//! A sweep: one guest does as many points as it lives for, and another goes on where it died.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::crash;
use crate::run::{Job, Outcome, Run, Settings};
use crate::scenario::{Scenario, Step, Sweep};
use crate::trace::Trace;
use crate::verdict::Verdict;

/// Guests that a sweep may use up for each of its faults.
const MOST_GUESTS: usize = 64;
/// Faults after which driver and host agree on what there is: it must be as before without loading the driver afresh,
/// and nothing be left. An answer that comes twice is taken for the next command's, too.
const CLEAN: [&str; 2] = ["status:", "delay:"];
/// Commands that end objects, and what the host still holds when it has refused to.
const ENDS: [(&str, &[&str]); 5] = [
    ("GDMA_DESTROY_DMA_REGION", &["dma_regions"]),
    ("GDMA_DISABLE_QUEUE", &["event_queues"]),
    ("MANA_DESTROY_WQ_OBJ", &["completion_queues", "send_queues", "receive_queues"]),
    ("MANA_CONFIG_VPORT_TX", &["vport_bindings"]),
    ("GDMA_DEREGISTER_DEVICE", &["devices"]),
];

/// A point with a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failed {
    n: u64,
    command: String,
    fault: String,
    problem: String,
}

/// How far a sweep has come.
#[derive(Debug, Default)]
struct State {
    points: Vec<Value>,
    /// Faults that are done with, and how many commands there were.
    done: usize,
    /// The next command to strike.
    next: u64,
    /// Points with problems.
    failed: Vec<Failed>,
    /// Problems of the guests.
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
        if guests == MOST_GUESTS * sweep.faults.len() {
            state.problems.push(format!("{guests} guests are used up, and the sweep is not over"));
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
            // The next guest's files would take the place of this one's. It has the same initramfs, which is large.
            let folder = job.folder(settings);
            let _ = fs::remove_file(folder.join("initrd"));
            let mut kept = folder.clone().into_os_string();
            kept.push(format!(".guest-{guests}"));
            let _ = fs::rename(&folder, kept);
        }
    }
    state.problems.extend(grouped(&state.failed));
    let verdict = Verdict::judge_sweep(state.code, state.problems, &job.expected_failures(settings));
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
        if !is_clean(fault) {
            line += " --reload";
        }
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
                    self.problems.extend(nothing_swept(&event));
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
        let name = command.as_deref().unwrap_or("no command");
        let mut problems: Vec<String> = point["problem"].as_str().map(str::to_owned).into_iter().collect();
        if is_clean(fault) {
            problems.extend(left(&point, name));
        }
        if !problems.is_empty() {
            let all = problems.join("; ");
            self.failed.push(Failed {
                n,
                command: name.to_owned(),
                fault: fault.to_owned(),
                problem: all.clone(),
            });
            point["problem"] = all.into();
        }
        self.next = n + 1;
        point["command"] = command.into();
        self.points.push(point);
    }
}

/// What is wrong with a sweep whose end this is, if it struck nothing: then it has shown nothing.
fn nothing_swept(end: &Value) -> Option<String> {
    let fault = end["do"].as_str().unwrap_or_default();
    (end["commands"] == 0).then(|| format!("{fault}: the action sends no command, so that nothing was swept"))
}

/// One line for all points in a row that show the same.
fn grouped(failed: &[Failed]) -> Vec<String> {
    let same = |a: &Failed, b: &Failed| (&a.fault, &a.problem) == (&b.fault, &b.problem) && a.n < b.n;
    let line = |group: &[Failed]| {
        let [first, .., last] = group else {
            return group.first().map_or(String::new(), |one| {
                format!("command {} ({}), {}: {}", one.n, one.command, one.fault, one.problem)
            });
        };
        let mut names: Vec<&str> = Vec::new();
        group.iter().for_each(|one| {
            if !names.contains(&one.command.as_str()) {
                names.push(&one.command);
            }
        });
        let (number, names) = (group.len(), names.join(", "));
        format!(
            "{number} commands from {} to {} ({names}), {}: {}",
            first.n, last.n, first.fault, first.problem
        )
    };
    failed.chunk_by(same).map(line).collect()
}

fn is_clean(fault: &str) -> bool {
    CLEAN.iter().any(|kind| fault.starts_with(kind))
}

/// What the driver left or broke at a point at which `command` was struck.
fn left(point: &Value, command: &str) -> Option<String> {
    let ended = ENDS.iter().find(|(name, _)| *name == command).map_or(&[][..], |(_, kinds)| kinds);
    let numbers = |key: &str| {
        let named = point[key].as_object().cloned().unwrap_or_default();
        named.into_iter().filter_map(|(name, value)| Some((name, value.as_i64()?))).collect::<Vec<_>>()
    };
    let is_refused = |(kind, number): &(String, i64)| *number == 1 && ended.contains(&kind.as_str());
    let held = numbers("held").into_iter().filter(|one| !is_refused(one));
    let held: Vec<String> = held.map(|(kind, number)| format!("{number:+} {kind}")).collect();
    // The host has kept them itself.
    let broken =
        numbers("rules").into_iter().filter(|(rule, _)| ended.is_empty() || rule != "release-objects");
    let broken: Vec<String> = broken.map(|(rule, number)| format!("{rule} ({number} times)")).collect();
    let mut found = Vec::new();
    if !held.is_empty() {
        found.push(format!("the host holds {}", held.join(", ")));
    }
    if !broken.is_empty() {
        found.push(format!("the driver breaks {}", broken.join(", ")));
    }
    (!found.is_empty()).then(|| found.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_of_nothing_has_shown_nothing() {
        let end = |commands: u64| json!({ "sweep": "end", "do": "drop", "commands": commands });
        assert_eq!(nothing_swept(&end(1)), None);
        assert!(nothing_swept(&end(0)).unwrap().starts_with("drop: the action sends no command"));
    }

    #[test]
    fn points_that_show_the_same_share_a_line() {
        let point = |n, command: &str, problem: &str| Failed {
            n,
            command: command.to_owned(),
            fault: "drop".to_owned(),
            problem: problem.to_owned(),
        };
        let failed =
            [point(2, "A", "busy"), point(3, "B", "busy"), point(7, "A", "busy"), point(8, "A", "gone")];
        assert_eq!(
            grouped(&failed),
            ["3 commands from 2 to 7 (A, B), drop: busy", "command 8 (A), drop: gone"]
        );
    }

    #[test]
    fn what_the_host_refused_to_end_is_no_leak() {
        let point = json!({ "held": { "completion_queues": 1, "send_queues": 1 }, "rules": { "release-objects": 2 } });
        assert_eq!(left(&point, "MANA_DESTROY_WQ_OBJ"), None);
        assert_eq!(
            left(&point, "GDMA_CREATE_QUEUE").unwrap(),
            "the host holds +1 completion_queues, +1 send_queues; the driver breaks release-objects (2 times)"
        );
        let point = json!({ "held": { "dma_regions": 2 }, "rules": {} });
        assert_eq!(left(&point, "GDMA_DESTROY_DMA_REGION").unwrap(), "the host holds +2 dma_regions");
        assert_eq!(left(&json!({ "held": {}, "rules": {} }), "MANA_CREATE_WQ_OBJ"), None);
    }
}
