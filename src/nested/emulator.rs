//! The emulated machine: QEMU's TCG with nested SVM, and Debian's cloud kernel as level 1's.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::Trouble;
use crate::config::DiskConfig;
use crate::places;

/// The program.
const QEMU: &str = "qemu-system-x86_64";
/// Older TCG breaks under nested SVM: level 1 oopses, or one of the levels ends in a triple fault.
const OLDEST: u32 = 11;
/// Series of the guest whose kernel level 1 has. It has all of virtio built in.
pub const LEVEL1: &str = "6.12";
/// Bytes of level 1's memory beyond its guest's: its kernel, the VMM, and twice what the initramfs holds.
const OVERHEAD: u64 = 512 << 20;
/// Lines of level 1's console that are kept, for the report of its death.
const KEPT_LINES: usize = 40;

/// Level 1's kernel is quiet, believes its clock, and dies visibly instead of limping on.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr tsc=reliable no_timer_check \
     random.trust_cpu=on cryptomgr.notests audit=0 apparmor=0 MANA_LEVEL1=1";

/// What nested runs need of this machine, found.
#[derive(Debug)]
pub struct Emulator {
    /// QEMU's program.
    pub program: PathBuf,
    /// Its version.
    pub version: String,
    /// Level 1's kernel.
    pub kernel: PathBuf,
    /// Its `lib/modules/VERSION`.
    pub modules: PathBuf,
}

impl Emulator {
    /// Looks for a QEMU that is new enough and for level 1's kernel.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    pub fn find() -> Result<Self, Trouble> {
        let fetched = places::emulator().join(QEMU);
        let found =
            [PathBuf::from(QEMU), fetched].map(|program| version(&program).map(|version| (program, version)));
        let newest = found.iter().flatten().max_by_key(|(_, version)| major(version));
        let (program, version) = match newest {
            Some(found) if major(&found.1) >= OLDEST => found.clone(),
            Some((program, version)) => {
                return Err(Trouble::OldEmulator { program: program.clone(), version: version.clone() });
            }
            None => return Err(Trouble::NoEmulator),
        };
        let guest = places::guests().join(LEVEL1);
        let kernel = guest.join("vmlinuz");
        let name = std::fs::read_to_string(guest.join("version")).unwrap_or_default();
        let modules = guest.join("lib/modules").join(name.trim());
        if !kernel.is_file() || name.is_empty() || !modules.is_dir() {
            return Err(Trouble::NoKernel(guest));
        }
        Ok(Self { program, version, kernel, modules })
    }

    /// Starts a machine for guests of `memory` bytes, with `disks` as /dev/vda and so on.
    ///
    /// # Errors
    /// When QEMU can't be started.
    pub fn start(&self, initramfs: &File, memory: u64, disks: &[DiskConfig]) -> Result<Machine> {
        let size = initramfs.metadata().context("can't tell the initramfs's size")?.len();
        let megabytes = (memory + OVERHEAD + 2 * size).div_ceil(1 << 20);
        // The file has no name; here it has one for as long as we live.
        let initramfs = format!("/proc/{}/fd/{}", std::process::id(), initramfs.as_raw_fd());
        let mut command = Command::new(&self.program);
        command
            .args(["-M", "pc", "-accel", "tcg", "-smp", "1", "-cpu", "EPYC,+svm,+npt"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-m", &megabytes.to_string(), "-initrd", &initramfs, "-append", COMMAND_LINE])
            .arg("-kernel")
            .arg(&self.kernel)
            .args(["-chardev", "stdio,id=link,signal=off", "-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=link,nr=1"])
            .args(["-chardev", "file,id=console,path=/proc/self/fd/2", "-serial", "chardev:console"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (index, disk) in disks.iter().enumerate() {
            // In QEMU's lists a comma stands for itself if it is doubled.
            let path = disk
                .path
                .to_str()
                .context("--disk: a nested run needs file names in UTF-8")?
                .replace(',', ",,");
            let read_only = if disk.read_only { "on" } else { "off" };
            let drive = format!("file={path},if=none,id=disk{index},format=raw,readonly={read_only}");
            command.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive=disk{index}")]);
        }
        die_with_parent(&mut command);
        let mut child = command.spawn().with_context(|| format!("can't start {}", self.program.display()))?;
        let stderr = child.stderr.take().context("QEMU has no standard error")?;
        let console = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&console);
        let reader = thread::spawn(move || keep_last_lines(BufReader::new(stderr), &kept));
        Ok(Machine { child, console, reader: Some(reader) })
    }
}

/// A running level 1; killed when dropped.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    console: Arc<Mutex<VecDeque<String>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Machine {
    /// Both ends of the link; they can be taken once.
    pub fn take_link(&mut self) -> Result<(ChildStdin, ChildStdout)> {
        let both = self.child.stdin.take().zip(self.child.stdout.take());
        both.context("the link to level 1 is in use")
    }

    /// Kills the machine; the last lines of its console, and of QEMU's own messages.
    pub fn end(&mut self) -> String {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.reader.take().map(thread::JoinHandle::join);
        let lines = self.console.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        lines.iter().map(|line| format!("\n  {line}")).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// An emulator that outlives us would take a whole CPU for ever.
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let before_exec = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have died before that.
        if getppid() == Some(parent) { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec, it makes two system calls and allocates nothing.
    unsafe { command.pre_exec(before_exec) };
}

fn keep_last_lines(mut from: impl BufRead, kept: &Mutex<VecDeque<String>>) {
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        // TCG lists what it lacks of an EPYC at every start.
        if text.is_empty() || text.contains("TCG doesn't support requested feature") {
            continue;
        }
        log::debug!("level 1: {text}");
        let mut kept = kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}

/// What the program says its version is.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// `11.1.3` from `QEMU emulator version 11.1.3 (Debian ...)`.
fn parse_version(text: &str) -> Option<String> {
    let version = text.split_once("version ")?.1.split_whitespace().next()?;
    Some(version.to_owned())
}

fn major(version: &str) -> u32 {
    version.split('.').next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        let text = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright (c)";
        let version = parse_version(text).unwrap();
        assert_eq!((version.as_str(), major(&version)), ("11.1.3", 11));
        assert_eq!(parse_version("not found"), None);
        assert!(major("7.2.22") < OLDEST);
    }

    #[test]
    fn keeps_the_last_lines_and_drops_noise() {
        let kept = Mutex::new(VecDeque::new());
        let mut text = "qemu: warning: TCG doesn't support requested feature: x\r\n\r\n".to_owned();
        (0..100).for_each(|line| text += &format!("line {line}\r\n"));
        keep_last_lines(text.as_bytes(), &kept);
        let kept = kept.into_inner().unwrap();
        assert_eq!(kept.len(), KEPT_LINES);
        assert_eq!(kept.back().unwrap(), "line 99");
    }
}
