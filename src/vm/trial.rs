//! Lies by the thousand: a machine runs again and again, each time under a host that tells the lies of another seed, for
//! as long as it takes a driver to fall over them.
//!
//! From a saved machine nothing is booted: RAM is mapped anew from the file, copy on write, so that a trial costs little
//! more than the time that it is given. Without one each trial is a boot, and the driver's probe is lied to, too. What a
//! seed tells is told the same way the next time, as far as the guest does the same.

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::SubscriberOps;
use mana_device::ManaDevice;
use mana_device::host::{Answer, Value};

use super::{Machine, Outside, report};
use crate::config::{Lies, VmConfig};
use crate::events::Timeout;
use crate::legacy;
use crate::snapshot::Snapshot;
use crate::stop::Outcome;

/// How often it is said how far it has come.
const PROGRESS: Duration = Duration::from_secs(60);
/// Most machines that are tried to find the shortest list of lies.
const MAX_CUTS: usize = 200;

/// A lie by its name, and in words.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lie {
    name: String,
    text: String,
}

impl fmt::Display for Lie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.text)
    }
}

/// What came of a seed.
struct Trial {
    outcome: Outcome,
    told: Vec<Lie>,
}

impl Trial {
    /// What the guest's kernel said when it crashed.
    fn crash(&self) -> Option<String> {
        match &self.outcome {
            Outcome::GuestPanic(line) => Some(line.clone()),
            Outcome::Reset => Some("the guest asked for a reset".into()),
            Outcome::PowerOff | Outcome::TimedOut | Outcome::RuleBroken(_) | Outcome::HostError(_) => None,
        }
    }
}

/// The machine of `snapshot`, or a new one, once for each seed of `lies`.
///
/// # Errors
/// Anything of the host's that fails.
pub(super) fn run(
    config: &VmConfig,
    outside: &Outside,
    snapshot: Option<&Snapshot>,
    lies: &Lies,
) -> anyhow::Result<ExitCode> {
    let around = Around { config, outside, snapshot, lies };
    let begin = Instant::now();
    let mut said = begin;
    let mut tally = Tally::default();
    for seed in lies.first..=lies.last {
        let trial = around.attempt(seed, &lies.only)?;
        if let Outcome::HostError(_) = trial.outcome {
            return Ok(report(config, &trial.outcome, None));
        }
        let crash = trial.crash();
        tally.count(seed, trial.told.len(), crash.as_deref());
        if let Some(line) = crash {
            eprintln!("mana-vmm: seed {seed}: {} lies, then: {line}", trial.told.len());
            let shortest = if lies.minimise { around.minimise(seed, trial.told)? } else { trial.told };
            shortest.iter().for_each(|lie| eprintln!("mana-vmm:   {lie}"));
            if lies.minimise {
                let only: Vec<_> = shortest.iter().map(|lie| format!(",only={}", lie.name)).collect();
                eprintln!("mana-vmm:   again by --lies {seed}{}{}", lies.how(), only.concat());
            }
        }
        if outside.is_over() {
            break;
        }
        if said.elapsed() >= PROGRESS {
            said = Instant::now();
            eprintln!("mana-vmm: {}", tally.sum(begin.elapsed()));
        }
    }
    tally.say(begin.elapsed());
    let crashed = Outcome::GuestPanic(String::new()).exit_code();
    Ok(if tally.crashes.is_empty() { ExitCode::SUCCESS } else { crashed })
}

/// What came of all seeds.
#[derive(Default)]
struct Tally {
    seeds: u64,
    lies: u64,
    /// By what they are about: how many, and the first seed.
    crashes: BTreeMap<String, (u64, u64)>,
}

impl Tally {
    fn count(&mut self, seed: u64, lies: usize, crash: Option<&str>) {
        self.seeds += 1;
        self.lies += lies as u64;
        if let Some(line) = crash {
            self.crashes.entry(legacy::what(line)).or_insert((0, seed)).0 += 1;
        }
    }

    fn sum(&self, elapsed: Duration) -> String {
        let an_hour = |count: u64| count as f64 * 3600.0 / elapsed.as_secs_f64();
        let crashed: u64 = self.crashes.values().map(|(count, _)| count).sum();
        format!(
            "{} seeds with {} lies in {} s, {:.0} and {:.0} an hour; the guest crashed with {crashed}",
            self.seeds,
            self.lies,
            elapsed.as_secs(),
            an_hour(self.seeds),
            an_hour(self.lies),
        )
    }

    fn say(&self, elapsed: Duration) {
        eprintln!("mana-vmm: {}", self.sum(elapsed));
        let mut most: Vec<_> = self.crashes.iter().collect();
        most.sort_by_key(|(_, (count, _))| std::cmp::Reverse(*count));
        for (what, (count, first)) in most {
            eprintln!("mana-vmm:   {count} times, first with seed {first}: {what}");
        }
    }
}

struct Around<'a> {
    config: &'a VmConfig,
    outside: &'a Outside,
    snapshot: Option<&'a Snapshot>,
    lies: &'a Lies,
}

