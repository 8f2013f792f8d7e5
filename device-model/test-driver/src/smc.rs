//! The shared-memory channel: eight dwords in BAR0 by which the hardware channel is set up and torn down.

use crate::error::{Errno, Error, Result};
use crate::world::World;

/// `SMC_MSG_TYPE_ESTABLISH_HWC`.
pub const ESTABLISH: u32 = 1;
/// `SMC_MSG_TYPE_DESTROY_HWC`.
pub const DESTROY: u32 = 2;

const OWNER_IS_PF: u32 = 1 << 31;
const RESPONSE: u32 = 1 << 7;
/// How often the driver looks, 1 ms apart.
const POLLS: u32 = 20_000;

/// What ESTABLISH tells the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Establish {
    /// Page of the event queue.
    pub eq: u64,
    /// Page of the completion queue.
    pub cq: u64,
    /// Page of the receive queue.
    pub rq: u64,
    /// Page of the send queue.
    pub sq: u64,
    /// MSI-X vector of the event queue.
    pub msix: u16,
}

impl Establish {
    /// The seven payload dwords.
    pub fn dwords(&self) -> [u32; 7] {
        let pages = [self.eq, self.cq, self.rq, self.sq].map(|address| address >> 12);
        let mut bytes = [0; 28];
        let mut high = 0;
        for (i, page) in pages.into_iter().enumerate() {
            bytes[6 * i..6 * i + 6].copy_from_slice(&page.to_le_bytes()[..6]);
            high |= (page >> 48) << (4 * i);
        }
        bytes[24..26].copy_from_slice(&high.to_le_bytes()[..2]);
        bytes[26..28].copy_from_slice(&self.msix.to_le_bytes());
        std::array::from_fn(|i| u32::from_le_bytes([0, 1, 2, 3].map(|j| bytes[4 * i + j])))
    }
}

/// The aperture.
#[derive(Clone, Copy)]
pub struct Smc<'w> {
    world: &'w World,
    offset: u64,
}

impl<'w> Smc<'w> {
    /// The aperture at `offset` of BAR0.
    pub fn new(world: &'w World, offset: u64) -> Self {
        Self { world, offset }
    }

    /// Read a dword.
    ///
    /// # Panics
    /// It does not answer.
    pub fn read(self, dword: u64) -> u32 {
        let mut data = [0; 4];
        self.world.device.bar_read(0, self.offset + 4 * dword, &mut data).expect("the SMC aperture answers");
        u32::from_le_bytes(data)
    }

    /// Write a dword.
    ///
    /// # Panics
    /// It is not taken.
    pub fn write(self, dword: u64, value: u32) {
        let offset = self.offset + 4 * dword;
        self.world.device.bar_write(0, offset, &value.to_le_bytes()).expect("the SMC aperture answers");
    }

    /// `mana_smc_setup_hwc`.
    ///
    /// # Errors
    /// As [`request`](Self::request).
    pub fn establish(self, payload: &Establish) -> Result<()> {
        self.wait_for_ownership()?;
        for (dword, value) in (0..).zip(payload.dwords()) {
            self.write(dword, value);
        }
        self.request(ESTABLISH)
    }

    /// `mana_smc_teardown_hwc`.
    ///
    /// # Errors
    /// As [`request`](Self::request).
    pub fn destroy(self) -> Result<()> {
        self.wait_for_ownership()?;
        self.request(DESTROY)
    }

    /// Write the header and check the answer.
    ///
    /// # Errors
    /// `-ETIMEDOUT` if the device keeps the aperture, `-EPROTO` if the answer is another or a refusal.
    pub fn request(self, kind: u32) -> Result<()> {
        self.write(7, kind);
        let header = self.wait_for_ownership()?;
        let status = header >> 8 & 0xff;
        let answers = header & 7 == kind && header >> 3 & 7 == 0 && header & RESPONSE != 0;
        if !answers || status != 0 {
            return Err(Error::proto(format!("SMC: header {header:#010x} answers request {kind}")));
        }
        Ok(())
    }

    fn wait_for_ownership(self) -> Result<u32> {
        for _ in 0..POLLS {
            let header = self.read(7);
            if header & OWNER_IS_PF == 0 {
                return Ok(header);
            }
            self.world.clock.advance(1_000_000);
            let _ = self.world.settle();
        }
        Err(Error::new(Errno::Etimedout, "SMC: the device keeps the aperture"))
    }
}
