//! A part of all runs, split as cargo-nextest does it, so that several machines share the work.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use twox_hash::XxHash64;

/// `--partition`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    how: Split,
    /// From 1 on.
    part: u64,
    parts: u64,
}

/// How a run's part is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    /// In turn: parts are of equal size, but a new run moves those after it.
    Count,
    /// By the name alone (xxHash64 with seed 0): a run stays in its part.
    Hash,
}

impl FromStr for Partition {
    type Err = anyhow::Error;

    /// `count:1/3`, `hash:1/3`; `1/3` means `count:1/3`.
    fn from_str(text: &str) -> Result<Self> {
        let (how, numbers) = match text.split_once(':') {
            None => (Split::Count, text),
            Some(("count", numbers)) => (Split::Count, numbers),
            Some(("hash", numbers)) => (Split::Hash, numbers),
            Some((other, _)) => bail!("'{other}' is neither count nor hash"),
        };
        let form = || format!("'{numbers}' is not PART/PARTS, as 1/3");
        let (part, parts) = numbers.split_once('/').with_context(form)?;
        let partition =
            Self { how, part: part.parse().with_context(form)?, parts: parts.parse().with_context(form)? };
        ensure!((1..=partition.parts).contains(&partition.part), "there is no part {part} of {parts}");
        Ok(partition)
    }
}

impl Partition {
    /// Is the run with this index among all, and this name, of this part?
    pub fn holds(self, index: usize, name: &str) -> bool {
        let number = match self.how {
            Split::Count => index as u64,
            Split::Hash => XxHash64::oneshot(0, name.as_bytes()),
        };
        number % self.parts == self.part - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_is_in_one_part() {
        let names: Vec<String> = (0..20).map(|number| format!("run {number}")).collect();
        for how in ["count:", "hash:", ""] {
            let parts: Vec<Partition> =
                (1..=3).map(|part| format!("{how}{part}/3").parse().unwrap()).collect();
            for (index, name) in names.iter().enumerate() {
                assert_eq!(parts.iter().filter(|part| part.holds(index, name)).count(), 1);
            }
        }
    }

    #[test]
    fn counts_in_turn_and_hashes_as_nextest_does() {
        let first: Partition = "count:1/2".parse().unwrap();
        assert_eq!([0, 1, 2, 3].map(|index| first.holds(index, "")), [true, false, true, false]);
        // xxHash64 of "abc" with seed 0, from the algorithm's own test vectors.
        let hash = 0x44bc_2cf5_ad77_0999_u64;
        let hashed = Partition { how: Split::Hash, part: hash % 1000 + 1, parts: 1000 };
        assert!(hashed.holds(99, "abc"));
    }

    #[test]
    fn says_what_is_wrong() {
        for text in ["0/2", "3/2", "1", "slice:1/2", "a/b", "1/0"] {
            assert!(text.parse::<Partition>().is_err(), "{text}");
        }
    }
}
