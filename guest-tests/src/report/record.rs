//! All that a report says of one run, in a form that can be kept in a file and merged with others.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::evidence::{self, Evidence};
use crate::matrix::check::Combination;
use crate::run::{Job, Outcome, Settings};
use crate::verdict::{Failure, Verdict};

/// Name of the file with the records of a report folder.
pub const FILE: &str = "report.json";

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Scenario, case, guest, lane and number of the repetition.
    pub name: String,
    /// Scenario with its case.
    pub scenario: String,
    /// What it is about.
    pub story: String,
    /// Series of the guest, where there is one.
    pub guest: Option<String>,
    /// Version of its kernel.
    pub version: Option<String>,
    /// `built-in` or `qemu`.
    pub lane: String,
    /// Which of several equal runs, from 1 on.
    pub repetition: usize,
    /// As [`Verdict::name`] has it.
    pub verdict: String,
    /// Does it fail the suite?
    pub is_failure: bool,
    /// Why a failure is expected, or why there was no run.
    pub reason: Option<String>,
    /// All that was not as expected.
    pub problems: Vec<String>,
    /// How long it took, a repetition on broken ground included.
    pub seconds: f64,
    /// Why the first run did not count.
    pub repeated: Option<String>,
    /// What the driver made of each combination of limits.
    pub combinations: Vec<Value>,
    /// The points of a sweep.
    pub sweep: Vec<Value>,
    /// Which of the driver's functions were executed.
    pub coverage: Option<Coverage>,
    /// What trace and console show.
    pub evidence: Evidence,
}

/// Functions of `mana.ko`, by the kernel's function tracer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coverage {
    /// All that can be traced.
    pub all: Vec<String>,
    /// Those that were executed.
    pub reached: Vec<String>,
}

impl Record {
    /// Of a job that has ended; its files are still there.
    pub fn new(job: &Job, outcome: &Outcome, settings: &Settings) -> Self {
        let guest = job.guest.as_ref().and_then(|guest| guest.as_ref().ok());
        let (reason, problems) = match &outcome.verdict {
            Verdict::Passed => (None, &[][..]),
            Verdict::ExpectedFailure { reason, problems } => (Some(reason.clone()), &problems[..]),
            Verdict::Failed { problems, .. } => (None, &problems[..]),
            Verdict::Skipped(reason) => (Some(reason.clone()), &[][..]),
        };
        let folder = job.folder(settings);
        let was_run = !matches!(outcome.verdict, Verdict::Skipped(_));
        Self {
            name: job.name(&settings.lane),
            scenario: job.scenario.name.clone(),
            story: job.scenario.story.trim().to_owned(),
            guest: guest.map(|guest| guest.series.clone()),
            version: guest.map(|guest| guest.version.clone()),
            lane: settings.lane.name().to_owned(),
            repetition: job.repetition,
            verdict: outcome.verdict.name().to_owned(),
            is_failure: outcome.verdict.is_failure(),
            reason,
            problems: problems.to_vec(),
            seconds: outcome.duration.as_secs_f64(),
            repeated: outcome.repeated.clone(),
            combinations: outcome.combinations.iter().map(Combination::describe).collect(),
            sweep: outcome.sweep.clone(),
            coverage: outcome.coverage.clone(),
            evidence: if was_run { evidence::gather(&settings.vmm, &folder) } else { Evidence::default() },
        }
    }

    /// Is it the one failure that KTAP has a word of its own for?
    pub fn is_time_out(&self) -> bool {
        self.verdict == Failure::TimeOut.name()
    }

    /// Was it run, and as it should be?
    pub fn is_pass(&self) -> bool {
        self.verdict == Verdict::Passed.name()
    }

    /// Does it show a known defect?
    pub fn is_expected_failure(&self) -> bool {
        !self.is_failure && !self.is_pass() && !self.is_skipped()
    }

    /// Was it not run?
    pub fn is_skipped(&self) -> bool {
        self.verdict == Verdict::Skipped(String::new()).name()
    }
}

/// Writes the records of a run into `folder`.
pub fn write(folder: &Path, records: &[Record]) -> Result<()> {
    let file = folder.join(FILE);
    fs::write(&file, serde_json::to_string(records)?).with_context(|| file.display().to_string())
}

/// Reads the records in `folder`; links to files in it are made to lead there from `reader`.
pub fn read(folder: &Path, reader: &Path) -> Result<Vec<Record>> {
    let file = folder.join(FILE);
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let mut records: Vec<Record> =
        serde_json::from_str(&text).with_context(|| format!("{} is no report of ours", file.display()))?;
    if folder != reader {
        let folder = folder.canonicalize().with_context(|| folder.display().to_string())?;
        for link in records.iter_mut().flat_map(|record| &mut record.evidence.files) {
            *link = folder.join(&*link).display().to_string();
        }
    }
    Ok(records)
}
