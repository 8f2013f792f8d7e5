//! What the kernel leaves to init: file systems, modules, terminals.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, mount};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// The clock in use: `tsc-early` until the TSC's frequency is known for good, then `tsc`.
const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// The kernel takes a second, and begins again when it was disturbed.
const CLOCK_PATIENCE: Duration = Duration::from_secs(20);

/// Mounts what a program expects to find.
pub(super) fn mount_all() -> Result<()> {
    let mounts = [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("debugfs", "/sys/kernel/debug"),
        ("devpts", "/dev/pts"),
    ];
    for (kind, at) in mounts {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), None::<&CStr>)
            .with_context(|| format!("can't mount {at}"))?;
    }
    Ok(())
}

/// Waits until the kernel has measured the TSC's frequency for good, about a second after its first guess.
///
/// KVM keeps the frequency that holds when it is loaded. Is the guess off by more than 250 ppm, as happens on a busy
/// host, then KVM later refuses to set up the TSC of a CPU (`kvm_set_tsc_khz`, arch/x86/kvm/x86.c), goes on without,
/// and the guest's timers fire as much too late as the machine is old.
pub(super) fn await_steady_clock() {
    let deadline = Instant::now() + CLOCK_PATIENCE;
    while fs::read_to_string(CLOCK_SOURCE).is_ok_and(|name| name.trim() != "tsc") {
        if Instant::now() > deadline {
            eprintln!("the TSC's frequency is still a guess; timers of guests may be late");
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Loads an uncompressed module.
pub(super) fn load_module(path: &Path) -> Result<()> {
    let image = fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
    rustix::system::init_module(&image, c"").with_context(|| format!("can't load {}", path.display()))
}

/// A FIFO that is there and open, so that its readers and writers need not wait for each other.
pub(super) fn make_fifo(path: &Path) -> Result<File> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    Ok(OpenOptions::new().read(true).write(true).open(path)?)
}

/// Our end and the job's end of a pipe.
pub(super) fn pipe() -> Result<(File, File)> {
    let (reader, writer) = std::io::pipe()?;
    Ok((File::from(std::os::fd::OwnedFd::from(writer)), File::from(std::os::fd::OwnedFd::from(reader))))
}

/// Our end and the job's end of a terminal that changes nothing and echoes nothing: level 0's does that already.
pub(super) fn raw_pty() -> Result<(File, File)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    let mut mode = tcgetattr(&theirs)?;
    mode.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &mode)?;
    Ok((File::from(ours), File::from(theirs)))
}
