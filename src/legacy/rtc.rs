//! The MC146818 real-time clock: the host's time (UTC, BCD, 24 hours), and an alarm within the day that can wake a
//! sleeping guest. Setting the time has no effect.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::Trigger;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::AcpiPm;
use crate::irq::IrqLine;

// Register numbers (MC146818 data sheet, figure 10).
const SECONDS: u8 = 0;
const SECONDS_ALARM: u8 = 1;
const MINUTES: u8 = 2;
const MINUTES_ALARM: u8 = 3;
const HOURS: u8 = 4;
const HOURS_ALARM: u8 = 5;
const DAY_OF_WEEK: u8 = 6;
const DATE: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const REGISTER_A: u8 = 10;
const REGISTER_B: u8 = 11;
const REGISTER_C: u8 = 12;
const REGISTER_D: u8 = 13;
/// Where PCs keep the century (FADT's CENTURY field).
const CENTURY: u8 = 0x32;

/// 32768 Hz time base, no update in progress.
const A_TIME_BASE: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_ALARM_ENABLE: u8 = 1 << 5;
const C_ALARM: u8 = 1 << 5;
const C_IRQ: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
/// An alarm register from here on matches any value.
const DONT_CARE: u8 = 0xc0;
/// The index port's other bit masks NMIs.
const INDEX: u8 = 0x7f;
const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

/// Index and data port.
pub struct Rtc {
    state: Mutex<State>,
    line: IrqLine,
    pm: Arc<AcpiPm>,
}

/// What is kept: the time is the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    alarm: [u8; 3],
    alarm_enabled: bool,
    flags: u8,
}

struct State {
    index: u8,
    /// Seconds, minutes, hours.
    alarm: [u8; 3],
    alarm_enabled: bool,
    flags: u8,
    timer: TimerFd,
}

impl Rtc {
    /// A clock whose alarm interrupts by `line` and is an event of `pm`.
    ///
    /// # Errors
    /// The host has no timer left.
    pub fn new(line: IrqLine, pm: Arc<AcpiPm>) -> anyhow::Result<Self> {
        let timer = TimerFd::new().context("no timer descriptor")?;
        let state = State { index: 0, alarm: [0; 3], alarm_enabled: false, flags: 0, timer };
        Ok(Self { state: Mutex::new(state), line, pm })
    }

    /// What is kept.
    pub fn save(&self) -> RtcState {
        let State { index, alarm, alarm_enabled, flags, timer: _ } = &*self.state();
        RtcState { index: *index, alarm: *alarm, alarm_enabled: *alarm_enabled, flags: *flags }
    }

