//! A virtual machine, from its configuration to its end.

use std::process::ExitCode;

use crate::config::VmConfig;

/// Build the machine, run it, and say how it ended.
///
/// # Errors
/// Anything of the host's that fails.
pub fn run(_config: VmConfig) -> anyhow::Result<ExitCode> {
    anyhow::bail!("this build can't run a machine yet")
}
