//! One boot of a guest, and the scenarios that share it.
//!
//! A guest takes longer to come up than many a scenario. Those that say so (`shares_guest`) and want the same machine run
//! one after another in one guest. The agent ends one (`end-scenario`) and begins the next (`begin-scenario`), with the driver
//! loaded afresh; trace, console and output are cut there, so that each has its own verdict and its own files. Where the
//! guest dies, the scenario under way has failed, and those behind it get a guest of their own.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::Value;

use crate::run::{Job, Outcome, Run, Settings};
use crate::scenario::{Scenario, Step};
use crate::transcript;

/// Most scenarios of one guest.
const MOST: usize = 6;
/// What the agent (`sys::SCENARIO`) writes to the kernel's log where a scenario begins, before its name.
const BEGINS: &str = "mana-agent: scenario ";
/// Files of a run that are cut where a scenario begins. The others are about all of it.
const CUT: [&str; 3] = ["trace.jsonl", "console", "stdout"];

/// A boot.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The runs that it serves, by their number.
    pub runs: Vec<usize>,
    /// What the guest does: the only run's job, or one that is made of several.
    pub job: Job,
}

/// The boots that it takes to run `jobs`, in their order.
pub fn deal(jobs: &[Job], settings: &Settings) -> Vec<Boot> {
    let mut boots: Vec<Vec<usize>> = Vec::new();
    for (index, job) in jobs.iter().enumerate() {
        let fits = |boot: &&mut Vec<usize>| boot.len() < MOST && alike(&jobs[boot[0]], job, settings);
        match boots.iter_mut().find(fits) {
            Some(boot) => boot.push(index),
            None => boots.push(vec![index]),
        }
    }
    boots.into_iter().map(|runs| Boot { job: merged(&runs, jobs, settings), runs }).collect()
}

/// May both run in one guest?
fn alike(one: &Job, other: &Job, settings: &Settings) -> bool {
    let shares = |job: &Job| {
        let Scenario { shares_guest, machine, .. } = &job.scenario;
        // What is on a disk, and on the wire, belongs to one scenario. The tracer's functions are of a whole boot.
        let alone = !machine.disks.is_empty() || !machine.pcaps.is_empty() || settings.coverage;
        *shares_guest && !alone && job.skipped(settings).is_none()
    };
    let series = |job: &Job| Some(job.guest.as_ref()?.as_ref().ok()?.series.clone());
    let same = one.repetition == other.repetition && one.scenario.machine == other.scenario.machine;
    same && series(one) == series(other) && shares(one) && shares(other)
}

fn merged(runs: &[usize], jobs: &[Job], settings: &Settings) -> Job {
    let first = &jobs[runs[0]];
    if runs.len() == 1 {
        return first.clone();
    }
    let mut steps = Vec::new();
    for (now, next) in runs.iter().zip(&runs[1..]) {
        steps.extend(jobs[*now].steps(settings));
        steps.extend(between(&jobs[*now].scenario, &jobs[*next].scenario));
    }
    let mut job = jobs[runs[runs.len() - 1]].clone();
    job.scenario.name = format!("{} and {} more", first.scenario.name, runs.len() - 1);
    steps.append(&mut job.scenario.step);
    job.scenario.step = steps;
    job.scenario.machine.timeout *= runs.len() as u64;
    job
}

/// The steps that end one scenario and begin the next.
fn between(now: &Scenario, next: &Scenario) -> [Step; 2] {
    let end = format!("end-scenario{}", now.expect.allow_options());
    let begin = format!("begin-scenario '{}'", next.name);
    [end, begin].map(|run| Step { run, ..Step::default() })
}

impl Boot {
    /// Boots the guest and tells of each run, the `n`-th of all, as `ended(n, outcome)`.
    pub fn run(&self, jobs: &[Job], settings: &Settings, ended: &dyn Fn(usize, Outcome)) {
        match self.runs[..] {
            [only] => ended(only, jobs[only].run(settings)),
            _ => {
                let start = Instant::now();
                self.settle(self.job.attempt(settings), start, jobs, settings, ended);
            }
        }
    }

