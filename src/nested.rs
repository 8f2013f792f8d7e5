//! A boot where `/dev/kvm` can't: the same VMM in a machine that QEMU emulates.
//!
//! Level 0 is this machine, level 1 the emulated one, whose init is this very program (see [`crate::level1`]); the
//! guest is level 2. Level 1 gets everything in its initramfs and reports over one virtio-serial port (see [`link`]).
//! What a job writes there appears here as it is written.

pub mod emulator;
pub mod job;
pub mod link;
mod relay;
mod terminal;

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, ExitCode};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use thiserror::Error;

use crate::config::{DiskConfig, VmConfig};
use crate::control::ControlSocket;
use crate::initramfs::modules::ModuleFolder;
use emulator::{Emulator, Machine};
use job::{Parcel, Task};
use link::{FIRST_FILE, Order, Report, STDERR, STDOUT};
use relay::Relay;

/// For level 1 to come up: a few seconds, on a loaded machine many.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// What a job with a time-out gets beyond it, to end by itself: level 0 steps in only where level 1 hangs.
const SLACK: Duration = Duration::from_secs(30);
/// For level 1 to turn itself off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(5);
/// Exit code of a boot that took too long.
const TIMED_OUT: u8 = 3;

/// Why a nested run can't be had, or broke.
#[derive(Debug, Error)]
pub enum Trouble {
    /// No QEMU.
    #[error("nested runs need QEMU 11 or newer, and there is none: resources/fetch-emulator gets it")]
    NoEmulator,
    /// QEMU is too old.
    #[error(
        "nested runs need QEMU 11 or newer, and {} is {version}: resources/fetch-emulator gets one",
        program.display()
    )]
    OldEmulator {
        /// The newest that there is.
        program: PathBuf,
        /// Its version.
        version: String,
    },
    /// No kernel for level 1.
    #[error("nested runs need a kernel for level 1 in {}: resources/fetch-emulator gets it", .0.display())]
    NoKernel(PathBuf),
    /// Level 1 ended before the job did: it oopsed, or QEMU failed.
    #[error("the emulated machine (level 1) died; the guest is not to blame. Its last words:{0}")]
    Died(String),
    /// Level 1 did not come up.
    #[error("the emulated machine (level 1) did not come up within {} s. Its last words:{console}", patience.as_secs())]
    TooSlow {
        /// How long was waited.
        patience: Duration,
        /// The end of its console.
        console: String,
    },
    /// Level 1 came up and found something wrong.
    #[error("the emulated machine (level 1) can't run guests: {0}")]
    Unfit(String),
}

/// Boots one machine nested; the result is that of [`crate::vm::run`] there.
///
/// # Errors
/// [`Trouble`], or one sentence for what can't be read or written here.
pub fn run(config: VmConfig) -> Result<ExitCode> {
    Ok(ExitCode::from(run_one(Parcel::boot(0, config, terminal::is_terminal())?)?))
}

/// Runs one job in a level 1 of its own; its exit code.
fn run_one(parcel: Parcel) -> Result<u8> {
    let parcels = [parcel];
    let mut level1 = Level1::start(&parcels)?;
    let code = level1.run(0, &parcels[0])?;
    level1.power_off();
    Ok(code)
}

/// Boots machines one after another in one level 1, each with files for its standard output and standard error, and
/// tells the exit code of each as it ends. After one that level 1 does not survive, no further one is run.
///
/// # Errors
/// [`Trouble`], or one sentence for what can't be read or written here: none was run.
pub fn run_batch(
    machines: Vec<(VmConfig, [PathBuf; 2])>,
    mut ended: impl FnMut(usize, Result<u8>) -> Result<()>,
) -> Result<()> {
    let numbered = machines.into_iter().enumerate();
    let parcel = |(index, (config, output))| {
        let mut parcel = Parcel::boot(index, config, false)?;
        parcel.own_output = Some(output);
        Ok(parcel)
    };
    let parcels = numbered.map(parcel).collect::<Result<Vec<_>>>()?;
    let mut level1 = Level1::start(&parcels)?;
    for (index, parcel) in parcels.iter().enumerate() {
        let code = level1.run(index as u32, parcel);
        let go_on = code.is_ok() && !level1.silent;
        ended(index, code)?;
        if !go_on {
            return Ok(());
        }
    }
    level1.power_off();
    Ok(())
}

