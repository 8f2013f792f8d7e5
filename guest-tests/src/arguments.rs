//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::model::Generation;
use crate::partition::Partition;

/// Test guest drivers: real kernels against the simulated MANA host.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// Do something else than run scenarios.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Scenarios to run, by name or its beginning; all if none is named.
    pub scenario: Vec<String>,
    /// Guests to run them on.
    #[arg(long, value_delimiter = ',', default_values = ["6.1", "6.12", "newest"])]
    pub guest: Vec<String>,
    /// A kernel (bzImage) of one's own in place of guests; its version says which model its driver follows.
    #[arg(long, value_name = "FILE", requires = "modules", conflicts_with = "guest")]
    pub kernel: Option<PathBuf>,
    /// The kernel's lib/modules/VERSION.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// Where the guest's CPUs are: in mana-vmm itself, or in QEMU, which has the device over vfio-user.
    #[arg(long, value_enum, default_value = "built-in")]
    pub vmm: Vmm,
    /// A folder with the mana.ko to test in place of the guest's own.
    #[arg(long, value_name = "DIR")]
    pub driver: Option<PathBuf>,
    /// The kernel by whose driver's rules vectors and queues are judged [default: that of the driver].
    #[arg(long, value_enum, value_name = "SERIES")]
    pub rules: Option<Generation>,
    /// Where reports go, and the files of failed runs [default: target/guest-tests].
    #[arg(long, value_name = "DIR", default_value = "target/guest-tests", hide_default_value = true)]
    pub report: PathBuf,
    /// Name the scenarios and stop.
    #[arg(long)]
    pub list: bool,
    /// Machines that run side by side [default: the host's CPUs].
    #[arg(long)]
    pub jobs: Option<usize>,
    /// Passed on to mana-vmm; under QEMU kvm means KVM, everything else TCG.
    #[arg(long, default_value = "auto")]
    pub accel: String,
    /// Folder of the scenarios [default: the project's].
    #[arg(long, value_name = "DIR", hide = true, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios"))]
    pub scenarios: PathBuf,
    /// All combinations and all scenarios, which may take hours.
    #[arg(long)]
    pub full: bool,
    /// Only this part of all runs, count:PART/PARTS (in turn) or hash:PART/PARTS (by name), as cargo-nextest splits
    /// tests; PART/PARTS means count.
    #[arg(long, value_name = "PART")]
    pub partition: Option<Partition>,
    /// Run everything so often, whatever the verdict.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeat: usize,
    /// Find out which functions of mana.ko are executed (the kernel's function tracer).
    #[arg(long)]
    pub coverage: bool,
    /// Keep the files of passed runs too.
    #[arg(long)]
    pub keep: bool,
}

/// What else there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make one report of those of several parts.
    Merge {
        /// Report folders.
        #[arg(required = true)]
        part: Vec<PathBuf>,
        /// Where the whole report goes.
        #[arg(long, short, value_name = "DIR")]
        output: PathBuf,
    },
}

/// `--vmm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Vmm {
    /// `mana-vmm boot`.
    BuiltIn,
    /// QEMU and `mana-vmm serve`.
    Qemu,
}
