//! The language of the simulated host: the words behind `mana-vmm ctl SOCKET` and `mana-agent host`.
//!
//! | words | answer |
//! |---|---|
//! | `fault add command=WHAT [nth=N] [count=M\|all] [queue=ID] do=ACTION` | `fault`: its id |
//! | `fault list` | `faults`: id, text and hits of each |
//! | `fault clear [ID]` | `hits`: how often it struck, or all since the last `fault clear` |
//! | `event TYPE [port=N] [value=N] [eq=ID] [after=MS] [every=MS] [count=N] [at-command=N]` | `event`: its id |
//! | `event list` | `events`: id, text and how many are to come of each |
//! | `event stop [ID]` | nothing |
//! | `limits max-msix=N max-queues=N ports=N ...` | nothing; the host shows these from the next channel on |
//! | `profile NAME`, `profile list` | nothing, the host shows this profile from then on; `profiles`: their names |
//! | `hostile SEED [rate=N] [at=WHERE]... [only=LIE]...`, `hostile stop` | nothing; one in `rate` (100) is a lie from now on, or no more; of the seed's lies only these |
//! | `hostile list` | `lies`: those that were told, each with its name (`lie`, as `only` takes it) and `text` |
//! | `mark NAME` | nothing; the name goes into the trace, and commands are counted from here |
//! | `commands` | `commands`: commands of the hardware channel since the mark |
//! | `ledger`, `counters`, `rules` | live objects, counters, broken rules by name |
//!
//! WHAT is the driver's name of a command, its code (`0x20001`), or `any` for every command; or `smc` (a request in the
//! shared-memory channel), `eqe` (an event, with `type=N` only of that type), `cqe` (a completion), `msix` (an interrupt),
//! `reg` (a read of BAR0's registers). `queue` is the event or completion queue's id, the vector, or the register's
//! offset. `nth` counts what matches
//! from when the fault is set: 1, the default, is the next one. From then on `count` are struck, 1 if not given.
//!
//! ACTION is `status:STATUS`, `drop`, `lose` (done, but the answer gets lost), `delay:MS`, `hold` (until the faults are
//! cleared), `duplicate`, `edit:FIELD=VALUE`, `corrupt:SEED` or `event:TYPE`. `fault clear` without an id heals the host:
//! what was held comes, and events that were to come do not.
//!
//! WHERE is `completions`, `events` (and interrupts), `messages` or `registers`; all but the last if it is not given.
//!
//! TYPE is a number, or `fpga-reconfig` (132), `hwc-timeout` (133, `value` in ms), `link-up`, `link-down` (133, of `port`),
//! `rdma-suspend`, `rdma-resume` (134), `reset` (135), `qp-fatal` (176, `value` is the QP); the `value` of others stands in
//! the event's first word. It comes on event queue `eq`, by default the hardware channel's, `after` so long from now or
//! from the `at-command`-th command on, which it precedes; `count` of them, `every` so long, by default at once.

use super::answer::Answer;
use super::fault::{Action, Edit, Fault, Matcher, NS_PER_MS, Point};
use super::hostile::{Chance, Hostility, Where};
use super::later::{Scheduled, eqe};
use super::plan::Plan;
use super::profile::Profile;
use super::strike;
use crate::command;
use crate::queues::HWC_QUEUE;
use crate::wire::hwc::{self, MAX_MESSAGE};

/// What is asked of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Words {
    /// Set this fault.
    Add(Fault),
    /// Show the faults.
    List,
    /// Take a fault back, or all.
    Clear(Option<u64>),
    /// Raise an event.
    Raise(Scheduled),
    /// Show the events that are to come.
    Events,
    /// Take an event back, or all.
    Stop(Option<u64>),
    /// Show this profile from the next channel on.
    Profile(Box<Profile>),
    /// Which profiles are there?
    Profiles,
    /// Show these limits from the next channel on.
    Limits(Vec<(String, u32)>),
    /// Lie, or be honest again.
    Hostile(Option<(Hostility, Vec<Chance>)>),
    /// What lies were told?
    Lies,
    /// Name this moment.
    Mark(String),
    /// How many commands since the mark?
    Commands,
    /// What is alive?
    Ledger,
    /// What was counted?
    Counters,
    /// Which rules were broken?
    Rules,
}

/// Longest delay: a day.
const MAX_DELAY_MS: u64 = 24 * 60 * 60 * 1000;

