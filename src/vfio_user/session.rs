//! What one client asks for, and what it is answered: from its first message until it leaves.
//!
//! A [`Session`] knows no socket: messages come in, replies go out, the device is driven in between. The client's
//! guest is hostile and so may the client be: every field is checked here, a request that makes no sense gets an
//! errno, and only a stream whose borders or order are lost ends the connection.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mana_device::ManaDevice;
use mana_device::config::{BarLocation, DeviceConfig};
use mana_device::doors::Memory;
use rustix::io::Errno;
use serde_json::json;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::dma::ClientMemory;
use super::frames::{Broken, Frame, MAX_DESCRIPTORS, MAX_TRANSFER};
use super::irqs::EventDescriptors;
use super::wire::{
    Command, DeviceInfo, DmaMap, DmaUnmap, Header, IrqInfo, IrqSet, OneWrite, RegionAccess, RegionInfo,
    Version, WriteCount, flags, irq, region,
};
use crate::warn_limited;

/// Bytes of configuration space with PCI Express's extension.
const CONFIG_SIZE: u64 = 4096;
/// Most writes of one message (`VFIO_USER_MULTI_MAX`).
const MAX_WRITES: u64 = 200;
/// Descriptors that we tell clients to send at most with a message. QEMU takes no more than its own 8.
const ANNOUNCED_DESCRIPTORS: usize = if MAX_DESCRIPTORS < 8 { MAX_DESCRIPTORS } else { 8 };

/// Why a connection ends that the client has not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Offence {
    /// The stream is out of step.
    #[error(transparent)]
    Broken(#[from] Broken),
    /// We ask for nothing, so there is nothing to reply to.
    #[error("a message of type {0} is no request")]
    NoRequest(u32),
    /// The first message must be VERSION.
    #[error("command {0} came before the versions were compared")]
    NoVersion(u16),
    /// The client speaks another language.
    #[error("the client speaks version {0}.x of the protocol, not 0.x")]
    WrongVersion(u16),
}

/// A function and the ways into it that a session needs.
pub struct Function {
    /// The device.
    pub device: Arc<ManaDevice>,
    /// What it was made with.
    pub config: DeviceConfig,
    /// The memory that it was given.
    pub memory: Memory,
    /// The interrupts that it was given.
    pub events: Arc<EventDescriptors>,
}

/// One client's state.
pub struct Session {
    device: Arc<ManaDevice>,
    events: Arc<EventDescriptors>,
    memory: ClientMemory,
    /// Bytes of each region, 0 where there is none.
    sizes: [u64; region::COUNT as usize],
    vectors: u32,
    table: BarLocation,
    negotiated: bool,
    /// Memory Space Enable.
    decodes: bool,
}

impl Session {
    /// A client has come; the device is in its power-on state. The client's `socket` is shut down when memory that it
    /// has lent is found gone.
    pub fn new(function: &Function, socket: Option<OwnedFd>) -> Self {
        let Function { device, config, memory, events } = function;
        let mut sizes = [0; region::COUNT as usize];
        for (index, size) in config.bars() {
            sizes[usize::from(index)] = size;
        }
        sizes[region::CONFIG as usize] = CONFIG_SIZE;
        Self {
            device: device.clone(),
            events: events.clone(),
            memory: ClientMemory::new(memory.clone(), socket),
            sizes,
            vectors: config.msix_table_size.into(),
            table: config.msix_table,
            negotiated: false,
            decodes: false,
        }
    }

