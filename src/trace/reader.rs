//! Reads trace files, broken ones too: a VMM may be killed in the middle of a line.

use std::fmt;
use std::io::BufRead;

use serde_json::{Map, Value};

/// One event as it stands in a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Nanoseconds of the machine's clock.
    pub t_ns: u64,
    /// The device's number; 0 if it is the only one.
    pub device: u64,
    /// Name of the event.
    pub event: String,
    /// What else the line says, in its order.
    pub fields: Map<String, Value>,
}

impl Record {
    /// The field `name` if it is a whole number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.fields.get(name)?.as_u64()
    }
    /// The field `name` if it is text, else nothing.
    pub fn text(&self, name: &str) -> &str {
        self.fields.get(name).and_then(Value::as_str).unwrap_or_default()
    }
    /// Whether the field `name` is true.
    pub fn flag(&self, name: &str) -> bool {
        self.fields.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    fn parse(line: &str) -> Result<Self, String> {
        let Value::Object(mut fields) = serde_json::from_str(line).map_err(|error| error.to_string())? else {
            return Err("it is no JSON object".into());
        };
        let Some(t_ns) = fields.shift_remove("t_ns").and_then(|value| value.as_u64()) else {
            return Err("it has no time (t_ns)".into());
        };
        let Some(Value::String(event)) = fields.shift_remove("event") else {
            return Err("it has no event".into());
        };
        let device = fields.shift_remove("device").and_then(|value| value.as_u64()).unwrap_or(0);
        Ok(Self { t_ns, device, event, fields })
    }
}

/// A line that is no event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenLine {
    /// Number of the line, from 1; 0 if reading itself failed.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for BrokenLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} is no trace event: {}; it is left out", self.line, self.reason)
    }
}

/// The records of a trace, in order. Empty lines are skipped.
pub struct Reader<R> {
    input: R,
    line: usize,
    ended: bool,
}

impl<R: BufRead> Reader<R> {
    /// Read the trace from the start.
    pub fn new(input: R) -> Self {
        Self { input, line: 0, ended: false }
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = Result<Record, BrokenLine>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = Vec::new();
        while !self.ended {
            bytes.clear();
            match self.input.read_until(b'\n', &mut bytes) {
                Ok(0) => self.ended = true,
                Ok(_) => {
                    self.line += 1;
                    let text = String::from_utf8_lossy(&bytes);
                    if !text.trim().is_empty() {
                        return Some(parse(self.line, &text));
                    }
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(BrokenLine { line: 0, reason: error.to_string() }));
                }
            }
        }
        None
    }
}

/// Line number `line`, which reads `text`.
pub fn parse(line: usize, text: &str) -> Result<Record, BrokenLine> {
    let cut = if text.ends_with('\n') { "" } else { " (the file ends within it)" };
    Record::parse(text).map_err(|reason| BrokenLine { line, reason: reason + cut })
}