    /// Tells of each run what `result`, of a boot that began at `start`, says of it.
    pub fn settle(
        &self,
        result: Result<Run>,
        start: Instant,
        jobs: &[Job],
        settings: &Settings,
        ended: &dyn Fn(usize, Outcome),
    ) {
        if let [only] = self.runs[..] {
            return ended(only, jobs[only].outcome(result, start, settings));
        }
        let parts = result.and_then(|run| self.cut(&run, start.elapsed(), jobs, settings));
        let _ = fs::remove_dir_all(self.job.folder(settings));
        let Ok(parts) = parts else {
            // Each says for itself what is wrong.
            return self.runs.iter().for_each(|&number| ended(number, jobs[number].run(settings)));
        };
        let mut parts = parts.into_iter();
        for &number in &self.runs {
            let outcome = match parts.next() {
                Some((run, duration)) => {
                    let outcome = jobs[number].outcome(Ok(run), Instant::now(), settings);
                    Outcome { duration: duration + outcome.duration, ..outcome }
                }
                // The guest has not come to it.
                None => jobs[number].run(settings),
            };
            ended(number, outcome);
        }
    }

    /// The runs that were begun, each as if it had had the guest for itself, and how long each took.
    fn cut(
        &self,
        run: &Run,
        whole: Duration,
        jobs: &[Job],
        settings: &Settings,
    ) -> Result<Vec<(Run, Duration)>> {
        let folder = self.job.folder(settings);
        // The first step of each scenario; two steps before it end one and begin the next.
        let mut steps = vec![0];
        for (&before, index) in self.runs.iter().zip(1..self.runs.len()) {
            steps.push(steps[index - 1] + jobs[before].steps(settings).len() + 2);
        }
        steps.retain(|&step| step == 0 || run.stdout.contains(&transcript::begin(step - 1)));
        let begun: Vec<&Job> = self.runs.iter().zip(&steps).map(|(&number, _)| &jobs[number]).collect();
        let [trace, console, stdout] = CUT.map(|name| {
            String::from_utf8_lossy(&fs::read(folder.join(name)).unwrap_or_default()).into_owned()
        });
        let names = || begun[1..].iter().map(|job| &job.scenario.name);
        let trace = at_lines(&trace, names().map(|name| format!(r#""name":"scenario {name}""#)));
        let console = at_lines(&console, names().map(|name| format!("{BEGINS}{name}")));
        let stdout = at_lines(&stdout, steps[1..].iter().map(|&step| transcript::begin(step - 1)));
        let mut ends: Vec<Duration> = trace[1..].iter().map(|part| begin(part)).collect();
        ends.push(whole);
        let mut start = Duration::ZERO;
        let mut parts = Vec::new();
        for (index, job) in begun.iter().enumerate() {
            let own = job.prepare(settings)?;
            for entry in fs::read_dir(&folder)?.flatten() {
                if !CUT.contains(&&*entry.file_name().to_string_lossy()) && entry.file_name() != "initrd" {
                    fs::copy(entry.path(), own.join(entry.file_name()))?;
                }
            }
            let part = |parts: &[&str]| parts.get(index).copied().unwrap_or_default().to_owned();
            for (name, text) in CUT.iter().zip([part(&trace), part(&console), part(&stdout)]) {
                fs::write(own.join(name), text)?;
            }
            let is_last = index + 1 == begun.len();
            // An end that was not the guest's own is that of the run under way.
            let mut run = Run::read(if is_last { run.code } else { 0 }, &own)?;
            run.first_step = steps[index];
            run.is_followed = !is_last;
            let end = ends.get(index).copied().unwrap_or(whole);
            parts.push((run, end.saturating_sub(start)));
            start = end;
        }
        Ok(parts)
    }
}

/// When `trace` begins, since the device was there.
fn begin(trace: &str) -> Duration {
    let event = trace.lines().next().and_then(|line| serde_json::from_str::<Value>(line).ok());
    Duration::from_nanos(event.and_then(|event| event["t_ns"].as_u64()).unwrap_or_default())
}

/// `text` in parts, each but the first from the line on that holds the next of `marks`.
fn at_lines(text: &str, marks: impl Iterator<Item = String>) -> Vec<&str> {
    let mut rest = text;
    let mut parts = Vec::new();
    for mark in marks {
        let Some(at) = rest.find(&mark) else { break };
        let line = rest[..at].rfind('\n').map_or(0, |end| end + 1);
        parts.push(&rest[..line]);
        rest = &rest[line..];
    }
    parts.push(rest);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::tests::{job, settings};

    #[test]
    fn texts_are_cut_at_lines() {
        let marks = ["begins b", "begins c"].map(str::to_owned);
        let parts = at_lines("1\n[ 2.0] begins b\n3\n[ 4.0] begins c\n", marks.clone().into_iter());
        assert_eq!(parts, ["1\n", "[ 2.0] begins b\n3\n", "[ 4.0] begins c\n"]);
        assert_eq!(at_lines("1\n2", marks.into_iter()), ["1\n2"], "where it was not reached");
        assert_eq!(begin("{\"event\":\"mark\",\"t_ns\":1500}\n{"), Duration::from_nanos(1500));
    }

    #[test]
    fn the_scenario_under_way_has_died_and_the_next_has_not_begun() {
        let reports = tempfile::tempdir().unwrap();
        let settings = Settings { artefacts: reports.path().to_owned(), ..settings(false) };
        let job = |name: &str, cpus: &str| {
            let mut job = job("6.12", false);
            job.scenario.name = name.to_owned();
            job.scenario.shares_guest = true;
            job.scenario.machine.cpus = cpus.to_owned();
            job
        };
        let jobs = [job("a", "2"), job("other", "4"), job("b", "2"), job("c", "2")];
        let boots = deal(&jobs, &settings);
        assert_eq!(boots.iter().map(|boot| &boot.runs[..]).collect::<Vec<_>>(), [&[0, 2, 3][..], &[1]]);
        let together = &boots[0];
        let said: Vec<&str> = together.job.scenario.step.iter().map(|step| step.run.as_str()).collect();
        assert_eq!(
            said,
            [
                "true",
                "log-check",
                "end-scenario",
                "begin-scenario 'b'",
                "true",
                "log-check",
                "end-scenario",
                "begin-scenario 'c'",
                "true"
            ]
        );

        let folder = together.job.prepare(&settings).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write(
            "trace.jsonl",
            "{\"event\":\"x\"}\n{\"event\":\"mark\",\"t_ns\":2000000000,\"name\":\"scenario b\"}\n",
        );
        write("console", "up\n[ 2.0] mana-agent: scenario b\nBUG\n");
        write("stderr", "the whole boot's");
        let begun = |step| format!("{}\n", transcript::begin(step));
        let stdout = (0..5).map(begun).collect::<String>();
        write("stdout", &stdout);
        let run = Run::read(2, &folder).unwrap();
        let parts = together.cut(&run, Duration::from_secs(9), &jobs, &settings).unwrap();
        let shown: Vec<_> = parts
            .iter()
            .map(|(run, duration)| {
                (run.code, run.console.as_str(), run.first_step, run.is_followed, duration.as_secs())
            })
            .collect();
        assert_eq!(
            shown,
            [(0, "up\n", 0, true, 2), (2, "[ 2.0] mana-agent: scenario b\nBUG\n", 4, false, 7)],
            "c gets a guest of its own"
        );
        assert!(parts[0].0.stdout.contains("step 2") && !parts[0].0.stdout.contains("step 3"));
        assert_eq!(fs::read_to_string(jobs[2].folder(&settings).join("stderr")).unwrap(), "the whole boot's");
    }
}
