//! `mana-vmm check`: what this machine can do, what is missing, and how to get it.

use std::path::Path;
use std::process::ExitCode;

use crate::nested::emulator::Emulator;
use crate::{accel, nested, places};

/// One line of the table.
struct Row {
    what: &'static str,
    /// What there is, or what is wrong and what would help.
    found: Result<String, String>,
}

/// Prints the table; with `deep`, starts level 1 and runs the KVM probe in it too.
///
/// The exit code says whether guests can run here, one way or the other.
///
/// # Errors
/// None so far: what is missing is an answer.
pub fn run(deep: bool) -> anyhow::Result<ExitCode> {
    let kvm = Row { what: "KVM", found: kvm() };
    let nested = Row { what: "nested runs", found: nested(deep) };
    let can_boot = kvm.found.is_ok() || nested.found.is_ok();
    let rows = [
        kvm,
        nested,
        Row { what: "guests", found: guests() },
        Row { what: "guest agent", found: agent() },
        Row { what: "tap", found: tap() },
        Row { what: "build-driver", found: driver_tools() },
    ];
    for row in &rows {
        let (mark, text) = match &row.found {
            Ok(text) => ("yes", text),
            Err(text) => ("no", text),
        };
        println!("{:<13} {mark:<4} {text}", row.what);
    }
    println!();
    println!("--accel auto {}", verdict(&rows));
    Ok(if can_boot { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verdict(rows: &[Row; 6]) -> &'static str {
    match rows {
        [Row { found: Ok(_), .. }, ..] => "runs guests on this machine's KVM",
        [_, Row { found: Ok(_), .. }, ..] => "runs guests nested, in an emulated machine",
        _ => "can't run guests yet: one of the first two lines has to say yes",
    }
}

fn kvm() -> Result<String, String> {
    accel::kvm_runs_guests().map_err(|reason| reason.to_string())?;
    Ok("/dev/kvm runs guests".to_owned())
}

fn nested(deep: bool) -> Result<String, String> {
    let emulator = Emulator::find().map_err(|reason| reason.to_string())?;
    let text = format!("QEMU {} ({})", emulator.version, emulator.program.display());
    if !deep {
        return Ok(text);
    }
    nested::probe().map_err(|reason| format!("{text}: {reason:#}"))?;
    Ok(format!("{text}; level 1 came up and its KVM runs guests"))
}

fn guests() -> Result<String, String> {
    let folder = places::guests();
    let help = || format!("none in {}: resources/fetch-guests 6.1 6.12 newest", folder.display());
    let entries = folder.read_dir().map_err(|_| help())?;
    let mut series: Vec<_> = entries.filter_map(|entry| guest(&entry.ok()?.path())).collect();
    series.sort();
    if series.is_empty() { Err(help()) } else { Ok(series.join(", ")) }
}

/// `6.12 (6.12.117+deb13-cloud-amd64)` for a guest's folder.
fn guest(folder: &Path) -> Option<String> {
    let version = std::fs::read_to_string(folder.join("version")).ok()?;
    let series = folder.file_name()?.to_str()?;
    folder.join("vmlinuz").is_file().then(|| format!("{series} ({})", version.trim()))
}

fn agent() -> Result<String, String> {
    let agent = std::env::current_exe().unwrap_or_default().with_file_name("mana-agent");
    if agent.is_file() {
        Ok(agent.display().to_string())
    } else {
        Err(format!("{} is missing: cargo build --workspace", agent.display()))
    }
}

fn tap() -> Result<String, String> {
    let tun = "/dev/net/tun";
    let open = std::fs::OpenOptions::new().read(true).write(true).open(tun);
    open.map_err(|error| format!("{tun}: {error}; --netdev peer needs nothing of the kind"))?;
    Ok(format!("{tun} opens; --netdev tap takes an interface that you may use, nested runs none"))
}

fn driver_tools() -> Result<String, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|folder| folder.join("mmdebstrap")).find(|tool| tool.is_file());
    let tool = found
        .ok_or("mmdebstrap is missing: resources/build-driver installs it (sudo apt install mmdebstrap)")?;
    Ok(format!("{} makes the folder to build in", tool.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_needs_kernel_and_version() {
        let folder = tempfile::tempdir().unwrap();
        let guest_folder = folder.path().join("6.12");
        std::fs::create_dir(&guest_folder).unwrap();
        assert_eq!(guest(&guest_folder), None);
        std::fs::write(guest_folder.join("version"), "6.12.1-cloud-amd64\n").unwrap();
        assert_eq!(guest(&guest_folder), None);
        std::fs::write(guest_folder.join("vmlinuz"), "").unwrap();
        assert_eq!(guest(&guest_folder).unwrap(), "6.12 (6.12.1-cloud-amd64)");
    }
}