    /// Become what `saved` says. An interrupt that may have been on its way comes once more.
    pub fn load(&self, saved: &RtcState) {
        let mut state = self.state();
        let RtcState { index, alarm, alarm_enabled, flags } = *saved;
        (state.index, state.alarm, state.alarm_enabled) = (index & INDEX, alarm, alarm_enabled);
        state.flags = flags & (C_ALARM | C_IRQ);
        state.arm();
        if state.flags & C_IRQ != 0
            && let Err(error) = self.line.trigger()
        {
            crate::warn_limited!("RTC interrupt: {error}");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alarm(&self) {
        self.pm.rtc_alarm();
        let mut state = self.state();
        state.flags |= C_ALARM | C_IRQ;
        state.arm();
        if let Err(error) = self.line.trigger() {
            crate::warn_limited!("RTC interrupt: {error}");
        }
    }
}

impl State {
    fn read(&mut self) -> u8 {
        let time = Calendar::of(now().as_secs());
        match self.index {
            SECONDS => bcd(time.second),
            MINUTES => bcd(time.minute),
            HOURS => bcd(time.hour),
            DAY_OF_WEEK => bcd(time.day_of_week),
            DATE => bcd(time.date),
            MONTH => bcd(time.month),
            YEAR => bcd((time.year % 100) as u8),
            CENTURY => bcd((time.year / 100) as u8),
            SECONDS_ALARM => self.alarm[0],
            MINUTES_ALARM => self.alarm[1],
            HOURS_ALARM => self.alarm[2],
            REGISTER_A => A_TIME_BASE,
            REGISTER_B => B_24_HOURS | if self.alarm_enabled { B_ALARM_ENABLE } else { 0 },
            REGISTER_C => std::mem::take(&mut self.flags),
            REGISTER_D => D_VALID,
            _ => 0,
        }
    }

    fn write(&mut self, value: u8) {
        match self.index {
            SECONDS_ALARM => self.alarm[0] = value,
            MINUTES_ALARM => self.alarm[1] = value,
            HOURS_ALARM => self.alarm[2] = value,
            REGISTER_B => self.alarm_enabled = value & B_ALARM_ENABLE != 0,
            _ => return,
        }
        self.arm();
    }

    /// Let the timer expire when the alarm is due next.
    fn arm(&mut self) {
        let now = now();
        let due = next_match(self.alarm, now.as_secs()).filter(|_| self.alarm_enabled);
        let armed = match due {
            Some(due) => self.timer.reset(Duration::from_secs(due).saturating_sub(now), None),
            None => self.timer.clear(),
        };
        if let Err(error) = armed {
            crate::warn_limited!("RTC alarm: {error}");
        }
    }
}

/// The next second after `now` that the alarm registers match.
fn next_match(alarm: [u8; 3], now: u64) -> Option<u64> {
    (now + 1..=now + SECONDS_PER_DAY).find(|second| {
        let time = Calendar::of(*second);
        let fields = [time.second, time.minute, time.hour];
        alarm.into_iter().zip(fields).all(|(wanted, field)| wanted >= DONT_CARE || wanted == bcd(field))
    })
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Two decimal digits.
fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// A moment in UTC.
#[derive(Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    month: u8,
    date: u8,
    /// 1 is Sunday.
    day_of_week: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// `seconds` after 1970-01-01.
    fn of(seconds: u64) -> Self {
        let (days, second_of_day) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
        let (year, month, date) = civil_date(days);
        Self {
            year,
            month,
            date,
            day_of_week: ((days + 4) % 7 + 1) as u8,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }
}

/// Year, month and day of month of a day counted from 1970-01-01, by counting from 0000-03-01, when leap days come
/// last and the months' lengths follow a line.
fn civil_date(days: u64) -> (u64, u8, u8) {
    const DAYS_PER_ERA: u64 = 146_097;
    let days = days + 719_468;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let date = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month as u8, date as u8)
}

impl DevicePio for Rtc {
    fn pio_read(&self, _: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let mut state = self.state();
        match offset {
            0 => data.fill(0xff),
            _ => data.iter_mut().for_each(|byte| *byte = state.read()),
        }
    }

    fn pio_write(&self, _: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut state = self.state();
        for byte in data {
            match offset {
                0 => state.index = byte & INDEX,
                _ => state.write(*byte),
            }
        }
    }
}

/// The alarm, for the event loop.
pub struct RtcAlarm {
    rtc: Arc<Rtc>,
    timer: RawFd,
}

impl RtcAlarm {
    /// The alarm of `rtc`.
    pub fn new(rtc: Arc<Rtc>) -> Self {
        let timer = rtc.state().timer.as_raw_fd();
        Self { rtc, timer }
    }
}

impl MutEventSubscriber for RtcAlarm {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new_raw(self.timer, EventSet::IN)) {
            log::error!("RTC alarm: {error}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.rtc.alarm();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let of = |seconds| {
            let time = Calendar::of(seconds);
            (time.year, time.month, time.date, time.hour, time.minute, time.second, time.day_of_week)
        };
        assert_eq!(of(0), (1970, 1, 1, 0, 0, 0, 5));
        assert_eq!(of(951_868_799), (2000, 2, 29, 23, 59, 59, 3));
        assert_eq!(of(951_868_800), (2000, 3, 1, 0, 0, 0, 4));
        assert_eq!(of(1_735_689_599), (2024, 12, 31, 23, 59, 59, 3));
        assert_eq!(of(4_107_542_400), (2100, 3, 1, 0, 0, 0, 2));
    }

    #[test]
    fn alarms_match_by_field() {
        let noon = 951_825_600;
        assert_eq!(next_match([0x30, 0x00, 0x12], noon), Some(noon + 30));
        assert_eq!(next_match([0x30, 0xff, 0xff], noon + 30), Some(noon + 90));
        assert_eq!(next_match([0x00, 0x00, 0x12], noon), Some(noon + SECONDS_PER_DAY));
        assert_eq!(next_match([0x99, 0xff, 0xff], noon), None);
    }
}
