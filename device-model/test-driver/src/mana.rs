//! MANA_* commands of a VF (sections 7.1 to 7.6 of the interface), each answer checked as the netdev driver checks it.

use crate::driver::Driver;
use crate::error::{Error, Result};
use crate::gdma::{DeviceId, Registration};
use crate::message::{Request, Response};

/// Command codes.
pub mod code {
    #![allow(missing_docs, reason = "the names are the driver's")]
    pub const QUERY_DEV_CONFIG: u32 = 0x20001;
    pub const QUERY_GF_STAT: u32 = 0x20002;
    pub const CONFIG_VPORT_TX: u32 = 0x20003;
    pub const CREATE_WQ_OBJ: u32 = 0x20004;
    pub const DESTROY_WQ_OBJ: u32 = 0x20005;
    pub const FENCE_RQ: u32 = 0x20006;
    pub const CONFIG_VPORT_RX: u32 = 0x20007;
    pub const QUERY_VPORT_CONFIG: u32 = 0x20008;
    pub const QUERY_LINK_CONFIG: u32 = 0x2000a;
    pub const SET_BW_CLAMP: u32 = 0x2000b;
    pub const QUERY_PHY_STAT: u32 = 0x2000c;
}

/// Queue entries of an indirection table when the device's number makes no sense.
const DEFAULT_INDIRECTION: u32 = 64;
/// No handle.
pub const INVALID_HANDLE: u64 = u64::MAX;

/// MANA_QUERY_DEV_CONFIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DevConfig {
    /// `max_num_vports`.
    pub vports: u16,
    /// `adapter_mtu`, bytes with the Ethernet header, after the driver's rules for it.
    pub adapter_mtu: u16,
    /// Version of the response.
    pub version: u16,
    /// `pf_cap_flags1`.
    pub flags: u64,
}

/// MANA_QUERY_VPORT_CONFIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VportInfo {
    /// `max_num_sq`.
    pub max_sq: u32,
    /// `max_num_rq`.
    pub max_rq: u32,
    /// Entries of the indirection table.
    pub indirection: u32,
    /// MAC address.
    pub mac: [u8; 6],
    /// Handle.
    pub handle: u64,
}

/// MANA_CREATE_WQ_OBJ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WqObject {
    /// WQ id.
    pub wq: u32,
    /// CQ id.
    pub cq: u32,
    /// Handle.
    pub handle: u64,
    /// Moderation that the device granted: completions, microseconds. Drivers before version 3 are told nothing.
    pub moderation: Option<(u16, u16)>,
}

/// MANA_CONFIG_VPORT_RX.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RxSteering {
    /// `rx_enable`: 0 off, 1 on, all ones leave.
    pub enable: u32,
    /// `rss_enable`: 0 off, 1 on, all ones leave.
    pub rss: u32,
    /// `default_rxobj`, if it is to be updated.
    pub default_object: Option<u64>,
    /// Toeplitz key, if it is to be updated.
    pub key: Option<[u8; 40]>,
    /// Indirection table of objects, if it is to be updated.
    pub table: Option<Vec<u64>>,
    /// `cqe_coalescing_enable`.
    pub coalescing: bool,
    /// `cqe8_coalescing_enable`.
    pub coalescing8: bool,
}

/// What MANA_CREATE_WQ_OBJ is told, apart from the vPort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WqSpec {
    /// 1 SQ, 2 RQ.
    pub kind: u32,
    /// Region of the work queue.
    pub wq_region: u64,
    /// Region of the completion queue.
    pub cq_region: u64,
    /// Bytes of the work queue.
    pub wq_bytes: u32,
    /// Bytes of the completion queue.
    pub cq_bytes: u32,
    /// Event queue of the completion queue.
    pub eq: u32,
    /// Moderation to ask for: completions, microseconds.
    pub moderation: (u16, u16),
}

