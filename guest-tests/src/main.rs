//! Runs scenarios against real guest kernels, through the built `mana-vmm` binary only.
//!
//! A scenario ([`scenario`]) is a TOML file; each runs on each guest it is for ([`guest`]) as a `mana-vmm` process
//! ([`mod@run`]), in its own VMM or under QEMU ([`qemu`]); some share a guest ([`boot`]). What it prints ([`transcript`], [`json`]), its trace
//! ([`trace`]) and its console ([`crash`]) are compared with what the file says, and with a model of what drivers do
//! with vectors ([`model`], [`matrix`]). A [`mod@sweep`] makes the host fail at one command after another. The differences make a [`verdict`], and all verdicts the [`report`].

mod arguments;
mod batch;
mod boot;
mod crash;
mod guest;
mod json;
mod matrix;
mod model;
mod partition;
mod progress;
mod qemu;
mod relay;
mod report;
mod run;
mod scenario;
mod sweep;
mod trace;
mod transcript;
mod verdict;
mod wake;

use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use arguments::{Arguments, Command, Vmm};
use boot::Boot;
use guest::Guest;
use progress::Progress;
use report::Record;
use run::{Job, Lane, Outcome, Settings};
use scenario::Scenario;
use verdict::Verdict;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Merge { part, output }) => report::merge(part, output),
        None => run(&arguments),
    };
    match result {
        Ok(records) if !records.iter().any(|record| record.is_failure) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("guest-tests: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what is asked for.
fn run(arguments: &Arguments) -> Result<Vec<Record>> {
    let lane = match arguments.vmm {
        Vmm::BuiltIn => Lane::BuiltIn,
        Vmm::Qemu if arguments.list => Lane::Qemu(PathBuf::new()),
        Vmm::Qemu => Lane::Qemu(qemu::find()?),
    };
    let jobs = plan(arguments, &lane)?;
    if arguments.list {
        jobs.iter().for_each(|job| println!("{:40} {}", job.name(&lane), first_line(&job.scenario.story)));
        return Ok(Vec::new());
    }
    let program = env::current_exe().context("can't tell where guest-tests itself lies")?;
    let vmm = program.with_file_name("mana-vmm");
    ensure!(vmm.is_file(), "{} is missing: build it with `cargo build --workspace`", vmm.display());
    fs::create_dir_all(&arguments.report)
        .with_context(|| format!("--report {}", arguments.report.display()))?;
    let settings = Settings {
        vmm: vmm.clone(),
        lane,
        driver: arguments.driver.clone(),
        accel: arguments.accel.clone(),
        nested: is_nested(&vmm, &arguments.accel)?,
        coverage: arguments.coverage,
        artefacts: arguments.report.clone(),
    };
    let start = Instant::now();
    let at_once =
        arguments.jobs.or_else(|| thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    println!("{} runs, {at_once} at a time", jobs.len());
    let records = run_all(&jobs, &settings, at_once, arguments.keep);
    report::write_all(&arguments.report, &records, start.elapsed())?;
    report::coverage_lines(&records).iter().for_each(|line| println!("{line}"));
    println!("{}", report::closing_line(&records, start.elapsed()));
    println!("report: {}", arguments.report.join("report.html").display());
    Ok(records)
}

/// Would `mana-vmm boot` run a guest inside an emulated machine?
fn is_nested(vmm: &Path, accel: &str) -> Result<bool> {
    if accel != "auto" {
        return Ok(accel == "nested");
    }
    let output = process::Command::new(vmm).arg("check").output().context("mana-vmm check")?;
    Ok(!String::from_utf8_lossy(&output.stdout).contains("--accel auto runs guests on this machine's KVM"))
}

fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or_default()
}

/// Every scenario that is asked for, on every guest that is asked for and that it is for.
fn plan(arguments: &Arguments, lane: &Lane) -> Result<Vec<Job>> {
    let all = scenario::load_folder(&arguments.scenarios, arguments.full)?;
    for wanted in &arguments.scenario {
        let known = all.iter().any(|scenario| scenario.name.starts_with(wanted));
        ensure!(known, "there is no scenario '{wanted}' (--list names them)");
    }
    let is_wanted = |scenario: &Scenario| {
        arguments.scenario.is_empty() || arguments.scenario.iter().any(|name| scenario.name.starts_with(name))
    };
    let guests = guests(arguments)?;
    // What the command line alone decides is no matter of lanes, and tested in our own.
    let is_for_lane = |scenario: &Scenario| scenario.has_guest() || arguments.vmm == Vmm::BuiltIn;
    let mut jobs: Vec<Job> = all
        .iter()
        .filter(|scenario| is_wanted(scenario) && is_for_lane(scenario))
        .flat_map(|scenario| jobs(scenario, &guests))
        .collect();
    if let Some(partition) = arguments.partition {
        let mut index = 0..;
        jobs.retain(|job| index.next().is_some_and(|index| partition.holds(index, &job.name(lane))));
    }
    let repeated = |job: Job| (1..=arguments.repeat).map(move |repetition| Job { repetition, ..job.clone() });
    Ok(jobs.into_iter().flat_map(repeated).collect())
}

/// A guest's name, and the guest or why it can't be had.
type Named = (String, Result<Guest, String>);

fn guests(arguments: &Arguments) -> Result<Vec<Named>> {
    let driver = arguments.driver.as_deref();
    if let (Some(kernel), Some(modules)) = (&arguments.kernel, &arguments.modules) {
        let guest = Guest::of_files(kernel, modules, driver, arguments.rules)?;
        return Ok(vec![(guest.series.clone(), Ok(guest))]);
    }
    let find = |series: &String| {
        let guest = Guest::find(series, driver, arguments.rules).map_err(|error| format!("{error:#}"));
        (series.clone(), guest)
    };
    Ok(arguments.guest.iter().map(find).collect())
}

fn jobs(scenario: &Scenario, guests: &[Named]) -> Vec<Job> {
    let job = |guest| Job { scenario: scenario.clone(), guest, repetition: 1 };
    if !scenario.has_guest() {
        return vec![job(None)];
    }
    let is_for = |(series, guest): &&Named| {
        let is_named =
            |named: &String| named == series || guest.as_ref().is_ok_and(|guest| guest.is_of(named));
        let named = scenario.guests.is_empty() || scenario.guests.iter().any(is_named);
        let grows = |guest: &Guest| scenario.vectors.is_none_or(|growth| growth == guest.growth());
        named && guest.as_ref().map_or(true, grows)
    };
    guests.iter().filter(is_for).map(|(_, guest)| job(Some(guest.clone()))).collect()
}

/// Runs `jobs`, `at_once` at a time, prints each result as it comes, and gives all in the order of `jobs`.
fn run_all(jobs: &[Job], settings: &Settings, at_once: usize, keep: bool) -> Vec<Record> {
    let at_once = at_once.max(1);
    let boots = boot::deal(jobs, settings);
    let batches = batch::deal(&boots, settings, at_once);
    let next = AtomicUsize::new(0);
    let progress = Progress::new(jobs.len());
    let records = Mutex::new(Vec::new());
    let ended = |index: usize, outcome: Outcome| {
        let job = &jobs[index];
        let mut record = Record::new(job, &outcome, settings);
        if outcome.verdict == Verdict::Passed && !keep {
            let _ = fs::remove_dir_all(job.folder(settings));
            record.evidence.files.clear();
        }
        records.lock().unwrap_or_else(PoisonError::into_inner).push((index, record));
        let print = |done| report::print(job, &outcome, settings, done, jobs.len());
        progress.ends(&job.name(&settings.lane), outcome.verdict.is_failure(), print);
    };
    let work = || {
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            let batch: Vec<&Boot> = batch.iter().map(|&index| &boots[index]).collect();
            let runs = batch.iter().flat_map(|boot| &boot.runs);
            runs.for_each(|&index| progress.begins(&jobs[index].name(&settings.lane)));
            match batch[..] {
                [boot] => boot.run(jobs, settings, &ended),
                _ => batch::run(&batch, jobs, settings, &ended),
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(work);
        }
    });
    let mut records = records.into_inner().unwrap_or_else(PoisonError::into_inner);
    records.sort_by_key(|(index, _)| *index);
    records.into_iter().map(|(_, record)| record).collect()
}
