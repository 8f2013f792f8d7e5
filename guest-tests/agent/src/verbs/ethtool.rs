//! `ethtool`, with the tool's own options for what the driver can do:
//!
//! | read | change | what |
//! |---|---|---|
//! | `-l IF` | `-L IF combined N` | channels |
//! | `-g IF` | `-G IF rx N tx N` | rings |
//! | `-c IF` | `-C IF rx-usecs N adaptive-rx on rx-cqe-frames 4` | coalescing |
//! | `-k IF` | `-K IF tso off tx-checksum-ipv4 on` | features |
//! | `-x IF` | `-X IF [equal N \| weight W... \| default] [hkey AA:BB:...]` | receive side scaling |
//! | `-S IF` | | the driver's counters, and their totals over the queues |
//!
//! A change reports what is in force afterwards. The kernel's error is told in its own words.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use pico_args::Arguments;
use serde_json::{Map, Value, json};

use crate::ethtool::{self, CHANNELS, COALESCE, Numbers, RINGS};
use crate::net;

/// The tool's short names, and the features that each stands for.
const SHORT: [(&str, &[&str]); 9] = [
    ("rx", &["rx-checksum"]),
    ("tx", &["tx-checksum-ipv4", "tx-checksum-ipv6"]),
    ("sg", &["tx-scatter-gather"]),
    ("tso", &["tx-tcp-segmentation", "tx-tcp6-segmentation"]),
    ("gso", &["tx-generic-segmentation"]),
    ("gro", &["rx-gro"]),
    ("rxhash", &["rx-hashing"]),
    ("rxvlan", &["rx-vlan-hw-parse"]),
    ("txvlan", &["tx-vlan-hw-insert"]),
];

/// One of the options above.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let mut words = Vec::new();
    for word in std::mem::replace(arguments, Arguments::from_vec(Vec::new())).finish() {
        words.push(word.into_string().map_err(|word| anyhow::anyhow!("{word:?} is no text"))?);
    }
    let [option, interface, settings @ ..] = words.as_slice() else { bail!("ethtool -OPTION INTERFACE ...") };
    let is_change = option != "-S" && option.chars().any(char::is_uppercase);
    ensure!(
        is_change != settings.is_empty(),
        "{option} {}",
        if is_change { "lacks settings" } else { "has no settings" }
    );
    match option.as_str() {
        "-l" | "-L" => numbers(&CHANNELS, interface, settings),
        "-g" | "-G" => numbers(&RINGS, interface, settings),
        "-c" | "-C" => coalesce(interface, settings),
        "-k" | "-K" => features(interface, settings),
        "-x" | "-X" => rss(interface, settings),
        "-S" => counters(interface),
        _ => bail!("there is no option {option}"),
    }
}

fn numbers(what: &Numbers, interface: &str, settings: &[String]) -> Result<Value> {
    if !settings.is_empty() {
        let changes: Vec<(String, u32)> = pairs(settings)?
            .map(|(name, value)| Ok((name.clone(), number(value)?)))
            .collect::<Result<_>>()?;
        what.set(interface, &changes)?;
    }
    Ok(what
        .get(interface)?
        .into_iter()
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .collect::<Map<_, _>>()
        .into())
}

/// All but `rx-cqe-frames` is in the old structure.
fn coalesce(interface: &str, settings: &[String]) -> Result<Value> {
    const NEW: &str = "rx-cqe-frames";
    let (new, old): (Vec<_>, Vec<_>) = pairs(settings)?.partition(|(name, _)| *name == NEW);
    let old: Vec<String> = old.into_iter().flat_map(|(name, value)| [name.clone(), value.clone()]).collect();
    for (_, value) in new {
        ethtool::set_rx_cqe_frames(interface, number(value)?)?;
    }
    let mut report = numbers(&COALESCE, interface, &old)?;
    if let Some(frames) = ethtool::rx_cqe_frames(interface)? {
        report[NEW] = frames.into();
    }
    Ok(report)
}

