//! Can this machine's KVM run a guest?
//!
//! That `/dev/kvm` opens says little: some hosts offer a KVM that runs straight-line code and then fails at what
//! every kernel does all the time. So a tiny virtual machine does those things once: see [`STEPS`].

mod probe;

use std::io;
use std::time::Duration;

use kvm_ioctls::Kvm;
use thiserror::Error;

pub use probe::STEPS;

/// The interface to KVM.
const DEVICE: &std::ffi::CStr = c"/dev/kvm";
/// The only version of the interface that there is (`KVM_API_VERSION`, linux/kvm.h).
const API_VERSION: i32 = 12;
/// The probe takes a few hundred instructions; this is for hosts where one of them never ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why guests can't run on this machine's KVM.
#[derive(Debug, Error)]
pub enum Unusable {
    /// No KVM in the kernel, no virtualisation in the CPU, or the module is not loaded.
    #[error(
        "/dev/kvm does not exist: load kvm_amd or kvm_intel, if this CPU has virtualisation and the BIOS allows it"
    )]
    Missing,
    /// The user may not open it.
    #[error(
        "no permission to open /dev/kvm: add yourself to the group kvm (sudo adduser $USER kvm) and log in again"
    )]
    NoPermission,
    /// It is there but can't be opened.
    #[error("/dev/kvm does not open: {0}")]
    Open(io::Error),
    /// Not the stable interface.
    #[error("/dev/kvm speaks version {0} of the interface instead of {API_VERSION}")]
    Version(i32),
    /// The virtual machine can't be made.
    #[error("/dev/kvm opens but can't make a virtual machine: {step}: {error}")]
    Setup {
        /// The ioctl that failed.
        step: &'static str,
        /// What it returned.
        error: io::Error,
    },
    /// The virtual machine stops before its time.
    #[error("/dev/kvm opens but can't run a guest: it fails at {step} ({how})")]
    Step {
        /// One of [`STEPS`].
        step: &'static str,
        /// How KVM ended the run.
        how: String,
    },
    /// The virtual machine runs on and on.
    #[error("/dev/kvm opens but can't run a guest: it hangs at {step}")]
    Hangs {
        /// One of [`STEPS`].
        step: &'static str,
    },
}

/// Runs the probe, a few milliseconds where KVM works.
///
/// # Errors
/// What stands in the way of a guest.
pub fn kvm_runs_guests() -> Result<(), Unusable> {
    probe::run(open()?, PATIENCE)
}

fn open() -> Result<Kvm, Unusable> {
    let kvm = Kvm::new_with_path(DEVICE).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Unusable::Missing,
        libc::EACCES | libc::EPERM => Unusable::NoPermission,
        _ => Unusable::Open(error.into()),
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(Unusable::Version(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Holds on every machine: whichever way it goes, it ends in time and says what is wrong.
    #[test]
    fn gives_an_answer_that_names_the_device() {
        let start = std::time::Instant::now();
        match kvm_runs_guests() {
            Ok(()) => println!("KVM runs guests"),
            Err(reason) => {
                println!("{reason}");
                assert!(reason.to_string().contains("/dev/kvm"));
            }
        }
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(5));
    }
}
