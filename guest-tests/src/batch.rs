//! Several guests in one emulated machine (`mana-vmm batch`), which comes up once for all of them.
//!
//! They boot one after another. If the emulated machine dies, the run that it died under is repeated as ever, and those
//! that were not begun yet run by themselves.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::NamedTempFile;

use crate::boot::Boot;
use crate::run::{Job, Lane, Outcome, Run, Settings};

/// Most guests of one emulated machine: each has its kernel and initramfs in that one's memory.
const MOST: usize = 6;
/// Between two looks whether a run has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Which of `boots` share an emulated machine: those of one guest, in their order. Towards the end batches become small, so
/// that no thread is left with many while the others have none.
pub fn deal(boots: &[Boot], settings: &Settings, at_once: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<Vec<usize>> = Vec::new();
    // By the guest's series: a batch, and how many more it takes.
    let mut open: HashMap<&str, (usize, usize)> = HashMap::new();
    for (index, Boot { job, .. }) in boots.iter().enumerate() {
        let Some(series) = series(job).filter(|_| can_share(job, settings)) else {
            batches.push(vec![index]);
            continue;
        };
        if let Some((batch, room @ 1..)) = open.get_mut(series) {
            batches[*batch].push(index);
            *room -= 1;
        } else {
            let room = ((boots.len() - index) / (2 * at_once)).clamp(1, MOST) - 1;
            open.insert(series, (batches.len(), room));
            batches.push(vec![index]);
        }
    }
    batches
}

/// Disks belong to the emulated machine, and what needs no guest needs no machine either.
fn can_share(job: &Job, settings: &Settings) -> bool {
    settings.nested
        && settings.lane == Lane::BuiltIn
        && job.guest.is_some()
        && job.skipped(settings).is_none()
        && job.scenario.sweep.is_none()
        && job.scenario.machine.disks.is_empty()
}

fn series(job: &Job) -> Option<&str> {
    Some(&job.guest.as_ref()?.as_ref().ok()?.series)
}

/// A boot of the batch.
struct Planned<'a> {
    boot: &'a Boot,
    folder: PathBuf,
    exit: PathBuf,
}

/// Runs `batch`, and tells of each of the `jobs` as it ends.
pub fn run(batch: &[&Boot], jobs: &[Job], settings: &Settings, ended: &dyn Fn(usize, Outcome)) {
    let started = plan(batch, settings).and_then(|planned| Ok((start(&planned, settings)?, planned)));
    let Ok((Batch { mut child, said, .. }, planned)) = started else {
        // Each says for itself what is wrong.
        return batch.iter().for_each(|boot| boot.run(jobs, settings, ended));
    };
    let mut over = false;
    for (number, Planned { boot, folder, exit }) in planned.into_iter().enumerate() {
        let begin = Instant::now();
        while !exit.exists() && !over {
            over = child.try_wait().map_or(true, |status| status.is_some());
            thread::sleep(LOOK);
        }
        let code = fs::read_to_string(&exit).ok().and_then(|text| text.parse().ok());
        match code {
            Some(code) => boot.settle(Run::read(code, &folder), begin, jobs, settings, ended),
            None => boot.run(jobs, settings, &|run, mut outcome| {
                // None was begun, and why is no run's to tell.
                let is_first = number == 0 && run == boot.runs[0];
                let why = is_first.then(|| fs::read_to_string(said.path()).unwrap_or_default());
                let why = why.map(|why| format!("no guest was begun: {}", why.trim()));
                outcome.repeated = outcome.repeated.or(why);
                ended(run, outcome);
            }),
        }
    }
    // It has nothing left to do, and turns its machine off.
    let _ = child.wait();
}

fn plan<'a>(batch: &[&'a Boot], settings: &Settings) -> Result<Vec<Planned<'a>>> {
    let planned = |&boot: &&'a Boot| {
        let folder = boot.job.prepare(settings)?;
        let exit = folder.join("exit");
        Ok(Planned { boot, folder, exit })
    };
    batch.iter().map(planned).collect()
}

/// `mana-vmm batch`, and files that it needs no longer than it runs.
struct Batch {
    child: Child,
    /// What it says on its standard error.
    said: NamedTempFile,
    _list: NamedTempFile,
}

fn start(planned: &[Planned<'_>], settings: &Settings) -> Result<Batch> {
    let mut lines = String::new();
    for Planned { boot, folder, exit } in planned {
        let arguments = boot.job.arguments(settings, folder);
        fs::write(folder.join("command"), crate::run::shell_line(&settings.vmm, &arguments))?;
        let (stdout, stderr) = (folder.join("stdout"), folder.join("stderr"));
        let options = &arguments[1..];
        lines += &json!({ "options": options, "stdout": stdout, "stderr": stderr, "exit": exit }).to_string();
        lines.push('\n');
    }
    let (said, list) = (NamedTempFile::new()?, NamedTempFile::new()?);
    fs::write(list.path(), lines)?;
    let child = Command::new(&settings.vmm)
        .arg("batch")
        .arg(list.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.reopen()?)
        .spawn()
        .with_context(|| format!("start {}", settings.vmm.display()))?;
    Ok(Batch { child, said, _list: list })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::guest::{Guest, Source};
    use crate::model::Generation;
    use crate::scenario::{Machine, Scenario};

    /// A job of one step.
    pub fn job(series: &str, disk: bool) -> Job {
        let mut scenario: Scenario = toml::from_str("story = \"x\"\n[[step]]\nrun = \"true\"").unwrap();
        scenario.machine =
            Machine { disks: if disk { vec!["x".into()] } else { Vec::new() }, ..Machine::default() };
        let guest = Guest {
            series: series.to_owned(),
            version: format!("{series}.1"),
            generation: Generation::Growing,
            source: Source::Fetched,
        };
        Job { scenario, guest: Some(Ok(guest)), repetition: 1 }
    }

    fn boots(jobs: &[Job]) -> Vec<Boot> {
        crate::boot::deal(jobs, &settings(true))
    }

    /// Settings whose artefacts go nowhere.
    pub fn settings(nested: bool) -> Settings {
        Settings {
            vmm: "mana-vmm".into(),
            lane: Lane::BuiltIn,
            driver: None,
            accel: "auto".to_owned(),
            nested,
            coverage: false,
            artefacts: PathBuf::new(),
        }
    }

    #[test]
    fn runs_of_the_same_guest_share_a_machine() {
        let mut jobs: Vec<Job> = (0..8).flat_map(|_| [job("6.1", false), job("7.3", false)]).collect();
        jobs.insert(1, job("6.1", true));
        let batches = deal(&boots(&jobs), &settings(true), 2);
        assert_eq!(batches[..3], [vec![0, 3, 5, 7], vec![1], vec![2, 4, 6]], "a guest with disks is alone");
        assert!(
            batches.iter().rev().take(2).all(|batch| batch.len() == 1),
            "the last are short: {batches:?}"
        );
        let mut all = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..jobs.len()).collect::<Vec<_>>());
    }

    #[test]
    fn where_kvm_runs_guests_nothing_is_shared() {
        let jobs: Vec<Job> = (0..8).map(|_| job("6.1", false)).collect();
        assert_eq!(deal(&boots(&jobs), &settings(false), 1).len(), 8);
    }
}
