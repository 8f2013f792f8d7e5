//! One scenario on one guest: `mana-vmm` as a process, as a user would start it, and what came out of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::Guest;
use crate::matrix::check::{self, Combination};
use crate::model::{self, Limits, Topology};
use crate::report::Coverage;
use crate::scenario::{DiskCheck, ExpectedFailure, Scenario, Step};
use crate::trace::Trace;
use crate::verdict::Verdict;
use crate::{crash, json, qemu, sweep, transcript};

/// Exit codes of `mana-vmm boot` that tell of the guest's death.
const GUEST_DIED: [i32; 2] = [2, 3];
/// Bytes of a disk.
const DISK_SIZE: u64 = 16 << 20;
/// Why a nested run does not try much of one kind.
const TOO_SLOW: &str =
    "it would take long in an emulated machine, which is what this one's KVM calls for; --vmm qemu runs it";
/// The step that tells which of the driver's functions were executed.
const COVERAGE: &str = "coverage";
/// Seconds in which a guest of an emulated machine comes up, which takes it ten; one in some dozens never does.
const BOOT_PATIENCE: u64 = 120;
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

impl Lane {
    /// For files.
    pub fn name(&self) -> &'static str {
        if *self == Self::BuiltIn { "built-in" } else { "qemu" }
    }
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
    /// The built-in VMM runs inside an emulated machine, since this one's KVM runs no guests.
    pub nested: bool,
    /// Trace which functions of the driver are executed.
    pub coverage: bool,
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
    /// Which of several equal runs, from 1 on.
    pub repetition: usize,
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
    /// What the driver made of each combination of limits.
    pub combinations: Vec<Combination>,
    /// The points of a sweep, as the report has them.
    pub sweep: Vec<serde_json::Value>,
    /// Which of the driver's functions were executed.
    pub coverage: Option<Coverage>,
}

impl Outcome {
    /// Of a run that began at `start` and shows no more than this.
    pub fn new(verdict: Verdict, start: Instant) -> Self {
        let duration = start.elapsed();
        let (combinations, sweep) = (Vec::new(), Vec::new());
        Self { verdict, duration, repeated: None, combinations, sweep, coverage: None }
    }
}

impl Job {
    /// Scenario, case, guest, and the lane unless it is our own.
    pub fn name(&self, lane: &Lane) -> String {
        let guest = self.guest.as_ref().and_then(|guest| guest.as_ref().ok());
        let mut name = self.scenario.name.clone();
        if self.repetition > 1 {
            name += &format!(" #{}", self.repetition);
        }
        match (guest, lane) {
            (None, _) => name,
            (Some(guest), Lane::BuiltIn) => format!("{name} on {}", guest.series),
            (Some(guest), Lane::Qemu(_)) => format!("{name} on {} under QEMU", guest.series),
        }
    }

    /// Why there is nothing to run.
    pub fn skipped(&self, settings: &Settings) -> Option<String> {
        if let Some(Err(reason)) = &self.guest {
            return Some(reason.clone());
        }
        if settings.lane == Lane::BuiltIn {
            let too_slow = self.scenario.breadth && settings.nested;
            return too_slow.then(|| TOO_SLOW.to_owned());
        }
        let own_vmm_only = self.scenario.built_in_only.as_deref();
        let reason = own_vmm_only.or_else(|| qemu::impossible(&self.scenario.machine))?;
        Some(format!("for the built-in VMM only: {reason}"))
    }

    /// Runs it, once more if the ground broke under it: level 1 died, or the guest before its driver was loaded.
    pub fn run(&self, settings: &Settings) -> Outcome {
        let start = Instant::now();
        if let Some(reason) = self.skipped(settings) {
            return Outcome::new(Verdict::Skipped(reason), start);
        }
        if let Some(sweep) = &self.scenario.sweep {
            return sweep::run(self, sweep, settings);
        }
        self.outcome(self.attempt(settings), start, settings)
    }

    /// What its first run's `result` is worth; it runs once more if that says nothing.
    pub fn outcome(&self, mut result: Result<Run>, start: Instant, settings: &Settings) -> Outcome {
        let repeated = result.as_ref().ok().and_then(Run::broken_ground);
        if repeated.is_some() {
            result = self.attempt(settings);
        }
        let mut found = Findings::default();
        let mut code = 0;
        match &result {
            Ok(run) => {
                code = run.code;
                self.check(run, settings, &mut found);
            }
            Err(error) => found.problems.push(format!("{error:#}")),
        }
        let verdict =
            Verdict::judge(code, std::mem::take(&mut found.problems), &self.expected_failures(settings));
        let Findings { combinations, coverage, .. } = found;
        Outcome { repeated, combinations, coverage, ..Outcome::new(verdict, start) }
    }

