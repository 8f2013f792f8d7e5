//! Memory that a client takes away under us.
//!
//! Whoever shortens a file that we have mapped makes our next touch of it a SIGBUS, which would end this process with
//! all its other clients. A file sealed against that (`F_SEAL_SHRINK`) is safe, and so are the memfds of QEMU, but not
//! its `memory-backend-file`, and not those of other VMMs. So that whatever a client sends can be served, the handler
//! here does what Wayland compositors do with their clients' buffers: the piece that was touched is replaced by zeros
//! of our own, the access goes on, and the client is cut off.
//!
//! Accesses by system calls need no care: they fail with EFAULT.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Pieces of all clients that can be watched. A client with a hundred devices has some dozens.
const SLOTS: usize = 8192;

static PIECES: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];
/// What was to be done with a SIGBUS before us.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// One piece. It can be read by a signal handler at any moment of its changes.
struct Slot {
    /// Somebody has it.
    taken: AtomicBool,
    /// First byte, 0 while there is none.
    start: AtomicUsize,
    /// Bytes.
    length: AtomicUsize,
    /// The client's socket.
    socket: AtomicI32,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            length: AtomicUsize::new(0),
            socket: AtomicI32::new(-1),
        }
    }

    /// Start and length, if `address` is in it.
    fn around(&self, address: usize) -> Option<(usize, usize)> {
        let start = self.start.load(Ordering::SeqCst);
        let length = self.length.load(Ordering::SeqCst);
        let inside = start != 0 && address.checked_sub(start).is_some_and(|offset| offset < length);
        // Not one that becomes another meanwhile; one that is being touched does not.
        (inside && self.start.load(Ordering::SeqCst) == start).then_some((start, length))
    }
}

/// A piece of a client's memory that may vanish. It is watched until this is dropped.
#[derive(Debug)]
pub struct Watch(usize);

impl Watch {
    /// Watch `length` mapped bytes at `start`. When they are found gone, `socket` is shut down, if there is one; it
    /// must stay open as long as this lives.
    ///
    /// # Errors
    /// Too many pieces are watched already, or the handler can't be set.
    pub fn new(start: *const u8, length: usize, socket: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        set_handler()?;
        let free = |slot: &Slot| {
            slot.taken.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let index = PIECES.iter().position(free).ok_or(io::ErrorKind::QuotaExceeded)?;
        let slot = &PIECES[index];
        slot.length.store(length, Ordering::SeqCst);
        slot.socket.store(socket.map_or(-1, |socket| socket.as_raw_fd()), Ordering::SeqCst);
        slot.start.store(start as usize, Ordering::SeqCst);
        Ok(Self(index))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let slot = &PIECES[self.0];
        slot.start.store(0, Ordering::SeqCst);
        slot.taken.store(false, Ordering::SeqCst);
    }
}

fn set_handler() -> io::Result<()> {
    static DONE: Mutex<bool> = Mutex::new(false);
    let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    if *done {
        return Ok(());
    }
    let mut before = MaybeUninit::uninit();
    // What there is must be known before ours can be called.
    // SAFETY: no action is set, and `before` has room for the one that there is.
    let read = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr()) };
    if read != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sigaction has filled it.
    BEFORE.get_or_init(|| unsafe { before.assume_init() });
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    let action = libc::sigaction {
        sa_sigaction: handler as usize,
        sa_mask: empty_set(),
        sa_flags: libc::SA_SIGINFO | libc::SA_ONSTACK,
        sa_restorer: None,
    };
    // SAFETY: the handler makes only calls that are allowed in one, and of our data touches only atomics.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    *done = true;
    Ok(())
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: there is room for a set, and the call can't fail with it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset has filled it.
    unsafe { set.assume_init() }
}

