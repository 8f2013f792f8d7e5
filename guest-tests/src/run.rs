//! One scenario on one guest: `mana-vmm` as a process, as a user would start it, and what came out of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::Guest;
use crate::model::{self, Limits, Topology};
use crate::scenario::{DiskCheck, Scenario, Step};
use crate::trace::Trace;
use crate::{json, qemu, transcript};

/// Exit codes of `mana-vmm boot` that tell of the guest's death.
const GUEST_DIED: [i32; 2] = [2, 3];
/// Bytes of a disk.
const DISK_SIZE: u64 = 16 << 20;
/// How `mana-vmm` begins its sentence when the machine around the guest's died, the guest not being to blame.
const EMULATOR_DIED: &str = "the emulated machine (level 1)";

/// Which VMM the guest runs under.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lane {
    /// `mana-vmm boot`.
    BuiltIn,
    /// This QEMU, with the device behind vfio-user.
    Qemu(PathBuf),
}

/// What all runs share.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `mana-vmm`.
    pub vmm: PathBuf,
    /// `--vmm`.
    pub lane: Lane,
    /// `--driver`.
    pub driver: Option<PathBuf>,
    /// `--accel`.
    pub accel: String,
    /// A folder for the files of each run.
    pub artefacts: PathBuf,
}

/// One line of the report.
#[derive(Clone, Debug)]
pub struct Job {
    /// The story.
    pub scenario: Scenario,
    /// The guest, or the reason why there is none; nothing where the scenario needs none.
    pub guest: Option<Result<Guest, String>>,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As expected.
    Passed,
    /// All that was not as expected.
    Failed(Vec<String>),
    /// Not run, and why.
    Skipped(String),
}

/// A job's result.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it went.
    pub verdict: Verdict,
    /// All of it, the repetition included.
    pub duration: Duration,
    /// The first run's end, where it was not the guest's driver that ended it.
    pub repeated: Option<String>,
}

impl Job {
    /// Scenario, case, guest, and the lane unless it is our own.
    pub fn name(&self, lane: &Lane) -> String {
        let guest = self.guest.as_ref().and_then(|guest| guest.as_ref().ok());
        let name = &self.scenario.name;
        match (guest, lane) {
            (None, _) => name.clone(),
            (Some(guest), Lane::BuiltIn) => format!("{name} on {}", guest.series),
            (Some(guest), Lane::Qemu(_)) => format!("{name} on {} under QEMU", guest.series),
        }
    }

    /// Why there is nothing to run.
    fn skipped(&self, settings: &Settings) -> Option<String> {
        if let Some(Err(reason)) = &self.guest {
            return Some(reason.clone());
        }
        if settings.lane == Lane::BuiltIn {
            return None;
        }
        let own_vmm_only = self.scenario.built_in_only.as_deref();
        let reason = own_vmm_only.or_else(|| qemu::impossible(&self.scenario.machine))?;
        Some(format!("for the built-in VMM only: {reason}"))
    }

    /// Runs it, once more if the ground broke under it: level 1 died, or the guest before its driver was loaded.
    pub fn run(&self, settings: &Settings) -> Outcome {
        let start = Instant::now();
        if let Some(reason) = self.skipped(settings) {
            return Outcome { verdict: Verdict::Skipped(reason), duration: start.elapsed(), repeated: None };
        }
        let mut result = self.attempt(settings);
        let repeated = result.as_ref().ok().and_then(Run::broken_ground);
        if repeated.is_some() {
            result = self.attempt(settings);
        }
        let problems = match &result {
            Ok(run) => self.problems(run, &settings.lane, &self.folder(settings)),
            Err(error) => vec![format!("{error:#}")],
        };
        let verdict = if problems.is_empty() { Verdict::Passed } else { Verdict::Failed(problems) };
        Outcome { verdict, duration: start.elapsed(), repeated }
    }

    /// Folder of this run's files.
    pub fn folder(&self, settings: &Settings) -> PathBuf {
        let name: String = self
            .name(&settings.lane)
            .chars()
            .map(|c| if c.is_alphanumeric() || ".-".contains(c) { c } else { '_' })
            .collect();
        settings.artefacts.join(name)
    }

