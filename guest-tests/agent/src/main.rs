//! The guest's init, and the commands that scenarios run in the guest.
//!
//! As process 1 it mounts what a system needs, loads the driver, brings the links up, runs the command it was told
//! to (or a shell) and powers off ([`init`]). Under any other name it is a command ([`verbs`]) that prints one JSON
//! object and exits 1, with a sentence on stderr, when something is not as it must be.

mod bpf;
mod channel;
mod ethtool;
mod function;
mod init;
mod map;
mod namespace;
mod net;
mod netlink;
mod sys;
mod verbs;

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    let mut arguments: Vec<OsString> = env::args_os().collect();
    let mut name = base_name(&arguments.remove(0));
    if ["mana-agent", "init"].contains(&name.as_str()) && !arguments.is_empty() {
        name = base_name(&arguments.remove(0));
    }
    match verbs::run(&name, pico_args::Arguments::from_vec(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One write: standard error has no buffer, and each write becomes a frame.
            let _ = std::io::stderr().write_all(format!("{name}: {error:#}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn base_name(path: &OsString) -> String {
    Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned()
}
