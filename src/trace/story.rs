//! A trace in words.
//!
//! The [`Narrator`] hears one record after the other and answers with paragraphs: a request and its answer are one,
//! with what happened in between below; writes to the vector table and interrupts are summed up. [`Fold`] then sums
//! up paragraphs that repeat.

mod fold;
mod narrator;
mod words;

use std::io::{self, Write};

pub use fold::{Fold, LiveFold};
pub use narrator::{Narrator, answered, asked, plain};

/// How much a line matters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mark {
    /// A step like others.
    #[default]
    Plain,
    /// A step that the reader waits for.
    Milestone,
    /// Something went wrong.
    Problem,
}

/// How lines are shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// Milestones in bold, problems in red.
    pub color: bool,
}

impl Style {
    fn line(self, mark: Mark, text: &str) -> String {
        match (self.color, mark) {
            (true, Mark::Milestone) => format!("\x1b[1m{text}\x1b[0m"),
            (true, Mark::Problem) => format!("\x1b[31m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

/// One line of the story.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// How much it matters.
    pub mark: Mark,
    /// The line.
    pub text: String,
}

/// Lines that belong together: the first says what, the others what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paragraph {
    /// When it began, nanoseconds from the trace's first event.
    pub t_ns: u64,
    /// Prefix that names the device, if there are several.
    pub device: String,
    /// At least one.
    pub lines: Vec<Line>,
}

impl Paragraph {
    /// Write it, the time as the kernel's log does.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, style: Style, out: &mut dyn Write) -> io::Result<()> {
        for (index, Line { mark, text }) in self.lines.iter().enumerate() {
            let device = &self.device;
            let text = style.line(*mark, text);
            match index {
                0 => writeln!(out, "[{}] {device}{text}", words::seconds(self.t_ns))?,
                _ => writeln!(out, "{:15}{device}  {text}", "")?,
            }
        }
        Ok(())
    }

    /// Equal for paragraphs that tell the same, but for numbers; those with something special in them are unique.
    fn key(&self) -> String {
        let mut key = self.device.clone();
        for line in &self.lines {
            match line.mark {
                Mark::Plain => key.push_str(&words::without_numbers(&line.text)),
                _ => key.push_str(&format!("{} {}", self.t_ns, line.text)),
            }
            key.push('\n');
        }
        key
    }
}
