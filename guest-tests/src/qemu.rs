//! The other lane: the same scenario under stock QEMU, with the device in a `mana-vmm serve` process beside it.
//!
//! One level of emulation less than nested runs, so that guests boot in seconds on a machine without KVM. The machine
//! looks as `mana-vmm boot` makes it: same places on the PCI buses, CPUs in the same order, and the agent's channel at
//! the same port, which QEMU's debug console writes to a file here. What differs is whose MSI-X table the guest
//! programs: it is QEMU's, and the device sees a vector when the guest unmasks it for the first time.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::Guest;
use crate::model::Topology;
use crate::relay::{self, TERMINAL};
use crate::scenario::Machine;
use crate::wake;

/// Exit codes of `mana-vmm boot`, which a run under QEMU gets too, so that scenarios expect the same.
mod code {
    pub const SUCCESS: i32 = 0;
    pub const PANIC: i32 = 2;
    pub const TIMEOUT: i32 = 3;
    pub const EXEC_FAILED: i32 = 5;
}

/// How long the server may take to listen, and to end after QEMU.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often we look whether a process has ended.
const CADENCE: Duration = Duration::from_millis(20);

/// The kernel's console is a file, and a guest that dies ends the run. HPET and i8042 are left out: TCG's HPET loses
/// interrupts on a busy host, after which the guest calibrates its clocks for ever. On such a host the guest would also
/// find its timer dead, and its TSC unstable and turn to the ACPI timer, which stands still after a suspend to RAM until
/// the agent has repaired what firmware leaves undone.
const APPEND: &str =
    "console=ttyS0 panic=-1 oops=panic mitigations=off random.trust_cpu=on no_timer_check tsc=reliable";

/// Finds a QEMU that has `vfio-user-pci`: the fetched one, else the system's.
///
/// # Errors
/// There is none.
pub fn find() -> Result<PathBuf> {
    const QEMU: &str = "qemu-system-x86_64";
    let binary = env::current_exe().unwrap_or_default();
    let folder = env::var_os("MANA_EMULATOR")
        .map(PathBuf::from)
        .or_else(|| binary.ancestors().map(|folder| folder.join("emulator")).find(|folder| folder.is_dir()));
    let fetched = folder.unwrap_or_else(|| "target/emulator".into()).join(QEMU);
    let has_vfio_user = |program: &PathBuf| {
        let help = Command::new(program).args(["-device", "vfio-user-pci,help"]).output();
        help.is_ok_and(|output| output.status.success())
    };
    [fetched, QEMU.into()].into_iter().find(has_vfio_user).context(
        "no QEMU here has vfio-user-pci (10.1 is the first that does): resources/fetch-emulator gets one",
    )
}

/// Why QEMU can't build `machine`, if it can't.
pub fn impossible(machine: &Machine) -> Option<&'static str> {
    let on_node_without_port = |device: &String| {
        let place = Place::split(device).0;
        place.node.is_some() && !place.port
    };
    let reason = "QEMU's host bridges of other nodes (pxb-pcie) take nothing but root ports";
    machine.devices.iter().any(on_node_without_port).then_some(reason)
}

/// What a run needs to know.
#[derive(Debug)]
pub struct Order<'a> {
    /// `mana-vmm`.
    pub vmm: &'a Path,
    /// QEMU.
    pub qemu: &'a Path,
    /// The guest.
    pub guest: &'a Guest,
    /// `--driver`.
    pub driver: Option<&'a Path>,
    /// KVM, else TCG.
    pub kvm: bool,
    /// What the scenario asks for.
    pub machine: &'a Machine,
    /// More of the kernel's command line.
    pub append: &'a str,
    /// What the guest is to do.
    pub exec: &'a str,
    /// Where files go.
    pub folder: &'a Path,
}

/// What came out.
#[derive(Debug)]
pub struct Output {
    /// As `mana-vmm boot` would have exited.
    pub code: i32,
    /// The guest's standard output.
    pub stdout: String,
    /// What the guest, QEMU and the server say on standard error.
    pub stderr: String,
}

