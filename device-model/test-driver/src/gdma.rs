//! GDMA_* commands (section 6.5 to 6.7 of the interface).

use crate::driver::Driver;
use crate::error::{Error, Result};
use crate::memory::{Dma, RingMemory};
use crate::message::{Request, Response, STATUS_MORE_ENTRIES};
use crate::queues::{DoorbellPage, EventQueue};

/// Page addresses that fit behind the header of GDMA_CREATE_DMA_REGION in one page.
pub const PAGES_IN_CREATE: usize = (4096 - 64) / 8;
/// Page addresses that fit behind the header of GDMA_DMA_REGION_ADD_PAGES in one page.
pub const PAGES_IN_ADD: usize = (4096 - 56) / 8;

/// Command codes.
pub mod code {
    #![allow(missing_docs, reason = "the names are the driver's")]
    pub const VERIFY_VF_DRIVER_VERSION: u32 = 1;
    pub const QUERY_MAX_RESOURCES: u32 = 2;
    pub const LIST_DEVICES: u32 = 3;
    pub const REGISTER_DEVICE: u32 = 4;
    pub const DEREGISTER_DEVICE: u32 = 5;
    pub const GENERATE_TEST_EQE: u32 = 10;
    pub const CREATE_QUEUE: u32 = 12;
    pub const DISABLE_QUEUE: u32 = 13;
    pub const ALLOCATE_RESOURCE_RANGE: u32 = 22;
    pub const DESTROY_RESOURCE_RANGE: u32 = 24;
    pub const CREATE_DMA_REGION: u32 = 25;
    pub const DMA_REGION_ADD_PAGES: u32 = 26;
    pub const DESTROY_DMA_REGION: u32 = 27;
    pub const CREATE_PD: u32 = 29;
    pub const DESTROY_PD: u32 = 30;
    pub const QUERY_HWC_TIMEOUT: u32 = 84;
}

/// `gdma_dev_id`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceId {
    /// 1 HWC, 2 MANA, 3 MANA_IB.
    pub kind: u16,
    /// Instance.
    pub instance: u16,
}

impl DeviceId {
    /// No device: commands about the whole function.
    pub const NONE: Self = Self { kind: 0, instance: 0 };
    /// The hardware channel.
    pub const HWC: Self = Self { kind: 1, instance: 0 };
}

/// Queue types of GDMA_CREATE_QUEUE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    /// Send queue.
    Sq = 1,
    /// Receive queue.
    Rq = 2,
    /// Completion queue.
    Cq = 3,
    /// Event queue.
    Eq = 4,
}

/// GDMA_QUERY_MAX_RESOURCES.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Send queues.
    pub max_sq: u32,
    /// Receive queues.
    pub max_rq: u32,
    /// Completion queues.
    pub max_cq: u32,
    /// Event queues.
    pub max_eq: u32,
    /// MSI-X vectors.
    pub max_msix: u32,
}

/// GDMA_REGISTER_DEVICE.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Protection domain.
    pub pdid: u32,
    /// Memory key of data-path SGEs.
    pub gpa_mkey: u32,
    /// Doorbell page index.
    pub db_id: u32,
}

/// GDMA_CREATE_QUEUE of an event queue.
pub fn create_eq_request(
    device: DeviceId,
    registration: Registration,
    region: u64,
    bytes: u32,
    msix: u16,
) -> Request {
    Request::new(code::CREATE_QUEUE, device, 96, 36)
        .u32(40, QueueType::Eq as u32)
        .u32(48, registration.pdid)
        .u32(52, registration.db_id)
        .u64(56, region)
        .u32(68, bytes)
        .u32(72, 3)
        .u32(76, u32::from(msix))
}

