//! A scenario: one story, told in a TOML file.
//!
//! `${NAME}` in any string stands for a value of the `[[case]]` at hand; a string that is nothing but `${NAME}` takes
//! the value with its type.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use toml::{Table, Value};

use crate::matrix::plan::{Axes, Plan};

/// One file, or one case of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// File name without `.toml`, with the values of the case if there are several.
    #[serde(skip)]
    pub name: String,
    /// What it is about, in a sentence or two.
    pub story: String,
    /// Series it is for; all if none are named.
    #[serde(default)]
    pub guests: Vec<String>,
    /// Only for drivers that take their vectors in this way.
    pub vectors: Option<Growth>,
    /// Why it says nothing under another VMM than the built-in one, if it doesn't.
    pub built_in_only: Option<String>,
    /// It tries much of one kind: not in nested runs, which take ten times as long as those under QEMU.
    #[serde(default)]
    pub breadth: bool,
    /// Only under `--full`.
    #[serde(default)]
    pub full: bool,
    /// It leaves the guest as it found it, but for the driver, which is loaded afresh for each scenario: it may share one
    /// guest with others of the same machine.
    #[serde(default)]
    pub shares_guest: bool,
    /// Kernels whose own driver fails, as it should not.
    #[serde(default)]
    pub expect_failure: Vec<ExpectedFailure>,
    /// More of them, in all cases, of which none must show: that is a matter of timing, or of `--full`.
    #[serde(default)]
    pub may_fail: Vec<ExpectedFailure>,
    /// Many functions with other limits each, in place of `machine.devices`.
    pub matrix: Option<Axes>,
    /// One command after another fails, in place of steps.
    pub sweep: Option<Sweep>,
    /// `mana-vmm` is called with exactly these arguments; no guest runs.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// The machine.
    #[serde(default)]
    pub machine: Machine,
    /// What the guest does, one after another.
    #[serde(default)]
    pub step: Vec<Step>,
    /// What must be seen from outside.
    #[serde(default)]
    pub expect: Expect,
}

/// `[sweep]`: an action during which the n-th command fails, for every n until it has no n-th.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// What is done before the fault is set, if anything.
    pub prepare: Option<String>,
    /// What the fault strikes; it may fail.
    pub action: String,
    /// What must work afterwards, when the host is well again.
    pub recover: String,
    /// Faults, each of which is tried at every command, in the words of the simulated host.
    #[serde(rename = "do")]
    pub faults: Vec<String>,
    /// More of them, under `--full` only.
    #[serde(default)]
    pub full: Vec<String>,
    /// Which commands count.
    #[serde(default = "any_command")]
    pub command: String,
    /// Most commands that are struck.
    #[serde(default = "many_commands")]
    pub most: u32,
}

fn any_command() -> String {
    "any".to_owned()
}

fn many_commands() -> u32 {
    200
}

/// A defect of some kernels' own drivers. A run that does not show it has failed, unless it shows sometimes only.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpectedFailure {
    /// Series of the kernels.
    pub guests: Vec<String>,
    /// What is wrong with the driver, and since when it is not.
    pub reason: String,
    /// A text in what the run finds wrong, in which `*` stands for any text. Of a sweep each problem is held against
    /// it by itself, and one that no expected failure shows fails the run.
    pub shows: String,
    /// It need not show.
    #[serde(default)]
    pub sometimes: bool,
}

impl ExpectedFailure {
    /// Is it what `problem` shows?
    pub fn explains(&self, problem: &str) -> bool {
        let mut rest = problem;
        self.shows.split('*').all(|text| {
            let found = rest.find(text);
            rest = found.map_or(rest, |at| &rest[at + text.len()..]);
            found.is_some()
        })
    }
}

/// When a driver takes its interrupt vectors.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Growth {
    /// All before the hardware channel is established.
    Static,
    /// One before, the rest when the host has said how many there are.
    Growing,
}

/// `mana-vmm boot`'s options.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Machine {
    /// `--cpus`.
    pub cpus: String,
    /// `--memory`.
    pub memory: String,
    /// Each a `--device`, as `mana` or `mana,max-msix=3`.
    pub devices: Vec<String>,
    /// Each a `--netdev`; a device without one gets a peer.
    pub netdevs: Vec<String>,
    /// Netdevs of which everything that passes is kept in `ID.pcap`, beside the run's other files.
    pub pcaps: Vec<String>,
    /// Each a `--disk` of 16 MiB that begins with this text.
    pub disks: Vec<String>,
    /// `--append`.
    pub append: String,
    /// Seconds.
    pub timeout: u64,
}