/// Starts level 1 and runs the probe of [`crate::accel`] in it.
///
/// # Errors
/// [`Trouble`], or one sentence for what can't be read or written here.
pub fn probe() -> Result<()> {
    let code = run_one(Parcel::probe())?;
    // The reason came on the standard error.
    if code == 0 { Ok(()) } else { Err(Trouble::Unfit("its KVM fails the probe".to_owned()).into()) }
}

/// Runs a program in a level 1, with KVM to use; its exit code.
///
/// # Errors
/// [`Trouble`], or one sentence for what can't be read or written here.
pub fn run_command(argv: Vec<String>, memory: u64, take: &[PathBuf]) -> Result<ExitCode> {
    Ok(ExitCode::from(run_one(Parcel::command(argv, memory, take)?)?))
}

/// A level 1 that is up.
struct Level1 {
    machine: Machine,
    orders: Arc<Mutex<ChildStdin>>,
    reports: Receiver<io::Result<Report>>,
    /// Whether standard input is being forwarded.
    forwarding: bool,
    /// It did not answer in time.
    silent: bool,
}

impl Level1 {
    fn start(parcels: &[Parcel]) -> Result<Self> {
        let emulator = Emulator::find()?;
        let disks = common_disks(parcels)?;
        let wanted: &[&str] =
            if disks.is_empty() { &["kvm_amd"] } else { &["virtio_pci", "virtio_blk", "kvm_amd"] };
        let modules = ModuleFolder::open(&emulator.modules)?.closure(wanted)?;
        let initramfs =
            tempfile::tempfile().context("can't make a temporary file for level 1's initramfs")?;
        job::pack(initramfs.try_clone()?, &modules, parcels)?;
        let memory = parcels.iter().map(|parcel| match &parcel.job.task {
            // It may be saved there before it comes here.
            Task::Boot(config) if config.control.is_some() => 2 * config.memory,
            Task::Boot(config) => config.memory,
            Task::Command { memory, .. } => *memory,
            Task::Probe => 0,
        });
        let mut machine = emulator.start(&initramfs, memory.max().unwrap_or_default(), disks)?;
        let (orders, from) = machine.take_link()?;
        let (tell, reports) = mpsc::sync_channel(64);
        thread::spawn(move || {
            let mut from = from;
            loop {
                let report = Report::read(&mut from);
                let last = report.is_err();
                if tell.send(report).is_err() || last {
                    return;
                }
            }
        });
        let mut level1 =
            Self { machine, orders: Arc::new(Mutex::new(orders)), reports, forwarding: false, silent: false };
        match level1.next(Some(Instant::now() + BOOT_PATIENCE))? {
            Some(Report::Ready) => Ok(level1),
            Some(Report::Failed(reason)) => Err(Trouble::Unfit(reason).into()),
            Some(other) => Err(Trouble::Unfit(format!("it sent {other:?} first")).into()),
            None => Err(Trouble::TooSlow { patience: BOOT_PATIENCE, console: level1.machine.end() }.into()),
        }
    }

    /// Runs a job to its end and passes its output on; its exit code.
    fn run(&mut self, index: u32, parcel: &Parcel) -> Result<u8> {
        let mut outputs = Outputs::open(parcel)?;
        self.order(&Order::Run(index))?;
        let _raw = parcel.job.terminal.then(terminal::Raw::new).transpose()?;
        if parcel.own_output.is_none() {
            self.forward_input();
        }
        let relay = Arc::new(Relay::new(Arc::clone(&self.orders)));
        let socket = parcel.control.as_deref().map(|path| ControlSocket::open(path, &relay));
        let _socket = socket.transpose()?;
        let timeout = match &parcel.job.task {
            Task::Boot(config) => config.timeout,
            Task::Command { .. } => None,
            Task::Probe => Some(BOOT_PATIENCE),
        };
        let deadline = timeout.map(|timeout| Instant::now() + timeout + SLACK);
        loop {
            match self.next(deadline)? {
                Some(Report::Output { stream, bytes }) => outputs.write(stream, &bytes)?,
                Some(Report::Ended(code)) => return Ok(code),
                Some(Report::Failed(reason)) => return Err(Trouble::Unfit(reason).into()),
                Some(Report::Ready) => {}
                Some(Report::Answer(number, part)) => relay.answered(number, &part),
                Some(Report::FilePart { number, offset, bytes }) => relay.file_part(number, offset, &bytes),
                None => {
                    self.silent = true;
                    outputs.write(STDERR, b"mana-vmm: the emulated machine does not answer; time is up\n")?;
                    return Ok(TIMED_OUT);
                }
            }
        }
    }