    fn attempt(&self, settings: &Settings) -> Result<Run> {
        let folder = self.folder(settings);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        for (number, text) in self.scenario.machine.disks.iter().enumerate() {
            let disk = disk_file(&folder, number);
            fs::write(&disk, text)
                .and_then(|()| File::options().write(true).open(&disk)?.set_len(DISK_SIZE))?;
        }
        if let (Lane::Qemu(program), Some(Ok(guest))) = (&settings.lane, &self.guest) {
            return self.attempt_under_qemu(settings, program, guest, &folder);
        }
        let arguments = self.arguments(settings, &folder);
        fs::write(folder.join("command"), shell_line(&settings.vmm, &arguments))?;
        let output = |name: &str| File::create(folder.join(name));
        let status = Command::new(&settings.vmm)
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(output("stdout")?)
            .stderr(output("stderr")?)
            .status()
            .with_context(|| format!("start {}", settings.vmm.display()))?;
        let text = |name: &str| {
            let bytes = fs::read(folder.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok(Run {
            code: status.code().with_context(|| format!("mana-vmm was killed: {status}"))?,
            stdout: text("stdout"),
            stderr: text("stderr"),
            trace: Trace::read(&folder.join("trace.jsonl"))?,
        })
    }

    fn attempt_under_qemu(
        &self,
        settings: &Settings,
        program: &Path,
        guest: &Guest,
        folder: &Path,
    ) -> Result<Run> {
        let output = qemu::run(&qemu::Order {
            vmm: &settings.vmm,
            qemu: program,
            series: &guest.series,
            driver: settings.driver.as_deref(),
            kvm: settings.accel == "kvm",
            machine: &self.scenario.machine,
            exec: &transcript::script(&all_steps(&self.scenario)),
            folder,
        })?;
        let qemu::Output { code, stdout, stderr } = output;
        fs::write(folder.join("stdout"), &stdout)?;
        fs::write(folder.join("stderr"), &stderr)?;
        Ok(Run { code, stdout, stderr, trace: Trace::read(&folder.join("trace.jsonl"))? })
    }

    fn arguments(&self, settings: &Settings, folder: &Path) -> Vec<String> {
        let scenario = &self.scenario;
        let Some(Ok(guest)) = &self.guest else { return scenario.arguments.clone() };
        let machine = &scenario.machine;
        let file = |name: &str| folder.join(name).display().to_string();
        let mut arguments = vec!["boot".to_owned()];
        let mut option = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
        option("guest", guest.series.clone());
        if let Some(driver) = &settings.driver {
            option("driver", driver.display().to_string());
        }
        option("accel", settings.accel.clone());
        option("cpus", machine.cpus.clone());
        option("memory", machine.memory.clone());
        machine.netdevs.iter().for_each(|netdev| option("netdev", netdev.clone()));
        machine.devices.iter().for_each(|device| option("device", device.clone()));
        (0..machine.disks.len())
            .for_each(|number| option("disk", disk_file(folder, number).display().to_string()));
        if !machine.append.is_empty() {
            option("append", machine.append.clone());
        }
        option("timeout", machine.timeout.to_string());
        option("trace", file("trace.jsonl"));
        option("console", file("console"));
        option("exec", transcript::script(&all_steps(scenario)));
        arguments
    }

    /// All that was not as expected.
    fn problems(&self, run: &Run, lane: &Lane, folder: &Path) -> Vec<String> {
        let expect = &self.scenario.expect;
        let mut problems = Vec::new();
        let mut note = |result: Result<()>| problems.extend(result.err().map(|error| format!("{error:#}")));
        note(run.check_exit(expect.exit));
        for text in &expect.stderr {
            note(if run.stderr.contains(text) {
                Ok(())
            } else {
                Err(anyhow::anyhow!("stderr lacks '{text}'"))
            });
        }
        if let Some(Ok(guest)) = &self.guest {
            let steps = all_steps(&self.scenario);
            for (number, step) in steps.iter().enumerate() {
                note(
                    self.check_step(step, transcript::result(&run.stdout, number), guest)
                        .with_context(|| format!("step '{}'", step.run)),
                );
            }
        }
        if expect.ledger_empty {
            note(run.check_ledger());
        }
        if *lane != Lane::BuiltIn {
            note(run.check_teardown());
        }
        expect.trace.iter().for_each(|check| note(run.trace.check(check)));
        expect.disk.iter().for_each(|check| note(check_disk(folder, check)));
        problems
    }

    fn check_step(
        &self,
        step: &Step,
        result: Option<transcript::StepResult<'_>>,
        guest: &Guest,
    ) -> Result<()> {
        let result = result.context("the guest didn't finish it")?;
        ensure!(result.status == step.status, "status {}, {}", result.status, result.stderr.trim());
        for text in &step.contains {
            ensure!(result.stdout.contains(text.as_str()), "its output lacks '{text}'");
        }
        if step.json.is_empty() && !step.vectors_by_model && !step.topology_as_asked {
            return Ok(());
        }
        let report: serde_json::Value =
            serde_json::from_str(result.stdout).context("its output is no JSON")?;
        step.json.iter().try_for_each(|(path, wanted)| json::check(&report, path, wanted))?;
        let topology = Topology::parse(&self.scenario.machine.cpus)?;
        let devices: Vec<Limits> = self
            .scenario
            .machine
            .devices
            .iter()
            .map(|device| Limits::parse(device))
            .collect::<Result<_>>()?;
        if step.vectors_by_model {
            model::check_vectors(&report, guest.generation, topology, &devices)?;
        }
        if step.topology_as_asked {
            model::check_topology(&report, topology, &devices)?;
        }
        Ok(())
    }
}

fn disk_file(folder: &Path, number: usize) -> PathBuf {
    folder.join(format!("disk{number}.img"))
}

fn check_disk(folder: &Path, check: &DiskCheck) -> Result<()> {
    let mut found = vec![0; check.holds.len()];
    File::open(disk_file(folder, check.disk))?.read_exact_at(&mut found, check.offset)?;
    let found = String::from_utf8_lossy(&found);
    ensure!(
        found == check.holds,
        "disk {} holds {found:?} at {}, not {:?}",
        check.disk,
        check.offset,
        check.holds
    );
    Ok(())
}

/// The scenario's steps, and the look at the log that ends every one.
fn all_steps(scenario: &Scenario) -> Vec<Step> {
    let allow: String = scenario.expect.log_allows.iter().map(|text| format!(" --allow '{text}'")).collect();
    let log_check = Step {
        run: format!("log-check{allow}"),
        status: 0,
        contains: Vec::new(),
        json: toml::Table::new(),
        vectors_by_model: false,
        topology_as_asked: false,
    };
    scenario.step.iter().cloned().chain([log_check]).collect()
}

/// What came out.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
    trace: Trace,
}

impl Run {
    /// Why this run says nothing about the driver, if it doesn't.
    fn broken_ground(&self) -> Option<String> {
        if let Some(at) = self.stderr.find(EMULATOR_DIED) {
            return self.stderr[at..].lines().next().map(str::to_owned);
        }
        let early = GUEST_DIED.contains(&self.code) && !self.trace.shows_driver();
        early.then(|| format!("the guest died before its driver was loaded (exit code {})", self.code))
    }

    fn check_exit(&self, wanted: i32) -> Result<()> {
        if self.code == wanted {
            return Ok(());
        }
        let last = self.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        bail!("exit code {}, not {wanted}: {last}", self.code)
    }

    /// When a client leaves, the server takes everything down, whatever the guest has left.
    fn check_teardown(&self) -> Result<()> {
        let live = self.trace.live_at_end()?;
        ensure!(live.is_empty(), "the server still holds {} after its client has left", live.join(", "));
        Ok(())
    }

    fn check_ledger(&self) -> Result<()> {
        let live = self.trace.left_by_guest()?;
        ensure!(live.is_empty(), "the ledger holds {} at the end", live.join(", "));
        Ok(())
    }
}

/// The command as one can paste it into a shell.
pub fn shell_line(program: &Path, arguments: &[String]) -> String {
    let quoted = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    let words: Vec<String> = [program.display().to_string()].iter().chain(arguments).map(quoted).collect();
    words.join(" ") + "\n"
}