/// Boots the guest and waits for its end.
///
/// # Errors
/// A program can't be started, or the server does not come up.
pub fn run(order: &Order<'_>) -> Result<Output> {
    // A socket's path has at most 107 bytes, and --report may name a deep folder.
    let folder = tempfile::tempdir().context("no folder for sockets")?;
    let sockets = (0..order.machine.devices.len()).map(|index| folder.path().join(index.to_string()));
    let sockets: Vec<PathBuf> = sockets.collect();
    let [control, serial, monitor] = ["control", "serial", "monitor"].map(|name| folder.path().join(name));
    write_initramfs(order)?;
    let arguments = server_arguments(order, &sockets, &control);
    let mut server = Process::start("server", order.vmm, &arguments, order.folder)?;
    await_sockets(&sockets, &mut server)?;
    let arguments = qemu_arguments(order, &sockets, &serial, &monitor)?;
    let mut qemu = Process::start("qemu", order.qemu, &arguments, order.folder)?;
    relay::start(&serial, &control);
    wake::start(&monitor);
    let deadline = Instant::now() + Duration::from_secs(order.machine.timeout);
    let mut ended_early = None;
    while qemu.ended()?.is_none() {
        if ended_early.is_none() {
            ended_early = server.ended()?;
        }
        if ended_early.is_some() || Instant::now() > deadline {
            break;
        }
        thread::sleep(CADENCE);
    }
    let ended = qemu.ended()?;
    let in_time = ended.is_some();
    if let Some(status) = ended.filter(|status| !status.success()) {
        bail!("QEMU ended with {status}: {}", qemu.said());
    }
    qemu.kill();
    let served = ended_early.map_or_else(|| server.await_end(PATIENCE), Ok)?;
    let text = |name: &str| {
        String::from_utf8_lossy(&fs::read(order.folder.join(name)).unwrap_or_default()).into_owned()
    };
    let frames = Frames::parse(&fs::read(order.folder.join("agent")).unwrap_or_default());
    let stderr = frames.stderr + &text("qemu.stderr") + &text("server.stderr");
    let server_failed = served.code().filter(|&code| code != code::SUCCESS);
    let code = match (server_failed, frames.status) {
        (Some(code), _) => code,
        _ if !in_time => code::TIMEOUT,
        _ if tells_of_trouble(&text("console")) => code::PANIC,
        (_, Some(0)) => code::SUCCESS,
        _ => code::EXEC_FAILED,
    };
    Ok(Output { code, stdout: frames.stdout, stderr })
}

/// `mana-vmm` makes the guest's initramfs, as for a boot of its own.
fn write_initramfs(order: &Order<'_>) -> Result<()> {
    let mut arguments = vec!["initramfs".to_owned()];
    let mut option = |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
    if let Some(driver) = order.driver {
        option("driver", &driver.display().to_string());
    }
    option("cpus", &order.machine.cpus);
    order.machine.netdevs.iter().for_each(|netdev| option("netdev", netdev));
    order.machine.devices.iter().for_each(|device| option("device", device));
    option("exec", order.exec);
    option("output", &order.folder.join("initrd").display().to_string());
    arguments.extend(order.guest.options());
    let output = Command::new(order.vmm).args(&arguments).output().context("start mana-vmm initramfs")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mana-vmm initramfs: {}", said.trim());
    Ok(())
}

fn server_arguments(order: &Order<'_>, sockets: &[PathBuf], control: &Path) -> Vec<String> {
    let mut arguments = vec!["serve".to_owned(), "--once".to_owned()];
    let mut option = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
    sockets.iter().for_each(|socket| option("socket", socket.display().to_string()));
    order.machine.netdevs.iter().for_each(|netdev| option("netdev", netdev.clone()));
    order.machine.devices.iter().for_each(|device| option("device", Place::split(device).1));
    order.machine.pcap_options(order.folder).into_iter().for_each(|pcap| option("pcap", pcap));
    option("control", control.display().to_string());
    option("trace", order.folder.join("trace.jsonl").display().to_string());
    arguments
}

fn await_sockets(sockets: &[PathBuf], server: &mut Process) -> Result<()> {
    let start = Instant::now();
    let is_socket = |path: &PathBuf| fs::metadata(path).is_ok_and(|file| file.file_type().is_socket());
    while !sockets.iter().all(is_socket) {
        if let Some(status) = server.ended()? {
            bail!("mana-vmm serve ended at once ({status}): {}", server.said());
        }
        ensure!(start.elapsed() < PATIENCE, "mana-vmm serve does not listen");
        thread::sleep(CADENCE);
    }
    Ok(())
}