    /// Do what `frame` asks for, and add the reply to `replies` if one is due.
    ///
    /// # Errors
    /// [`Offence`] ends the connection, after what is in `replies` was sent.
    pub fn handle(&mut self, frame: Frame<'_>, replies: &mut Vec<u8>) -> Result<(), Offence> {
        let Frame { header, payload, descriptors } = frame;
        let (number, flags) = (header.command.get(), header.flags.get());
        if flags & flags::TYPE != flags::REQUEST {
            return Err(Offence::NoRequest(flags & flags::TYPE));
        }
        let command = Command::new(number);
        if !self.negotiated && command != Some(Command::Version) {
            return Err(Offence::NoVersion(number));
        }
        let start = replies.len();
        replies.extend_from_slice(header.as_bytes());
        let result = match command {
            Some(command) => self.run(command, payload, descriptors, replies),
            None => Err(Errno::OPNOTSUPP),
        };
        if let Err(errno) = result {
            replies.truncate(start + size_of::<Header>());
            log::debug!("command {number} of {} bytes: {errno}", payload.len());
        }
        let size = replies.len() - start;
        if flags & flags::NO_REPLY != 0 {
            replies.truncate(start);
        } else if let Some((reply, _)) =
            replies.get_mut(start..).and_then(|bytes| Header::mut_from_prefix(bytes).ok())
        {
            reply.size = (size as u32).into();
            reply.flags = (flags::REPLY | if result.is_err() { flags::ERROR } else { 0 }).into();
            reply.error = result.err().map_or(0, |errno| errno.raw_os_error() as u32).into();
        }
        if !self.negotiated {
            let major =
                Version::read_from_prefix(payload).map_or(u16::MAX, |(version, _)| version.major.get());
            return Err(Offence::WrongVersion(major));
        }
        Ok(())
    }

    /// The client is gone: nothing of it stays behind.
    pub fn end(mut self) {
        self.events.clear();
        self.device.reset();
        self.memory.unmap_all();
    }

    fn run(
        &mut self,
        command: Command,
        payload: &[u8],
        descriptors: Vec<OwnedFd>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        // Descriptors that a command has no use for are closed when they go out of scope.
        match command {
            Command::Version => self.version(payload, out),
            Command::DmaMap => {
                let mut files = descriptors.into_iter();
                let (message, file) = (exactly::<DmaMap>(payload)?, files.next());
                if files.next().is_some() { Err(Errno::INVAL) } else { self.memory.map(&message, file) }
            }
            Command::DmaUnmap => {
                let message: DmaUnmap = exactly(payload)?;
                self.memory.unmap(&message)?;
                out.extend_from_slice(message.as_bytes());
                Ok(())
            }
            Command::DeviceGetInfo => device_info(payload, out),
            Command::DeviceGetRegionInfo => self.region_info(payload, out),
            Command::DeviceGetIrqInfo => self.irq_info(payload, out),
            Command::DeviceSetIrqs => self.set_irqs(payload, descriptors),
            Command::RegionRead => self.read(payload, out),
            Command::RegionWrite => self.write(payload, out),
            Command::RegionWriteMulti => self.write_multi(payload),
            Command::DeviceReset => {
                self.device.reset();
                self.decodes = false;
                Ok(())
            }
        }
    }

    /// Compare versions, and tell the client what we bear. What the client says of itself binds only us, and we send
    /// it nothing but replies.
    fn version(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
        let (version, _) = Version::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        if version.major.get() != 0 || self.negotiated {
            return Err(Errno::INVAL);
        }
        self.negotiated = true;
        let capabilities = json!({ "capabilities": {
            "max_msg_fds": ANNOUNCED_DESCRIPTORS,
            "max_data_xfer_size": MAX_TRANSFER,
            "pgsizes": 4096,
            "write_multiple": true,
        }});
        out.extend_from_slice(
            Version { major: 0.into(), minor: version.minor.get().min(1).into() }.as_bytes(),
        );
        out.extend_from_slice(capabilities.to_string().as_bytes());
        out.push(0);
        Ok(())
    }

    fn region_info(&self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
        let asked: RegionInfo = exactly(payload)?;
        let index = asked.index.get();
        let size = self.size(index)?;
        let info = RegionInfo {
            argsz: (size_of::<RegionInfo>() as u32).into(),
            flags: if size > 0 { 3 } else { 0 }.into(),
            index: index.into(),
            cap_offset: 0.into(),
            size: size.into(),
            offset: 0.into(),
        };
        out.extend_from_slice(info.as_bytes());
        Ok(())
    }

    fn size(&self, index: u32) -> Result<u64, Errno> {
        usize::try_from(index).ok().and_then(|index| self.sizes.get(index)).copied().ok_or(Errno::INVAL)
    }

