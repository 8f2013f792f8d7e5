//! Steps as one shell script, and its output cut into steps again.

use crate::scenario::Step;

/// What a step printed and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepResult<'a> {
    /// Standard output.
    pub stdout: &'a str,
    /// Standard error.
    pub stderr: &'a str,
    /// Exit status.
    pub status: i32,
}

/// Runs every step in a shell of its own, and prints marks around what it prints.
pub fn script(steps: &[Step]) -> String {
    let step = |(number, step): (usize, &Step)| {
        format!(
            "echo '{}'\n(\n{}\n) 2>/tmp/stderr\nstatus=$?\necho; echo '{}'\ncat /tmp/stderr\necho; echo \"{} $status\"\n",
            mark(number, "stdout"),
            step.run,
            mark(number, "stderr"),
            mark(number, "status"),
        )
    };
    steps.iter().enumerate().map(step).collect()
}

/// The result of step `number`, if the guest got to its end.
pub fn result(output: &str, number: usize) -> Option<StepResult<'_>> {
    let (_, rest) = output.split_once(&mark(number, "stdout"))?;
    let (stdout, rest) = rest.split_once(&mark(number, "stderr"))?;
    let (stderr, rest) = rest.split_once(&mark(number, "status"))?;
    let status = rest.lines().next()?.trim().parse().ok()?;
    Some(StepResult { stdout: stdout.trim(), stderr: stderr.trim(), status })
}

/// What is printed before step `number`.
pub fn begin(number: usize) -> String {
    mark(number, "stdout")
}

fn mark(number: usize, part: &str) -> String {
    format!("@@ step {number} {part}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn step(run: &str) -> Step {
        toml::from_str(&format!("run = '''{run}'''")).unwrap()
    }

    #[test]
    fn a_shell_s_output_is_cut_into_steps() {
        let steps = [step("echo one; echo two >&2; exit 3"), step("printf '{}'")];
        let output = Command::new("sh").args(["-c", &script(&steps)]).output().unwrap();
        let output = String::from_utf8(output.stdout).unwrap();
        assert_eq!(result(&output, 0), Some(StepResult { stdout: "one", stderr: "two", status: 3 }));
        assert_eq!(result(&output, 1), Some(StepResult { stdout: "{}", stderr: "", status: 0 }));
        assert_eq!(result(&output, 2), None);
        let cut = output.split_once("@@ step 1 status").unwrap().0;
        assert_eq!(result(cut, 1), None);
    }
}
