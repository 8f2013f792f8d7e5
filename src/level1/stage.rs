//! What the kernel leaves to init: file systems, modules, terminals.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, mount};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Mounts what a program expects to find.
pub(super) fn mount_all() -> Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("devpts", "/dev/pts")] {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), None::<&CStr>)
            .with_context(|| format!("can't mount {at}"))?;
    }
    Ok(())
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
