//! `sweep --do ACTION --action CMD --recover CMD [--prepare CMD] [--command WHAT] [--from N] [--most N] [--reload]`: the
//! n-th command fails, for every n until CMD has no n-th.
//!
//! After each n the host is healed and the driver must recover: the recovery's commands work, with `--reload` after the
//! driver was loaded afresh if need be, and the kernel's log has no new complaint. What the host holds more or less than
//! after a run without a fault, and which of its rules were broken, is told too. What happens goes to standard output as
//! lines of JSON, one before each n, since the guest may not live to tell, and one after it. A kernel that has
//! complained is not trusted with another n.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::log_check;
use crate::channel;

/// Longest run of one of the commands: a driver may wait 30 s for each of a few answers.
const PATIENCE: Duration = Duration::from_secs(150);
/// How long a command is given to end once it was told to.
const LAST_CHANCE: Duration = Duration::from_secs(5);
/// What brings a driver back that does not recover, before the next n.
const RELOAD: &str = "rmmod mana_ib 2>/dev/null; rmmod mana; modprobe mana && link-up";
/// How long the newest driver may be about a reset of its own: it sleeps 10 s, and may look for the function again.
const RESET: Duration = Duration::from_secs(40);
/// Characters of a command's words that are passed on.
const LONGEST: usize = 300;

/// One sweep.
struct Sweep {
    fault: String,
    command: String,
    prepare: Option<String>,
    action: String,
    recover: String,
    allowed: Vec<String>,
    /// Loading the driver afresh is a recovery, too.
    may_reload: bool,
    /// Objects that the host holds after a run without a fault.
    ledger: BTreeMap<String, u64>,
    /// How often each rule was broken so far.
    rules: BTreeMap<String, u64>,
    /// Complaints in the log that are told already.
    complaints: usize,
}

/// There while a sweep is under way, and where one has ended early: this guest is not for another then.
const UNDER_WAY: &str = "/run/sweep";

/// Goes through all n; ends early, with an error, where the guest is no more to be trusted.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    if fs::exists(UNDER_WAY)? {
        bail!("a sweep before this one did not come to its end");
    }
    fs::write(UNDER_WAY, "")?;
    let report = sweep(arguments)?;
    fs::remove_file(UNDER_WAY)?;
    Ok(report)
}

fn sweep(arguments: &mut Arguments) -> Result<Value> {
    let mut sweep = Sweep {
        fault: arguments.value_from_str("--do")?,
        command: arguments.opt_value_from_str("--command")?.unwrap_or_else(|| "any".to_owned()),
        prepare: arguments.opt_value_from_str("--prepare")?,
        action: arguments.value_from_str("--action")?,
        recover: arguments.value_from_str("--recover")?,
        allowed: arguments.values_from_str("--allow")?,
        may_reload: arguments.contains("--reload"),
        ledger: BTreeMap::new(),
        rules: BTreeMap::new(),
        complaints: 0,
    };
    let first: u32 = arguments.opt_value_from_str("--from")?.unwrap_or(1);
    let most: u32 = arguments.opt_value_from_str("--most")?.unwrap_or(200);
    sweep.begin().context("without a fault")?;
    for n in first..=most {
        let point = sweep.point(n)?;
        let is_past_end = point["hits"] == 0;
        if !is_past_end {
            println!("{}", json!({ "sweep": "point", "point": point }));
        }
        let is_lost = point["lost"] == true;
        if is_lost {
            bail!("nothing brings the driver back");
        }
        if is_past_end {
            return Ok(json!({ "sweep": "end", "do": sweep.fault, "commands": n - 1 }));
        }
        if point["complained"] == true {
            bail!("the kernel has complained");
        }
    }
    Ok(json!({ "sweep": "end", "do": sweep.fault, "commands": most, "cut": true }))
}

impl Sweep {
    /// A run without a fault, after which we know what the host holds.
    fn begin(&mut self) -> Result<()> {
        host(&["fault", "clear"])?;
        self.prepare()?;
        shell(&self.action).context("action")?;
        shell(&self.recover).context("recovery")?;
        self.ledger = ledger()?;
        self.rules = rules()?;
        self.complaints = log_check::complaints_now(&self.allowed)?.len();
        Ok(())
    }

    fn prepare(&self) -> Result<()> {
        self.prepare.as_ref().map_or(Ok(()), |command| shell(command).context("preparation").map(drop))
    }

