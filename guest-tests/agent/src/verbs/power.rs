//! `suspend [SECONDS] [--no-link]`: suspend, woken by the real-time clock; to RAM where the machine can, else to idle.
//! Afterwards links are up again, unless they are nobody's business.
//!
//! QEMU's clock raises its wake event only in a machine that is in S3, so that a suspend to idle there has no end.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::rebind::bring_up;
use crate::function;
use crate::sys;

const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";
const KINDS: &str = "/sys/power/mem_sleep";
const SUCCESSES: &str = "/sys/power/suspend_stats/success";

/// The driver's suspend and resume callbacks run for every function; afterwards the links are up again.
pub fn suspend(arguments: &mut Arguments) -> Result<Value> {
    let links = !arguments.contains("--no-link");
    let seconds: u64 = arguments.opt_free_from_str()?.unwrap_or(3);
    let before = successes()?;
    let start = sys::uptime_ms();
    set_alarm(seconds)?;
    let kinds = fs::read_to_string(KINDS).with_context(|| KINDS.to_owned())?;
    if kinds.contains("deep") {
        fs::write(KINDS, "deep").context("choose suspend to RAM")?;
        let bridge = PowerRegisters::save()?;
        fs::write("/sys/power/state", "mem").context("suspend")?;
        bridge.map_or(Ok(()), |bridge| bridge.restore())?;
    } else {
        fs::write(KINDS, "s2idle").context("choose suspend to idle")?;
        fs::write("/sys/power/state", "freeze").context("suspend")?;
    }
    let duration = sys::uptime_ms() - start;
    ensure!(successes()? == before + 1, "the kernel counts no successful suspend");
    for function in function::all() {
        ensure!(function.is_bound(), "{} is not bound after resume", function.address);
        if links {
            bring_up(&function)?;
        }
    }
    Ok(json!({ "duration_ms": duration }))
}

/// Where an ICH9 LPC bridge (QEMU's q35) decodes the ACPI registers: PMBASE and ACPI_CNTL, lost in S3.
///
/// It is up to firmware to write them again; SeaBIOS does not, and without them a second suspend or a power-off is lost.
struct PowerRegisters {
    config: File,
    values: [u8; 8],
}

impl PowerRegisters {
    const BRIDGE: &str = "/sys/bus/pci/devices/0000:00:1f.0";
    /// PMBASE in configuration space, ACPI_CNTL behind it.
    const OFFSET: u64 = 0x40;

    /// Those of the bridge, if there is one.
    fn save() -> Result<Option<Self>> {
        let id = |name| fs::read_to_string(format!("{}/{name}", Self::BRIDGE)).unwrap_or_default();
        if (id("vendor").trim(), id("device").trim()) != ("0x8086", "0x2918") {
            return Ok(None);
        }
        let path = format!("{}/config", Self::BRIDGE);
        let config = File::options().read(true).write(true).open(path).context("the LPC bridge")?;
        let mut values = [0; 8];
        config.read_exact_at(&mut values, Self::OFFSET).context("the LPC bridge")?;
        Ok(Some(Self { config, values }))
    }

    fn restore(&self) -> Result<()> {
        self.config.write_all_at(&self.values, Self::OFFSET).context("the LPC bridge")
    }
}

fn successes() -> Result<u64> {
    let text = fs::read_to_string(SUCCESSES).with_context(|| SUCCESSES.to_owned())?;
    text.trim().parse().with_context(|| SUCCESSES.to_owned())
}

/// The clock's own time counts, which need not be the system's.
fn set_alarm(seconds: u64) -> Result<()> {
    let since_epoch =
        fs::read_to_string("/sys/class/rtc/rtc0/since_epoch").context("there is no real-time clock")?;
    let now = since_epoch
        .trim()
        .parse()
        .unwrap_or_else(|_| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()));
    fs::write(ALARM, "0").with_context(|| ALARM.to_owned())?;
    fs::write(ALARM, (now + seconds).to_string()).with_context(|| ALARM.to_owned())
}
