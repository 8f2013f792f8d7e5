//! Messages of the hardware channel: the headers that every request and response begins with, and the out-of-band
//! data of the WQEs and CQEs that carry them.
//!
//! Source: `struct gdma_req_hdr`, `struct gdma_resp_hdr` (gdma.h), `struct hwc_tx_oob`, `struct hwc_rx_oob`
//! (hw_channel.h); the sheet's sections 4.4, 4.5 and 6.1.

use zerocopy::little_endian::{U16, U32, U64};

/// Largest request and response, bytes (`HW_CHANNEL_MAX_REQUEST_SIZE`): each lies in one page.
pub const MAX_MESSAGE: usize = 4096;

/// Types of HWC_INIT_DATA events (`HWC_INIT_DATA_*`).
pub mod init_data {
    /// Id of the completion queue.
    pub const CQ_ID: u8 = 1;
    /// Id of the receive queue.
    pub const RQ_ID: u8 = 2;
    /// Id of the send queue.
    pub const SQ_ID: u8 = 3;
    /// Requests that may be in flight.
    pub const QUEUE_DEPTH: u8 = 4;
    /// Largest request, bytes.
    pub const MAX_REQUEST: u8 = 5;
    /// Largest response, bytes.
    pub const MAX_RESPONSE: u8 = 6;
    /// All completion queue ids are below this.
    pub const MAX_NUM_CQS: u8 = 7;
    /// Protection domain of the channel.
    pub const PD_ID: u8 = 8;
    /// Memory key of the channel's scatter/gather entries.
    pub const GPA_MKEY: u8 = 9;
}

wire! {
    /// A GDMA device (`struct gdma_dev_id`).
    pub struct DeviceId {
        /// `GDMA_DEVICE_*`.
        kind: U16,
        /// Instance.
        instance: U16,
    }

    /// First bytes of a request (`struct gdma_req_hdr`).
    pub struct RequestHeader {
        /// `GDMA_STANDARD_HEADER_TYPE`, 0.
        hdr_type: U32,
        /// The command.
        msg_type: U32,
        /// Version of this request.
        msg_version: U16,
        /// The driver's slot, echoed in the response.
        hwc_msg_id: U16,
        /// Bytes of this request.
        msg_size: U32,
        /// Header type of the response.
        resp_hdr_type: U32,
        /// Command of the response: the same.
        resp_msg_type: U32,
        /// Highest version of the response that the driver understands.
        resp_msg_version: U16,
        /// Not filled in by Linux.
        resp_hwc_msg_id: U16,
        /// Bytes of the response that the driver has room for.
        resp_msg_size: U32,
        /// The device that the command is for.
        dev_id: DeviceId,
        /// Echoed in the response.
        activity_id: U32,
    }

    /// First bytes of a response (`struct gdma_resp_hdr`).
    pub struct ResponseHeader {
        /// As the request wanted.
        hdr_type: U32,
        /// The command.
        msg_type: U32,
        /// Version of this response.
        msg_version: U16,
        /// The driver's slot.
        hwc_msg_id: U16,
        /// Bytes of this response.
        msg_size: U32,
        /// The device that the command was for.
        dev_id: DeviceId,
        /// As in the request.
        activity_id: U32,
        /// 0 for success.
        status: U32,
        /// Reserved.
        reserved: U32,
    }

    /// Inline OOB of a request's WQE (`struct hwc_tx_oob`).
    pub struct TxOob {
        /// Reserved.
        reserved: U64,
        /// `vrq_id` 0..23, `dest_vfid` 24..31.
        vrq: U32,
        /// `vrcq_id` 0..23.
        vrcq: U32,
        /// `vscq_id` 0..23: the channel's CQ; flags 24..26.
        vscq: U32,
        /// `vsq_id` 0..23: the channel's SQ.
        vsq: U32,
    }

    /// Client data of a response's CQE (`struct hwc_rx_oob`).
    pub struct RxOob {
        /// `type` 0..5, `eom` 6, `som` 7, `vendor_err` 8..15.
        kind: U32,
        /// `src_virt_wq` 0..23, `src_vfid` 24..31.
        src_virt_wq: U32,
        /// Reserved.
        reserved: U32,
        /// `wqe_addr_low`, also `wqe_offset`: bytes from the ring's first post to the receive WQE.
        wqe_offset: U32,
        /// `wqe_addr_high`.
        wqe_addr_high: U32,
        /// `client_data_unit` 0..13.
        client_data_unit: U32,
        /// `tx_oob_data_size`: bytes of the response.
        tx_oob_data_size: U32,
        /// `chunk_offset` 0..20.
        chunk_offset: U32,
    }
}

const _: () = assert!(size_of::<RequestHeader>() == 40);
const _: () = assert!(std::mem::offset_of!(RequestHeader, resp_hdr_type) == 16);
const _: () = assert!(std::mem::offset_of!(RequestHeader, dev_id) == 32);
const _: () = assert!(size_of::<ResponseHeader>() == 32);
const _: () = assert!(std::mem::offset_of!(ResponseHeader, status) == 24);
const _: () = assert!(size_of::<TxOob>() == 24);
const _: () = assert!(std::mem::offset_of!(RxOob, wqe_offset) == 12);
const _: () = assert!(std::mem::offset_of!(RxOob, tx_oob_data_size) == 24);

impl RequestHeader {
    /// The header of the response: what the request expects, `size` bytes, at most in version `version`.
    pub fn response(&self, size: u32, version: u16, status: u32) -> ResponseHeader {
        ResponseHeader {
            hdr_type: self.resp_hdr_type,
            msg_type: self.resp_msg_type,
            msg_version: self.resp_msg_version.get().min(version).into(),
            hwc_msg_id: self.hwc_msg_id,
            msg_size: size.into(),
            dev_id: self.dev_id,
            activity_id: self.activity_id,
            status: status.into(),
            reserved: U32::ZERO,
        }
    }
}

impl DeviceId {
    /// Device `kind`, instance 0.
    pub fn new(kind: u16) -> Self {
        Self { kind: kind.into(), instance: U16::ZERO }
    }
}
