//! The commands of the hardware channel: a table of code, name, request body and handler, and the one place where
//! bytes become a typed command.

use vm_memory::GuestMemoryMmap;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::card::Card;
use crate::describe::Describe;
use crate::host::Profile;
use crate::observe::Fields;
use crate::status::{CommandError, Status};
use crate::table::{Device, Objects, Origin};
use crate::wire::hwc::{MAX_MESSAGE, RequestHeader, ResponseHeader};
use crate::wire::{FieldMap, gdma as wire_gdma, mana as wire_mana};
use crate::{gdma, mana};

/// What a handler works on.
pub struct Context<'a> {
    /// The data path and the configuration.
    pub card: &'a Card,
    /// What the host shows.
    pub offer: &'a Profile,
    /// What is alive.
    pub objects: &'a mut Objects,
    /// Guest memory.
    pub memory: &'a GuestMemoryMmap,
    /// This command, as the maker of what it makes.
    pub origin: Origin,
}

/// A request, checked for length, its body in its type. The whole message is a copy that the guest can't change.
pub struct Message<'a, T> {
    /// The header.
    pub header: &'a RequestHeader,
    /// The body. Fields beyond the message's end, which older versions don't have, are 0.
    pub body: &'a T,
    bytes: &'a [u8],
}

impl<T> Message<'_, T> {
    /// The `count` 8-byte values at byte `offset` of the message.
    ///
    /// # Errors
    /// They are not all within the message.
    pub fn list(&self, offset: usize, count: usize) -> Result<&[U64], CommandError> {
        let tail = self.bytes.get(offset..).unwrap_or_default();
        <[U64]>::ref_from_prefix_with_elems(tail, count).map(|(list, _)| list).map_err(|_| {
            CommandError::invalid(format!("{count} values at byte {offset} of {} bytes", self.bytes.len()))
        })
    }
    /// The list that follows the body directly.
    ///
    /// # Errors
    /// It is not within the message.
    pub fn trailing(&self, count: u32) -> Result<&[U64], CommandError> {
        self.list(size_of::<RequestHeader>() + size_of::<T>(), count as usize)
    }
    /// The device that the command is for.
    ///
    /// # Errors
    /// The card has no such device.
    pub fn device(&self) -> Result<Device, CommandError> {
        let id = self.header.dev_id;
        match (id.kind.get(), id.instance.get()) {
            (wire_gdma::device::HWC, 0) => Ok(Device::Hwc),
            (wire_gdma::device::MANA, 0) => Ok(Device::Mana),
            (wire_gdma::device::MANA_IB, 0) => Ok(Device::ManaIb),
            (kind, instance) => Err(CommandError::not_found(format!("device {kind}:{instance}"))),
        }
    }
}

/// What a command that worked answers.
pub struct Reply {
    /// The body, in the newest version that the card knows; the response cuts it to what was asked for.
    pub body: Vec<u8>,
    /// That version.
    pub version: u16,
    /// Success, or [`Status::MoreEntries`].
    pub status: Status,
    describe: fn(&[u8]) -> Fields,
}

impl Reply {
    /// A body in version 1.
    pub fn new<T>(body: &T) -> Self
    where
        T: IntoBytes + Immutable + FromBytes + KnownLayout + Unaligned + Describe,
    {
        fn describe<T: FromBytes + KnownLayout + Immutable + Unaligned + Describe>(bytes: &[u8]) -> Fields {
            T::ref_from_bytes(bytes).map(Describe::fields).unwrap_or_default()
        }
        Self { body: body.as_bytes().to_vec(), version: 1, status: Status::Success, describe: describe::<T> }
    }
    /// Just the status.
    pub fn empty() -> Self {
        Self::new(&wire_gdma::Empty {})
    }
    /// The body is version `version`.
    #[must_use]
    pub fn in_version(self, version: u16) -> Self {
        Self { version, ..self }
    }
    /// Not finished: more pages are needed.
    #[must_use]
    pub fn more_entries(self) -> Self {
        Self { status: Status::MoreEntries, ..self }
    }
    /// The fields that matter.
    pub fn fields(&self) -> Fields {
        (self.describe)(&self.body)
    }
}

