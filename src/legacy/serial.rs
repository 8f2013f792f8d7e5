//! COM1: a 16550A, and the terminal's input to it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow};
use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::Serial;
use vm_superio::serial::{SerialEvents, SerialState};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::terminal::Terminal;

use super::console::Console;
use crate::irq::IrqLine;
use crate::stop::{Outcome, Stop};
use crate::warn_limited;

type Uart = Serial<IrqLine, RoomInFifo, ConsoleWriter>;

/// The UART's eight ports.
pub struct SerialPort {
    uart: Mutex<Uart>,
    room: EventFd,
    line: IrqLine,
    console: Arc<Console>,
}

/// The UART's registers and its FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    /// Divisor latch, interrupt enable and identification, line control and status, modem control and status, scratch.
    registers: [u8; 9],
    received: Vec<u8>,
}

impl SerialPort {
    /// A UART that interrupts by `line` and writes to `console`.
    ///
    /// # Errors
    /// The host has no event descriptor left.
    pub fn new(line: IrqLine, console: Arc<Console>) -> anyhow::Result<Self> {
        let room = EventFd::new(EFD_NONBLOCK).context("no event descriptor")?;
        let uart = uart(&SerialState::default(), &line, &room, &console)?;
        Ok(Self { uart: Mutex::new(uart), room, line, console })
    }

    /// What is kept.
    pub fn save(&self) -> UartState {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart().state();
        let registers = [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ];
        UartState { registers, received: in_buffer }
    }

    /// Become what `state` says.
    ///
    /// # Errors
    /// The FIFO is longer than there is one.
    pub fn load(&self, state: &UartState) -> anyhow::Result<()> {
        let [
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ] = state.registers;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: state.received.clone(),
        };
        *self.uart() = uart(&state, &self.line, &self.room, &self.console)?;
        Ok(())
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn uart(state: &SerialState, line: &IrqLine, room: &EventFd, console: &Arc<Console>) -> anyhow::Result<Uart> {
    let events = RoomInFifo(room.try_clone().context("no event descriptor")?);
    let uart = Serial::from_state(state, line.try_clone()?, events, ConsoleWriter(console.clone()));
    uart.map_err(|error| anyhow!("serial port: {error}"))
}

impl DevicePio for SerialPort {
    fn pio_read(&self, _: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let mut uart = self.uart();
        data.iter_mut().for_each(|byte| *byte = uart.read(offset as u8));
    }

    fn pio_write(&self, _: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        let mut uart = self.uart();
        for byte in data {
            if let Err(error) = uart.write(offset as u8, *byte) {
                warn_limited!("serial port: {error}");
            }
        }
    }
}

/// The guest has emptied the FIFO.
struct RoomInFifo(EventFd);

impl SerialEvents for RoomInFifo {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

struct ConsoleWriter(Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.byte(*byte));
        Ok(bytes.len())
    }

    /// Called after every byte; the console knows better when.
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Standard input, for the guest. A terminal is in raw mode for as long as this lives.
pub struct SerialInput {
    port: Arc<SerialPort>,
    input: File,
    escape: Escape,
    /// Typed, but no room in the FIFO yet.
    waiting: VecDeque<u8>,
    stop: Arc<Stop>,
}

impl SerialInput {
    /// Feed standard input to `port`; Ctrl-A X goes to `stop`.
    ///
    /// # Errors
    /// There is no standard input.
    pub fn new(port: Arc<SerialPort>, stop: Arc<Stop>) -> anyhow::Result<Self> {
        let stdin = std::io::stdin();
        let input = File::from(stdin.as_fd().try_clone_to_owned().context("no standard input")?);
        if stdin.is_terminal() {
            stdin.lock().set_raw_mode().context("can't set the terminal to raw mode")?;
        }
        Ok(Self { port, input, escape: Escape::default(), waiting: VecDeque::new(), stop })
    }

    fn read_input(&mut self, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 64];
        let count = self.input.read(&mut bytes).unwrap_or(0);
        if count == 0 {
            let _ = ops.remove(Events::empty(&self.input));
        }
        for byte in bytes.into_iter().take(count) {
            match self.escape.byte(byte) {
                Key::Typed(byte) => self.waiting.push_back(byte),
                Key::Quit => self.stop.request(Outcome::PowerOff),
                Key::None => {}
            }
        }
    }

    /// Move what fits into the FIFO, and read no more input until all did.
    fn feed(&mut self, ops: &EventOps<'_>) {
        let mut uart = self.port.uart();
        let count = uart.fifo_capacity().min(self.waiting.len());
        let bytes: Vec<u8> = self.waiting.drain(..count).collect();
        if let Err(error) = uart.enqueue_raw_bytes(&bytes) {
            warn_limited!("serial port: {error}");
        }
        let wanted = if self.waiting.is_empty() { EventSet::IN } else { EventSet::empty() };
        let _ = ops.modify(Events::new(&self.input, wanted));
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.port.room, EventSet::IN)) {
            log::error!("serial port: {error}");
        }
        // Files and /dev/null can't be waited for, and have nothing to type.
        if let Err(error) = ops.add(Events::new(&self.input, EventSet::IN)) {
            log::debug!("no input for the serial port: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == std::os::fd::AsRawFd::as_raw_fd(&self.port.room) {
            let _ = self.port.room.read();
        } else {
            self.read_input(ops);
        }
        self.feed(ops);
    }
}

impl Drop for SerialInput {
    fn drop(&mut self) {
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            let _ = stdin.lock().set_canon_mode();
        }
    }
}

/// QEMU's escape: Ctrl-A X quits, Ctrl-A Ctrl-A is Ctrl-A.
#[derive(Default)]
struct Escape {
    begun: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Key {
    Typed(u8),
    Quit,
    None,
}

impl Escape {
    const CTRL_A: u8 = 1;

    fn byte(&mut self, byte: u8) -> Key {
        match (std::mem::take(&mut self.begun), byte) {
            (false, Self::CTRL_A) => {
                self.begun = true;
                Key::None
            }
            (true, b'x' | b'X') => Key::Quit,
            (true, byte) if byte != Self::CTRL_A => Key::None,
            (_, byte) => Key::Typed(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_the_escape() {
        let mut escape = Escape::default();
        let keys: Vec<Key> = b"a\x01\x01\x01bx\x01x".iter().map(|byte| escape.byte(*byte)).collect();
        let (typed, none) = (Key::Typed, || Key::None);
        assert_eq!(keys, [typed(b'a'), none(), typed(1), none(), none(), typed(b'x'), none(), Key::Quit]);
    }
}