/// Something was touched that is not there. The access is tried again when this returns.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid pointer.
    let info_ref = unsafe { &*info };
    // SAFETY: a SIGBUS of a fault has an address; of one that was sent, it is no piece's.
    let address = unsafe { info_ref.si_addr() } as usize;
    let faulted = info_ref.si_code > 0;
    let found = PIECES.iter().find_map(|slot| Some((slot, slot.around(address)?)));
    match found.filter(|_| faulted) {
        Some((slot, (start, length))) if replace(start, length) => {
            let socket = slot.socket.load(Ordering::SeqCst);
            if socket >= 0 {
                // SAFETY: the socket is open as long as the piece is watched, which somebody is just touching.
                unsafe { libc::shutdown(socket, libc::SHUT_RDWR) };
            }
        }
        _ => pass_on(signal, info, context),
    }
}

/// Zeros of our own in place of a file's bytes. `errno` stays as the interrupted code has it.
fn replace(start: usize, length: usize) -> bool {
    // SAFETY: no preconditions.
    let errno_at = unsafe { libc::__errno_location() };
    // SAFETY: the pointer is this thread's and valid as long as it runs.
    let errno = unsafe { *errno_at };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is a mapping that is nobody's but the client's piece's, and stays mapped.
    let new = unsafe { libc::mmap(start as *mut libc::c_void, length, protection, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { *errno_at = errno };
    new != libc::MAP_FAILED
}

/// It is none of ours: whoever was there before us decides, in the end the default, which ends the process.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(before) = BEFORE.get() else { return };
    if before.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: with SA_SIGINFO the field holds a function of this type.
        let call = unsafe {
            std::mem::transmute::<usize, extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void)>(
                before.sa_sigaction,
            )
        };
        call(signal, info, context);
        return;
    }
    // None is set, where not by the standard library, whose handler is of the kind above.
    // SAFETY: the action was in force before.
    unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::*;

    const PAGE: usize = 4096;

    fn mapped(file: &File) -> MmapRegion {
        MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 2 * PAGE).unwrap()
    }

    #[test]
    fn what_is_gone_reads_as_zeros_and_cuts_the_client_off() {
        let file = File::from(memfd_create("client", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 2 * PAGE as u64).unwrap();
        let region = mapped(&file);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let watch = Watch::new(region.as_ptr(), region.size(), Some(ours.as_fd())).unwrap();
        let bytes = region.get_slice(0, 2 * PAGE).unwrap();
        bytes.write_obj(7_u8, PAGE).unwrap();
        assert_eq!(bytes.read_obj::<u8>(PAGE).unwrap(), 7);
        ftruncate(&file, 0).unwrap();
        assert_eq!(bytes.read_obj::<u8>(PAGE).unwrap(), 0);
        bytes.write_obj(8_u8, 0).unwrap();
        assert_eq!(bytes.read_obj::<u8>(0).unwrap(), 8);
        assert_eq!(io::Read::read(&mut theirs, &mut [0]).unwrap(), 0, "the connection ends");
        drop(watch);
    }

    #[test]
    fn slots_are_given_back() {
        for _ in 0..2 * SLOTS {
            Watch::new(ptr::without_provenance(PAGE), 1, None).unwrap();
        }
    }

    /// Set where the test is to die.
    const ALONE: &str = "MANA_TEST_ALONE";

    #[test]
    fn other_faults_still_end_the_process() {
        if std::env::var_os(ALONE).is_none() {
            let name = "vfio_user::lost::tests::other_faults_still_end_the_process";
            let mut command = Command::new(std::env::current_exe().unwrap());
            let output = command.args(["--exact", name]).env(ALONE, "1").output().unwrap();
            assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{}", output.status);
            return;
        }
        let file = File::from(memfd_create("ours", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 2 * PAGE as u64).unwrap();
        let (watched, other) = (mapped(&file), mapped(&file));
        let _watch = Watch::new(watched.as_ptr(), PAGE, None).unwrap();
        ftruncate(&file, 0).unwrap();
        let _ = other.get_slice(0, PAGE).unwrap().read_obj::<u8>(0);
    }
}
