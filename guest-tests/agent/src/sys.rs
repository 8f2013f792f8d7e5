//! System calls that the standard library has no name for.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd;

fn check(result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// mount(2) of a file system that has no device.
pub fn mount(kind: &CStr, target: &CStr) -> Result<()> {
    // SAFETY: three terminated strings, no data.
    check(unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) })
}

/// mount(2) of what is at `source`, at `target` too.
pub fn bind(source: &CStr, target: &CStr) -> Result<()> {
    let nothing = std::ptr::null();
    // SAFETY: two terminated strings, no kind, no data.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), nothing, libc::MS_BIND, nothing.cast()) })
}

/// unshare(2): the calling thread gets a network namespace of its own.
pub fn new_network() -> Result<()> {
    // SAFETY: changes only which network the thread sees.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

/// setns(2): the calling thread goes over to a network namespace.
pub fn enter_network(namespace: &File) -> Result<()> {
    // SAFETY: an open file; changes only which network the thread sees.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// The calling thread's number.
pub fn thread_id() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// sethostname(2).
pub fn set_host_name(name: &str) -> Result<()> {
    // SAFETY: the pointer and length are of one string.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
}

/// finit_module(2); the error is what the module's init function returned.
pub fn load_module(file: &File) -> Result<()> {
    // SAFETY: an open file, an empty parameter string, no flags.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    check(result as libc::c_int)
}

/// delete_module(2), without waiting and without force.
pub fn unload_module(name: &str) -> Result<()> {
    let name = CString::new(name)?;
    // SAFETY: a terminated string and a flag.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    check(result as libc::c_int)
}

/// ioperm(2) of one port, for the calling thread.
pub fn allow_port(port: u16) -> Result<()> {
    // SAFETY: changes only what the thread may do.
    check(unsafe { libc::ioperm(port.into(), 1, 1) })
}

/// What is typed at `terminal` is not written back to it, and comes line by line.
pub fn stop_echo(terminal: &File) -> Result<()> {
    // SAFETY: all zeroes is a termios, and the call fills it in.
    let mut mode = unsafe { std::mem::zeroed::<libc::termios>() };
    // SAFETY: an open file and a termios to write to.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode) })?;
    mode.c_lflag = mode.c_lflag & !libc::ECHO | libc::ICANON;
    // SAFETY: an open file and a termios.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &raw const mode) })
}

/// Milliseconds since the kernel started, time in suspend included.
pub fn uptime_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// reboot(2): power the machine off. Returns only when that is impossible.
pub fn power_off() -> Error {
    // SAFETY: no arguments but the command; file systems are in RAM.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    Error::last_os_error()
}

/// A line of the log that begins with this, and goes on with a name, is where a scenario begins.
pub const SCENARIO: &str = "mana-agent: scenario ";

/// The kernel's log, since the last scenario began.
pub fn kernel_log() -> Result<String> {
    const READ_ALL: libc::c_int = 3;
    const BUFFER_SIZE: libc::c_int = 10;
    // SAFETY: asks for a number only.
    let size = unsafe { libc::klogctl(BUFFER_SIZE, std::ptr::null_mut(), 0) };
    check(size)?;
    let mut log = vec![0_u8; size as usize];
    // SAFETY: the pointer and length are of one buffer.
    let length = unsafe { libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), size) };
    check(length)?;
    log.truncate(length as usize);
    let log = String::from_utf8_lossy(&log);
    let begin = log.rfind(SCENARIO).and_then(|at| Some(at + log[at..].find('\n')? + 1));
    Ok(log[begin.unwrap_or_default()..].to_owned())
}

/// In a child before it runs its program: a session of its own on the terminal that is its standard input, so that
/// Ctrl-C and job control work.
pub fn take_terminal() -> Result<()> {
    // SAFETY: no arguments.
    check(unsafe { libc::setsid() })?;
    // SAFETY: standard input is open; the argument is a number.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })
}