    /// The next report; `None` when the deadline passes first.
    fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Report>> {
        let report = match deadline {
            Some(deadline) => self.reports.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => self.reports.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match report {
            Ok(Ok(report)) => Ok(Some(report)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Ok(Err(error)) if error.kind() == ErrorKind::InvalidData => {
                Err(error).context("level 1 sent nonsense")
            }
            Ok(Err(_)) | Err(RecvTimeoutError::Disconnected) => Err(Trouble::Died(self.machine.end()).into()),
        }
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let sent = order.write(&mut *lock(&self.orders));
        sent.map_err(|_| Trouble::Died(self.machine.end()).into())
    }

    /// From the first job on, what comes in here goes to the job that runs.
    fn forward_input(&mut self) {
        if std::mem::replace(&mut self.forwarding, true) {
            return;
        }
        let orders = Arc::clone(&self.orders);
        // It ends with the process: nothing wakes a thread that reads a terminal.
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let order = match io::stdin().lock().read(&mut bytes) {
                    Ok(0) => Order::InputEnd,
                    Ok(count) => Order::Input(bytes[..count].to_vec()),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => Order::InputEnd,
                };
                let sent = order.write(&mut *lock(&orders));
                if order == Order::InputEnd || sent.is_err() {
                    return;
                }
            }
        });
    }

    /// Turns level 1 off, the hard way if it takes its time.
    fn power_off(mut self) {
        let deadline = Instant::now() + POWER_OFF_PATIENCE;
        if self.order(&Order::PowerOff).is_ok() {
            while matches!(self.next(Some(deadline)), Ok(Some(_))) {}
        }
    }
}

/// The disks of level 1, which all jobs must share: their names go by their order.
fn common_disks(parcels: &[Parcel]) -> Result<&[DiskConfig]> {
    let disks = parcels.first().map_or(&[][..], |parcel| &parcel.disks);
    ensure!(
        parcels.iter().all(|parcel| parcel.disks == disks),
        "--disk: machines that share a nested run need the same"
    );
    Ok(disks)
}

fn lock(orders: &Mutex<ChildStdin>) -> std::sync::MutexGuard<'_, ChildStdin> {
    orders.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Where a job's streams end here.
struct Outputs {
    /// Standard output and standard error.
    own: Option<[File; 2]>,
    files: Vec<File>,
}

impl Outputs {
    fn open(parcel: &Parcel) -> Result<Self> {
        let open = |(option, path): &(&str, PathBuf)| {
            File::create(path)
                .with_context(|| format!("{option} {}: the file can't be written", path.display()))
        };
        let own = match &parcel.own_output {
            Some([stdout, stderr]) => {
                Some([open(&("stdout", stdout.clone()))?, open(&("stderr", stderr.clone()))?])
            }
            None => None,
        };
        Ok(Self { own, files: parcel.files.iter().map(open).collect::<Result<_>>()? })
    }

    fn write(&mut self, stream: u32, bytes: &[u8]) -> Result<()> {
        let written = match (stream, &mut self.own) {
            (STDOUT, Some([file, _])) | (STDERR, Some([_, file])) => file.write_all(bytes),
            (STDOUT, None) => io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()),
            (STDERR, None) => io::stderr().write_all(bytes),
            _ => match self.files.get_mut((stream - FIRST_FILE) as usize) {
                Some(file) => file.write_all(bytes),
                None => Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!("stream {stream} is none of the job's"),
                )),
            },
        };
        written.context("can't write the guest's output")
    }
}
