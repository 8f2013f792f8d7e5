//! What each thread may ask the kernel for.
//!
//! A guest that gets the better of the device model gets a thread of this process, and with it whatever that thread
//! may do. So each kind of thread gives up, once it is set up, all system calls but the ones it needs ([`Role`]); none
//! that a guest or a client reaches can open a file from then on, and no thread at all can start a program, trace a process, mount,
//! or gain a privilege. Memory can't become code.
//!
//! A call beyond that ends the process, with a sentence that says which thread and which call it was. `--seccomp log`
//! lets such calls pass, and the kernel's log has them; `--seccomp off` does without filters.
//!
//! A filter is inherited: what the main thread starts later, for a machine after a reset, has both its own and the main
//! thread's.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Once, OnceLock};

use anyhow::Context;
use clap::ValueEnum;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde::{Deserialize, Serialize};

mod calls;

/// `--seccomp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Mode {
    /// A system call that a thread has no use for ends the process.
    #[default]
    On,
    /// It passes, and the kernel's log has it.
    Log,
    /// Threads may call what they like.
    Off,
}

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Builds the machine, anew after a reset, and waits for the end of the run.
    Main,
    /// Runs guest code, and devices' registers.
    Vcpu,
    /// Runs queues and cables.
    Worker,
    /// Writes the trace.
    Trace,
    /// Talks to a vfio-user client.
    VfioUser,
    /// Answers requests to the simulated host.
    Control,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "CPU",
            Self::Worker => "worker",
            Self::Trace => "trace",
            Self::VfioUser => "vfio-user",
            Self::Control => "control",
        }
    }
}

static MODE: OnceLock<Mode> = OnceLock::new();

thread_local! {
    /// The role that this thread has taken, for the handler of a violation.
    static ROLE: Cell<&'static str> = const { Cell::new("") };
}

/// Filters are as `mode` says, for the whole process. Without it there are none.
pub fn set_mode(mode: Mode) {
    // Whoever came first has decided.
    let _ = MODE.set(mode);
}

/// From now on this thread calls nothing but what `role` needs.
///
/// # Errors
/// The kernel takes no filters.
pub fn enter(role: Role) -> anyhow::Result<()> {
    let violation = match MODE.get() {
        None | Some(Mode::Off) => return Ok(()),
        Some(Mode::Log) => SeccompAction::Log,
        Some(Mode::On) => SeccompAction::Trap,
    };
    static HANDLER: Once = Once::new();
    HANDLER.call_once(handle_violations);
    // The main thread comes here again after a reset.
    if ROLE.replace(role.name()) == role.name() {
        return Ok(());
    }
    let without = "--seccomp off does without filters";
    let mut programs = Vec::new();
    if !matches!(role, Role::Main | Role::Control) && violation == SeccompAction::Trap {
        programs.push(no_files());
    }
    programs.push(filter(role, violation));
    for program in programs {
        let program = program.with_context(|| format!("no filter of system calls; {without}"))?;
        seccompiler::apply_filter(&program)
            .with_context(|| format!("the kernel takes no filter of system calls; {without}"))?;
    }
    Ok(())
}

/// Opening a file fails, but is no reason to die: libc tries by itself, to find out about the host's memory
/// (`check_may_shrink_heap` of glibc).
fn no_files() -> anyhow::Result<BpfProgram> {
    let rules = BTreeMap::from([(libc::SYS_openat, Vec::new())]);
    let denied = SeccompAction::Errno(libc::EACCES as u32);
    let architecture = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, denied, architecture)?.try_into()?)
}

fn filter(role: Role, violation: SeccompAction) -> anyhow::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // The other filter of a thread that opens no files says no to this.
    let opens = [libc::SYS_openat];
    for &call in calls::ALL.iter().chain(calls::of(role)).chain(&opens) {
        rules.insert(call, Vec::new());
    }
    // Memory becomes no code.
    let no_code =
        SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![no_code.clone()])?]);
    }
    let only = |argument, values: &[u64]| -> anyhow::Result<Vec<SeccompRule>> {
        let rule = |&value| {
            let condition =
                SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
            Ok(SeccompRule::new(vec![condition])?)
        };
        values.iter().map(rule).collect()
    };
    let requests = calls::requests(role);
    if !requests.is_empty() {
        rules.insert(libc::SYS_ioctl, only(1, requests)?);
    }
    if calls::connects(role) {
        rules.insert(libc::SYS_socket, only(0, &[libc::AF_UNIX as u64])?);
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, violation, SeccompAction::Allow, architecture)?.try_into()?)
}