    fn point(&mut self, n: u32) -> Result<Value> {
        println!("{}", json!({ "sweep": "begin", "n": n, "do": self.fault }));
        self.prepare()?;
        host(&["mark", &format!("sweep {} {n}", self.fault)])?;
        let (command, nth) = (format!("command={}", self.command), format!("nth={n}"));
        host(&["fault", "add", &command, &nth, &format!("do={}", self.fault)])?;
        let start = Instant::now();
        let action = shell(&self.action);
        let hits = host(&["fault", "clear"])?["hits"].as_u64().unwrap_or_default();
        let mut problems = Vec::new();
        let recovery = shell(&self.recover);
        let (mut reloaded, mut lost) = (false, false);
        let (mut held, mut rules) = (BTreeMap::new(), BTreeMap::new());
        if recovery.is_ok() {
            held = self.held()?;
            rules = self.broken()?;
        }
        if recovery.is_err() || !held.is_empty() {
            // What is left is told once.
            reloaded = self.reload();
            lost = !reloaded;
        }
        if let Some(error) = recovery.err().filter(|_| lost || !self.may_reload) {
            problems.push(format!("does not recover: {error:#}"));
        }
        let complaints = log_check::complaints_now(&self.allowed)?;
        let fresh = complaints.get(self.complaints..).unwrap_or_default();
        if !fresh.is_empty() {
            problems.push(format!("the kernel's log says: {}", log_check::summary(fresh)?));
        }
        self.complaints = complaints.len();
        if hits == 0
            && let Err(error) = &action
        {
            problems.push(format!("the action fails without a fault: {error:#}"));
        }
        Ok(json!({
            "n": n,
            "do": self.fault,
            "hits": hits,
            "action": action.map_or_else(|error| format!("{error:#}"), |()| "works".to_owned()),
            "problem": if problems.is_empty() { None } else { Some(problems.join("; ")) },
            "held": held,
            "rules": rules,
            "reloaded": reloaded,
            "lost": lost,
            "complained": !fresh.is_empty(),
            "ms": start.elapsed().as_millis() as u64,
        }))
    }

    /// What the host holds more or less than after a run without a fault.
    fn held(&self) -> Result<BTreeMap<String, i64>> {
        let now = ledger()?;
        let difference = |(kind, number): (&String, &u64)| {
            let before = self.ledger.get(kind).copied().unwrap_or_default();
            (*number != before).then(|| (kind.clone(), *number as i64 - before as i64))
        };
        Ok(now.iter().filter_map(difference).collect())
    }

    /// Rules that were broken since we asked last.
    fn broken(&mut self) -> Result<BTreeMap<String, u64>> {
        let now = rules()?;
        let fresh = |(rule, number): (&String, &u64)| {
            let before = self.rules.get(rule).copied().unwrap_or_default();
            (*number > before).then(|| (rule.clone(), number - before))
        };
        let broken = now.iter().filter_map(fresh).collect();
        self.rules = now;
        Ok(broken)
    }

    /// Loads the driver afresh. Does it work? While it resets the function by itself, it can't be unloaded.
    fn reload(&mut self) -> bool {
        let start = Instant::now();
        let mut works = shell(RELOAD).is_ok() && shell(&self.recover).is_ok();
        while !works && start.elapsed() < RESET {
            thread::sleep(Duration::from_secs(3));
            works = shell(RELOAD).is_ok() && shell(&self.recover).is_ok();
        }
        if works && let Ok(ledger) = ledger() {
            self.ledger = ledger;
            self.rules = rules().unwrap_or_default();
        }
        works
    }
}

fn host(words: &[&str]) -> Result<Value> {
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let answer = channel::ask_host(&words)?;
    if answer["ok"] != true {
        bail!("host {}: {}", words.join(" "), answer["error"]);
    }
    Ok(answer)
}

/// Live objects by kind.
fn ledger() -> Result<BTreeMap<String, u64>> {
    numbers("ledger")
}

/// Breaches by rule.
fn rules() -> Result<BTreeMap<String, u64>> {
    numbers("rules")
}

/// The numbers in the host's answer to `word`, by name.
fn numbers(word: &str) -> Result<BTreeMap<String, u64>> {
    let answer = host(&[word])?;
    let named = answer[word].as_object().with_context(|| format!("host {word}: {answer}"))?;
    Ok(named.iter().filter_map(|(name, value)| Some((name.clone(), value.as_u64()?))).collect())
}

/// Runs a shell command, which must end in time and with status 0.
fn shell(command: &str) -> Result<()> {
    let child = Command::new("/bin/busybox")
        .args(["sh", "-c", &format!("({command}) >/tmp/sweep 2>&1")])
        .stdin(Stdio::null())
        .spawn()
        .context("/bin/busybox sh")?;
    let status = wait(child)?;
    if status == Some(0) {
        return Ok(());
    }
    let output = fs::read("/tmp/sweep").unwrap_or_default();
    let said: String =
        String::from_utf8_lossy(&output).trim().replace('\n', " / ").chars().take(LONGEST).collect();
    match status {
        Some(status) => bail!("status {status}: {said}"),
        None => bail!("not over after {} s: {said}", PATIENCE.as_secs()),
    }
}

/// Exit status; none where it did not end in time and was killed, or could not even be killed.
fn wait(mut child: Child) -> Result<Option<i32>> {
    let start = Instant::now();
    let mut killed = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(if killed { None } else { Some(status.code().unwrap_or(-1)) });
        }
        if !killed && start.elapsed() > PATIENCE {
            child.kill()?;
            killed = true;
        }
        if start.elapsed() > PATIENCE + LAST_CHANCE {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
