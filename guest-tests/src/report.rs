//! What people and machines get to read: a line for each job as it ends, and files that say it all.

mod evidence;
mod html;
mod junit;
mod ktap;
mod record;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run::{Job, Outcome, Settings};
use crate::verdict::Verdict;

pub use record::{Coverage, Record};

/// Prints how a job went.
pub fn print(job: &Job, outcome: &Outcome, settings: &Settings, done: usize, all: usize) {
    let seconds = outcome.duration.as_secs_f64();
    let line =
        |word: &str| println!("{word:>5} [{seconds:6.1}s] ({done}/{all}) {}", job.name(&settings.lane));
    let indented = |text: &String| println!("      {}", text.replace('\n', "\n      "));
    match &outcome.verdict {
        Verdict::Passed => line("PASS"),
        Verdict::ExpectedFailure { reason, problems } => {
            line("XFAIL");
            indented(reason);
            let firsts = problems.iter().filter_map(|problem| problem.lines().next());
            firsts.for_each(|first| println!("      shown by: {first}"));
        }
        Verdict::Failed { kind, problems } => {
            line(&kind.name().to_uppercase());
            problems.iter().for_each(indented);
            println!("      story: {}", job.scenario.story.trim());
            println!("      files: {}", job.folder(settings).display());
        }
        Verdict::Skipped(reason) => {
            line("SKIP");
            indented(reason);
        }
    }
    if let Some(reason) = &outcome.repeated {
        println!("      run a second time, since {reason}");
    }
}

/// Writes every report into `folder`.
pub fn write_all(folder: &Path, records: &[Record], duration: Duration) -> Result<()> {
    record::write(folder, records)?;
    junit::write(folder, records)?;
    ktap::write(folder, records)?;
    html::write(folder, records, &closing_line(records, duration))
}

/// Makes one report in `into` of those in `parts`.
pub fn merge(parts: &[PathBuf], into: &Path) -> Result<Vec<Record>> {
    fs::create_dir_all(into).with_context(|| into.display().to_string())?;
    let mut records = Vec::new();
    for part in parts {
        records.extend(record::read(part, into)?);
    }
    let time = records.iter().map(|record| record.seconds).sum();
    write_all(into, &records, Duration::from_secs_f64(time))?;
    Ok(records)
}

/// `N passed, N failed, N skipped`, how many were run twice, and what more there is to say.
pub fn closing_line(records: &[Record], duration: Duration) -> String {
    let count = |wanted: fn(&Record) -> bool| records.iter().filter(|record| wanted(record)).count();
    let mut line = format!("{} passed, {} failed", count(Record::is_pass), count(|record| record.is_failure));
    let expected = count(Record::is_expected_failure);
    if expected > 0 {
        line += &format!(", {expected} failed as expected");
    }
    let skipped = count(Record::is_skipped);
    if skipped > 0 {
        line += &format!(", {skipped} skipped");
    }
    let repeated = count(|record| record.repeated.is_some());
    if repeated > 0 {
        line += &format!(" ({repeated} run twice)");
    }
    let combinations: Vec<_> = records.iter().flat_map(|record| &record.combinations).collect();
    if !combinations.is_empty() {
        let agree = combinations.iter().filter(|one| one["problem"].is_null()).count();
        line += &format!("; {agree} of {} combinations of limits as the model says", combinations.len());
    }
    line + &format!(" in {:.0} s", duration.as_secs_f64())
}

/// Of each kernel whose functions were traced: how many of the driver's were executed, and which never.
pub fn coverage_lines(records: &[Record]) -> Vec<String> {
    let series: BTreeSet<_> = records.iter().filter_map(|record| record.guest.as_ref()).collect();
    let line = |series: &String| {
        let of_series = records.iter().filter(|record| record.guest.as_ref() == Some(series));
        let (mut all, mut reached) = (BTreeSet::new(), BTreeSet::new());
        for coverage in of_series.filter_map(|record| record.coverage.as_ref()) {
            all.extend(&coverage.all);
            reached.extend(&coverage.reached);
        }
        let never: Vec<&str> = all.difference(&reached).map(|name| name.as_str()).collect();
        let reached = all.len() - never.len();
        (!all.is_empty()).then(|| {
            format!(
                "{series}: {reached} of {} functions of mana.ko were executed; never: {}",
                all.len(),
                never.join(" ")
            )
        })
    };
    series.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run with this verdict.
    pub fn record(verdict: &str) -> Record {
        Record {
            name: "a story".to_owned(),
            scenario: "a story".to_owned(),
            story: String::new(),
            guest: Some("6.12".to_owned()),
            version: None,
            lane: "qemu".to_owned(),
            repetition: 1,
            verdict: verdict.to_owned(),
            is_failure: !["pass", "expected failure", "skipped"].contains(&verdict),
            reason: None,
            problems: Vec::new(),
            seconds: 1.0,
            repeated: None,
            combinations: Vec::new(),
            sweep: Vec::new(),
            coverage: None,
            evidence: evidence::Evidence::default(),
        }
    }

    #[test]
    fn counts_verdicts() {
        let records = ["pass", "pass", "oops", "expected failure", "skipped"].map(record);
        let line = closing_line(&records, Duration::from_secs(9));
        assert_eq!(line, "2 passed, 1 failed, 1 failed as expected, 1 skipped in 9 s");
    }

    #[test]
    fn reports_of_parts_become_one() {
        let folder = tempfile::tempdir().unwrap();
        let part = |name: &str, verdict: &str| {
            let part = folder.path().join(name);
            fs::create_dir(&part).unwrap();
            let mut record = record(verdict);
            record.evidence.files = vec!["run/console".to_owned()];
            write_all(&part, &[record], Duration::ZERO).unwrap();
            part
        };
        let parts = [part("a", "pass"), part("b", "oops")];
        let whole = folder.path().join("whole");
        assert_eq!(merge(&parts, &whole).unwrap().len(), 2);
        let read = record::read(&whole, &whole).unwrap();
        assert_eq!(
            read[1].evidence.files,
            [parts[1].canonicalize().unwrap().join("run/console").display().to_string()]
        );
        let junit = fs::read_to_string(whole.join("junit.xml")).unwrap();
        assert!(junit.contains("tests=\"2\"") && junit.contains("failures=\"1\""));
        assert!(merge(&[folder.path().join("c")], &whole).is_err());
    }

    #[test]
    fn coverage_adds_up_over_runs() {
        let coverage = |reached: &[&str]| Coverage {
            all: ["a", "b", "c"].map(str::to_owned).to_vec(),
            reached: reached.iter().map(|&name| name.to_owned()).collect(),
        };
        let mut records = [record("pass"), record("pass")];
        records[0].coverage = Some(coverage(&["a"]));
        records[1].coverage = Some(coverage(&["b"]));
        assert_eq!(coverage_lines(&records), ["6.12: 2 of 3 functions of mana.ko were executed; never: c"]);
    }
}
