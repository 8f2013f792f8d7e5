//! Times the boot of a guest in any VMM, from the outside; `resources/bench-boot` runs it.
//!
//! `boot-stopwatch NAME RAM-MIB PROGRAM ARGUMENT...` starts the VMM and waits for what the guest's agent says on the
//! VMM's output: stages as JSON, each with the guest's own uptime. It prints one JSON object with milliseconds from
//! the VMM's start:
//!
//! | key | from the VMM's start to |
//! |---|---|
//! | `kernel_ms` | the start of the kernel's clock, after it has unpacked itself: `init_ms` less the guest's uptime then |
//! | `init_ms` | the guest's init |
//! | `probe_ms` | the driver's probe, if there is a driver |
//! | `link_ms` | the link with an address, if there is one |
//! | `end_ms` | the VMM's end after the guest's power-off |
//!
//! `own_kib` is the VMM's resident memory beside the guest's RAM when the last stage came, in KiB.

use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// Stages of the agent, and the key that each becomes.
const STAGES: [(&str, &str); 3] = [("boot", "init_ms"), ("probe", "probe_ms"), ("link", "link_ms")];

fn main() -> ExitCode {
    match run() {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("boot-stopwatch: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<Value> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [name, ram, program, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: boot-stopwatch NAME RAM-MIB PROGRAM ARGUMENT...");
    };
    let ram_kib = ram.parse::<u64>().context("RAM-MIB is no number")? * 1024;
    let start = Instant::now();
    let (mut output, writer) = std::io::pipe()?;
    let mut child = Command::new(program)
        .args(rest)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let mut report = Map::from_iter([("vmm".to_owned(), json!(name))]);
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = output.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        let elapsed = start.elapsed().as_millis() as u64;
        text.extend_from_slice(&buffer[..count]);
        for (stage, key) in STAGES {
            let Some(uptime) = uptime_at(&text, stage) else { continue };
            if report.contains_key(key) {
                continue;
            }
            report.insert(key.to_owned(), elapsed.into());
            if stage == "boot" {
                report.insert("kernel_ms".to_owned(), elapsed.saturating_sub(uptime).into());
            }
            report.insert("own_kib".to_owned(), own_memory(child.id(), ram_kib)?.into());
        }
    }
    let status = child.wait()?;
    report.insert("end_ms".to_owned(), (start.elapsed().as_millis() as u64).into());
    ensure!(status.success(), "{name} ended with {status}: {}", String::from_utf8_lossy(&text));
    ensure!(
        report.contains_key("init_ms"),
        "{name}'s guest never started: {}",
        String::from_utf8_lossy(&text)
    );
    Ok(report.into())
}

/// The guest's uptime in milliseconds when it reached `stage`, if it has.
fn uptime_at(output: &[u8], stage: &str) -> Option<u64> {
    let text = String::from_utf8_lossy(output);
    let mark = format!("\"stage\":\"{stage}\",\"uptime_ms\":");
    let (_, rest) = text.split_once(&mark)?;
    let (number, _) = rest.split_once(['}', ','])?;
    number.parse().ok()
}

/// Resident KiB of process `pid` outside the mapping that is the guest's RAM, the largest of at least half its size.
fn own_memory(pid: u32, ram_kib: u64) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the VMM's memory map")?;
    let field = |line: &str, name: &str| {
        let value = line.strip_prefix(name)?.trim().strip_suffix("kB")?;
        value.trim().parse::<u64>().ok()
    };
    let (mut resident, mut size, mut guest) = (0, 0, 0);
    for line in maps.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        } else if let Some(kib) = field(line, "Rss:") {
            resident += kib;
            if size >= ram_kib / 2 {
                guest += kib;
            }
        }
    }
    Ok(resident - guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_stages_in_frames_and_in_logs() {
        let output = b"L\x10\0{\"kernel\":\"6\",\"stage\":\"boot\",\"uptime_ms\":120}S\x01\x000";
        assert_eq!(uptime_at(output, "boot"), Some(120));
        assert_eq!(uptime_at(output, "probe"), None);
        assert_eq!(uptime_at(&output[..40], "boot"), None);
    }

    #[test]
    fn counts_this_process_s_memory() {
        assert!(own_memory(std::process::id(), 1 << 30).unwrap() > 100);
    }
}
