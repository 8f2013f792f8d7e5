//! Sums up paragraphs that repeat.

use std::io::{self, Write};

use super::{Paragraph, Style, words};

/// Longest cycle of paragraphs that is recognised.
const MAX_CYCLE: usize = 8;

/// A whole story: a cycle of paragraphs that comes three times or more is told once.
pub struct Fold<'a> {
    paragraphs: &'a [Paragraph],
    keys: Vec<String>,
}

impl<'a> Fold<'a> {
    /// The story that `paragraphs` tell.
    pub fn new(paragraphs: &'a [Paragraph]) -> Self {
        Self { paragraphs, keys: paragraphs.iter().map(Paragraph::key).collect() }
    }

    /// Write it.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, style: Style, out: &mut dyn Write) -> io::Result<()> {
        let mut at = 0;
        while at < self.paragraphs.len() {
            let (cycle, times) = self.cycle_at(at);
            for paragraph in &self.paragraphs[at..at + cycle] {
                paragraph.write(style, out)?;
            }
            at += cycle * times;
            if times > 1 {
                write_repeats(cycle, times - 1, &self.paragraphs[at - 1], out)?;
            }
        }
        Ok(())
    }

    /// The cycle that saves most lines from `at` on: its length and how often it comes.
    fn cycle_at(&self, at: usize) -> (usize, usize) {
        let rest = &self.keys[at..];
        let repeats = |cycle: usize| {
            let times = rest.chunks_exact(cycle).take_while(|chunk| *chunk == &rest[..cycle]).count();
            (cycle, times)
        };
        let worth = |&(_, times): &(usize, usize)| times >= 3;
        // The shortest of equals: four times one is not twice two.
        let best =
            (1..=MAX_CYCLE.min(rest.len())).rev().map(repeats).filter(worth).max_by_key(|(c, n)| c * (n - 1));
        best.unwrap_or((1, 1))
    }
}

fn write_repeats(cycle: usize, times: usize, last: &Paragraph, out: &mut dyn Write) -> io::Result<()> {
    let what = if cycle == 1 { "the same".into() } else { format!("these {cycle} steps") };
    writeln!(out, "{:15}... {what} {times} more times, until {}", "", words::seconds(last.t_ns).trim_start())
}

/// A story that is told as it happens: a paragraph that repeats is told once, then counted.
#[derive(Default)]
pub struct LiveFold {
    told: String,
    repeats: usize,
    last: Option<Paragraph>,
}

impl LiveFold {
    /// Tell `paragraph`, or count it.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn tell(&mut self, paragraph: Paragraph, style: Style, out: &mut dyn Write) -> io::Result<()> {
        let key = paragraph.key();
        if key == self.told {
            self.repeats += 1;
        } else {
            self.settle(out)?;
            paragraph.write(style, out)?;
            self.told = key;
        }
        self.last = Some(paragraph);
        Ok(())
    }

    /// Say how often the last paragraph came again.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn settle(&mut self, out: &mut dyn Write) -> io::Result<()> {
        match (std::mem::take(&mut self.repeats), &self.last) {
            (repeats @ 1.., Some(last)) => write_repeats(1, repeats, last, out),
            _ => Ok(()),
        }
    }
}