impl Machine {
    /// Values of `--pcap`.
    pub fn pcap_options(&self, folder: &Path) -> Vec<String> {
        let value = |id: &String| format!("{id}={}", folder.join(format!("{id}.pcap")).display());
        self.pcaps.iter().map(value).collect()
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: "2".to_owned(),
            memory: "512M".to_owned(),
            devices: vec!["mana".to_owned()],
            netdevs: Vec::new(),
            pcaps: Vec::new(),
            disks: Vec::new(),
            append: String::new(),
            timeout: 400,
        }
    }
}

/// A shell command in the guest, and what it must say.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The command.
    pub run: String,
    /// Its exit status.
    #[serde(default)]
    pub status: i32,
    /// Texts that its output holds.
    #[serde(default)]
    pub contains: Vec<String>,
    /// Its output is JSON, and these paths in it have these values.
    #[serde(default)]
    pub json: Table,
    /// Its output is that of `vectors`, and agrees with the model of the driver's generation.
    #[serde(default)]
    pub vectors_by_model: bool,
    /// CPUs that are offline when its output is that of `vectors`.
    #[serde(default)]
    pub offline: Vec<usize>,
    /// Its output is that of `functions`, and each function agrees with the model of the driver's generation.
    #[serde(default)]
    pub functions_by_model: bool,
    /// Its output is that of `topology`, and agrees with `--cpus`.
    #[serde(default)]
    pub topology_as_asked: bool,
}

/// What a disk must hold when the machine is off.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCheck {
    /// Which.
    pub disk: usize,
    /// Byte position.
    pub offset: u64,
    /// What is there.
    pub holds: String,
}

/// What the run as a whole must show.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expect {
    /// Of the machine's disks.
    pub disk: Vec<DiskCheck>,
    /// Exit code of `mana-vmm`.
    pub exit: i32,
    /// Texts on its standard error.
    pub stderr: Vec<String>,
    /// The device's ledger at the end holds nothing.
    pub ledger_empty: bool,
    /// Complaints in the guest's log that are no failure, by a text in them.
    pub log_allows: Vec<String>,
    /// Checks on the trace.
    pub trace: Vec<TraceCheck>,
}

impl Expect {
    /// What tells the agent's verbs of complaints that are no failure.
    pub fn allow_options(&self) -> String {
        self.log_allows.iter().map(|text| format!(" --allow '{text}'")).collect()
    }
}

/// One check on the trace. Patterns are an event's name and conditions on its fields:
/// `msix.program vector>=1`, `smc.request type=ESTABLISH_HWC`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum TraceCheck {
    /// These happen in this order, others in between.
    Order {
        /// Patterns.
        order: Vec<String>,
    },
    /// It happens so often.
    Count {
        /// Pattern.
        count: String,
        /// Fewest.
        #[serde(default)]
        min: usize,
        /// Most.
        #[serde(default = "any_number")]
        max: usize,
    },
    /// It does not happen before the first of another.
    NotBefore {
        /// Pattern of what must wait.
        none: String,
        /// Pattern of what it waits for.
        before: String,
    },
    /// It does not happen after the first of another.
    NotAfter {
        /// Pattern of what is over.
        none: String,
        /// Pattern of what ends it.
        after: String,
    },
}

fn any_number() -> usize {
    usize::MAX
}

impl Scenario {
    /// Does it run in a guest?
    pub fn has_guest(&self) -> bool {
        self.arguments.is_empty()
    }
}