    /// What this kernel's own driver is known for.
    pub fn expected_failures(&self, settings: &Settings) -> Vec<&ExpectedFailure> {
        let Some(Ok(guest)) = &self.guest else { return Vec::new() };
        let is_for = |expected: &&ExpectedFailure| {
            settings.driver.is_none() && expected.guests.iter().any(|series| guest.is_of(series))
        };
        self.scenario.expect_failure.iter().filter(is_for).collect()
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

    /// Makes a new folder for a run's files, with its disks.
    pub fn prepare(&self, settings: &Settings) -> Result<PathBuf> {
        let folder = self.folder(settings);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        for (number, text) in self.scenario.machine.disks.iter().enumerate() {
            let disk = disk_file(&folder, number);
            fs::write(&disk, text)
                .and_then(|()| File::options().write(true).open(&disk)?.set_len(DISK_SIZE))?;
        }
        Ok(folder)
    }

    /// Boots the guest once.
    pub fn attempt(&self, settings: &Settings) -> Result<Run> {
        let folder = self.prepare(settings)?;
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
        Run::read(status.code().with_context(|| format!("mana-vmm was killed: {status}"))?, &folder)
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
            guest,
            driver: settings.driver.as_deref(),
            kvm: settings.accel == "kvm",
            machine: &self.scenario.machine,
            append: &self.append(settings),
            exec: &transcript::script(&self.steps(settings)),
            folder,
        })?;
        let qemu::Output { code, stdout, stderr } = output;
        fs::write(folder.join("stdout"), &stdout)?;
        fs::write(folder.join("stderr"), &stderr)?;
        Run::read(code, folder)
    }

    /// Words of `mana-vmm` for a run whose files are in `folder`.
    pub fn arguments(&self, settings: &Settings, folder: &Path) -> Vec<String> {
        let scenario = &self.scenario;
        let Some(Ok(guest)) = &self.guest else { return scenario.arguments.clone() };
        let machine = &scenario.machine;
        let file = |name: &str| folder.join(name).display().to_string();
        let mut arguments = vec!["boot".to_owned()];
        let mut option = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
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
        let append = self.append(settings);
        if !append.is_empty() {
            option("append", append);
        }
        machine.pcap_options(folder).into_iter().for_each(|pcap| option("pcap", pcap));
        option("timeout", machine.timeout.to_string());
        if settings.nested {
            option("boot-timeout", BOOT_PATIENCE.to_string());
        }
        option("trace", file("trace.jsonl"));
        option("console", file("console"));
        option("exec", transcript::script(&self.steps(settings)));
        arguments.extend(guest.options());
        arguments
    }

    /// What goes to the kernel's command line; the kernel makes of what it doesn't know its init's environment.
    fn append(&self, settings: &Settings) -> String {
        let own = &self.scenario.machine.append;
        if settings.coverage { format!("{own} MANA_COVERAGE=1").trim().to_owned() } else { own.clone() }
    }

    /// The scenario's steps, and those that end every one: a look at the log, and the coverage if it is wanted.
    pub fn steps(&self, settings: &Settings) -> Vec<Step> {
        let mut steps = self.scenario.step.clone();
        steps.push(Step {
            run: format!("log-check{}", self.scenario.expect.allow_options()),
            ..Step::default()
        });
        if settings.coverage {
            steps.push(Step { run: COVERAGE.to_owned(), ..Step::default() });
        }
        steps
    }

    /// All that was not as expected.
    pub fn problems(&self, run: &Run, settings: &Settings) -> Vec<String> {
        let mut found = Findings::default();
        self.check(run, settings, &mut found);
        found.problems
    }

    /// Notes all that was not as expected.
    fn check(&self, run: &Run, settings: &Settings, found: &mut Findings) {
        let expect = &self.scenario.expect;
        found.coverage = run.coverage();
        found.note(run.check_exit(expect.exit));
        if let Some(report) = crash::report(&run.console).filter(|_| run.guest_died()) {
            found.problems.push(format!("{}\n{report}", crash::summary(&report)));
        }
        for text in &expect.stderr {
            let has = run.stderr.contains(text);
            found.note(if has { Ok(()) } else { Err(anyhow::anyhow!("stderr lacks '{text}'")) });
        }
        if let Some(Ok(guest)) = &self.guest {
            let steps = self.steps(settings);
            for (step, number) in steps.iter().zip(run.first_step..) {
                let result = transcript::result(&run.stdout, number);
                let checked = self.check_step(step, result, guest, &run.trace, &mut found.combinations);
                found.note(checked.with_context(|| format!("step '{}'", step.run)));
            }
            if run.is_followed {
                let end = transcript::result(&run.stdout, run.first_step + steps.len());
                let checked =
                    self.check_step(&Step::default(), end, guest, &run.trace, &mut found.combinations);
                found.note(checked.context("at the scenario's end, as the driver was unloaded"));
            }
        }
        if expect.ledger_empty {
            found.note(run.check_ledger());
        }
        if settings.lane != Lane::BuiltIn {
            found.note(run.check_teardown());
        }
        expect.trace.iter().for_each(|check| found.note(run.trace.check(check)));
        let folder = self.folder(settings);
        expect.disk.iter().for_each(|check| found.note(check_disk(&folder, check)));
    }

    fn check_step(
        &self,
        step: &Step,
        result: Option<transcript::StepResult<'_>>,
        guest: &Guest,
        trace: &Trace,
        combinations: &mut Vec<Combination>,
    ) -> Result<()> {
        let result = result.context("the guest didn't finish it")?;
        ensure!(result.status == step.status, "status {}, {}", result.status, result.stderr.trim());
        for text in &step.contains {
            ensure!(result.stdout.contains(text.as_str()), "its output lacks '{text}'");
        }
        let by_model = step.vectors_by_model || step.functions_by_model || step.topology_as_asked;
        if step.json.is_empty() && !by_model {
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
            let topology = topology.without(&step.offline);
            model::check_vectors(&report, guest.generation, topology, &devices)?;
        }
        if step.functions_by_model {
            let machine = &self.scenario.machine;
            let checked = check::check(&report, trace, guest.generation, &machine.cpus, &machine.devices)?;
            let differ: Vec<String> = checked
                .iter()
                .filter_map(|one| Some(format!("{}: {}", one.device, one.problem.as_ref()?)))
                .collect();
            combinations.extend(checked);
            ensure!(
                differ.is_empty(),
                "{} functions are not as the model says:\n{}",
                differ.len(),
                differ.join("\n")
            );
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

/// What a run showed.
#[derive(Debug, Default)]
struct Findings {
    problems: Vec<String>,
    combinations: Vec<Combination>,
    coverage: Option<Coverage>,
}

impl Findings {
    fn note(&mut self, result: Result<()>) {
        self.problems.extend(result.err().map(|error| format!("{error:#}")));
    }
}

/// What came out.
#[derive(Debug)]
pub struct Run {
    /// Exit code of `mana-vmm`.
    pub code: i32,
    /// Standard output of the guest's steps.
    pub stdout: String,
    stderr: String,
    /// The kernel's console.
    pub console: String,
    /// The device's trace.
    pub trace: Trace,
    /// Number of the scenario's first step in `stdout`.
    pub first_step: usize,
    /// Another scenario went on in the same guest: a step of its own has ended this one.
    pub is_followed: bool,
}

impl Run {
    /// What the files in `folder` hold of a run that ended with `code`.
    pub fn read(code: i32, folder: &Path) -> Result<Self> {
        let text = |name: &str| {
            let bytes = fs::read(folder.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let trace = Trace::read(&folder.join("trace.jsonl"))?;
        let (stdout, stderr, console) = (text("stdout"), text("stderr"), text("console"));
        Ok(Self { code, stdout, stderr, console, trace, first_step: 0, is_followed: false })
    }

    /// Did the kernel die, or not come to an end?
    pub fn guest_died(&self) -> bool {
        GUEST_DIED.contains(&self.code)
    }

    /// Which of the driver's functions were executed, if the guest tells.
    pub fn coverage(&self) -> Option<Coverage> {
        self.stdout
            .lines()
            .filter(|line| line.starts_with(r#"{"reached""#))
            .find_map(|line| serde_json::from_str(line).ok())
    }

    /// Why this run says nothing about the driver, if it doesn't.
    pub fn broken_ground(&self) -> Option<String> {
        if let Some(at) = self.stderr.find(EMULATOR_DIED) {
            return self.stderr[at..].lines().next().map(str::to_owned);
        }
        // The driver may die before it has read a register.
        let shows_driver = self.trace.shows_driver() || self.console.contains("[mana]");
        let early = self.guest_died() && !shows_driver;
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