impl Driver<'_> {
    /// A GDMA command: the caller looks at the status itself only for the page-list commands.
    pub(crate) fn gdma(&mut self, request: &Request) -> Result<Response> {
        let response = self.send(request)?;
        match response.status() {
            0 => Ok(response),
            status => {
                let what = format!("command {:#x}: status {status:#x}", request.code());
                Err(Error { status: Some(status), ..Error::proto(what) })
            }
        }
    }

    /// GDMA_VERIFY_VF_DRIVER_VERSION; returns `pf_cap_flags1`.
    pub(crate) fn verify_vf_driver_version(&mut self) -> Result<u64> {
        let (major, minor) = self.generation.release;
        let request = Request::new(code::VERIFY_VF_DRIVER_VERSION, DeviceId::NONE, 640, 72)
            .u64(40, 1)
            .u64(48, 1)
            .u64(56, self.generation.capabilities)
            .u32(96, 0x10)
            .u32(104, major)
            .u32(108, minor)
            .put(128, b"Linux")
            .put(256, self.generation.name.as_bytes())
            .put(384, b"#1 SMP");
        let response = self.gdma(&request)?;
        let (protocol, flags) = (response.u64(32), response.u64(40));
        assert_eq!(protocol, 1, "gdma_protocol_ver: other drivers insist on 1");
        if flags & 1 << 3 != 0 {
            self.query_hwc_timeout()?;
        }
        Ok(flags)
    }

    /// GDMA_QUERY_HWC_TIMEOUT.
    ///
    /// # Errors
    /// Those of the command.
    ///
    /// # Panics
    /// The device says 0, which kills the channel.
    pub fn query_hwc_timeout(&mut self) -> Result<u32> {
        let current = u32::try_from(self.hwc_ref().timeout_ns / 1_000_000).unwrap_or(u32::MAX);
        let request = Request::new(code::QUERY_HWC_TIMEOUT, DeviceId::NONE, 48, 40).u32(40, current);
        let timeout = self.gdma(&request)?.u32(32);
        assert_ne!(timeout, 0, "a time-out of 0 kills the channel");
        self.hwc_mut().timeout_ns = u64::from(timeout) * 1_000_000;
        Ok(timeout)
    }

    /// GDMA_LIST_DEVICES, holes skipped.
    ///
    /// # Errors
    /// Those of the command.
    ///
    /// # Panics
    /// The list has more than 64 entries, or fewer than it says.
    pub fn list_devices(&mut self) -> Result<Vec<DeviceId>> {
        let response = self.gdma(&Request::new(code::LIST_DEVICES, DeviceId::NONE, 40, 296))?;
        let count = response.u32(32) as usize;
        assert!(count <= 64, "{count} devices in a list of 64");
        let entry =
            |i: usize| DeviceId { kind: response.u16(40 + 4 * i), instance: response.u16(42 + 4 * i) };
        let devices: Vec<_> =
            (0..64).map(entry).filter(|&device| device != DeviceId::NONE).take(count).collect();
        assert_eq!(devices.len(), count, "the list holds as many devices as it says");
        Ok(devices)
    }

    /// GDMA_QUERY_MAX_RESOURCES.
    ///
    /// # Errors
    /// Those of the command.
    pub fn query_max_resources(&mut self) -> Result<Resources> {
        let response = self.gdma(&Request::new(code::QUERY_MAX_RESOURCES, DeviceId::NONE, 40, 72))?;
        Ok(Resources {
            max_sq: response.u32(36),
            max_rq: response.u32(40),
            max_cq: response.u32(44),
            max_eq: response.u32(48),
            max_msix: response.u32(68),
        })
    }

    /// GDMA_REGISTER_DEVICE.
    ///
    /// # Errors
    /// Those of the command; `-EPROTO` if the doorbell page lies outside BAR0.
    pub fn register_device(&mut self, device: DeviceId) -> Result<Registration> {
        let response = self.gdma(&Request::new(code::REGISTER_DEVICE, device, 40, 44))?;
        let registration =
            Registration { pdid: response.u32(32), gpa_mkey: response.u32(36), db_id: response.u32(40) };
        let page = self.doorbell_page(registration.db_id);
        if self.generation.validates_registers && page.offset + self.registers.page_size > self.bar0_size {
            return Err(Error::proto(format!("doorbell page {} lies outside BAR0", registration.db_id)));
        }
        Ok(registration)
    }

    /// GDMA_DEREGISTER_DEVICE.
    ///
    /// # Errors
    /// Those of the command.
    pub fn deregister_device(&mut self, device: DeviceId) -> Result<()> {
        self.gdma(&Request::new(code::DEREGISTER_DEVICE, device, 40, 32)).map(drop)
    }

    /// GDMA_GENERATE_TEST_EQE, without the wait for the event ([`test_events`](Self::test_events) counts them).
    ///
    /// # Errors
    /// Those of the command.
    pub fn generate_test_eqe(&mut self, device: DeviceId, eq: u32) -> Result<()> {
        self.gdma(&Request::new(code::GENERATE_TEST_EQE, device, 44, 32).u32(40, eq)).map(drop)
    }

    /// GDMA_CREATE_DMA_REGION of one message, as the netdev driver makes one for a ring.
    ///
    /// # Errors
    /// Those of the command; any non-zero status.
    ///
    /// # Panics
    /// The handle is 0, or the list needs a second message.
    pub fn create_dma_region(&mut self, dma: &Dma) -> Result<u64> {
        assert!(dma.pages().len() <= PAGES_IN_CREATE, "a ring's page list fits in one message");
        let request = create_region_request(dma.len(), dma.pages().len(), dma.pages());
        let handle = self.gdma(&request)?.u64(32);
        assert_ne!(handle, 0, "0 is no region handle");
        Ok(handle)
    }

    /// A region of any length: GDMA_CREATE_DMA_REGION, then GDMA_DMA_REGION_ADD_PAGES with `per_message` pages each
    /// until all are there. The statuses must be 0x105 up to the last message, and 0 for the last.
    ///
    /// # Errors
    /// Those of the commands; a wrong status.
    pub fn create_long_dma_region(&mut self, dma: &Dma, per_message: usize) -> Result<u64> {
        let total = dma.pages().len();
        let (first, rest) = dma.pages().split_at(total.min(per_message.min(PAGES_IN_CREATE)));
        let response = self.send(&create_region_request(dma.len(), total, first))?;
        let handle = response.u64(32);
        page_list_status(&response, rest.is_empty())?;
        let mut left = rest;
        while !left.is_empty() {
            let (now, later) = left.split_at(left.len().min(per_message.min(PAGES_IN_ADD)));
            let response = self.send(&add_pages_request(handle, now))?;
            page_list_status(&response, later.is_empty())?;
            left = later;
        }
        Ok(handle)
    }

    /// GDMA_DESTROY_DMA_REGION.
    ///
    /// # Errors
    /// Those of the command.
    pub fn destroy_dma_region(&mut self, handle: u64) -> Result<()> {
        self.gdma(&Request::new(code::DESTROY_DMA_REGION, DeviceId::NONE, 48, 32).u64(40, handle)).map(drop)
    }

    /// `mana_gd_create_mana_eq`: region, queue, test event. Returns the queue's key.
    ///
    /// # Errors
    /// Those of the commands; what was made is undone.
    pub fn create_eq(
        &mut self,
        device: DeviceId,
        registration: Registration,
        bytes: u32,
        vector: u16,
    ) -> Result<usize> {
        let ring = RingMemory::new(self.ring_memory(u64::from(bytes)), bytes);
        let region =
            self.create_dma_region(ring.dma()).inspect_err(|_| self.world.memory.free(ring.dma().clone()))?;
        let request = create_eq_request(device, registration, region, bytes, vector);
        let id = match self.gdma(&request) {
            Ok(response) => response.u32(32),
            Err(error) => {
                self.destroy_dma_region(region)?;
                self.world.memory.free(ring.into_dma());
                return Err(error);
            }
        };
        assert!(id <= 0xffff, "EQ id {id:#x} does not fit in an EQ doorbell of Linux");
        let taken = self.irqs.eqs.values().any(|eq| eq.queue.id == id);
        assert!(!taken, "EQ id {id} is handed out twice");
        let page = self.doorbell_page(registration.db_id);
        let key = self.irqs.register(vector, EventQueue::new(id, ring, page));
        self.test_eq(key, device)?;
        Ok(key)
    }

    /// `mana_gd_destroy_eq`: a test event as a flush, then GDMA_DISABLE_QUEUE, then the memory back.
    ///
    /// # Errors
    /// Those of the commands.
    pub fn destroy_eq(&mut self, device: DeviceId, key: usize) -> Result<()> {
        self.test_eq(key, device)?;
        let queue = self.irqs.deregister(key);
        let request = Request::new(code::DISABLE_QUEUE, device, 52, 32)
            .u32(40, QueueType::Eq as u32)
            .u32(44, queue.id)
            .u32(48, 1);
        let disabled = self.gdma(&request).map(drop);
        self.world.memory.free(queue.into_ring().into_dma());
        disabled
    }

    /// Test events that came on an event queue.
    pub fn test_events(&self, key: usize) -> u32 {
        self.irqs.eq(key).tests
    }

    /// Vector of an event queue.
    pub fn eq_vector_of(&self, key: usize) -> u16 {
        self.irqs.eq(key).vector
    }

    /// Event queues that serve `port`.
    pub fn port_eqs(&self, port: usize) -> Vec<usize> {
        if self.device_eqs.is_empty() { self.netdevs[port].eqs.clone() } else { self.device_eqs.clone() }
    }

    /// Id of an event queue.
    pub fn eq_id(&self, key: usize) -> u32 {
        self.irqs.eq(key).queue.id
    }

    pub(crate) fn doorbell_page(&self, index: u32) -> DoorbellPage {
        DoorbellPage { offset: self.registers.doorbells + self.registers.page_size * u64::from(index) }
    }
}

