//! Wakes a guest under QEMU that sleeps too long, by QEMU's monitor (QMP).
//!
//! A guest sets its clock's alarm and suspends to RAM. If its driver takes longer to suspend than the alarm is away, as
//! where the host's answers are bad, the alarm is gone by when the guest sleeps.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::relay;

/// How long a guest may sleep: longer than any alarm that a scenario sets.
const LONGEST_SLEEP: Duration = Duration::from_secs(15);

/// Looks after the guest whose monitor is at `monitor`, until it is gone.
pub fn start(monitor: &Path) {
    let monitor = monitor.to_owned();
    // It ends with QEMU, whose end nobody has to wait for here.
    thread::spawn(move || {
        if let Err(error) = look_after(&monitor) {
            eprintln!("guest-tests: QEMU's monitor: {error:#}");
        }
    });
}

fn look_after(monitor: &Path) -> Result<()> {
    let mut stream = relay::connect(monitor)?;
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    stream.set_read_timeout(Some(LONGEST_SLEEP))?;
    let mut events = BufReader::new(stream.try_clone()?);
    let (mut line, mut sleeps) = (String::new(), false);
    loop {
        match events.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                let event = serde_json::from_str::<Value>(&line).unwrap_or_default();
                match event["event"].as_str() {
                    Some("SUSPEND") => sleeps = true,
                    Some("WAKEUP") => sleeps = false,
                    _ => {}
                }
                line.clear();
            }
            // Nothing has happened for so long.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if sleeps {
                    stream.write_all(b"{\"execute\":\"system_wakeup\"}\n")?;
                }
            }
            // QEMU was killed.
            Err(_) => return Ok(()),
        }
    }
}
