//! Process 1: from an empty machine to a driver under test, then a command or a shell, then power-off.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::channel::{self, Kind};
use crate::verbs::coverage;
use crate::{function, net, sys};

/// How long output of a finished command's own children is waited for.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// What the VMM asked for.
#[derive(Debug, Default)]
pub struct Orders {
    /// Module files that come before the driver.
    pub modules: Vec<String>,
    /// The driver's files.
    pub driver: Vec<String>,
    /// Ask for addresses.
    pub dhcp: bool,
    /// The command, or none for a shell.
    pub exec: Option<String>,
}

impl Orders {
    /// Reads `/etc/mana-agent.conf`, whose keys stand in mana-vmm's module `initramfs`.
    pub fn read() -> Result<Self> {
        let file = "/etc/mana-agent.conf";
        let text = fs::read(file).with_context(|| file.to_owned())?;
        let orders: Value = serde_json::from_slice(&text).with_context(|| file.to_owned())?;
        let list = |key: &str| {
            let values = orders[key].as_array().into_iter().flatten();
            values.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        Ok(Self {
            modules: list("modules"),
            driver: list("driver"),
            dhcp: orders["dhcp"].as_bool().unwrap_or(false),
            exec: orders["exec"].as_str().map(str::to_owned),
        })
    }
}

/// Never returns: the end of process 1 is the end of the machine.
pub fn run() -> ! {
    if let Err(error) = live() {
        channel::log("failed", json!({ "error": format!("{error:#}") }));
    }
    let error = sys::power_off();
    channel::log("failed", json!({ "error": format!("power-off: {error}") }));
    loop {
        thread::park();
    }
}

fn live() -> Result<()> {
    mount_all();
    // SAFETY: process 1 has one thread here.
    unsafe { std::env::set_var("PATH", "/bin:/sbin") };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    channel::log("boot", json!({ "kernel": kernel.trim() }));
    let _ = sys::set_host_name("guest");
    let _ = net::set_up("lo");
    let orders = Orders::read()?;
    for file in &orders.modules {
        report_load("module", file, load_file(file));
    }
    start_driver(&orders);
    match &orders.exec {
        Some(command) => execute(command)?,
        None => shell()?,
    }
    Ok(())
}

fn mount_all() {
    let mounts = [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
        (c"tmpfs", c"/tmp"),
        (c"tmpfs", c"/run"),
        (c"debugfs", c"/sys/kernel/debug"),
    ];
    for (kind, target) in mounts {
        if let Err(error) = sys::mount(kind, target) {
            eprintln!("mount {target:?}: {error}");
        }
    }
}

/// Loads the driver and brings its links up. What fails is reported, and the command runs all the same.
fn start_driver(orders: &Orders) {
    let wants_coverage = coverage::is_wanted();
    if wants_coverage {
        note("coverage", coverage::start());
    }
    for file in &orders.driver {
        report_load("driver", file, load_file(file));
    }
    if wants_coverage {
        note("coverage", coverage::keep_names());
    }
    for function in function::all() {
        channel::log("probe", function.describe());
    }
    for interface in net::mana_interfaces().into_iter().chain(net::other_interfaces()) {
        let result = net::bring_up(&interface, orders.dhcp);
        let mut report = net::describe(&interface);
        if let Err(error) = result {
            report["error"] = format!("{error:#}").into();
        }
        channel::log("link", report);
    }
}

/// Tells of what can't be done.
fn note(stage: &str, result: Result<()>) {
    if let Err(error) = result {
        channel::log(stage, json!({ "error": format!("{error:#}") }));
    }
}

fn report_load(stage: &str, file: &str, result: std::io::Result<()>) {
    let module = module_name(file);
    let error = result.err().map(|error| error.to_string());
    channel::log(stage, json!({ "module": module, "error": error }));
}

/// The name under which the kernel has the module of `file`.
pub fn module_name(file: &str) -> String {
    Path::new(file).file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Loads one module file.
pub fn load_file(file: &str) -> std::io::Result<()> {
    sys::load_module(&File::open(file)?)
}

/// Runs `command` with its output on the agent channel.
fn execute(command: &str) -> Result<()> {
    let mut child = Command::new("/bin/busybox")
        .args(["sh", "-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("/bin/busybox sh")?;
    let (finished, pumps) = mpsc::channel();
    pump(Kind::Output, child.stdout.take(), finished.clone());
    pump(Kind::Error, child.stderr.take(), finished);
    let status = child.wait().context("wait for the command")?;
    // A child left in the background may hold the pipes open for ever.
    for _ in 0..2 {
        let _ = pumps.recv_timeout(LAST_OUTPUT);
    }
    channel::send(Kind::Status, exit_code(status).to_string().as_bytes());
    Ok(())
}

/// A shell's view of how a process ended: 128 and the signal's number if one killed it.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn pump(kind: Kind, pipe: Option<impl Read + Send + 'static>, finished: mpsc::Sender<()>) {
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        let mut pipe = pipe;
        while let Some(pipe) = &mut pipe {
            match pipe.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(length) => channel::send(kind, &buffer[..length]),
            }
        }
        let _ = finished.send(());
    });
}

/// A shell on the console, until it exits.
fn shell() -> Result<()> {
    let console = console()?;
    let mut command = Command::new("/bin/busybox");
    command.args(["sh", "-l"]).env("PS1", "guest:\\w# ").env("HOME", "/").env("TERM", "linux");
    command.stdin(console.try_clone()?).stdout(console.try_clone()?).stderr(console);
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(sys::take_terminal) };
    command.status().context("/bin/busybox sh").map(drop)
}

/// The terminal behind /dev/console, which itself can't be the terminal of a session.
fn console() -> Result<File> {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let name = active.split_whitespace().last().unwrap_or("console");
    let path = Path::new("/dev").join(name);
    OpenOptions::new().read(true).write(true).open(&path).with_context(|| path.display().to_string())
}