impl Words {
    /// What `words` ask for.
    ///
    /// # Errors
    /// One sentence that says which word is wrong and what would be right.
    pub fn parse<W: AsRef<str>>(words: &[W]) -> Result<Self, String> {
        let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
        match words.as_slice() {
            ["fault", "add", rest @ ..] => fault(rest).map(Self::Add),
            ["fault", "list"] => Ok(Self::List),
            ["fault", "clear"] => Ok(Self::Clear(None)),
            ["fault", "clear", id] => Ok(Self::Clear(Some(number("fault clear", id)?))),
            ["fault", ..] => Err("`fault` wants add, list, or clear with at most one id".into()),
            ["event", "list"] => Ok(Self::Events),
            ["event", "stop"] => Ok(Self::Stop(None)),
            ["event", "stop", id] => Ok(Self::Stop(Some(number("event stop", id)?))),
            ["event", kind, rest @ ..] => event(kind, rest).map(Self::Raise),
            ["event"] => Err(format!("`event` wants list, stop, {TYPES}")),
            ["profile", "list"] => Ok(Self::Profiles),
            ["profile", name] => Profile::named(name).map(|profile| Self::Profile(Box::new(profile))),
            ["profile", ..] => Err("`profile` wants one name, or list".into()),
            ["limits", rest @ ..] => limits(rest).map(Self::Limits),
            ["hostile", "stop"] => Ok(Self::Hostile(None)),
            ["hostile", "list"] => Ok(Self::Lies),
            ["hostile", seed, rest @ ..] => hostile(seed, rest).map(|it| Self::Hostile(Some(it))),
            ["hostile"] => Err("`hostile` wants a seed, list or stop".into()),
            ["mark", name] => Ok(Self::Mark((*name).to_owned())),
            ["mark", ..] => Err("`mark` wants one name".into()),
            ["commands"] => Ok(Self::Commands),
            ["ledger"] => Ok(Self::Ledger),
            ["counters"] => Ok(Self::Counters),
            ["rules"] => Ok(Self::Rules),
            [only @ ("commands" | "ledger" | "counters" | "rules"), ..] => {
                Err(format!("`{only}` wants nothing behind it"))
            }
            [other, ..] => Err(format!(
                "there is no `{other}`, but fault, event, limits, profile, hostile, mark, commands, ledger, counters and rules"
            )),
            [] => Err("there are no words".into()),
        }
    }
}

/// Decimal, or hexadecimal after `0x`.
fn number(name: &str, text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    parsed.ok_or_else(|| format!("{name} must be a number, not `{text}`"))
}

/// As [`number`], at most `most`.
fn at_most<T: TryFrom<u64>>(name: &str, text: &str, most: u64) -> Result<T, String> {
    let parsed = number(name, text)?;
    let fits = Some(parsed).filter(|&parsed| parsed <= most).and_then(|parsed| T::try_from(parsed).ok());
    fits.ok_or_else(|| format!("{name} must be at most {most:#x}, not `{text}`"))
}

/// What stands behind `hostile`.
fn hostile(seed: &str, words: &[&str]) -> Result<(Hostility, Vec<Chance>), String> {
    let mut hostility = Hostility::new(number("hostile", seed)?);
    let (mut at, mut only) = (Vec::new(), Vec::new());
    for word in words {
        match word.split_once('=') {
            Some(("rate", value)) => hostility.rate = at_most("rate", value, u32::MAX.into())?,
            Some(("at", value)) => at.push(Where::parse(value).ok_or_else(|| {
                format!("at must be completions, events, messages or registers, not `{value}`")
            })?),
            Some(("only", value)) => only.push(Chance::parse(value).ok_or_else(|| {
                format!("only must be a lie as `hostile list` names it, cqe:5:17 for one, not `{value}`")
            })?),
            _ => return Err(format!("there is no `{word}` here, but rate=N, at=WHERE and only=LIE")),
        }
    }
    if hostility.rate == 0 {
        return Err("rate must be 1 (always) or more".into());
    }
    if !at.is_empty() {
        hostility.at = at;
    }
    Ok((hostility, only))
}

/// What stands behind `limits`.
fn limits(words: &[&str]) -> Result<Vec<(String, u32)>, String> {
    if words.is_empty() {
        return Err("`limits` wants max-msix=N, max-queues=N, ports=N and the like".into());
    }
    let limit = |word: &&str| {
        let (key, value) =
            word.split_once('=').ok_or_else(|| format!("`{word}` is not of the form limit=value"))?;
        Ok((key.to_owned(), at_most(key, value, u32::MAX.into())?))
    };
    words.iter().map(limit).collect()
}

