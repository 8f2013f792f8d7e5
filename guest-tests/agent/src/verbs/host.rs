//! `host WORDS...`: ask the simulated host for something, in the words of `mana-vmm ctl`.

use anyhow::{Result, bail};
use pico_args::Arguments;

use crate::channel;

/// Prints the answer; a no is an error.
pub fn run(arguments: Arguments) -> Result<()> {
    let words: Vec<String> =
        arguments.finish().into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let answer = channel::ask_host(&words)?;
    if answer["ok"] != true {
        bail!("{}", answer["error"].as_str().unwrap_or("the host says no"));
    }
    println!("{answer}");
    Ok(())
}