/// All cases of all scenarios in `folder`, by name.
pub fn load_folder(folder: &Path, full: bool) -> Result<Vec<Scenario>> {
    let entries = fs::read_dir(folder).with_context(|| format!("no scenarios in {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|ending| ending == "toml"));
    files.sort();
    let mut scenarios = Vec::new();
    for file in files {
        let cases = load(&file, full).with_context(|| file.display().to_string())?;
        scenarios.extend(cases);
    }
    ensure!(!scenarios.is_empty(), "no scenarios in {}", folder.display());
    Ok(scenarios)
}

fn load(file: &Path, full: bool) -> Result<Vec<Scenario>> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy();
    let mut scenarios = Vec::new();
    for mut scenario in parse(&name, &fs::read_to_string(file)?)? {
        if let Some(sweep) = scenario.sweep.as_mut().filter(|_| full) {
            sweep.faults.append(&mut sweep.full);
        }
        scenarios.extend(in_parts(scenario, full)?);
    }
    scenarios.retain(|scenario| full || !scenario.full);
    Ok(scenarios)
}

/// A matrix takes several guests, each a scenario of its own.
fn in_parts(scenario: Scenario, full: bool) -> Result<Vec<Scenario>> {
    let Some(axes) = &scenario.matrix else { return Ok(vec![scenario]) };
    let guests = axes.guests(&scenario.machine.cpus, full)?;
    let number = guests.len();
    let part = |(index, plan): (usize, Plan)| {
        let mut part = scenario.clone();
        part.name += &format!(" {}/{number}", index + 1);
        part.machine.devices = plan.devices;
        part.machine.netdevs = plan.netdevs;
        part
    };
    Ok(guests.into_iter().enumerate().map(part).collect())
}

fn parse(name: &str, text: &str) -> Result<Vec<Scenario>> {
    let mut table: Table = text.parse()?;
    let cases = match table.remove("case") {
        None => vec![Table::new()],
        Some(Value::Array(cases)) if !cases.is_empty() => {
            cases.into_iter().map(Value::try_into).collect::<Result<_, _>>()?
        }
        Some(_) => bail!("'case' is no list of tables"),
    };
    cases.iter().map(|case| one_case(name, &table, case)).collect()
}

fn one_case(name: &str, table: &Table, case: &Table) -> Result<Scenario> {
    let mut value = Value::Table(table.clone());
    substitute(&mut value, case)?;
    let mut scenario: Scenario = value.try_into()?;
    scenario.name = name.to_owned();
    scenario.may_fail.iter_mut().for_each(|known| known.sometimes = true);
    scenario.expect_failure.append(&mut scenario.may_fail);
    let says = |name| case.get(name).is_some_and(|value| value.as_bool() == Some(true));
    scenario.full |= says("full");
    scenario.breadth |= says("breadth");
    if !case.is_empty() {
        scenario.name = format!("{name} ({})", case_name(case));
    }
    let has_work = !scenario.step.is_empty() || scenario.sweep.is_some();
    ensure!(scenario.has_guest() == has_work, "it needs either steps or arguments");
    let is_plain = scenario.expect.exit == 0 && !scenario.step.is_empty() && scenario.matrix.is_none();
    ensure!(is_plain || !scenario.shares_guest, "only steps that leave the guest alive may share one");
    Ok(scenario)
}

/// The case's `name`, or its short values.
fn case_name(case: &Table) -> String {
    if let Some(name) = case.get("name") {
        return plain(name);
    }
    // What is a property of the run, or follows from the rest, tells no case from another.
    let telling = |name: &str| !["full", "breadth", "memory"].contains(&name);
    let short = case.iter().filter(|(name, value)| telling(name) && !value.is_array());
    let values: Vec<String> = short.map(|(name, value)| format!("{name} {}", plain(value))).collect();
    values.join(", ")
}

/// A value as it looks inside a string.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn substitute(value: &mut Value, case: &Table) -> Result<()> {
    match value {
        Value::String(text) => *value = filled(text, case)?,
        Value::Array(values) => values.iter_mut().try_for_each(|value| substitute(value, case))?,
        Value::Table(table) => table.iter_mut().try_for_each(|(_, value)| substitute(value, case))?,
        _ => {}
    }
    Ok(())
}

fn filled(text: &str, case: &Table) -> Result<Value> {
    let mut rest = text;
    let mut result = String::new();
    while let Some((before, after)) = rest.split_once("${") {
        let (name, after) = after.split_once('}').with_context(|| format!("'}}' is missing in '{text}'"))?;
        let value = case.get(name).with_context(|| format!("no case has a value for '{name}'"))?;
        if before.is_empty() && after.is_empty() && result.is_empty() {
            return Ok(value.clone());
        }
        result += before;
        result += &plain(value);
        rest = after;
    }
    Ok(Value::String(result + rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_fill_in_values_with_their_types() {
        let text = r#"
            story = "With ${vectors} vectors."
            [[case]]
            vectors = 2
            [[case]]
            vectors = 3
            [machine]
            devices = ["mana,max-msix=${vectors}"]
            [[step]]
            run = "vectors"
            json = { len = "${vectors}" }
        "#;
        let scenarios = parse("few", text).unwrap();
        let names: Vec<_> = scenarios.iter().map(|scenario| scenario.name.as_str()).collect();
        assert_eq!(names, ["few (vectors 2)", "few (vectors 3)"]);
        assert_eq!(scenarios[1].machine.devices, ["mana,max-msix=3"]);
        assert_eq!(scenarios[1].step[0].json["len"], Value::Integer(3));
        assert_eq!(scenarios[1].story, "With 3 vectors.");
    }

    #[test]
    fn says_what_is_wrong_in_a_file() {
        assert!(parse("x", "story = 'a'").unwrap_err().to_string().contains("either steps or arguments"));
        let error = parse("x", "story = '${a}'\n[[step]]\nrun = ''").unwrap_err().to_string();
        assert_eq!(error, "no case has a value for 'a'");
        assert!(parse("x", "story = 'a'\nsteps = []").is_err());
    }

    #[test]
    fn every_scenario_of_the_suite_loads() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let (default, full) = (load_folder(&folder, false).unwrap(), load_folder(&folder, true).unwrap());
        assert!(default.len() < full.len());
    }
}
