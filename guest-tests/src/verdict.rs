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
    /// Of a run that ended with exit code `code` of `mana-vmm`. A defect that is expected explains all that it leads to.
    pub fn judge(code: i32, problems: Vec<String>, expected: &[&ExpectedFailure]) -> Self {
        Self::judge_by(code, problems, expected, |problems, expected| {
            let shows = |problem: &String| expected.iter().any(|known| known.explains(problem));
            problems.iter().any(shows)
        })
    }

    /// Of a sweep, whose problems are independent of each other: each must be one that is expected.
    pub fn judge_sweep(code: i32, problems: Vec<String>, expected: &[&ExpectedFailure]) -> Self {
        Self::judge_by(code, problems, expected, |problems, expected| {
            let shows = |problem: &String| expected.iter().any(|known| known.explains(problem));
            problems.iter().all(shows)
        })
    }

    fn judge_by(
        code: i32,
        problems: Vec<String>,
        expected: &[&ExpectedFailure],
        explain: fn(&[String], &[&ExpectedFailure]) -> bool,
    ) -> Self {
        // Where several defects are expected, one that is mended is as much news as one that is new.
        let shows = |known: &&&ExpectedFailure| problems.iter().any(|problem| known.explains(problem));
        let unseen = expected.iter().filter(|known| !known.sometimes).find(|known| !shows(known));
        let unseen = unseen.filter(|_| problems.is_empty() || explain(&problems, expected));
        if let Some(known) = unseen {
            let problem = format!("it does not show what it should: {}", known.reason);
            let problems = [problem].into_iter().chain(problems).collect();
            return Self::Failed { kind: Failure::UnexpectedPass, problems };
        }
        if problems.is_empty() {
            return Self::Passed;
        }
        if explain(&problems, expected) {
            let shown = expected.iter().filter(shows);
            let reasons: Vec<&str> = shown.map(|known| known.reason.as_str()).collect();
            return Self::ExpectedFailure { reason: reasons.join("; "), problems };
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

    fn known(shows: &str) -> ExpectedFailure {
        let (guests, reason) = (Vec::new(), "known".to_owned());
        ExpectedFailure { guests, reason, shows: shows.to_owned(), sometimes: false }
    }

    fn judge(code: i32, problems: &[&str], shows: Option<&str>) -> &'static str {
        let expected = shows.map(known);
        let problems = problems.iter().map(|&problem| problem.to_owned()).collect();
        Verdict::judge(code, problems, &expected.iter().collect::<Vec<_>>()).name()
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
    #[test]
    fn what_shows_sometimes_is_known_and_not_missed() {
        let sometimes = ExpectedFailure { sometimes: true, ..known("WARNING") };
        let judge = |problems: &[&str]| {
            let problems = problems.iter().map(|&problem| problem.to_owned()).collect();
            Verdict::judge_sweep(0, problems, &[&known("EBUSY"), &sometimes]).name()
        };
        assert_eq!(judge(&["EBUSY"]), "expected failure");
        assert_eq!(judge(&["EBUSY", "WARNING"]), "expected failure");
        assert_eq!(judge(&["WARNING"]), "unexpected pass");
        assert_eq!(judge(&["EBUSY", "gone"]), "fail");
    }
    #[test]
    fn each_problem_of_a_sweep_must_be_known() {
        let expected = [known("command 2 (*), status:*: EBUSY"), known("WARNING*mana_destroy_rxq")];
        let judge = |problems: &[&str]| {
            let problems = problems.iter().map(|&problem| problem.to_owned()).collect();
            Verdict::judge_sweep(0, problems, &expected.iter().collect::<Vec<_>>()).name()
        };
        let (busy, warning) =
            ("command 2 (X), status:0x1: EBUSY", "WARNING at xdp.c in mana_destroy_rxq+0x46");
        assert_eq!(judge(&[busy, warning]), "expected failure");
        assert_eq!(judge(&[busy, warning, "command 3 (X), status:0x1: EBUSY"]), "fail");
        assert_eq!(judge(&[busy]), "unexpected pass");
        assert_eq!(judge(&[]), "unexpected pass");
    }
}
