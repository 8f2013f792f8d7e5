//! A port that is up: what most cases of the data path begin with.

use super::machine::{FREE, Machine, TABLE};
use super::message;
use super::model::MANA;
use super::ram::{PAGE, address};

/// Protection domain and doorbell page of the Ethernet device. The driver learns them from REGISTER_DEVICE.
#[derive(Clone, Copy)]
pub struct Registration {
    /// Protection domain.
    pub pd: u32,
    /// Memory key.
    pub key: u32,
    /// Doorbell page.
    pub page: u32,
}

/// Queue pairs of the port.
const PAIRS: usize = 2;
/// Pages of its rings: the event queue, and two for each queue.
pub const RINGS: usize = 1 + 4 * PAIRS;
/// Pages for rings that are made later.
const SPARE: usize = 4;
/// First page that is never a ring. The next stretch of RAM begins behind it.
pub const BUFFERS: usize = FREE + RINGS + SPARE;
/// Bytes of a work queue's ring.
pub const WQ: u32 = 1024;
/// Bytes of a completion queue's ring.
pub const CQ: u32 = 2048;

impl Machine {
    /// GDMA_REGISTER_DEVICE of the Ethernet device.
    pub fn register(&mut self) -> Option<Registration> {
        let answer = self.command(message::register(MANA).bytes())?;
        Some(Registration { pd: answer.dword(32), key: answer.dword(36), page: answer.dword(40) })
    }
    /// A DMA region of one page.
    pub fn region(&mut self, page: usize) -> Option<u64> {
        self.ram.clear(address(page));
        self.command(message::create_region(&[address(page)], 1).bytes())?;
        self.model.regions.last().map(|region| region.handle)
    }
    /// An event queue of the Ethernet device, on one page.
    pub fn event_queue(&mut self, page: usize, doorbells: u32, vector: u32) -> Option<u32> {
        let region = self.region(page)?;
        self.command(message::create_eq(MANA, region, doorbells, PAGE as u32, vector).bytes())?;
        self.model.eqs.last().map(|eq| eq.id)
    }
    /// A work queue with its completion queue, on two pages.
    pub fn work_queue(&mut self, port: u32, is_send: bool, page: usize, eq: u32) -> Option<u64> {
        let regions = [self.region(page)?, self.region(page + 1)?];
        self.command(message::create_wq(port, is_send, regions, [WQ, CQ], eq).bytes())?;
        self.model.wqs.last().map(|wq| wq.handle)
    }
    /// Everything from power-on to vPort `port` open with two queue pairs and RSS. A machine as new does it once and
    /// becomes what it was then later on, which is quicker.
    ///
    /// # Panics
    /// A card that does what it should does this.
    pub fn bring_up(&mut self, port: u32) -> Registration {
        if !self.is_fresh() {
            return self.drive_up(port);
        }
        if let Some(registration) = self.recall(port as usize) {
            return registration;
        }
        let registration = self.drive_up(port);
        self.remember(port as usize, registration);
        registration
    }
    fn drive_up(&mut self, port: u32) -> Registration {
        self.enable();
        assert!(self.open(0), "the channel is established");
        let registration = self.register().expect("the device registers");
        let mut page = FREE;
        let eq = self.event_queue(page, registration.page, 1).expect("an event queue");
        page += 1;
        let binding = message::config_tx(port, registration.pd, registration.page);
        self.command(binding.bytes()).expect("an answer");
        let mut queues = [0; PAIRS];
        for queue in &mut queues {
            self.work_queue(port, true, page, eq).expect("a send queue");
            *queue = self.work_queue(port, false, page + 2, eq).expect("a receive queue");
            page += 4;
        }
        let steering = message::config_rx(port, true, true, &queues, TABLE, 0);
        self.command(steering.bytes()).expect("an answer");
        assert_eq!(self.model.wqs.len(), 2 * PAIRS, "the port is open");
        registration
    }
}
