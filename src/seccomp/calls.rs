//! The lists. They come from traces of real runs: `strace -ff` of `serve` with a guest under QEMU, and `--seccomp log` of
//! `boot` (see `src/THREATS.md`); and from what the error paths of our code and of libc call beyond that.

use super::Role;

/// What every thread calls: memory, locks, time, its own end, and bytes through descriptors that it has.
pub(super) const ALL: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    // Aborts, and SIGBUS of memory that a client has taken back.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    // A panic that can't unwind aborts.
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Descriptors of sockets, pipes, timers and event loops that there are already.
macro_rules! with_descriptors {
    ($($call:ident,)*) => {
        &[
            libc::SYS_accept4,
            libc::SYS_dup,
            libc::SYS_epoll_ctl,
            libc::SYS_epoll_pwait,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_epoll_wait,
            libc::SYS_eventfd2,
            libc::SYS_fcntl,
            libc::SYS_fstat,
            libc::SYS_getpeername,
            libc::SYS_getsockname,
            libc::SYS_getsockopt,
            libc::SYS_lseek,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll,
            libc::SYS_ppoll,
            libc::SYS_recvfrom,
            libc::SYS_recvmmsg,
            libc::SYS_recvmsg,
            libc::SYS_sendmmsg,
            libc::SYS_sendmsg,
            libc::SYS_sendto,
            libc::SYS_setsockopt,
            libc::SYS_shutdown,
            libc::SYS_timerfd_gettime,
            libc::SYS_timerfd_settime,
            $(libc::$call,)*
        ]
    };
}

/// Disks.
const VCPU: &[libc::c_long] = with_descriptors![SYS_pread64, SYS_preadv, SYS_pwrite64, SYS_pwritev,];

/// Disks, and a switch that several machines share, where each may become the one that the others connect to.
const WORKER: &[libc::c_long] = with_descriptors![
    SYS_bind,
    SYS_connect,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_flock,
    SYS_fsync,
    SYS_ftruncate,
    SYS_listen,
    SYS_pread64,
    SYS_preadv,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_statx,
    SYS_unlink,
    SYS_unlinkat,
];

/// Guest memory comes as files, of which is asked what they are.
const VFIO_USER: &[libc::c_long] = with_descriptors![SYS_fstatfs, SYS_readlinkat, SYS_statx,];

/// A thread a client, and the files that a user names.
const CONTROL: &[libc::c_long] =
    with_descriptors![SYS_clone3, SYS_prctl, SYS_rseq, SYS_set_robust_list, SYS_statx,];

/// All of the above, and what it takes to build a machine after a reset: files, threads, sockets.
const MAIN: &[libc::c_long] = with_descriptors![
    SYS_access,
    SYS_bind,
    SYS_clone3,
    SYS_connect,
    SYS_epoll_create1,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_flock,
    SYS_fsync,
    SYS_ftruncate,
    SYS_getdents64,
    SYS_ioctl,
    SYS_listen,
    SYS_newfstatat,
    SYS_openat,
    SYS_pread64,
    SYS_preadv,
    SYS_prctl,
    SYS_prlimit64,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_readlink,
    SYS_readlinkat,
    // A saved machine takes its name when it is whole.
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_rseq,
    // A worker of the new machine, before it has its own filter.
    SYS_sched_setscheduler,
    SYS_seccomp,
    SYS_set_robust_list,
    SYS_signalfd4,
    SYS_socket,
    SYS_socketpair,
    SYS_statx,
    SYS_timerfd_create,
    SYS_unlink,
    SYS_unlinkat,
];

/// What `role` calls beyond [`ALL`].
pub(super) const fn of(role: Role) -> &'static [libc::c_long] {
    match role {
        Role::Main => MAIN,
        Role::Vcpu => VCPU,
        Role::Worker => WORKER,
        Role::Trace => &[],
        Role::VfioUser => VFIO_USER,
        Role::Control => CONTROL,
    }
}

/// Requests to KVM (`linux/kvm.h`) that devices make while the guest runs.
mod kvm {
    pub const RUN: u64 = 0xae80;
    pub const GET_REGS: u64 = 0x8090_ae81;
    pub const IRQ_LINE: u64 = 0x4008_ae61;
    pub const SET_GSI_ROUTING: u64 = 0x4008_ae6a;
    pub const IRQFD: u64 = 0x4020_ae76;
    pub const IOEVENTFD: u64 = 0x4040_ae79;
    pub const SIGNAL_MSI: u64 = 0x4020_aea5;
    pub const GET_STATS_FD: u64 = 0xaece;
}

/// Requests by ioctl that `role` makes; without any it has no ioctl. The main thread makes all that there are.
pub(super) const fn requests(role: Role) -> &'static [u64] {
    use kvm::{GET_REGS, GET_STATS_FD, IOEVENTFD, IRQ_LINE, IRQFD, RUN, SET_GSI_ROUTING, SIGNAL_MSI};
    match role {
        Role::Vcpu => {
            &[RUN, GET_REGS, IRQ_LINE, SIGNAL_MSI, SET_GSI_ROUTING, IRQFD, IOEVENTFD, GET_STATS_FD, FIONBIO]
        }
        Role::Worker => &[SIGNAL_MSI, IRQ_LINE, SET_GSI_ROUTING, FIONBIO],
        Role::VfioUser => &[FIONBIO],
        Role::Main | Role::Trace | Role::Control => &[],
    }
}

/// A socket that is not to block (`asm-generic/ioctls.h`).
const FIONBIO: u64 = 0x5421;

/// Whether `role` makes sockets of this machine's own.
pub(super) const fn connects(role: Role) -> bool {
    matches!(role, Role::Worker)
}
