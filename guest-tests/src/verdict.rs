//! What a run's problems mean.

use crate::scenario::ExpectedFailure;

/// How a job went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As expected.
    Passed,
    /// It shows the defect that this kernel is known for.
    ExpectedFailure {
        /// What is wrong with the driver.
        reason: String,
        /// How the run shows it.
        problems: Vec<String>,
    },
    /// Not as expected.
    Failed {
        /// What sort of failure.
        kind: Failure,
        /// All that was not as expected.
        problems: Vec<String>,
    },
    /// Not run, and why.
    Skipped(String),
}

/// Sorts of failures, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// A check does not hold.
    Check,
    /// A known defect does not show.
    UnexpectedPass,
    /// The driver broke a rule of the device, under `strict=on`.
    RuleBroken,
    /// The guest, or a step of it, did not come to its end.
    TimeOut,
    /// The kernel found something wrong with itself.
    Oops,
}

impl Failure {
    /// For people and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Check => "fail",
            Self::UnexpectedPass => "unexpected pass",
            Self::RuleBroken => "device rule broken",
            Self::TimeOut => "time-out",
            Self::Oops => "oops",
        }
    }

    /// Of a run that ended with `code`, of which `problems` were found.
    fn of(code: i32, problems: &[String]) -> Self {
        const COMPLAINTS: [&str; 4] = ["BUG: ", "Oops", "general protection fault", "Kernel panic"];
        let complains = |problem: &String| COMPLAINTS.iter().any(|text| problem.contains(text));
        match code {
            2 => Self::Oops,
            3 => Self::TimeOut,
            4 => Self::RuleBroken,
            _ if problems.iter().any(complains) => Self::Oops,
            _ => Self::Check,
        }
    }
}

impl Verdict {
    /// Of a run that ended with exit code `code` of `mana-vmm`.
    pub fn judge(code: i32, problems: Vec<String>, expected: Option<&ExpectedFailure>) -> Self {
        let Some(expected) = expected else {
            return match problems.is_empty() {
                true => Self::Passed,
                false => Self::Failed { kind: Failure::of(code, &problems), problems },
            };
        };
        let ExpectedFailure { reason, shows, .. } = expected;
        if problems.iter().any(|problem| problem.contains(shows.as_str())) {
            return Self::ExpectedFailure { reason: reason.clone(), problems };
        }
        if problems.is_empty() {
            let problem = format!("it passes, but should fail: {reason}");
            return Self::Failed { kind: Failure::UnexpectedPass, problems: vec![problem] };
        }
        Self::Failed { kind: Failure::of(code, &problems), problems }
    }

    /// Does it fail the suite?
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// For people and files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::ExpectedFailure { .. } => "expected failure",
            Self::Failed { kind, .. } => kind.name(),
            Self::Skipped(_) => "skipped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(code: i32, problems: &[&str], shows: Option<&str>) -> &'static str {
        let expected = shows.map(|shows| ExpectedFailure {
            guests: Vec::new(),
            reason: "known".to_owned(),
            shows: shows.to_owned(),
        });
        let problems = problems.iter().map(|&problem| problem.to_owned()).collect();
        Verdict::judge(code, problems, expected.as_ref()).name()
    }

    #[test]
    fn sorts_of_failures() {
        assert_eq!(judge(0, &[], None), "pass");
        assert_eq!(judge(5, &["a step"], None), "fail");
        assert_eq!(judge(2, &["exit code 2"], None), "oops");
        assert_eq!(judge(3, &["exit code 3"], None), "time-out");
        assert_eq!(judge(4, &["exit code 4"], None), "device rule broken");
        assert_eq!(judge(5, &["[ 1.0] BUG: scheduling while atomic"], None), "oops");
    }

    #[test]
    fn a_known_defect_must_show() {
        assert_eq!(judge(2, &["RIP: mana_gd_setup"], Some("mana_gd_setup")), "expected failure");
        assert_eq!(judge(0, &[], Some("mana_gd_setup")), "unexpected pass");
        assert_eq!(judge(5, &["no carrier"], Some("mana_gd_setup")), "fail");
    }
}