fn qemu_arguments(
    order: &Order<'_>,
    sockets: &[PathBuf],
    serial: &Path,
    monitor: &Path,
) -> Result<Vec<String>> {
    let machine = order.machine;
    let topology = Topology::parse(&machine.cpus)?;
    let file = |name: &str| order.folder.join(name).display().to_string();
    let mut line = Line::default();
    // A function can be on a node only where QEMU is told of nodes.
    let tell_nodes =
        topology.nodes > 1 || machine.devices.iter().any(|device| Place::split(device).0.node.is_some());
    line.add("machine", if tell_nodes { PC.to_owned() } else { format!("{PC},memory-backend=ram0") });
    // Suspend to RAM: from that its clock wakes a guest, from suspend to idle it does not.
    line.add("global", "ICH9-LPC.disable_s3=0");
    line.add("accel", if order.kvm { "kvm" } else { "tcg,thread=multi" });
    line.add("cpu", if order.kvm { "host" } else { CPU });
    let Topology { cpus, threads, packages, nodes, .. } = topology;
    let cores = cpus / (threads * packages);
    line.add("smp", format!("cpus={cpus},sockets={packages},cores={cores},threads={threads}"));
    let mebibytes = mebibytes(&machine.memory)?;
    line.add("m", format!("{mebibytes}M"));
    for node in 0..nodes {
        let size = mebibytes / nodes as u64;
        // The device maps the guest's memory, so that it must be shared.
        line.add("object", format!("memory-backend-memfd,id=ram{node},size={size}M,share=on"));
        if tell_nodes {
            let (first, last) = (node * (cpus / nodes), (node + 1) * (cpus / nodes) - 1);
            line.add("numa", format!("node,nodeid={node},cpus={first}-{last},memdev=ram{node}"));
        }
    }
    line.flag("nodefaults");
    line.flag("no-user-config");
    line.flag("no-reboot");
    line.add("display", "none");
    line.add("kernel", order.guest.image().display().to_string());
    line.add("initrd", file("initrd"));
    line.add("append", format!("{APPEND} MANA_HOST={TERMINAL} {}", order.append));
    line.add("serial", format!("file:{}", file("console")));
    line.add("chardev", format!("socket,id=host,path={},server=on,wait=off", serial.display()));
    line.add("serial", "chardev:host");
    line.add("qmp", format!("unix:{},server=on,wait=off", monitor.display()));
    line.add("chardev", format!("file,id=agent,path={}", file("agent")));
    line.add("device", "isa-debugcon,iobase=0xe9,chardev=agent");
    add_functions(&mut line, machine, sockets)?;
    Ok(line.0)
}

/// A q35 without what the guest has no use for.
const PC: &str = "q35,hpet=off,smm=off,vmport=off,sata=off,smbus=off";
/// All that TCG can do, with Intel's way to tell threads from cores, which QEMU shows in full.
const CPU: &str = "max,vendor=GenuineIntel";

/// Functions where `mana-vmm boot` seats them: below a host bridge for each node that is asked for, device numbers
/// from 1 on, the n-th in slot n.
fn add_functions(line: &mut Line, machine: &Machine, sockets: &[PathBuf]) -> Result<()> {
    let places: Vec<Place> = machine.devices.iter().map(|device| Place::split(device).0).collect();
    let mut nodes: Vec<Option<usize>> = places.iter().map(|place| place.node).collect();
    nodes.push(None);
    nodes.sort_unstable();
    nodes.dedup();
    for (index, node) in nodes.iter().enumerate() {
        let Some(node) = node else { continue };
        let bus = 256 * index / nodes.len();
        line.add(
            "device",
            format!(
                "pxb-pcie,id=node{node},bus=pcie.0,addr={:#x},bus_nr={bus},numa_node={node}",
                0x10 + index
            ),
        );
    }
    for (index, (place, socket)) in places.iter().zip(sockets).enumerate() {
        let root = place.node.map_or("pcie.0".to_owned(), |node| format!("node{node}"));
        let before = places[..index].iter().filter(|other| other.node == place.node).count();
        let (mut bus, mut address) = (root, before + 1);
        if place.port {
            let (slot, port) = (index + 1, format!("port{index}"));
            line.add(
                "device",
                format!("pcie-root-port,id={port},bus={bus},addr={address:#x},slot={slot},chassis={slot}"),
            );
            (bus, address) = (port, 0);
        }
        let function = serde_json::json!({
            "driver": "vfio-user-pci",
            "bus": bus,
            "addr": format!("{address:x}"),
            "socket": { "type": "unix", "path": socket },
        });
        line.add("device", function.to_string());
    }
    Ok(())
}

/// Where a function sits, which is up to QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    node: Option<usize>,
    port: bool,
}

impl Place {
    /// The place in a `--device` value, and the value without it.
    fn split(device: &str) -> (Self, String) {
        let mut place = Self { node: None, port: true };
        let mut rest = Vec::new();
        for item in device.split(',') {
            match item.split_once('=') {
                Some(("node", node)) => place.node = node.parse().ok(),
                Some(("slot", slot)) => place.port = slot != "root",
                _ => rest.push(item),
            }
        }
        (place, rest.join(","))
    }
}

/// `512M`, `1G` or a number of MiB.
fn mebibytes(text: &str) -> Result<u64> {
    let (digits, shift) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 10),
        None => (text.trim_end_matches(['M', 'm']), 0),
    };
    let number: u64 = digits.parse().with_context(|| format!("memory = '{text}'"))?;
    Ok(number << shift)
}

/// A command line.
#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn add(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([format!("-{name}"), value.into()]);
    }

    fn flag(&mut self, name: &str) {
        self.0.push(format!("-{name}"));
    }
}