/// What stands behind `fault add`.
fn fault(words: &[&str]) -> Result<Fault, String> {
    const KEYS: &str = "command, type, nth, count, queue and do";
    let (mut at, mut action) = (None, None);
    let (mut skip, mut count, mut queue, mut kind) = (0, 1, None, None);
    let mut known: Vec<&str> = Vec::new();
    for word in words {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| format!("`{word}` is not of the form key=value; the keys are {KEYS}"))?;
        if known.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        known.push(key);
        match key {
            "command" => at = Some(what(value)?),
            "nth" => {
                let nth: u64 = number(key, value)?;
                skip = nth.checked_sub(1).ok_or("nth must be 1 (the next) or more, not `0`")?;
            }
            "count" if value == "all" => count = u64::MAX,
            "count" => count = number(key, value).map_err(|error| format!("{error}, nor `all`"))?,
            "type" => kind = Some(at_most(key, value, u8::MAX.into())?),
            "queue" => queue = Some(at_most(key, value, u32::MAX.into())?),
            "do" => action = Some(value),
            _ => return Err(format!("there is no `{key}` here, but {KEYS}")),
        }
    }
    let (point, code) =
        at.ok_or("`fault add` needs command=WHAT, the name of a command, its code, or any")?;
    if point == Point::Command && queue.is_some() {
        return Err("queue is for events and completions: commands have one queue".into());
    }
    if point != Point::Eqe && kind.is_some() {
        return Err("type is for command=eqe".into());
    }
    let action = self::action(action.ok_or("`fault add` needs do=ACTION")?)?;
    check(point, code, &action)?;
    let text = words.join(" ");
    Ok(Fault {
        matcher: Matcher { point, code: code.or(kind), queue },
        skip,
        count,
        action,
        text,
        seen: 0,
        hits: 0,
    })
}

/// The value of `command`: where a fault strikes, and which command.
fn what(text: &str) -> Result<(Point, Option<u32>), String> {
    if text == "any" {
        return Ok((Point::Command, None));
    }
    if let Some((_, point)) = Point::NAMED.into_iter().find(|(name, _)| *name == text) {
        return Ok((point, None));
    }
    if let Some(code) = command::code(text) {
        return Ok((Point::Command, Some(code)));
    }
    match number("command", text) {
        Ok(code) => Ok((Point::Command, Some(u32::try_from(code).map_err(|_| "a code has 32 bits")?))),
        Err(_) => Err(format!(
            "command must be a command's name such as {}, its code, any, smc, eqe, cqe, msix or reg, not `{text}`",
            command::name(0x2).unwrap_or_default()
        )),
    }
}

/// The value of `do`.
fn action(text: &str) -> Result<Action, String> {
    let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
    let needed = |what: &str| value.ok_or_else(|| format!("do={name} needs {name}:{what}"));
    let action = match name {
        "status" => Action::Status(at_most("status", needed("STATUS")?, u32::MAX.into())?),
        "delay" => Action::Delay(at_most::<u64>("delay", needed("MS")?, MAX_DELAY_MS)? * NS_PER_MS),
        "edit" => {
            let (field, value) = needed("FIELD=VALUE")?
                .split_once('=')
                .ok_or_else(|| format!("do=edit needs edit:FIELD=VALUE, not `{text}`"))?;
            Action::Edit(Edit { field: field.to_owned(), value: number(field, value)? })
        }
        "corrupt" => Action::Corrupt(number("corrupt", needed("SEED")?)?),
        "event" => Action::Event(at_most("event", needed("TYPE")?, u8::MAX.into())?),
        "drop" | "lose" | "hold" | "duplicate" if value.is_some() => {
            return Err(format!("do={name} takes no value, as in `{text}`"));
        }
        "drop" => Action::Drop,
        "lose" => Action::Lose,
        "hold" => Action::Hold,
        "duplicate" => Action::Duplicate,
        _ => {
            return Err(format!(
                "do must be status:STATUS, drop, lose, delay:MS, hold, duplicate, edit:FIELD=VALUE, \
                 corrupt:SEED or event:TYPE, not `{text}`"
            ));
        }
    };
    Ok(action)
}

