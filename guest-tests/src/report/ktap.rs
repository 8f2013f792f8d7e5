//! The report in the kernel's own format (Documentation/dev-tools/ktap.rst): `ktap`.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::record::Record;

/// Writes `ktap` into `folder`.
pub fn write(folder: &Path, records: &[Record]) -> Result<()> {
    let file = folder.join("ktap");
    fs::write(&file, text(records)).with_context(|| file.display().to_string())
}

fn text(records: &[Record]) -> String {
    let mut text = format!("KTAP version 1\n1..{}\n", records.len());
    for (index, record) in records.iter().enumerate() {
        for line in record.problems.iter().flat_map(|problem| problem.lines()) {
            let _ = writeln!(text, "# {line}");
        }
        let result = if record.is_failure { "not ok" } else { "ok" };
        // A hash would begin a directive.
        let name = record.name.replace('#', "number ");
        let _ = write!(text, "{result} {} {name}", index + 1);
        let reason = record.reason.as_deref().unwrap_or_default().replace('\n', " ");
        if record.is_time_out() {
            text += " # TIMEOUT";
        } else if record.is_expected_failure() {
            let _ = write!(text, " # XFAIL {reason}");
        } else if record.is_skipped() {
            let _ = write!(text, " # SKIP {reason}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::record;

    #[test]
    fn every_verdict_has_its_line() {
        let mut records = [
            record("pass"),
            record("fail"),
            record("time-out"),
            record("expected failure"),
            record("skipped"),
        ];
        records[1].problems = vec!["one\ntwo".to_owned()];
        records[3].reason = Some("known".to_owned());
        records[4].reason = Some("no guest".to_owned());
        assert_eq!(
            text(&records),
            "KTAP version 1\n1..5\nok 1 a story\n# one\n# two\nnot ok 2 a story\nnot ok 3 a story # TIMEOUT\n\
             ok 4 a story # XFAIL known\nok 5 a story # SKIP no guest\n"
        );
    }
}