/// How a handler ends.
pub type CommandResult = Result<Reply, CommandError>;

/// A request as it was read: one page, zero behind the message's end.
pub struct Request {
    page: Box<[u8; MAX_MESSAGE]>,
    len: usize,
}

impl Request {
    /// An empty page to read requests into.
    pub fn new() -> Self {
        Self { page: Box::new([0; MAX_MESSAGE]), len: 0 }
    }
    /// Room for the next request of `len` bytes; `None` if that is too short for a header or too long.
    pub fn start(&mut self, len: usize) -> Option<&mut [u8]> {
        if len < size_of::<RequestHeader>() {
            return None;
        }
        if len > self.page.len() {
            return None;
        }
        // Behind the last message it is zero already.
        if let Some(left_over) = self.page.get_mut(len..self.len) {
            left_over.fill(0);
        }
        self.len = len;
        self.page.get_mut(..len)
    }
    /// Bytes of the message.
    pub fn len(&self) -> usize {
        self.len
    }
    /// The header.
    pub fn header(&self) -> RequestHeader {
        RequestHeader::read_from_prefix(self.page.as_slice()).map(|(header, _)| header).unwrap_or_default()
    }
    /// The message with a body of type `T`, of which older versions may end before byte `least`.
    fn message<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &self,
        least: Option<usize>,
    ) -> Result<Message<'_, T>, CommandError> {
        let whole = size_of::<RequestHeader>() + size_of::<T>();
        let least = least.unwrap_or(whole);
        let too_short = || CommandError::invalid(format!("a request of {} bytes, not {least}", self.len));
        if self.len < least {
            return Err(too_short());
        }
        let page = self.page.as_slice();
        let (header, rest) = RequestHeader::ref_from_prefix(page).map_err(|_| too_short())?;
        let (body, _) = T::ref_from_prefix(rest).map_err(|_| too_short())?;
        Ok(Message { header, body, bytes: page.get(..self.len).unwrap_or_default() })
    }
}

macro_rules! commands {
    ($($code:literal $name:ident $variant:ident($body:ty $(, since $least:literal)?) -> $reply:ty => $handler:path;)+) => {
        /// A command, parsed.
        pub enum Command<'a> {
            $(#[doc = stringify!($name)] $variant(Message<'a, $body>),)+
        }

        impl<'a> Command<'a> {
            /// The command that `request` is.
            ///
            /// # Errors
            /// There is no such command, or the message is too short for it.
            pub fn parse(request: &'a Request) -> Result<Self, CommandError> {
                match request.header().msg_type.get() {
                    $($code => request.message(commands!(@least $($least)?)).map(Self::$variant),)+
                    code => Err(CommandError::unsupported(format!("there is no command {code:#x}"))),
                }
            }
            /// The fields of the request that matter.
            pub fn fields(&self) -> Fields {
                match self { $(Self::$variant(message) => message.body.fields(),)+ }
            }
            /// Do it.
            ///
            /// # Errors
            /// As the handler says; nothing has changed then.
            pub fn execute(&self, context: &mut Context<'_>) -> CommandResult {
                match self { $(Self::$variant(message) => $handler(context, message),)+ }
            }
        }

        /// The driver's name of a command.
        pub fn name(code: u32) -> Option<&'static str> {
            match code {
                $($code => Some(stringify!($name)),)+
                _ => None,
            }
        }

        /// The code of the command that the driver calls `name`.
        pub fn code(name: &str) -> Option<u32> {
            match name {
                $(stringify!($name) => Some($code),)+
                _ => None,
            }
        }

        /// The fields behind the header of the response to command `code`.
        pub fn reply_fields(code: u32) -> FieldMap {
            match code {
                $($code => <$reply>::FIELDS,)+
                _ => &[],
            }
        }
    };
    (@least) => { None };
    (@least $least:literal) => { Some($least) };
}

