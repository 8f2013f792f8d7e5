//! `mana-vmm`: parse the command line, do it, turn the outcome into an exit code.

use std::process::ExitCode;

use clap::Parser;
use mana_vmm::cli::{Cli, Command};
use mana_vmm::vm;

/// Bad arguments or a host error.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    mana_vmm::logging::init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and are no failures.
            let code = if error.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS };
            let _ = error.print();
            return code;
        }
    };
    run(cli).unwrap_or_else(|error| {
        eprintln!("mana-vmm: {error:#}");
        ExitCode::from(FAILED)
    })
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Boot(args) => vm::run(&args.into_config()?),
    }
}