    fn irq_info(&self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
        let asked: IrqInfo = exactly(payload)?;
        let index = asked.index.get();
        if index >= irq::COUNT {
            return Err(Errno::INVAL);
        }
        let msix = index == irq::MSIX;
        let info = IrqInfo {
            argsz: (size_of::<IrqInfo>() as u32).into(),
            flags: u32::from(msix).into(),
            index: index.into(),
            count: if msix { self.vectors } else { 0 }.into(),
        };
        out.extend_from_slice(info.as_bytes());
        Ok(())
    }

    /// SET_IRQS: vectors get their descriptors or lose them, or are fired to see whether they arrive.
    fn set_irqs(&mut self, payload: &[u8], descriptors: Vec<OwnedFd>) -> Result<(), Errno> {
        let (set, data) = IrqSet::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        let (index, start, count) = (set.index.get(), set.start.get(), set.count.get());
        let vectors = if index == irq::MSIX { self.vectors } else { 0 };
        let end = start.checked_add(count).filter(|&end| end <= vectors).ok_or(Errno::INVAL)?;
        let flags = set.flags.get();
        if index >= irq::COUNT || flags & irq::ACTION_TRIGGER == 0 {
            return Err(Errno::INVAL);
        }
        match (flags & !irq::ACTION_TRIGGER, data.len(), descriptors.len()) {
            // All are taken back.
            (irq::DATA_NONE, 0, 0) if count == 0 => {
                (0..vectors).try_for_each(|vector| self.take_vector(vector))?;
            }
            (irq::DATA_NONE, 0, 0) => (start..end).for_each(|vector| self.fire(vector)),
            (irq::DATA_BOOL, length, 0) if length == count as usize => {
                (start..end)
                    .zip(data)
                    .filter(|(_, fire)| **fire != 0)
                    .for_each(|(vector, _)| self.fire(vector));
            }
            (irq::DATA_EVENTFD, 0, 0) => (start..end).try_for_each(|vector| self.take_vector(vector))?,
            (irq::DATA_EVENTFD, 0, number) if number == count as usize => {
                for (vector, descriptor) in (start..end).zip(descriptors) {
                    self.give_vector(vector, descriptor)?;
                }
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(())
    }

    /// The guest has unmasked `vector` in the table that the client keeps, of which ours is the shadow: it holds no
    /// real message, but masks, pends and traces as the table itself would.
    fn give_vector(&mut self, vector: u32, descriptor: OwnedFd) -> Result<(), Errno> {
        self.events.set(vector, Some(descriptor))?;
        self.write_entry(vector, 8, vector);
        self.write_entry(vector, 12, 0);
        Ok(())
    }

    fn take_vector(&mut self, vector: u32) -> Result<(), Errno> {
        self.write_entry(vector, 12, 1);
        self.events.set(vector, None)
    }

    fn write_entry(&self, vector: u32, offset: u32, value: u32) {
        let at = u64::from(self.table.offset) + u64::from(vector) * 16 + u64::from(offset);
        // The table is there whatever the guest does, and takes dwords.
        let _ = self.device.bar_write(self.table.bar, at, &value.to_le_bytes());
    }

    fn fire(&self, vector: u32) {
        use mana_device::doors::MsiSink;
        if let Ok(vector) = u16::try_from(vector) {
            self.events.fire(vector);
        }
    }

    fn read(&self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
        let access: RegionAccess = exactly(payload)?;
        let place = self.place(&access)?;
        out.extend_from_slice(access.as_bytes());
        let start = out.len();
        out.resize(start + access.count.get() as usize, 0xff);
        match place {
            Place::Config(at) => {
                pieces(at, &mut out[start..], |at, piece| self.device.config_read(at, piece));
            }
            Place::Bar(bar, at) if self.decodes => {
                if let Err(error) = self.device.bar_read(bar, at, &mut out[start..]) {
                    warn_limited!("{error}; it reads as all ones");
                }
            }
            Place::Bar(..) => {}
        }
        Ok(())
    }

    fn write(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
        let (access, data) = RegionAccess::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        self.write_one(&access, data)?;
        out.extend_from_slice(access.as_bytes());
        Ok(())
    }

    /// Several posted writes in one message. One that makes no sense does not hold up the others.
    fn write_multi(&mut self, payload: &[u8]) -> Result<(), Errno> {
        let (head, writes) = WriteCount::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
        let whole = writes.len().is_multiple_of(size_of::<OneWrite>());
        let number = (writes.len() / size_of::<OneWrite>()) as u64;
        if !whole || number != head.count.get() || number > MAX_WRITES {
            return Err(Errno::INVAL);
        }
        let mut result = Ok(());
        for write in writes.chunks_exact(size_of::<OneWrite>()) {
            let write: OneWrite = exactly(write)?;
            let data =
                usize::try_from(write.access.count.get()).ok().and_then(|count| write.data.get(..count));
            let done = data.ok_or(Errno::INVAL).and_then(|data| self.write_one(&write.access, data));
            result = result.and(done);
        }
        result
    }

    fn write_one(&mut self, access: &RegionAccess, data: &[u8]) -> Result<(), Errno> {
        if data.len() != access.count.get() as usize {
            return Err(Errno::INVAL);
        }
        match self.place(access)? {
            Place::Config(at) => {
                let mut data = data.to_vec();
                let mut changed = false;
                pieces(at, &mut data, |at, piece| {
                    changed |= self.device.config_write(at, piece).bars_changed;
                });
                if changed {
                    self.decodes = self.device.memory_enabled();
                }
            }
            Place::Bar(bar, at) if self.decodes => {
                if let Err(error) = self.device.bar_write(bar, at, data) {
                    warn_limited!("{error}; the write is dropped");
                }
            }
            Place::Bar(..) => {}
        }
        Ok(())
    }

    /// What an access hits.
    fn place(&self, access: &RegionAccess) -> Result<Place, Errno> {
        let (index, at, count) = (access.region.get(), access.offset.get(), u64::from(access.count.get()));
        let end = at.checked_add(count).ok_or(Errno::INVAL)?;
        if count == 0 || count > MAX_TRANSFER as u64 || end > self.size(index)? {
            return Err(Errno::INVAL);
        }
        if index == region::CONFIG {
            return u16::try_from(at).map(Place::Config).map_err(|_| Errno::INVAL);
        }
        // A load or store of the guest; the client cuts longer ones.
        if !matches!(count, 1 | 2 | 4 | 8) {
            return Err(Errno::INVAL);
        }
        u8::try_from(index).map(|bar| Place::Bar(bar, at)).map_err(|_| Errno::INVAL)
    }
}

/// A place in a region.
enum Place {
    Config(u16),
    Bar(u8, u64),
}

fn device_info(payload: &[u8], out: &mut Vec<u8>) -> Result<(), Errno> {
    exactly::<DeviceInfo>(payload)?;
    let info = DeviceInfo {
        argsz: (size_of::<DeviceInfo>() as u32).into(),
        flags: 3.into(),
        num_regions: region::COUNT.into(),
        num_irqs: irq::COUNT.into(),
    };
    out.extend_from_slice(info.as_bytes());
    Ok(())
}

/// A message that is nothing but a `T`.
fn exactly<T: FromBytes + KnownLayout + Immutable + Unaligned>(payload: &[u8]) -> Result<T, Errno> {
    T::read_from_bytes(payload).map_err(|_| Errno::INVAL)
}

/// Cut an access to configuration space into naturally aligned ones of at most 4 bytes, as they are on the bus.
fn pieces(mut at: u16, mut data: &mut [u8], mut access: impl FnMut(u16, &mut [u8])) {
    while !data.is_empty() {
        let aligned = 1 << at.trailing_zeros().min(2);
        let length =
            [4, 2, 1].into_iter().find(|&length| length <= aligned && length <= data.len()).unwrap_or(1);
        let (piece, rest) = data.split_at_mut(length);
        access(at, piece);
        at += length as u16;
        data = rest;
    }
}
