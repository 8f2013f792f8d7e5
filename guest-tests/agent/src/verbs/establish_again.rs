//! `establish-again [ADDRESS]`: hands the function to the driver with a hardware channel that nobody has closed.
//!
//! That is what a crash kernel finds: the last owner established a channel and is gone. Here this process is the last
//! owner: it takes the function from the driver, establishes a channel of its own with four pages of its memory
//! through the shared-memory aperture in BAR0, sees the device's answer and its first event, and binds the driver.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pico_args::Arguments;
use serde_json::{Value, json};

use super::rebind::bring_up;
use crate::function::{self, Function};
use crate::map::Mapping;

/// EQ, CQ, RQ and SQ of the channel, a page each (`mana_smc_setup_hwc`, shm_channel.c).
const QUEUES: usize = 4;
/// Register that holds the aperture's offset in BAR0 (`GDMA_REG_SHM_OFFSET`, gdma.h).
const SHM_OFFSET: usize = 0x18;
/// The aperture's last word, the header (`union smc_proto_hdr`, shm_channel.c).
const HEADER: usize = 28;
const ESTABLISH: u32 = 1;
const TYPE: u32 = 7;
const IS_RESPONSE: u32 = 1 << 7;
const STATUS: u32 = 0xff << 8;
const OWNER_IS_DEVICE: u32 = 1 << 31;
/// Where an EQ entry has its type, and the type of the first event (`GDMA_EQE_HWC_INIT_EQ_ID_DB`, gdma.h).
const EQE_TYPE: usize = 12;
const INIT_EQ_ID_DB: u32 = 129;
/// Command register and its bits for memory decoding and bus mastering (`PCI_COMMAND`, pci_regs.h).
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;
const PATIENCE: Duration = Duration::from_secs(30);

/// Fails unless the device answers, and the driver probes and gets its links up afterwards.
pub fn run(arguments: &mut Arguments) -> Result<Value> {
    let address: Option<String> = arguments.opt_free_from_str()?;
    let function = function::choose(address.as_deref())?;
    if function.is_bound() {
        function.unbind()?;
    }
    // Until the driver has replaced the channel, the device may write to these pages.
    let queues = Mapping::locked(QUEUES).context("memory for the queues")?;
    establish(&function, &queues)?;
    let bind = function::timed(|| function.bind())?;
    bring_up(&function)?;
    Ok(json!({ "address": function.address, "bind_ms": bind, "interfaces": function.interfaces() }))
}

fn establish(function: &Function, queues: &Mapping) -> Result<()> {
    enable(function)?;
    let resource = OpenOptions::new().read(true).write(true).open(function.path.join("resource0"))?;
    let length = resource.metadata()?.len() as usize;
    let bar = Mapping::of_file(&resource, length).context("map BAR0")?;
    let aperture = bar.read::<u64>(SHM_OFFSET) as usize;
    ensure!(aperture + HEADER + 4 <= length, "the aperture is outside BAR0: {aperture:#x}");
    for (index, word) in request(&queues.frames()?).into_iter().enumerate() {
        bar.write(aperture + 4 * index, word);
    }
    let header = || bar.read::<u32>(aperture + HEADER);
    wait_until("answer", || header() & OWNER_IS_DEVICE == 0)?;
    let answer = header();
    ensure!(answer & (TYPE | IS_RESPONSE | STATUS) == ESTABLISH | IS_RESPONSE, "the answer is {answer:#x}");
    wait_until("first event", || queues.read::<u32>(EQE_TYPE) & 0xff == INIT_EQ_ID_DB)
}

/// Memory decoding and bus mastering on: unbinding switched them off.
fn enable(function: &Function) -> Result<()> {
    let config = OpenOptions::new().read(true).write(true).open(function.path.join("config"))?;
    let mut command = [0; 2];
    config.read_exact_at(&mut command, COMMAND)?;
    let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
    config.write_all_at(&command.to_le_bytes(), COMMAND).context("command register")
}

/// The request's eight words: four 48-bit frame numbers, their next four bits, the vector, the header.
fn request(frames: &[u64]) -> [u32; 8] {
    let mut bytes = [0; 32];
    let mut high_bits = 0_u16;
    for (index, frame) in frames.iter().take(QUEUES).enumerate() {
        bytes[6 * index..][..6].copy_from_slice(&frame.to_le_bytes()[..6]);
        high_bits |= ((frame >> 48 & 0xf) as u16) << (4 * index);
    }
    bytes[24..26].copy_from_slice(&high_bits.to_le_bytes());
    bytes[28..].copy_from_slice(&ESTABLISH.to_le_bytes());
    std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|byte| bytes[4 * word + byte])))
}

fn wait_until(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !condition() {
        ensure!(start.elapsed() < PATIENCE, "no {what} from the device within {} s", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_frame_numbers() {
        let words = request(&[0x1_2345_6789_abcd, 2, 3, 0xf_0000_0000_0004]);
        assert_eq!(words, [0x6789_abcd, 0x0002_2345, 0, 0x3, 0x0004_0000, 0, 0xf001, 1]);
    }
}