/// Whether `action` makes sense at `point`.
fn check(point: Point, code: Option<u32>, action: &Action) -> Result<(), String> {
    match (point, action) {
        (Point::Command, Action::Edit(edit)) => locate(code, &edit.field).map(drop),
        (point, Action::Edit(edit)) => strike::field(point, &edit.field).map(drop),
        (Point::Command, _)
        | (Point::Smc, Action::Status(..=0xff) | Action::Lose)
        | (Point::Smc | Point::Eqe | Point::Cqe | Point::Msix, Action::Delay(_) | Action::Hold)
        | (Point::Smc | Point::Eqe | Point::Cqe | Point::Reg, Action::Corrupt(_))
        | (Point::Eqe | Point::Cqe | Point::Msix, Action::Duplicate)
        | (_, Action::Drop | Action::Event(_)) => Ok(()),
        (point, action) => Err(format!("do={action} can't be done to command={}", point.name())),
    }
}

const TYPES: &str = "or a type: a number, fpga-reconfig, hwc-timeout, link-up, link-down, rdma-suspend, rdma-resume, \
                     reset or qp-fatal";
/// Most of one event.
const MAX_EVENTS: u64 = 100_000;

/// What stands behind `event`.
fn event(kind: &str, words: &[&str]) -> Result<Scheduled, String> {
    const KEYS: &str = "port, value, eq, after, every, count and at-command";
    let text = std::iter::once(kind).chain(words.iter().copied()).collect::<Vec<_>>().join(" ");
    let (kind, base) = match kind {
        "fpga-reconfig" => (132, 0),
        // The type in the upper 8 bits, the value in the lower 24 (`union hwc_init_type_data`).
        "hwc-timeout" => (133, 1 << 24),
        "link-up" => (133, 2 << 24),
        "link-down" => (133, 3 << 24),
        // The type in the upper 4 bits.
        "rdma-suspend" => (134, 1 << 28),
        "rdma-resume" => (134, 2 << 28),
        "reset" => (135, 0),
        "qp-fatal" => (176, 0),
        other => (at_most("event", other, u8::MAX.into()).map_err(|error| format!("{error}, {TYPES}"))?, 0),
    };
    let (mut value, mut eq, mut commands) = (0, HWC_QUEUE, None);
    let (mut after_ns, mut every_ns, mut left) = (0, 0, 1);
    let mut known: Vec<&str> = Vec::new();
    for word in words {
        let (key, text) = word
            .split_once('=')
            .ok_or_else(|| format!("`{word}` is not of the form key=value; the keys are {KEYS}"))?;
        let key = if key == "port" { "value" } else { key };
        if known.contains(&key) {
            return Err(format!("{key} is given twice"));
        }
        known.push(key);
        let time = || Ok::<u64, String>(at_most::<u64>(key, text, MAX_DELAY_MS)? * NS_PER_MS);
        match key {
            "value" => value = at_most(key, text, if base == 0 { u32::MAX.into() } else { 0xff_ffff })?,
            "eq" => eq = at_most(key, text, u32::MAX.into())?,
            "after" => after_ns = time()?,
            "every" => every_ns = time()?,
            "count" => left = at_most(key, text, MAX_EVENTS)?,
            "at-command" => commands = Some(at_most(key, text, u64::MAX)?),
            _ => return Err(format!("there is no `{key}` here, but {KEYS}")),
        }
    }
    if commands == Some(0) || left == 0 {
        return Err("at-command and count must be 1 or more".into());
    }
    let eqe = eqe(kind, base | value);
    Ok(Scheduled { eq, eqe, commands, after_ns, every_ns, left, due_ns: 0, text })
}

/// A field of the completion that brings a response.
pub(crate) const LENGTH: &str = "length";

/// Bytes of a response's field: by name in the header or in the body of `code`'s response, or by offset.
///
/// # Errors
/// There is no such field; the sentence names those there are.
pub(crate) fn locate(code: Option<u32>, field: &str) -> Result<std::ops::Range<usize>, String> {
    if let Some(place) = field.strip_prefix('@') {
        let (offset, size) = place.split_once('.').unwrap_or((place, "4"));
        let (offset, size): (usize, usize) =
            (at_most("@OFFSET", offset, MAX_MESSAGE as u64)?, at_most("BYTES", size, 8)?);
        return Ok(offset..offset + size.max(1));
    }
    let body = code.map(command::reply_fields).unwrap_or_default();
    let (header, start) = (hwc::ResponseHeader::FIELDS, size_of::<hwc::ResponseHeader>());
    let found = header.iter().find(|(name, _)| *name == field).map(|(_, range)| range.clone());
    let in_body = || body.iter().find(|(name, _)| *name == field);
    let found = found.or_else(|| in_body().map(|(_, range)| range.start + start..range.end + start));
    if field == LENGTH {
        return Ok(0..0);
    }
    found.ok_or_else(|| {
        let names: Vec<&str> = header.iter().chain(body).map(|(name, _)| *name).collect();
        format!("the response has no field `{field}`, but {}, {LENGTH}, and @OFFSET.BYTES", names.join(", "))
    })
}

