//! QEMU's `key=value,key=value` syntax: the first item may be a bare word, a comma in a value is doubled.

/// An option's value taken apart. Every key must be taken before [`finish`](Self::finish), so that a misspelt one
/// is never silently ignored.
#[derive(Debug)]
pub struct KeyValues {
    option: &'static str,
    /// Pairs in the order given that nobody has taken yet.
    pairs: Vec<(String, String)>,
    /// The keys asked for so far, for the error about an unknown one.
    known: Vec<&'static str>,
}

/// What is wrong with an option's value, and what would be right: one sentence that names the option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct OptionError {
    /// The option, e.g. `--netdev`.
    pub option: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

impl OptionError {
    /// An error of `option`.
    pub fn new(option: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { option: option.into(), reason: reason.into() }
    }
}

impl KeyValues {
    /// Take `text` apart. A first item without `=` is the value of `implied`.
    ///
    /// # Errors
    /// [`OptionError`] for an item that has no value, or no name.
    pub fn parse(option: &'static str, implied: &'static str, text: &str) -> Result<Self, OptionError> {
        let mut pairs = Vec::new();
        for (index, item) in split_commas(text).into_iter().enumerate() {
            match item.split_once('=') {
                Some((key, value)) if !key.is_empty() && !value.is_empty() => {
                    pairs.push((key.to_owned(), value.to_owned()));
                }
                None if index == 0 && !item.is_empty() => pairs.push((implied.to_owned(), item)),
                _ => return Err(OptionError::new(option, format!("`{item}` is not of the form key=value"))),
            }
        }
        Ok(Self { option, pairs, known: Vec::new() })
    }

    /// Every value of `key`, in order.
    pub fn take_all(&mut self, key: &'static str) -> Vec<String> {
        self.known.push(key);
        let (taken, left) = std::mem::take(&mut self.pairs).into_iter().partition(|(k, _)| k == key);
        self.pairs = left;
        let taken: Vec<(String, String)> = taken;
        taken.into_iter().map(|(_, value)| value).collect()
    }

    /// The value of `key`, if it was given.
    ///
    /// # Errors
    /// [`OptionError`] when it was given twice.
    pub fn take(&mut self, key: &'static str) -> Result<Option<String>, OptionError> {
        let mut values = self.take_all(key);
        if values.len() > 1 {
            return Err(self.error(key, "is given twice"));
        }
        Ok(values.pop())
    }

    /// The value of `key` through `parse`, which answers `None` for a value that is not `expected`.
    ///
    /// # Errors
    /// [`OptionError`] saying that `expected` would be right.
    pub fn take_with<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.take(key)? else { return Ok(None) };
        match parse(&value) {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(self.error(key, &format!("must be {expected}, not `{value}`"))),
        }
    }

    /// A number of `range` (decimal, or hexadecimal after `0x`).
    ///
    /// # Errors
    /// [`OptionError`] saying which numbers would be right.
    pub fn take_number<T: TryFrom<u64>>(
        &mut self,
        key: &'static str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<T>, OptionError> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        self.take_with(key, &expected, |value| {
            parse_number(value)
                .filter(|number| range.contains(number))
                .and_then(|number| T::try_from(number).ok())
        })
    }

    /// `on` or `off`.
    ///
    /// # Errors
    /// [`OptionError`] for anything else.
    pub fn take_switch(&mut self, key: &'static str) -> Result<Option<bool>, OptionError> {
        self.take_with(key, "on or off", |value| match value {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })
    }

    /// Nothing may be left.
    ///
    /// # Errors
    /// [`OptionError`] naming the first key that nobody took, and those there are.
    pub fn finish(self) -> Result<(), OptionError> {
        match self.pairs.first() {
            None => Ok(()),
            Some((key, _)) => Err(OptionError::new(
                self.option,
                format!("there is no `{key}` here, but {}", self.known.join(", ")),
            )),
        }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, reason: &str) -> OptionError {
        OptionError::new(self.option, format!("{key} {reason}"))
    }
}

/// Decimal, or hexadecimal after `0x`.
fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Split at commas; a doubled one stands for itself.
fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let doubled = c == ',' && chars.next_if_eq(&',').is_some();
        match (c, items.last_mut()) {
            (',', _) if !doubled => items.push(String::new()),
            (_, Some(item)) => item.push(c),
            (_, None) => {}
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_an_option_apart() {
        let mut options =
            KeyValues::parse("--device", "driver", "mana,netdev=a,netdev=b,max-msix=0x10").unwrap();
        assert_eq!(options.take("driver").unwrap().as_deref(), Some("mana"));
        assert_eq!(options.take_all("netdev"), ["a", "b"]);
        assert_eq!(options.take_number::<u16>("max-msix", 1..=64).unwrap(), Some(16));
        options.finish().unwrap();
    }

    #[test]
    fn doubled_commas_and_equal_signs_belong_to_the_value() {
        let mut options = KeyValues::parse("--pcap", "id", "n0=a,,b=c").unwrap();
        assert_eq!(options.take("n0").unwrap().as_deref(), Some("a,b=c"));
    }

    #[test]
    fn errors_name_the_option_and_what_would_be_right() {
        let error = |text: &str| {
            let mut options = KeyValues::parse("--device", "driver", text)?;
            options.take("driver")?;
            options.take_number::<u16>("max-msix", 1..=64)?;
            options.take_switch("rdma")?;
            options.finish()
        };
        let message = |text| error(text).unwrap_err().to_string();
        assert_eq!(message("mana,max-msix=65"), "--device: max-msix must be a number from 1 to 64, not `65`");
        assert_eq!(message("mana,max-msix=-1"), "--device: max-msix must be a number from 1 to 64, not `-1`");
        assert_eq!(message("mana,rdma=yes"), "--device: rdma must be on or off, not `yes`");
        assert_eq!(message("mana,rdma=on,rdma=on"), "--device: rdma is given twice");
        assert_eq!(message("mana,msix=1"), "--device: there is no `msix` here, but driver, max-msix, rdma");
        assert_eq!(message("mana,max-msix"), "--device: `max-msix` is not of the form key=value");
        assert_eq!(message("mana,"), "--device: `` is not of the form key=value");
        assert_eq!(message("mana,=3"), "--device: `=3` is not of the form key=value");
        assert_eq!(message(""), "--device: `` is not of the form key=value");
    }
}