/// What the agent wrote to its channel: a kind byte, a 16-bit little-endian length, the payload, again and again.
#[derive(Debug, Default, PartialEq, Eq)]
struct Frames {
    stdout: String,
    stderr: String,
    status: Option<i32>,
}

impl Frames {
    /// Frames up to the first that was cut off.
    fn parse(mut bytes: &[u8]) -> Self {
        let (mut stdout, mut stderr, mut status) = (Vec::new(), Vec::new(), None);
        while let Some(([kind, low, high], rest)) = bytes.split_first_chunk() {
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            let Some((payload, rest)) = rest.split_at_checked(length) else { break };
            match kind {
                b'O' => stdout.extend(payload),
                b'E' => stderr.extend(payload),
                b'S' => status = std::str::from_utf8(payload).ok().and_then(|text| text.parse().ok()),
                // `L`, a line of the agent's log, stays in the file.
                _ => {}
            }
            bytes = rest;
        }
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { stdout: text(stdout), stderr: text(stderr), status }
    }
}

/// The kernel's words for its end: `panic()`'s message, or `Oops: 0002 [#1]`.
fn tells_of_trouble(console: &str) -> bool {
    console.lines().any(|line| {
        line.contains("Kernel panic - not syncing") || line.contains("Oops: ") && line.contains(" [#")
    })
}

/// A program that is killed when we lose interest in it.
struct Process {
    child: Child,
    stderr: PathBuf,
}

impl Process {
    /// Starts `program`; what it says goes to `NAME.stderr`, how it was called to `NAME.command`.
    fn start(name: &str, program: &Path, arguments: &[String], folder: &Path) -> Result<Self> {
        fs::write(folder.join(format!("{name}.command")), crate::run::shell_line(program, arguments))?;
        let stderr = folder.join(format!("{name}.stderr"));
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr)?)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        Ok(Self { child, stderr })
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    fn await_end(&mut self, patience: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(start.elapsed() < patience, "mana-vmm serve --once goes on though its client has left");
            thread::sleep(CADENCE);
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default().trim().to_owned()
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_frames() {
        let bytes = b"O\x03\0one L\x02\0{}E\x03\0twoO\x01\0!S\x01\x007O\x09\0cut";
        assert_eq!(Frames::parse(&bytes[..6]), Frames { stdout: "one".into(), ..Frames::default() });
        let bytes = [&bytes[..6], &bytes[7..]].concat();
        let parsed = Frames::parse(&bytes);
        assert_eq!(parsed, Frames { stdout: "one!".into(), stderr: "two".into(), status: Some(7) });
    }

    #[test]
    fn functions_sit_where_boot_seats_them() {
        let devices = ["mana,slot=root", "mana,node=0,max-msix=3", "mana,node=1,slot=root", "mana,node=1"];
        let machine = Machine { devices: devices.map(str::to_owned).to_vec(), ..Machine::default() };
        let sockets: Vec<PathBuf> = (0..4).map(|index| format!("/s{index}").into()).collect();
        let mut line = Line::default();
        add_functions(&mut line, &machine, &sockets).unwrap();
        let shown: Vec<&str> = line.0.iter().map(String::as_str).filter(|word| *word != "-device").collect();
        let function = |bus, addr, socket| {
            format!(
                r#"{{"driver":"vfio-user-pci","bus":"{bus}","addr":"{addr}","socket":{{"type":"unix","path":"/s{socket}"}}}}"#
            )
        };
        assert_eq!(
            shown,
            [
                "pxb-pcie,id=node0,bus=pcie.0,addr=0x11,bus_nr=85,numa_node=0",
                "pxb-pcie,id=node1,bus=pcie.0,addr=0x12,bus_nr=170,numa_node=1",
                &function("pcie.0", 1, 0),
                "pcie-root-port,id=port1,bus=node0,addr=0x1,slot=2,chassis=2",
                &function("port1", 0, 1),
                &function("node1", 1, 2),
                "pcie-root-port,id=port3,bus=node1,addr=0x2,slot=4,chassis=4",
                &function("port3", 0, 3),
            ]
        );
        assert!(impossible(&machine).is_some(), "QEMU refuses the third");
        assert_eq!(impossible(&Machine::default()), None);
        assert_eq!(Place::split("mana,node=0,max-msix=3,slot=root").1, "mana,max-msix=3");
    }

    #[test]
    fn sizes_and_troubles() {
        assert_eq!(mebibytes("512M").unwrap(), 512);
        assert_eq!(mebibytes("2G").unwrap(), 2048);
        assert!(mebibytes("lots").is_err());
        assert!(tells_of_trouble("x\n[    1.0] Oops: Oops: 0002 [#1] SMP\n"));
        assert!(!tells_of_trouble("oops=panic [#1]"));
    }
}
