//! `suspend [SECONDS]`: suspend to idle, woken by the real-time clock.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::rebind::bring_up;
use crate::function;
use crate::sys;

const ALARM: &str = "/sys/class/rtc/rtc0/wakealarm";
const SUCCESSES: &str = "/sys/power/suspend_stats/success";

/// The driver's suspend and resume callbacks run for every function; afterwards the links are up again.
pub fn suspend(arguments: &mut Arguments) -> Result<Value> {
    let seconds: u64 = arguments.opt_free_from_str()?.unwrap_or(3);
    let before = successes()?;
    let start = sys::uptime_ms();
    set_alarm(seconds)?;
    fs::write("/sys/power/mem_sleep", "s2idle").context("choose suspend to idle")?;
    fs::write("/sys/power/state", "freeze").context("suspend")?;
    let duration = sys::uptime_ms() - start;
    ensure!(successes()? == before + 1, "the kernel counts no successful suspend");
    for function in function::all() {
        ensure!(function.is_bound(), "{} is not bound after resume", function.address);
        bring_up(&function)?;
    }
    Ok(json!({ "duration_ms": duration }))
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