impl Around<'_> {
    /// The machine runs with a host that tells the lies of `seed`, or `only` these of them.
    fn attempt(&self, seed: u64, only: &[String]) -> anyhow::Result<Trial> {
        let Self { config, outside, snapshot, lies } = self;
        let mut machine = Machine::build(config, outside, *snapshot)?;
        let devices = machine.cards();
        for device in &devices {
            let asked = device.control(&["mark".to_owned(), format!("seed-{seed}")]);
            let asked = asked.and_then(|_| device.control(&lies.words(seed, only)));
            asked.map_err(anyhow::Error::msg)?;
        }
        let span = Timeout::new(lies.span(snapshot.is_some()), machine.stop.clone())?;
        machine.events.add_subscriber(Box::new(span));
        let (outcome, _) = machine.run(config, outside)?;
        Ok(Trial { outcome, told: all_told(&devices) })
    }

    /// The shortest list of lies that is found to crash the guest with `seed`: halves are left out, then quarters, as
    /// long as it still crashes (Zeller's ddmin).
    fn minimise(&self, seed: u64, told: Vec<Lie>) -> anyhow::Result<Vec<Lie>> {
        let mut cuts = 0;
        shortest(told, |lies| {
            cuts += 1;
            if cuts > MAX_CUTS || self.outside.is_over() {
                return Ok(false);
            }
            let names: Vec<_> = lies.iter().map(|lie| lie.name.clone()).collect();
            Ok(self.attempt(seed, &names)?.crash().is_some())
        })
    }
}

/// What is left of `items` when no piece of it can be left out any more for `still` to hold.
fn shortest<T: Clone>(
    mut items: Vec<T>,
    mut still: impl FnMut(&[T]) -> anyhow::Result<bool>,
) -> anyhow::Result<Vec<T>> {
    let mut pieces = 2;
    while items.len() > 1 {
        let len = items.len().div_ceil(pieces);
        let without =
            |piece: usize| [&items[..piece * len], &items[((piece + 1) * len).min(items.len())..]].concat();
        let mut cut = None;
        for piece in 0..items.len().div_ceil(len) {
            let rest = without(piece);
            if still(&rest)? {
                cut = Some(rest);
                break;
            }
        }
        match cut {
            Some(rest) => {
                items = rest;
                pieces = (pieces - 1).max(2);
            }
            None if len == 1 => break,
            None => pieces = (pieces * 2).min(items.len()),
        }
    }
    Ok(items)
}

/// Say on standard error what lies the hosts of `cards` have told, if any.
pub(super) fn say_lies(cards: &[Arc<ManaDevice>]) {
    let told = all_told(cards);
    if !told.is_empty() {
        eprintln!("mana-vmm: the host had told {} lies:", told.len());
        told.iter().for_each(|lie| eprintln!("mana-vmm:   {lie}"));
    }
}

fn all_told(cards: &[Arc<ManaDevice>]) -> Vec<Lie> {
    let answers = cards.iter().map(|card| card.control(&["hostile", "list"]));
    answers.flat_map(|answer| answer.map_or_else(|_| Vec::new(), told)).collect()
}

/// The lies in an answer to `hostile list`.
fn told(answer: Answer) -> Vec<Lie> {
    let lists = answer.0.into_iter().filter_map(|(_, value)| match value {
        Value::List(list) => Some(list),
        _ => None,
    });
    let lie = |Answer(fields): Answer| {
        let text = |name| {
            fields.iter().find_map(|(known, value)| match value {
                Value::Text(text) if *known == name => Some(text.clone()),
                _ => None,
            })
        };
        Some(Lie { name: text("lie")?, text: text("text")? })
    };
    lists.flatten().filter_map(lie).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lies_that_matter_are_found_among_many() {
        for guilty in [vec![17], vec![3, 90], vec![0, 1, 2], vec![99], (40..50).collect()] {
            let mut tries = 0;
            let left = shortest((0..100).collect(), |items: &[i32]| {
                tries += 1;
                Ok(guilty.iter().all(|item| items.contains(item)))
            });
            assert_eq!(left.unwrap(), guilty);
            assert!(tries < MAX_CUTS, "{tries} for {guilty:?}");
        }
        assert_eq!(shortest(vec![1], |_: &[i32]| Ok(true)).unwrap(), [1], "there is one at least");
        assert!(shortest(Vec::new(), |_: &[i32]| Ok(true)).unwrap().is_empty());
    }

    #[test]
    fn crashes_are_told_apart_by_what_they_are_about() {
        let mut tally = Tally::default();
        let warning = |seconds| {
            Some(format!("[ {seconds}.5] WARNING: a.c:1 at mana_poll+0x1/0x2 [mana], CPU#{seconds}"))
        };
        for (seed, line) in [None, warning(1), Some("[ 3.0] BUG: gone".into()), warning(2)].iter().enumerate()
        {
            tally.count(seed as u64, 5, line.as_deref());
        }
        let sum = tally.sum(Duration::from_secs(36));
        assert_eq!(sum, "4 seeds with 20 lies in 36 s, 400 and 2000 an hour; the guest crashed with 3");
        let about: Vec<_> = tally.crashes.into_iter().collect();
        assert_eq!(about, [("BUG: gone".into(), (1, 2)), ("WARNING at mana_poll+0x1".into(), (2, 1))]);
    }

    #[test]
    fn an_answer_names_its_lies() {
        let lie =
            |name: &str| Answer(vec![("lie", name.to_owned().into()), ("text", "drop".to_owned().into())]);
        let names: Vec<_> = told(Answer::one("lies", vec![lie("cqe:1:2"), lie("msix:0:1")]));
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        assert_eq!(names, ["cqe:1:2: drop", "msix:0:1: drop"]);
    }
}