commands! {
    1 GDMA_VERIFY_VF_DRIVER_VERSION VerifyVersion(wire_gdma::VerifyVersion) -> wire_gdma::VerifyVersionReply
        => gdma::device::verify_version;
    2 GDMA_QUERY_MAX_RESOURCES QueryMaxResources(wire_gdma::Empty) -> wire_gdma::MaxResources
        => gdma::device::query_max_resources;
    3 GDMA_LIST_DEVICES ListDevices(wire_gdma::Empty) -> wire_gdma::DeviceList => gdma::device::list_devices;
    4 GDMA_REGISTER_DEVICE RegisterDevice(wire_gdma::Empty) -> wire_gdma::RegisterDeviceReply
        => gdma::device::register;
    5 GDMA_DEREGISTER_DEVICE DeregisterDevice(wire_gdma::Empty) -> wire_gdma::Empty
        => gdma::device::deregister;
    10 GDMA_GENERATE_TEST_EQE GenerateTestEqe(wire_gdma::GenerateTestEqe) -> wire_gdma::Empty
        => gdma::queue::generate_test_eqe;
    12 GDMA_CREATE_QUEUE CreateQueue(wire_gdma::CreateQueue) -> wire_gdma::CreateQueueReply
        => gdma::queue::create;
    13 GDMA_DISABLE_QUEUE DisableQueue(wire_gdma::DisableQueue) -> wire_gdma::Empty => gdma::queue::disable;
    22 GDMA_ALLOCATE_RESOURCE_RANGE AllocateResourceRange(wire_gdma::AllocateResourceRange) -> wire_gdma::AllocateResourceRangeReply
        => gdma::resource::allocate_range;
    24 GDMA_DESTROY_RESOURCE_RANGE DestroyResourceRange(wire_gdma::DestroyResourceRange) -> wire_gdma::Empty
        => gdma::resource::destroy_range;
    25 GDMA_CREATE_DMA_REGION CreateDmaRegion(wire_gdma::CreateDmaRegion) -> wire_gdma::CreateDmaRegionReply
        => gdma::region::create;
    26 GDMA_DMA_REGION_ADD_PAGES AddPages(wire_gdma::AddPages) -> wire_gdma::Empty => gdma::region::add_pages;
    27 GDMA_DESTROY_DMA_REGION DestroyDmaRegion(wire_gdma::HandleOnly) -> wire_gdma::Empty
        => gdma::region::destroy;
    29 GDMA_CREATE_PD CreatePd(wire_gdma::CreatePd) -> wire_gdma::CreatePdReply => gdma::resource::create_pd;
    30 GDMA_DESTROY_PD DestroyPd(wire_gdma::HandleOnly) -> wire_gdma::Empty => gdma::resource::destroy_pd;
    84 GDMA_QUERY_HWC_TIMEOUT QueryHwcTimeout(wire_gdma::QueryHwcTimeout) -> wire_gdma::QueryHwcTimeout
        => gdma::device::query_hwc_timeout;
    0x20001 MANA_QUERY_DEV_CONFIG QueryDevConfig(wire_mana::QueryDevConfig) -> wire_mana::QueryDevConfigReply
        => mana::vport::query_dev_config;
    0x20002 MANA_QUERY_GF_STAT QueryGfStat(wire_mana::QueryGfStat) -> wire_mana::GfStat
        => mana::stats::query_gf_stat;
    0x20003 MANA_CONFIG_VPORT_TX ConfigVportTx(wire_mana::ConfigVportTx) -> wire_mana::ConfigVportTxReply
        => mana::vport::config_tx;
    0x20004 MANA_CREATE_WQ_OBJ CreateWqObj(wire_mana::CreateWqObj, since 88) -> wire_mana::CreateWqObjReply
        => mana::wq::create;
    0x20005 MANA_DESTROY_WQ_OBJ DestroyWqObj(wire_mana::DestroyWqObj) -> wire_gdma::Empty
        => mana::wq::destroy;
    0x20006 MANA_FENCE_RQ FenceRq(wire_mana::FenceRq) -> wire_gdma::Empty => mana::wq::fence;
    0x20007 MANA_CONFIG_VPORT_RX ConfigVportRx(wire_mana::ConfigVportRx, since 112) -> wire_mana::ConfigVportRxReply
        => mana::vport::config_rx;
    0x20008 MANA_QUERY_VPORT_CONFIG QueryVportConfig(wire_mana::QueryVportConfig) -> wire_mana::QueryVportConfigReply
        => mana::vport::query_config;
    0x2000a MANA_QUERY_LINK_CONFIG QueryLinkConfig(wire_mana::QueryLinkConfig) -> wire_mana::QueryLinkConfigReply
        => mana::stats::query_link_config;
    0x2000b MANA_SET_BW_CLAMP SetBwClamp(wire_mana::SetBwClamp) -> wire_mana::SetBwClampReply
        => mana::stats::set_bw_clamp;
    0x2000c MANA_QUERY_PHY_STAT QueryPhyStat(wire_mana::QueryPhyStat) -> wire_mana::PhyStat
        => mana::stats::query_phy_stat;
}

