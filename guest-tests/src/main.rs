//! Runs scenarios against real guest kernels, through the built `mana-vmm` binary only.
//!
//! A scenario ([`scenario`]) is a TOML file; each runs on each guest it is for ([`guest`]) as a `mana-vmm` process
//! ([`mod@run`]), whose output ([`transcript`], [`json`]) and trace ([`trace`]) are compared with what the file says, and
//! with a model of what drivers do with vectors ([`model`]).

mod guest;
mod json;
mod model;
mod qemu;
mod report;
mod run;
mod scenario;
mod trace;
mod transcript;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};

use guest::Guest;
use run::{Job, Lane, Outcome, Settings, Verdict};
use scenario::Scenario;

/// Test guest drivers: real kernels against the simulated MANA host.
#[derive(Debug, Parser)]
struct Arguments {
    /// Scenarios to run, by name or its beginning; all if none is named.
    scenario: Vec<String>,
    /// Guests to run them on.
    #[arg(long, value_delimiter = ',', default_values = ["6.1", "6.12", "newest"])]
    guest: Vec<String>,
    /// Where the guest's CPUs are: in mana-vmm itself, or in QEMU, which has the device over vfio-user.
    #[arg(long, value_enum, default_value = "built-in")]
    vmm: Vmm,
    /// A folder with the mana.ko to test in place of the guest's own.
    #[arg(long, value_name = "DIR")]
    driver: Option<PathBuf>,
    /// Where the JUnit file goes, and the files of failed runs [default: target/guest-tests].
    #[arg(long, value_name = "DIR", default_value = "target/guest-tests", hide_default_value = true)]
    report: PathBuf,
    /// Name the scenarios and stop.
    #[arg(long)]
    list: bool,
    /// Machines that run side by side [default: the host's CPUs].
    #[arg(long)]
    jobs: Option<usize>,
    /// Passed on to mana-vmm; under QEMU kvm means KVM, everything else TCG.
    #[arg(long, default_value = "auto")]
    accel: String,
    /// Folder of the scenarios [default: the project's].
    #[arg(long, value_name = "DIR", hide = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios"))]
    scenarios: PathBuf,
    /// Keep the files of passed runs too.
    #[arg(long)]
    keep: bool,
}

/// `--vmm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Vmm {
    /// `mana-vmm boot`.
    BuiltIn,
    /// QEMU and `mana-vmm serve`.
    Qemu,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("guest-tests: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Did all pass that were run?
fn run(arguments: &Arguments) -> Result<bool> {
    let jobs = plan(arguments)?;
    let lane = match arguments.vmm {
        Vmm::BuiltIn => Lane::BuiltIn,
        Vmm::Qemu if arguments.list => Lane::Qemu(PathBuf::new()),
        Vmm::Qemu => Lane::Qemu(qemu::find()?),
    };
    if arguments.list {
        jobs.iter().for_each(|job| println!("{:40} {}", job.name(&lane), first_line(&job.scenario.story)));
        return Ok(true);
    }
    let program = env::current_exe().context("can't tell where guest-tests itself lies")?;
    let vmm = program.with_file_name("mana-vmm");
    ensure!(vmm.is_file(), "{} is missing: build it with `cargo build --workspace`", vmm.display());
    fs::create_dir_all(&arguments.report)
        .with_context(|| format!("--report {}", arguments.report.display()))?;
    let settings = Settings {
        vmm,
        lane,
        driver: arguments.driver.clone(),
        accel: arguments.accel.clone(),
        artefacts: arguments.report.clone(),
    };
    let start = Instant::now();
    let at_once =
        arguments.jobs.or_else(|| thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    println!("{} runs, {at_once} at a time", jobs.len());
    let results = run_all(&jobs, &settings, at_once, arguments.keep);
    report::write_junit(&arguments.report, &settings, &results)?;
    println!("{}", report::closing_line(&results, start.elapsed()));
    Ok(!results.iter().any(|(_, outcome)| matches!(outcome.verdict, Verdict::Failed(_))))
}

fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or_default()
}

/// Every scenario that is asked for, on every guest that is asked for and that it is for.
fn plan(arguments: &Arguments) -> Result<Vec<Job>> {
    let all = scenario::load_folder(&arguments.scenarios)?;
    for wanted in &arguments.scenario {
        let known = all.iter().any(|scenario| scenario.name.starts_with(wanted));
        ensure!(known, "there is no scenario '{wanted}' (--list names them)");
    }
    let is_wanted = |scenario: &Scenario| {
        arguments.scenario.is_empty() || arguments.scenario.iter().any(|name| scenario.name.starts_with(name))
    };
    let guests: Vec<(String, Result<Guest, String>)> = arguments
        .guest
        .iter()
        .map(|series| {
            let guest =
                Guest::find(series, arguments.driver.as_deref()).map_err(|error| format!("{error:#}"));
            (series.clone(), guest)
        })
        .collect();
    // What the command line alone decides is no matter of lanes, and tested in our own.
    let is_for_lane = |scenario: &Scenario| scenario.has_guest() || arguments.vmm == Vmm::BuiltIn;
    Ok(all
        .iter()
        .filter(|scenario| is_wanted(scenario) && is_for_lane(scenario))
        .flat_map(|scenario| jobs(scenario, &guests))
        .collect())
}

fn jobs(scenario: &Scenario, guests: &[(String, Result<Guest, String>)]) -> Vec<Job> {
    if !scenario.has_guest() {
        return vec![Job { scenario: scenario.clone(), guest: None }];
    }
    let is_for = |(series, guest): &&(String, Result<Guest, String>)| {
        let named = scenario.guests.is_empty() || scenario.guests.contains(series);
        let grows = |guest: &Guest| scenario.vectors.is_none_or(|growth| growth == guest.growth());
        named && guest.as_ref().map_or(true, grows)
    };
    let fitting = guests.iter().filter(is_for);
    fitting.map(|(_, guest)| Job { scenario: scenario.clone(), guest: Some(guest.clone()) }).collect()
}

/// Runs `jobs`, `at_once` at a time, and prints each result as it comes.
fn run_all(jobs: &[Job], settings: &Settings, at_once: usize, keep: bool) -> Vec<(Job, Outcome)> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let work = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = job.run(settings);
            if outcome.verdict == Verdict::Passed && !keep {
                let _ = fs::remove_dir_all(job.folder(settings));
            }
            let mut results = results.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            results.push((job.clone(), outcome));
            if let Some((job, outcome)) = results.last() {
                report::print(job, outcome, settings, results.len(), jobs.len());
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..at_once.max(1) {
            scope.spawn(work);
        }
    });
    results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
