//! How often CPUs left the guest: to us, which we count, and at all, which KVM counts.
//!
//! KVM keeps statistics of each CPU in a file of its own, with names beside the numbers (Linux's
//! Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`; since 5.14). `exits` there are all exits from guest code, those
//! that KVM deals with itself included.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use kvm_ioctls::VcpuFd;

/// linux/kvm.h: `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;
/// The number of all exits of a CPU (arch/x86/kvm/x86.c, `kvm_vcpu_stats_desc`).
const EXITS: &CStr = c"exits";
/// `struct kvm_stats_header`: flags, `name_size`, `num_desc`, `id_offset`, `desc_offset`, `data_offset`, 32 bits each.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` without its name: flags (32 bits), exponent (16), size (16), offset (32), `bucket_size` (32).
const DESCRIPTOR: usize = 16;
/// More descriptors than a CPU has (some 50), and longer names.
const LIMIT: u32 = 4096;

/// How often each CPU has come out of the guest, for others to read while it runs.
#[derive(Debug)]
pub struct ExitCounts(Box<[Cpu]>);

#[derive(Debug, Default)]
struct Cpu {
    /// To us.
    ours: AtomicU64,
    all: OnceLock<Statistic>,
}

impl ExitCounts {
    /// For `cpus` CPUs.
    pub fn new(cpus: u32) -> Arc<Self> {
        Arc::new(Self((0..cpus).map(|_| Cpu::default()).collect()))
    }

    /// Have KVM's count of CPU number `index` too, if it keeps one.
    pub fn watch(&self, index: u32, fd: &VcpuFd) {
        let Some(cpu) = self.0.get(index as usize) else { return };
        match Statistic::of_cpu(fd) {
            Ok(statistic) => drop(cpu.all.set(statistic)),
            Err(error) => log::debug!("KVM doesn't tell how often CPU {index} leaves the guest: {error}"),
        }
    }

    /// Exits to us, of all CPUs together.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|cpu| cpu.ours.load(Ordering::Relaxed)).sum()
    }

    /// Exits at all, of all CPUs together. `None` unless KVM tells of each of them.
    pub fn all(&self) -> Option<u64> {
        self.0.iter().map(|cpu| cpu.all.get()?.read().ok()).sum()
    }

    /// CPU number `cpu` came out to us.
    pub fn bump(&self, cpu: u32) {
        if let Some(cpu) = self.0.get(cpu as usize) {
            cpu.ours.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A number in a file of statistics.
#[derive(Debug)]
struct Statistic {
    file: File,
    /// Bytes from the file's start.
    at: u64,
}

impl Statistic {
    fn of_cpu(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: KVM_GET_STATS_FD takes no argument and touches no memory of ours.
        let file = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
        Self::find(unsafe { File::from_raw_fd(file) }, EXITS)
    }

    /// The statistic `name` in `file`.
    fn find(file: File, name: &CStr) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let (name_size, count) = (word(&header, 4), word(&header, 8));
        if name_size > LIMIT || count > LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more statistics than a CPU has"));
        }
        let (descriptors, data) = (u64::from(word(&header, 16)), u64::from(word(&header, 20)));
        let size = DESCRIPTOR + name_size as usize;
        let mut descriptor = vec![0; size];
        for index in 0..u64::from(count) {
            file.read_exact_at(&mut descriptor, descriptors + index * size as u64)?;
            if CStr::from_bytes_until_nul(&descriptor[DESCRIPTOR..]) == Ok(name) {
                return Ok(Self { file, at: data + u64::from(word(&descriptor, 8)) });
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    fn read(&self) -> io::Result<u64> {
        let mut value = [0; size_of::<u64>()];
        self.file.read_exact_at(&mut value, self.at)?;
        Ok(u64::from_ne_bytes(value))
    }
}

/// The 32 bits at `at` of a structure of the kernel's.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; size_of::<u32>()];
    word.copy_from_slice(&bytes[at..at + size_of::<u32>()]);
    u32::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const NAME_SIZE: usize = 8;

    /// A file as KVM lays it out, with these names and values.
    fn statistics(values: &[(&str, u64)]) -> File {
        let descriptors = HEADER + NAME_SIZE;
        let data = descriptors + values.len() * (DESCRIPTOR + NAME_SIZE);
        let mut bytes = Vec::new();
        for word in [0, NAME_SIZE, values.len(), HEADER, descriptors, data] {
            bytes.extend((word as u32).to_ne_bytes());
        }
        bytes.extend(*b"kvm-1\0\0\0");
        for (index, (name, _)) in values.iter().enumerate() {
            let mut descriptor = [0; DESCRIPTOR + NAME_SIZE];
            descriptor[8..12].copy_from_slice(&(8 * index as u32).to_ne_bytes());
            descriptor[DESCRIPTOR..][..name.len()].copy_from_slice(name.as_bytes());
            bytes.extend(descriptor);
        }
        values.iter().for_each(|(_, value)| bytes.extend(value.to_ne_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn statistics_are_found_by_name() {
        let file = statistics(&[("exits_x", 1), ("exits", 1 << 40), ("exi", 3)]);
        assert_eq!(Statistic::find(file, EXITS).unwrap().read().unwrap(), 1 << 40);
    }

    #[test]
    fn files_without_it_and_files_of_another_kind_have_none() {
        for values in [&[][..], &[("halts", 1)]] {
            assert_eq!(
                Statistic::find(statistics(values), EXITS).unwrap_err().kind(),
                io::ErrorKind::NotFound
            );
        }
        let mut short = tempfile::tempfile().unwrap();
        short.write_all(&[0xff; HEADER]).unwrap();
        assert_eq!(Statistic::find(short, EXITS).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(Statistic::find(tempfile::tempfile().unwrap(), EXITS).is_err());
    }

    #[test]
    fn the_sum_is_told_only_if_each_cpu_has_one() {
        let counts = ExitCounts::new(2);
        let watch = |cpu: usize, value| {
            let file = statistics(&[("exits", value)]);
            counts.0[cpu].all.set(Statistic::find(file, EXITS).unwrap()).unwrap();
        };
        watch(0, 30);
        assert_eq!(counts.all(), None);
        watch(1, 12);
        counts.bump(1);
        counts.bump(2);
        assert_eq!((counts.sum(), counts.all()), (1, Some(42)));
    }
}