impl Driver<'_> {
    /// A MANA command: `mana_send_request` and `mana_verify_resp_hdr`, then the status.
    pub(crate) fn mana(&mut self, request: Request) -> Result<Response> {
        self.activity += 1;
        let request = request.activity(self.activity);
        let response = self.send(&request)?;
        response.verify(&request, request.response_len())?;
        if response.status() != 0 {
            let what = format!("command {:#x}: status {:#x}", request.code(), response.status());
            return Err(Error { status: Some(response.status()), ..Error::proto(what) });
        }
        Ok(response)
    }

    /// MANA_QUERY_DEV_CONFIG.
    ///
    /// # Errors
    /// Those of the command; `-EPROTO` for an MTU that makes no sense.
    ///
    /// # Panics
    /// The device answers with a higher version than was asked for.
    pub fn query_dev_config(&mut self) -> Result<DevConfig> {
        let asked = self.generation.dev_config_version;
        let request = Request::new(code::QUERY_DEV_CONFIG, self.mana_device, 88, 80)
            .versions(1, asked)
            .u32(76, 1)
            .u32(80, 1);
        let response = self.mana(request)?;
        let version = response.version();
        assert!(version <= asked, "version {version} where {asked} was asked for");
        Ok(DevConfig {
            vports: response.u16(64),
            adapter_mtu: self.adapter_mtu(version, response.u16(72))?,
            version,
            flags: response.u64(32),
        })
    }

    /// What the generation makes of `adapter_mtu`.
    fn adapter_mtu(&self, version: u16, mtu: u16) -> Result<u16> {
        let old = self.generation.dev_config_version == 2;
        match (old, version, mtu) {
            (true, 2, 0) => panic!("an adapter_mtu of 0 underflows in 6.x"),
            (true, 2, mtu) => Ok(mtu),
            (false, 2.., 1..82) => Err(Error::proto(format!("an adapter_mtu of {mtu}"))),
            (false, 2.., 82..) => Ok(mtu),
            _ => Ok(1514),
        }
    }

    /// MANA_QUERY_VPORT_CONFIG.
    ///
    /// # Errors
    /// Those of the command; `-EPROTO` for a vPort without queues.
    pub fn query_vport_config(&mut self, index: u32) -> Result<VportInfo> {
        let request = Request::new(code::QUERY_VPORT_CONFIG, self.mana_device, 44, 64).u32(40, index);
        let response = self.mana(request)?;
        let entries = response.u32(40);
        let sane = entries.is_power_of_two() && entries <= 512;
        let info = VportInfo {
            max_sq: response.u32(32),
            max_rq: response.u32(36),
            indirection: if sane { entries } else { DEFAULT_INDIRECTION },
            mac: response.field(48),
            handle: response.u64(56),
        };
        assert!(sane, "WARN: {entries} indirection entries");
        if self.generation.rejects_zero_queues && (info.max_sq == 0 || info.max_rq == 0) {
            return Err(Error::proto(format!("vPort {index} has no queues")));
        }
        Ok(info)
    }

    /// MANA_CONFIG_VPORT_TX; returns `tx_vport_offset`.
    ///
    /// # Errors
    /// Those of the command.
    pub fn config_vport_tx(&mut self, vport: u64, registration: Registration) -> Result<u16> {
        let request = Request::new(code::CONFIG_VPORT_TX, self.mana_device, 56, 36)
            .u64(40, vport)
            .u32(48, registration.pdid)
            .u32(52, registration.db_id);
        Ok(self.mana(request)?.u16(32))
    }

    /// MANA_CREATE_WQ_OBJ in the generation's version.
    ///
    /// # Errors
    /// Those of the command; `-EINVAL` for a CQ id past the driver's table.
    ///
    /// # Panics
    /// The handle or an id makes no sense, or is in use.
    pub fn create_wq_obj(&mut self, vport: u64, spec: &WqSpec) -> Result<WqObject> {
        let (request, response) = (self.generation.wq_obj_request, self.generation.wq_obj_response);
        let mut message = Request::new(code::CREATE_WQ_OBJ, self.mana_device, request.len, response.len)
            .versions(request.version, response.version)
            .u64(40, vport)
            .u32(48, spec.kind)
            .u64s(56, &[spec.wq_region, spec.cq_region])
            .u32(72, spec.wq_bytes)
            .u32(76, spec.cq_bytes)
            .u32(84, spec.eq);
        if request.version >= 3 {
            message = message.u8(89, 1).u16(90, spec.moderation.0).u16(92, spec.moderation.1);
        }
        let answer = self.mana(message)?;
        let granted = response.version >= 2 && answer.version() >= 2 && answer.u8(52) != 0;
        let object = WqObject {
            wq: answer.u32(32),
            cq: answer.u32(36),
            handle: answer.u64(40),
            moderation: granted.then(|| (answer.u16(48), answer.u16(50))),
        };
        assert_ne!(object.handle, INVALID_HANDLE, "all ones is no handle");
        assert!(object.wq < 1 << 24 && object.cq < 1 << 24, "ids have 24 bits: {object:?}");
        assert!(!self.cqs.contains_key(&object.cq), "CQ id {} is in use", object.cq);
        let max = self.init_data().max_cqs.unwrap_or(0);
        if object.cq >= max {
            let errno = crate::error::Errno::Einval;
            return Err(Error::new(errno, format!("CQ id {} is not below {max}", object.cq)));
        }
        Ok(object)
    }

    /// MANA_DESTROY_WQ_OBJ.
    ///
    /// # Errors
    /// Those of the command.
    pub fn destroy_wq_obj(&mut self, kind: u32, handle: u64) -> Result<()> {
        let request =
            Request::new(code::DESTROY_WQ_OBJ, self.mana_device, 56, 32).u32(40, kind).u64(48, handle);
        self.mana(request).map(drop)
    }

    /// MANA_FENCE_RQ, without the wait for its completion.
    ///
    /// # Errors
    /// Those of the command.
    pub fn fence_rq(&mut self, handle: u64) -> Result<()> {
        self.mana(Request::new(code::FENCE_RQ, self.mana_device, 48, 32).u64(40, handle)).map(drop)
    }

    /// MANA_CONFIG_VPORT_RX in the generation's version, with room for `entries` of the indirection table.
    ///
    /// # Errors
    /// Those of the command.
    pub fn config_vport_rx(&mut self, vport: u64, entries: u32, steering: &RxSteering) -> Result<()> {
        let request = self.vport_rx_request(vport, entries, steering);
        self.mana(request).map(drop)
    }

    /// The request of [`config_vport_rx`](Self::config_vport_rx).
    pub fn vport_rx_request(&self, vport: u64, entries: u32, steering: &RxSteering) -> Request {
        let (request, response) = (self.generation.vport_rx_request, self.generation.vport_rx_response);
        let len = request.len + 8 * entries as usize;
        let stale = vec![0; entries as usize];
        Request::new(code::CONFIG_VPORT_RX, self.mana_device, len, response.len)
            .versions(request.version, response.version)
            .u64(40, vport)
            .u16(48, u16::try_from(entries).expect("a table is short"))
            .u16(50, u16::try_from(request.len).expect("a header is short"))
            .u32(52, steering.enable)
            .u32(56, steering.rss)
            .put(
                60,
                &[steering.default_object, steering.key.map(|_| 0)].map(|update| u8::from(update.is_some())),
            )
            .u8(62, u8::from(steering.table.is_some()))
            .u64(64, steering.default_object.unwrap_or(INVALID_HANDLE))
            .put(72, &steering.key.unwrap_or([0; 40]))
            .u8(112, u8::from(steering.coalescing))
            .u16(116, self.generation.hash_types)
            .u8(118, u8::from(steering.coalescing8))
            .u64s(request.len, steering.table.as_ref().unwrap_or(&stale))
    }

    /// MANA_QUERY_GF_STAT.
    ///
    /// # Errors
    /// Those of the command.
    pub fn query_gf_stat(&mut self) -> Result<Response> {
        let all = (1 << 27) - 1;
        let request =
            Request::new(code::QUERY_GF_STAT, self.mana_device, 48, 256).versions(1, 2).u64(40, all);
        self.mana(request)
    }

    /// MANA_QUERY_LINK_CONFIG.
    ///
    /// # Errors
    /// Those of the command; `-EOPNOTSUPP` is a legal answer.
    pub fn query_link_config(&mut self, vport: u64) -> Result<Response> {
        let request =
            Request::new(code::QUERY_LINK_CONFIG, self.mana_device, 48, 48).versions(1, 2).u64(40, vport);
        self.mana(request)
    }

    /// MANA_SET_BW_CLAMP: `enable` is 0 off, 1 on, all ones leave.
    ///
    /// # Errors
    /// Those of the command; `-EOPNOTSUPP` is a legal answer.
    pub fn set_bw_clamp(&mut self, vport: u64, enable: u32, mbps: u32) -> Result<Response> {
        let request = Request::new(code::SET_BW_CLAMP, self.mana_device, 56, 40)
            .u64(40, vport)
            .u32(48, enable)
            .u32(52, mbps);
        self.mana(request)
    }

    /// MANA_QUERY_PHY_STAT.
    ///
    /// # Errors
    /// Those of the command; `-EOPNOTSUPP` is a legal answer.
    pub fn query_phy_stat(&mut self) -> Result<Response> {
        self.mana(Request::new(code::QUERY_PHY_STAT, self.mana_device, 48, 440))
    }

    /// The MANA device as GDMA_LIST_DEVICES named it.
    pub fn mana_device(&self) -> DeviceId {
        self.mana_device
    }
}
