//! Level 1 of a nested run: this program as the init of the emulated machine.
//!
//! It loads KVM, then runs jobs as level 0 orders them (see [`crate::nested::link`]), each in a process of its own, and
//! sends what they write. Level 1 ends with a power-off, or with a reboot that ends QEMU when anything here fails.

mod relay;
mod stage;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, bail};
use rustix::system::RebootCommand;

use crate::nested::job::{Job, ORDERS, Orders, Task};
use crate::nested::link::{FIRST_FILE, MAX_PAYLOAD, Order, Report, STDERR, STDOUT};
use crate::{accel, vm};

/// Set by level 0 on the kernel command line, from where the kernel hands it to init.
const INIT_VARIABLE: &str = "MANA_LEVEL1";
/// Index of the job that a child of init is to run.
const JOB_VARIABLE: &str = "MANA_LEVEL1_JOB";
/// The virtio-serial port with number 1 (`virtserialport,nr=1`).
const LINK: &str = "/dev/vport0p1";

/// Is this process the init of a level 1?
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::var_os(INIT_VARIABLE).is_some()
}

/// Runs as init; never returns.
pub fn init() -> ! {
    let command = match serve() {
        Ok(()) => RebootCommand::PowerOff,
        Err(error) => {
            // The console's last words are what level 0 shows.
            eprintln!("mana-vmm as level 1's init: {error:#}");
            RebootCommand::Restart
        }
    };
    let _ = rustix::system::reboot(command);
    panic!("level 1 can't end");
}

/// Runs the job that this process was started for, if it was.
pub fn run_job() -> Option<Result<ExitCode>> {
    let index = std::env::var(JOB_VARIABLE).ok()?;
    Some(job(&index).and_then(|job| match job.task {
        Task::Boot(config) => vm::run(&config),
        Task::Probe => Ok(accel::kvm_runs_guests().map(|()| ExitCode::SUCCESS)?),
        Task::Command { argv, .. } => bail!("{argv:?} is not for this program to run"),
    }))
}

fn job(index: &str) -> Result<Job> {
    let index: usize = index.parse().context("job number")?;
    let mut jobs = read_orders()?.jobs;
    if index >= jobs.len() {
        bail!("there is no job {index}");
    }
    Ok(jobs.swap_remove(index))
}

fn read_orders() -> Result<Orders> {
    let text = std::fs::read(ORDERS).with_context(|| format!("can't read {ORDERS}"))?;
    serde_json::from_slice(&text).with_context(|| format!("{ORDERS} is not level 1's orders"))
}

/// Sends frames from several threads.
type Link = Arc<Mutex<File>>;

fn serve() -> Result<()> {
    stage::mount_all()?;
    let link =
        OpenOptions::new().read(true).write(true).open(LINK).with_context(|| format!("can't open {LINK}"))?;
    let mut incoming = link.try_clone()?;
    let link = Arc::new(Mutex::new(link));
    match prepare() {
        Ok(orders) => {
            send(&link, &Report::Ready)?;
            serve_orders(&orders, &link, &mut incoming)
        }
        Err(error) => {
            send(&link, &Report::Failed(format!("{error:#}")))?;
            // Level 0 ends the machine.
            Order::read(&mut incoming)?;
            Ok(())
        }
    }
}

fn prepare() -> Result<Orders> {
    let orders = read_orders()?;
    stage::await_steady_clock();
    for module in &orders.modules {
        stage::load_module(module)?;
    }
    Ok(orders)
}

/// Until level 0 says to power off.
fn serve_orders(orders: &Orders, link: &Link, incoming: &mut File) -> Result<()> {
    let mut input = None;
    let mut control = None;
    loop {
        match Order::read(incoming).context("the link to level 0 broke")? {
            Order::Run(index) => {
                let job =
                    orders.jobs.get(index as usize).context("level 0 ordered a job that is not there")?;
                let running = start(index, job, link)?;
                control.clone_from(&job.control);
                input = Some(running.input);
                let link = Arc::clone(link);
                thread::spawn(move || {
                    let code = running.rest.wait();
                    send(
                        &link,
                        &code.map_or_else(|error| Report::Failed(format!("{error:#}")), Report::Ended),
                    )
                });
            }
            // A job that is over takes no input any more.
            Order::Input(bytes) => drop(input.as_mut().map(|input: &mut File| input.write_all(&bytes))),
            Order::InputEnd => input = None,
            Order::Control(number, request) => relay::pass_on(number, request, control.clone(), link),
            Order::Fetch(number, path) => relay::send_file(number, path, link),
            Order::PowerOff => return Ok(()),
        }
    }
}

/// A job's process and the threads that send its output.
struct Running {
    child: std::process::Child,
    forwarders: Vec<JoinHandle<()>>,
    /// Keep the FIFOs open, so that their readers see no end before the job is over.
    fifos: Vec<File>,
}

/// What [`start`] gives back.
struct Started {
    /// Where the job's standard input comes from.
    input: File,
    rest: Running,
}

fn start(index: u32, job: &Job, link: &Link) -> Result<Started> {
    let mut fifos = Vec::new();
    let mut forwarders = Vec::new();
    for (stream, path) in (FIRST_FILE..).zip(&job.outputs) {
        let fifo = stage::make_fifo(path)?;
        forwarders.push(forward(stream, File::open(path)?, link));
        fifos.push(fifo);
    }
    if let Some(folder) = job.control.as_deref().and_then(Path::parent) {
        std::fs::create_dir_all(folder)?;
    }
    let (input, its_input) = if job.terminal { stage::raw_pty()? } else { stage::pipe()? };
    let mut command = match &job.task {
        Task::Command { argv, .. } => {
            let (program, arguments) = argv.split_first().context("a job without a program")?;
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
        Task::Boot(_) | Task::Probe => {
            let mut command = Command::new("/init");
            command.env(JOB_VARIABLE, index.to_string());
            command
        }
    };
    let mut child = command
        .env_remove(INIT_VARIABLE)
        .envs(job.log.iter().map(|value| ("MANA_LOG", value)))
        .stdin(its_input)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("can't start the job")?;
    if let Some(stdout) = child.stdout.take() {
        forwarders.push(forward(STDOUT, stdout, link));
    }
    if let Some(stderr) = child.stderr.take() {
        forwarders.push(forward(STDERR, stderr, link));
    }
    Ok(Started { input, rest: Running { child, forwarders, fifos } })
}

impl Running {
    /// Waits for the job's end and until all its output is sent.
    fn wait(mut self) -> Result<u8> {
        let status = self.child.wait().context("can't wait for the job")?;
        drop(self.fifos);
        for forwarder in self.forwarders {
            let _ = forwarder.join();
        }
        exit_code(status)
    }
}

fn exit_code(status: ExitStatus) -> Result<u8> {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(code.to_le_bytes()[0]),
        (None, signal) => bail!("mana-vmm was killed there by signal {}", signal.unwrap_or_default()),
    }
}

fn forward(stream: u32, mut from: impl Read + Send + 'static, link: &Link) -> JoinHandle<()> {
    let link = Arc::clone(link);
    thread::spawn(move || {
        let mut bytes = vec![0; MAX_PAYLOAD];
        while let Ok(count @ 1..) = retry(|| from.read(&mut bytes)) {
            if send(&link, &Report::Output { stream, bytes: bytes[..count].to_vec() }).is_err() {
                return;
            }
        }
    })
}

fn retry(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn send(link: &Link, report: &Report) -> io::Result<()> {
    report.write(&mut *link.lock().unwrap_or_else(PoisonError::into_inner))
}