/// A violation ends the process by our own handler, which can say what it was.
fn handle_violations() {
    let action = libc::sigaction {
        sa_sigaction: violated as *const () as usize,
        // SAFETY: a signal set is plain data, and empty when zero.
        sa_mask: unsafe { std::mem::zeroed() },
        sa_flags: libc::SA_SIGINFO,
        sa_restorer: None,
    };
    // SAFETY: the handler only makes system calls, which a signal handler may, and `action` lives through the call.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } != 0 {
        log::warn!("violations of --seccomp will have no words: {}", std::io::Error::last_os_error());
    }
}

/// Where `siginfo_t` of a SIGSYS has the call's number: behind `si_signo`, `si_errno`, `si_code`, padding, `_call_addr`.
const CALL_OFFSET: usize = 24;

extern "C" fn violated(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let at = info.cast::<u8>().wrapping_add(CALL_OFFSET).cast::<libc::c_int>();
    // SAFETY: the kernel hands over a whole `siginfo_t`, 128 bytes, which for SIGSYS has the number there.
    let number = unsafe { at.read_unaligned() };
    let mut digits = [0; 10];
    let (mut first, mut rest) = (digits.len(), number.unsigned_abs());
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 || first == 0 {
            break;
        }
    }
    let role = ROLE.get();
    for part in [
        b"mana-vmm: the ".as_slice(),
        role.as_bytes(),
        b" thread made system call ",
        &digits[first..],
        b", for which it has no use: it is ended here (--seccomp off lets it pass)\n",
    ] {
        // SAFETY: the bytes are there, and standard error is a number whoever it belongs to.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: ends the process at once, which is the point.
    unsafe { libc::_exit(1) }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs only as a process of its own, made by the test below.
    #[test]
    #[ignore = "ends its process"]
    fn in_a_process_of_its_own() {
        let role = std::env::var("ROLE").unwrap();
        set_mode(Mode::On);
        enter(if role == "trace" { Role::Trace } else { Role::Main }).unwrap();
        match std::env::var("CALL").unwrap().as_str() {
            "open" => drop(std::fs::File::open("/dev/null").unwrap()),
            "connect" => drop(std::os::unix::net::UnixStream::pair()),
            "run" => drop(Command::new("/bin/true").status()),
            "memory" => assert_eq!(vec![1_u8; 64 << 20].iter().filter(|&&byte| byte == 1).count(), 64 << 20),
            // As a machine that is built again after a reset.
            "worker" => std::thread::spawn(|| {
                crate::workers::wait_for_turns();
                enter(Role::Worker).unwrap();
            })
            .join()
            .unwrap(),
            other => panic!("{other}"),
        }
        eprintln!("survived");
    }

    fn outcome(role: &str, call: &str) -> (Option<i32>, String) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "seccomp::tests::in_a_process_of_its_own", "--ignored", "--nocapture"])
            .env("ROLE", role)
            .env("CALL", call)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    fn what_a_thread_has_no_use_for_ends_the_process_with_a_sentence() {
        let (status, said) = outcome("trace", "connect");
        let call = format!("the trace thread made system call {}, ", libc::SYS_socketpair);
        assert!(said.contains(&call) && !said.contains("survived"), "{said}");
        assert_eq!(status, Some(1));
        let (_, said) = outcome("main", "run");
        assert!(said.contains("the main thread made system call") && !said.contains("survived"), "{said}");
    }

    #[test]
    fn a_thread_that_a_guest_reaches_opens_no_files() {
        let (_, said) = outcome("trace", "open");
        assert!(said.contains("PermissionDenied") && !said.contains("survived"), "{said}");
    }

    #[test]
    fn what_a_thread_needs_goes_on() {
        for (role, call) in [("trace", "memory"), ("main", "memory"), ("main", "open"), ("main", "worker")] {
            let (_, said) = outcome(role, call);
            assert!(said.contains("survived"), "{role} {call}: {said}");
        }
    }

    #[test]
    fn every_role_has_a_filter() {
        for role in [Role::Main, Role::Vcpu, Role::Worker, Role::Trace, Role::VfioUser, Role::Control] {
            filter(role, SeccompAction::Trap).unwrap();
        }
        // The threads of a machine that is built after a reset have the main thread's filter, too.
        for role in [Role::Vcpu, Role::Worker] {
            let more = calls::of(role).iter().find(|call| !calls::of(Role::Main).contains(call));
            assert_eq!(more, None, "{}", role.name());
        }
    }
}
