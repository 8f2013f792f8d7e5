//! `mana-vmm`: parse the command line, do it, turn the outcome into an exit code.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use mana_vmm::cli::{Cli, Command};
use mana_vmm::config::{Accel, VmConfig};
use mana_vmm::{accel, batch, check, control, initramfs, level1, nested, peer, serve, trace, vm};

/// Bad arguments or a host error.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    if level1::is_init() {
        level1::init();
    }
    mana_vmm::logging::init();
    if let Some(outcome) = level1::run_job() {
        return outcome.unwrap_or_else(fail);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and are no failures.
            let code = if error.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS };
            let _ = error.print();
            return code;
        }
    };
    run(cli).unwrap_or_else(fail)
}

/// Here if KVM runs guests, else nested, unless `--accel` says which.
fn boot(config: VmConfig) -> anyhow::Result<ExitCode> {
    if config.accel == Accel::Nested {
        return nested::run(config);
    }
    match accel::kvm_runs_guests() {
        Ok(()) => vm::run(&config),
        Err(reason) if config.accel == Accel::Kvm => {
            anyhow::bail!("--accel kvm: {reason}; --accel nested needs no KVM")
        }
        Err(reason) => {
            eprintln!("mana-vmm: runs nested, in an emulated machine: {reason}");
            nested::run(config)
        }
    }
}

fn write_initramfs(output: &Path, config: &VmConfig) -> anyhow::Result<ExitCode> {
    std::fs::write(output, initramfs::build(config)?)
        .with_context(|| format!("--output: can't write {}", output.display()))?;
    Ok(ExitCode::SUCCESS)
}

#[expect(clippy::needless_pass_by_value, reason = "the shape that unwrap_or_else wants")]
fn fail(error: anyhow::Error) -> ExitCode {
    eprintln!("mana-vmm: {error:#}");
    ExitCode::from(FAILED)
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Boot(args) => boot(args.into_config()?),
        Command::Batch { file } => batch::run(&file),
        Command::Serve(args) => serve::run(&args.into_config()?),
        Command::Peer(args) => peer::run(&args.into_config()),
        Command::Ctl { socket, words } => control::ask(&socket, &words),
        Command::Trace(args) => trace::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Initramfs { output, boot } => write_initramfs(&output, &boot.into_config()?),
        Command::Level1(args) => nested::run_command(args.argv.clone(), args.memory()?, &args.take),
        Command::Check { deep } => check::run(deep),
    }
}
