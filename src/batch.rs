//! `mana-vmm batch`: several boots one after another, in one emulated machine where KVM runs no guests here.
//!
//! Level 1 takes seconds to come up, and longer than many a guest's test takes: one of them can serve many guests.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::cli::{self, Cli};
use crate::config::{Accel, VmConfig};
use crate::{accel, nested};

/// One boot, as a line of the file says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The options of `mana-vmm boot`.
    pub options: Vec<String>,
    /// A file for its standard output.
    pub stdout: PathBuf,
    /// A file for its standard error.
    pub stderr: PathBuf,
    /// A file for its exit code in decimal; it is there when the boot has ended, and never there for one that was not
    /// begun.
    pub exit: PathBuf,
}

impl Entry {
    fn config(&self) -> Result<VmConfig> {
        let words = ["mana-vmm", "boot"].into_iter().chain(self.options.iter().map(String::as_str));
        let cli = Cli::try_parse_from(words)?;
        let cli::Command::Boot(boot) = cli.command else { unreachable!("the second word says boot") };
        Ok(boot.into_config()?)
    }

    fn end(&self, code: u8) -> Result<()> {
        // Whoever waits for the file must not find it empty.
        let unfinished = self.exit.with_extension("part");
        fs::write(&unfinished, code.to_string())
            .and_then(|()| fs::rename(&unfinished, &self.exit))
            .with_context(|| format!("can't write {}", self.exit.display()))
    }
}

/// Boots what the lines of the file at `path` say.
///
/// # Errors
/// The file makes no sense, an option is wrong, or no machine can be had: nothing was booted.
pub fn run(path: &Path) -> Result<ExitCode> {
    let text = fs::read_to_string(path).with_context(|| format!("batch {}", path.display()))?;
    let line = |(number, line): (usize, &str)| -> Result<(Entry, VmConfig)> {
        let place = || format!("batch {}, line {}", path.display(), number + 1);
        let entry: Entry = serde_json::from_str(line).with_context(place)?;
        let config = entry.config().with_context(place)?;
        Ok((entry, config))
    };
    let boots = text.lines().enumerate().map(line).collect::<Result<Vec<_>>>()?;
    let nested = boots.iter().filter(|(_, config)| config.accel == Accel::Nested).count();
    ensure!(nested == 0 || nested == boots.len(), "batch: --accel nested is for all or for none");
    let auto = boots.iter().any(|(_, config)| config.accel == Accel::Auto);
    if nested > 0 || auto && accel::kvm_runs_guests().is_err() {
        return run_nested(boots);
    }
    for (entry, _) in &boots {
        run_here(entry)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn run_nested(boots: Vec<(Entry, VmConfig)>) -> Result<ExitCode> {
    let (entries, configs): (Vec<_>, Vec<_>) = boots.into_iter().unzip();
    let output = |entry: &Entry| [entry.stdout.clone(), entry.stderr.clone()];
    let outputs: Vec<_> = entries.iter().map(output).collect();
    nested::run_batch(configs.into_iter().zip(outputs).collect(), |index, code| {
        let entry = &entries[index];
        match code {
            Ok(code) => entry.end(code),
            Err(error) => {
                let said = File::options().append(true).create(true).open(&entry.stderr);
                let said = said.and_then(|mut file| writeln!(file, "mana-vmm: {error:#}"));
                said.with_context(|| format!("can't write {}", entry.stderr.display()))?;
                entry.end(1)
            }
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A process each: none outlives another's machine.
fn run_here(entry: &Entry) -> Result<()> {
    let create = |path: &Path| File::create(path).with_context(|| format!("can't write {}", path.display()));
    let program = std::env::current_exe().context("can't tell where mana-vmm itself lies")?;
    let status = Command::new(program)
        .arg("boot")
        .args(&entry.options)
        .stdin(Stdio::null())
        .stdout(create(&entry.stdout)?)
        .stderr(create(&entry.stderr)?)
        .status()
        .context("can't start mana-vmm")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    entry.end(code.with_context(|| format!("mana-vmm was killed: {status}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_line_is_named_and_nothing_is_booted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("batch");
        let entry = |options: &[&str]| Entry {
            options: options.iter().map(|&option| option.to_owned()).collect(),
            stdout: folder.path().join("stdout"),
            stderr: folder.path().join("stderr"),
            exit: folder.path().join("exit"),
        };
        let wrong = entry(&["--kernel", "/proc/self/exe", "--cpus", "0"]);
        let right = entry(&["--kernel", "/proc/self/exe"]);
        let text = [&right, &wrong].map(|entry| serde_json::to_string(entry).unwrap()).join("\n");
        fs::write(&file, text).unwrap();
        let error = format!("{:#}", run(&file).unwrap_err());
        assert!(error.contains("line 2: --cpus"), "{error}");
        fs::write(&file, "{}").unwrap();
        assert!(format!("{:#}", run(&file).unwrap_err()).contains("line 1: missing field `options`"));
        assert!(!folder.path().join("exit").exists());
    }
}
