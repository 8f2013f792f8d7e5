//! Network namespaces, so that both ends of a cable can be in one guest and still speak over it.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::{net, sys};

/// Where they are kept, as iproute2 does.
const FOLDER: &str = "/run/netns";
/// The namespace of process 1.
pub const OWN: &str = "-";

/// Runs `action` in a thread that is in the namespace `name`; [`OWN`] is the one that the caller is in.
pub fn within<T: Send>(name: &str, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let run = || {
        if name != OWN {
            let file = path(name);
            let namespace = File::open(&file).with_context(|| file.display().to_string())?;
            sys::enter_network(&namespace).with_context(|| format!("namespace {name}"))?;
        }
        action()
    };
    thread::scope(|scope| scope.spawn(run).join()).map_err(|_| anyhow!("a thread panicked"))?
}

/// Makes the namespace `name` unless there is one, with `lo` up.
pub fn make(name: &str) -> Result<()> {
    let file = path(name);
    if name == OWN || file.exists() {
        return Ok(());
    }
    fs::create_dir_all(FOLDER)?;
    File::create(&file)?;
    within(OWN, || {
        sys::new_network().context("a network namespace")?;
        let target = CString::new(file.display().to_string())?;
        sys::bind(c"/proc/thread-self/ns/net", &target).with_context(|| file.display().to_string())?;
        net::set_up("lo")
    })
}

/// Moves `interface` from the caller's namespace to `name`.
pub fn take_in(name: &str, interface: &str) -> Result<()> {
    if name == OWN {
        return Ok(());
    }
    let (tell, number) = std::sync::mpsc::channel();
    let (done, wait) = std::sync::mpsc::channel::<()>();
    thread::scope(|scope| {
        // A namespace is named by a thread that is in it.
        let holder = scope.spawn(move || {
            within(name, move || {
                tell.send(sys::thread_id())?;
                let _ = wait.recv();
                Ok(())
            })
        });
        let moved = number.recv().context("no thread in the namespace").and_then(|thread: i32| {
            net::ip(&["link", "set", "dev", interface, "netns", &thread.to_string()])
        });
        drop(done);
        holder.join().map_err(|_| anyhow!("a thread panicked"))??;
        moved
    })
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}