fn features(interface: &str, settings: &[String]) -> Result<Value> {
    let mut changes = Vec::new();
    for (name, value) in pairs(settings)? {
        let short = SHORT.iter().find(|(short, _)| short == name);
        let names = short.map_or_else(|| vec![name.as_str()], |(_, names)| names.to_vec());
        let on = number(value)? == 1;
        changes.extend(names.into_iter().map(|name| (name.to_owned(), on)));
    }
    if !changes.is_empty() {
        ethtool::set_features(interface, &changes)?;
    }
    let all = ethtool::features(interface)?;
    let chosen = all.into_iter().filter(|feature| feature.changeable || feature.active);
    Ok(chosen.map(|feature| (feature.name, json!(feature.active))).collect::<Map<_, _>>().into())
}

fn rss(interface: &str, settings: &[String]) -> Result<Value> {
    let size = ethtool::rss(interface)?.table.len();
    let (mut table, mut key) = (None, None);
    let mut words = settings.iter();
    while let Some(word) = words.next() {
        let mut value = || words.next().with_context(|| format!("{word}: what to?"));
        match word.as_str() {
            "equal" => {
                let queues = number(value()?)?;
                ensure!(queues > 0, "equal: at least 1 queue");
                table = Some((0..size as u32).map(|index| index % queues).collect());
            }
            "weight" => {
                let weights: Vec<u32> = words.by_ref().map(|word| number(word)).collect::<Result<_>>()?;
                table = Some(weighted(size, &weights)?);
            }
            "default" => table = Some(Vec::new()),
            "hkey" => key = Some(bytes(value()?)?),
            _ => bail!("-X has no '{word}'"),
        }
    }
    if table.is_some() || key.is_some() {
        ethtool::set_rss(interface, table.as_deref(), key.as_deref())?;
    }
    let rss = ethtool::rss(interface)?;
    let mut share: BTreeMap<String, usize> = BTreeMap::new();
    for queue in &rss.table {
        *share.entry(queue.to_string()).or_default() += 1;
    }
    let key: Vec<String> = rss.key.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(json!({ "entries": rss.table.len(), "share": share, "hkey": key.join(":") }))
}

/// A table in which each queue has entries by its weight.
fn weighted(size: usize, weights: &[u32]) -> Result<Vec<u32>> {
    let sum: u32 = weights.iter().sum();
    ensure!(sum > 0, "weight: at least one that is not 0");
    let queue = |entry: usize| {
        let mut left = entry * sum as usize / size;
        let found = weights.iter().position(|&weight| {
            let here = left < weight as usize;
            left = left.saturating_sub(weight as usize);
            here
        });
        found.unwrap_or_default() as u32
    };
    Ok((0..size).map(queue).collect())
}

fn counters(interface: &str) -> Result<Value> {
    let counters = net::counters(interface)?;
    Ok(json!({ "totals": net::totals(&counters), "counters": counters }))
}

/// `NAME VALUE NAME VALUE`.
fn pairs(words: &[String]) -> Result<impl Iterator<Item = (&String, &String)>> {
    ensure!(words.len().is_multiple_of(2), "'{}' has no value", words.last().map_or("", String::as_str));
    Ok(words.chunks_exact(2).map(|pair| (&pair[0], &pair[1])))
}

/// A number, or `on` and `off`.
fn number(text: &str) -> Result<u32> {
    match text {
        "on" => Ok(1),
        "off" => Ok(0),
        _ => text.parse().with_context(|| format!("'{text}' is no number")),
    }
}

/// `6d:5a:...`.
fn bytes(text: &str) -> Result<Vec<u8>> {
    let byte = |word: &str| u8::from_str_radix(word, 16).with_context(|| format!("'{word}' is no byte"));
    text.split(':').map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_share_the_table() {
        assert_eq!(weighted(8, &[1, 1]).unwrap(), [0, 0, 0, 0, 1, 1, 1, 1]);
        assert_eq!(weighted(8, &[0, 3, 0, 1]).unwrap(), [1, 1, 1, 1, 1, 1, 3, 3]);
        assert!(weighted(8, &[0]).is_err());
    }

    #[test]
    fn words_of_the_options() {
        assert_eq!((number("on").unwrap(), number("off").unwrap(), number("17").unwrap()), (1, 0, 17));
        assert!(number("fast").is_err());
        assert_eq!(bytes("6d:5a").unwrap(), [0x6d, 0x5a]);
        assert!(bytes("6d:").is_err());
        assert!(pairs(&["rx".to_owned()]).is_err());
    }
}
