//! What people and machines get to read: a line for each job as it ends, a closing line, a JUnit file.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::run::{Job, Outcome, Settings, Verdict};

/// Prints how a job went.
pub fn print(job: &Job, outcome: &Outcome, settings: &Settings, done: usize, all: usize) {
    let seconds = outcome.duration.as_secs_f64();
    let line =
        |word: &str| println!("{word:>5} [{seconds:6.1}s] ({done}/{all}) {}", job.name(&settings.lane));
    match &outcome.verdict {
        Verdict::Passed => line("PASS"),
        Verdict::Failed(problems) => {
            line("FAIL");
            problems.iter().for_each(|problem| println!("      {}", problem.replace('\n', "\n      ")));
            println!("      story: {}", job.scenario.story.trim());
            println!("      files: {}", job.folder(settings).display());
        }
        Verdict::Skipped(reason) => {
            line("SKIP");
            println!("      {reason}");
        }
    }
    if let Some(reason) = &outcome.repeated {
        println!("      run a second time, since {reason}");
    }
}

/// `N passed, N failed, N skipped`, and how many were run twice.
pub fn closing_line(results: &[(Job, Outcome)], duration: Duration) -> String {
    let count =
        |wanted: fn(&Verdict) -> bool| results.iter().filter(|(_, outcome)| wanted(&outcome.verdict)).count();
    let passed = count(|verdict| *verdict == Verdict::Passed);
    let failed = count(|verdict| matches!(verdict, Verdict::Failed(_)));
    let skipped = count(|verdict| matches!(verdict, Verdict::Skipped(_)));
    let repeated = results.iter().filter(|(_, outcome)| outcome.repeated.is_some()).count();
    let mut line = format!("{passed} passed, {failed} failed");
    if skipped > 0 {
        line += &format!(", {skipped} skipped");
    }
    if repeated > 0 {
        line += &format!(" ({repeated} run twice)");
    }
    line + &format!(" in {:.0} s", duration.as_secs_f64())
}

/// Writes `junit.xml` into `folder`.
pub fn write_junit(folder: &Path, settings: &Settings, results: &[(Job, Outcome)]) -> Result<()> {
    let mut suite = TestSuite::new("guest-tests");
    for (job, outcome) in results {
        let status = match &outcome.verdict {
            Verdict::Passed => TestCaseStatus::success(),
            Verdict::Failed(problems) => {
                let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
                status.set_message(problems.join("\n"));
                status
            }
            Verdict::Skipped(reason) => {
                let mut status = TestCaseStatus::skipped();
                status.set_message(reason.as_str());
                status
            }
        };
        let mut case = TestCase::new(job.name(&settings.lane), status);
        case.set_time(outcome.duration);
        if let Some(reason) = &outcome.repeated {
            case.set_system_out(format!("run a second time, since {reason}"));
        }
        suite.add_test_case(case);
    }
    let mut report = Report::new("guest-tests");
    report.add_test_suite(suite);
    let file = folder.join("junit.xml");
    let writer = File::create(&file).with_context(|| file.display().to_string())?;
    report.serialize(writer).with_context(|| file.display().to_string())
}