/// The response to `header`, as long as the driver has room for and no longer than a page.
pub fn response(header: &RequestHeader, result: &CommandResult, page: &mut [u8; MAX_MESSAGE]) -> usize {
    let size = (header.resp_msg_size.get() as usize).min(MAX_MESSAGE);
    let (status, version) = match result {
        Ok(reply) => (reply.status, reply.version),
        Err(error) => (error.status, 1),
    };
    let (head, body) = page.split_at_mut(size_of::<ResponseHeader>());
    head.copy_from_slice(header.response(size as u32, version, status as u32).as_bytes());
    let room = body.get_mut(..size.saturating_sub(head.len())).unwrap_or_default();
    let reply = result.as_ref().map(|reply| reply.body.as_slice()).unwrap_or_default();
    let (said, unsaid) = room.split_at_mut(room.len().min(reply.len()));
    said.copy_from_slice(reply.get(..said.len()).unwrap_or_default());
    unsaid.fill(0);
    size
}

#[cfg(test)]
mod tests {
    use zerocopy::little_endian::U32;

    use super::*;

    fn request(code: u32, len: usize) -> Request {
        let mut request = Request::new();
        let room = request.start(len).expect("a header fits");
        let header = RequestHeader {
            msg_type: code.into(),
            resp_msg_type: code.into(),
            resp_msg_version: 2.into(),
            resp_msg_size: 40.into(),
            hwc_msg_id: 7.into(),
            activity_id: 9.into(),
            ..RequestHeader::default()
        };
        room[..40].copy_from_slice(header.as_bytes());
        request
    }

    #[test]
    fn messages_are_as_long_as_their_command_needs() {
        assert!(Command::parse(&request(12, 96)).is_ok());
        assert_eq!(Command::parse(&request(12, 95)).err().map(|e| e.status), Some(Status::InvalidParameter));
        assert!(Command::parse(&request(0x20004, 88)).is_ok());
        assert!(Command::parse(&request(0x20004, 87)).is_err());
        assert_eq!(Command::parse(&request(99, 40)).err().map(|e| e.status), Some(Status::Unsupported));
        assert!(Request::new().start(39).is_none());
        assert!(Request::new().start(MAX_MESSAGE + 1).is_none());
    }

    #[test]
    fn an_older_request_reads_as_zero_behind_its_end() {
        let mut request = request(0x20004, 96);
        request.page[88] = 1;
        request.start(88).expect("fits");
        let Ok(Command::CreateWqObj(message)) = Command::parse(&request) else { panic!("not parsed") };
        assert_eq!(message.body.allow_rqwqe_chain, 0);
        assert!(message.list(80, 1).is_ok());
        assert!(message.list(81, 1).is_err());
        assert!(message.list(usize::MAX, 1).is_err());
    }

    #[test]
    fn response_echoes_and_never_exceeds_what_was_asked() {
        let request = request(4, 40);
        let body = wire_gdma::RegisterDeviceReply { pdid: U32::new(5), ..Default::default() };
        let mut page = [0xff; MAX_MESSAGE];
        let len = response(&request.header(), &Ok(Reply::new(&body).in_version(3)), &mut page);
        assert_eq!(len, 40);
        let header = ResponseHeader::read_from_prefix(&page).expect("header").0;
        assert_eq!(header.msg_size.get(), 40);
        assert_eq!(header.msg_version.get(), 2);
        assert_eq!(header.hwc_msg_id.get(), 7);
        assert_eq!(header.activity_id.get(), 9);
        assert_eq!(page[32], 5);
    }
}
