//! The report for machines that show test results: `junit.xml`.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use super::record::Record;

/// Writes `junit.xml` into `folder`. An expected failure is a skipped test there, which is how CI systems show that
/// nobody need act.
pub fn write(folder: &Path, records: &[Record]) -> Result<()> {
    let mut suite = TestSuite::new("guest-tests");
    suite.add_test_cases(records.iter().map(case));
    let mut report = Report::new("guest-tests");
    report.add_test_suite(suite);
    let file = folder.join("junit.xml");
    let writer = File::create(&file).with_context(|| file.display().to_string())?;
    report.serialize(writer).with_context(|| file.display().to_string())
}

fn case(record: &Record) -> TestCase {
    let reason = record.reason.as_deref().unwrap_or_default();
    let status = if record.is_failure {
        let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
        status.set_type(record.verdict.as_str());
        status.set_message(record.problems.join("\n"));
        status
    } else if record.is_pass() {
        TestCaseStatus::success()
    } else {
        let mut status = TestCaseStatus::skipped();
        status.set_message(format!("{}: {reason}", record.verdict));
        status.set_description(record.problems.join("\n"));
        status
    };
    let mut case = TestCase::new(record.name.as_str(), status);
    case.set_time(Duration::from_secs_f64(record.seconds));
    if let Some(reason) = &record.repeated {
        case.set_system_out(format!("run a second time, since {reason}"));
    }
    case
}