/// GDMA_CREATE_DMA_REGION of `len` bytes in `total` pages, the first of which are listed.
pub fn create_region_request(len: u64, total: usize, pages: &[u64]) -> Request {
    Request::new(code::CREATE_DMA_REGION, DeviceId::NONE, 64 + 8 * pages.len(), 40)
        .u64(40, len)
        .u32(56, u32::try_from(total).unwrap_or(u32::MAX))
        .u32(60, u32::try_from(pages.len()).unwrap_or(u32::MAX))
        .u64s(64, pages)
}

/// GDMA_DMA_REGION_ADD_PAGES.
pub fn add_pages_request(handle: u64, pages: &[u64]) -> Request {
    Request::new(code::DMA_REGION_ADD_PAGES, DeviceId::NONE, 56 + 8 * pages.len(), 32)
        .u64(40, handle)
        .u32(48, u32::try_from(pages.len()).unwrap_or(u32::MAX))
        .u64s(56, pages)
}

fn page_list_status(response: &Response, complete: bool) -> Result<()> {
    let want = if complete { 0 } else { STATUS_MORE_ENTRIES };
    if response.status() == want {
        return Ok(());
    }
    let what = format!("page list: status {:#x}, not {want:#x}", response.status());
    Err(Error { status: Some(response.status()), ..Error::proto(what) })
}