impl Plan {
    /// Do what concerns faults and marks; `None` for the rest.
    pub(crate) fn execute(&self, words: &Words, now_ns: u64) -> Option<Result<Answer, String>> {
        Some(match words {
            Words::Add(fault) => match self.add(fault.clone()) {
                Some(id) => Ok(Answer::one("fault", id)),
                None => Err("there are too many faults; clear some first".into()),
            },
            Words::List => {
                let faults = self.list().into_iter().map(|(id, text, hits)| {
                    Answer(vec![("id", id.into()), ("text", text.into()), ("hits", hits.into())])
                });
                Ok(Answer::one("faults", faults.collect::<Vec<_>>()))
            }
            Words::Clear(id) => match self.clear(*id) {
                Some(hits) => Ok(Answer::one("hits", hits)),
                None => Err(format!("there is no fault {}", id.unwrap_or_default())),
            },
            Words::Raise(event) => {
                let due_ns = now_ns.saturating_add(event.after_ns);
                match self.schedule(Scheduled { due_ns, ..event.clone() }) {
                    Some(id) => Ok(Answer::one("event", id)),
                    None => Err("there are too many events to come; stop some first".into()),
                }
            }
            Words::Events => {
                let events = self.events().into_iter().map(|(id, text, left)| {
                    Answer(vec![("id", id.into()), ("text", text.into()), ("left", left.into())])
                });
                Ok(Answer::one("events", events.collect::<Vec<_>>()))
            }
            Words::Stop(id) => match self.stop(*id) {
                true => Ok(Answer::default()),
                false => Err(format!("there is no event {} to come", id.unwrap_or_default())),
            },
            Words::Hostile(None) => {
                self.set_hostile(None);
                Ok(Answer::default())
            }
            Words::Hostile(Some((hostility, only))) => {
                self.set_lies(hostility.clone(), only.clone());
                Ok(Answer::default())
            }
            Words::Lies => {
                let lies = self.told().into_iter().map(|(chance, action)| {
                    Answer(vec![("lie", chance.to_string().into()), ("text", action.to_string().into())])
                });
                Ok(Answer::one("lies", lies.collect::<Vec<_>>()))
            }
            Words::Mark(_) => {
                self.mark();
                Ok(Answer::default())
            }
            Words::Commands => Ok(Answer::one("commands", self.commands())),
            Words::Profile(_) | Words::Profiles | Words::Limits(_) => return None,
            Words::Ledger | Words::Counters | Words::Rules => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::fault::Place;
    use super::*;

    fn parse(text: &str) -> Result<Words, String> {
        Words::parse(&text.split(' ').collect::<Vec<_>>())
    }
    fn fault(text: &str) -> Fault {
        match parse(&format!("fault add {text}")) {
            Ok(Words::Add(fault)) => fault,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn faults_are_read_as_they_are_written() {
        let some = fault("command=MANA_CREATE_WQ_OBJ nth=3 count=2 do=status:0x5");
        assert_eq!(some.matcher, Matcher { point: Point::Command, code: Some(0x20004), queue: None });
        assert_eq!((some.skip, some.count, some.action), (2, 2, Action::Status(5)));
        assert_eq!(some.text, "command=MANA_CREATE_WQ_OBJ nth=3 count=2 do=status:0x5");
        let all = fault("command=any count=all do=delay:1500");
        assert_eq!((all.matcher.code, all.count, all.action), (None, u64::MAX, Action::Delay(1_500_000_000)));
        assert_eq!(fault("command=0x54 do=drop").matcher.code, Some(84));
        let edit = fault("command=GDMA_QUERY_MAX_RESOURCES do=edit:max_msix=3");
        assert_eq!(edit.action, Action::Edit(Edit { field: "max_msix".into(), value: 3 }));
        for action in ["drop", "lose", "hold", "duplicate", "corrupt:7", "event:135", "edit:@40.2=0x1"] {
            let fault = fault(&format!("command=any do={action}"));
            assert_eq!(fault.action.to_string(), action);
        }
    }

    #[test]
    fn what_makes_no_sense_is_told_in_a_sentence() {
        for (text, says) in [
            ("", "no ``"),
            ("fly", "no `fly`"),
            ("fault", "add, list, or clear"),
            ("fault clear x", "must be a number, not `x`"),
            ("mark", "one name"),
            ("ledger now", "nothing behind"),
            ("fault add do=drop", "needs command="),
            ("fault add command=any", "needs do="),
            ("fault add command=GDMA_NONE do=drop", "not `GDMA_NONE`"),
            ("fault add command=any do=explode", "do must be status:STATUS"),
            ("fault add command=any do=status", "needs status:STATUS"),
            ("fault add command=any do=drop:1", "takes no value"),
            ("fault add command=any do=delay:99999999999", "at most"),
            ("fault add command=any nth=0 do=drop", "1 (the next)"),
            ("fault add command=any count=some do=drop", "nor `all`"),
            ("fault add command=any queue=1 do=drop", "commands have one queue"),
            ("fault add command=any when=now do=drop", "no `when` here"),
            ("fault add command=any command=any do=drop", "twice"),
            ("fault add command=any drop", "key=value"),
            ("fault add command=any type=3 do=drop", "type is for command=eqe"),
            ("fault add command=reg do=delay:1", "do=delay:1 can't be done to command=reg"),
            ("fault add command=msix do=corrupt:1", "can't be done to command=msix"),
            ("fault add command=cqe do=edit:mtu=1", "no field `mtu` here, but type"),
            ("fault add command=eqe do=status:1", "can't be done to command=eqe"),
            ("fault add command=smc do=status:256", "can't be done to command=smc"),
            ("hostile", "a seed"),
            ("hostile x", "must be a number"),
            ("hostile 1 rate=0", "1 (always)"),
            ("hostile 1 at=home", "not `home`"),
            ("hostile 1 often", "no `often` here"),
            ("hostile 1 only=cqe", "not `cqe`"),
            ("event", "list, stop, or a type"),
            ("event lunch", "not `lunch`, or a type: a number, fpga-reconfig"),
            ("event 300", "at most 0xff"),
            ("event link-up port=0x1000000", "at most 0xffffff"),
            ("event reset port=1 value=1", "twice"),
            ("event reset soon", "key=value"),
            ("event reset at=1", "no `at` here, but port"),
            ("event reset count=0", "1 or more"),
            ("event stop x", "must be a number"),
            ("fault add command=any do=edit:max_msix=1", "no field `max_msix`, but hdr_type"),
            ("fault add command=GDMA_QUERY_MAX_RESOURCES do=edit:max_mix=1", "max_eq"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn events_have_the_details_that_the_driver_looks_for() {
        let event = |text: &str| match parse(&format!("event {text}")) {
            Ok(Words::Raise(event)) => event,
            other => panic!("{text}: {other:?}"),
        };
        let shown = |text: &str| {
            let eqe = event(text).eqe;
            (eqe.info.get(), eqe.details[0].get())
        };
        assert_eq!(shown("link-down port=2"), (133, 0x0300_0002));
        assert_eq!(shown("link-up"), (133, 0x0200_0000));
        assert_eq!(shown("hwc-timeout value=5000"), (133, 0x0100_1388));
        assert_eq!(shown("rdma-resume"), (134, 0x2000_0000));
        assert_eq!(shown("qp-fatal value=9"), (176, 9));
        assert_eq!(shown("0xfe value=0xffffffff"), (254, u32::MAX));
        let storm = event("reset after=5 every=2 count=3 eq=4 at-command=7");
        assert_eq!((storm.after_ns, storm.every_ns, storm.left), (5_000_000, 2_000_000, 3));
        assert_eq!((storm.eq, storm.commands), (4, Some(7)));
    }

    #[test]
    fn the_nth_is_struck_and_as_many_as_were_asked_for() {
        let plan = Plan::default();
        assert!(!plan.watches(Point::Command));
        let id = plan.add(fault("command=any nth=2 count=2 do=drop")).unwrap();
        assert!(plan.watches(Point::Command) && !plan.watches(Point::Eqe));
        let struck = [1, 2, 3, 4].map(|code| plan.strike(Place::command(code)).len());
        assert_eq!(struck, [0, 1, 1, 0]);
        assert_eq!(plan.list()[0].2, 2);
        assert_eq!(plan.clear(Some(id + 1)), None);
        assert_eq!(plan.clear(Some(id)), Some(2));
        assert!(!plan.watches(Point::Command));
        assert_eq!(plan.clear(None), Some(2), "those of faults that are gone count, too");
        assert_eq!(plan.clear(None), Some(0));
    }
}
