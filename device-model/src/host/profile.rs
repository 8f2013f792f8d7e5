//! What kind of host it is: every limit, version, capability, id and register value that it shows, as far as that is
//! not the card's own.
//!
//! A profile is TOML: tables of keys, all of which may be left out. [`Profile::named`] has those that come with the
//! card, in `device-model/profiles/`; `profiles/default.toml` explains every key. What a profile shows is not always
//! what the card does: a host that announces more queues than there are will refuse to make them.

use serde::{Deserialize, Serialize};

use crate::command;
use crate::wire::gdma::{DEVICE_LIST, device};
use crate::wire::hwc::DeviceId;

macro_rules! table {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)* }
    };
}

table! {
    /// The whole.
    Profile {
        /// What BAR0's registers read as.
        registers: Registers,
        /// What the init events of the hardware channel say.
        channel: Channel,
        /// GDMA_VERIFY_VF_DRIVER_VERSION and GDMA_QUERY_HWC_TIMEOUT.
        version: Version,
        /// GDMA_QUERY_MAX_RESOURCES.
        limits: MaxResources,
        /// GDMA_LIST_DEVICES.
        devices: Devices,
        /// GDMA_REGISTER_DEVICE of the Ethernet device.
        registration: Registration,
        /// MANA_QUERY_DEV_CONFIG.
        adapter: Adapter,
        /// MANA_QUERY_VPORT_CONFIG.
        port: Port,
        /// Where the ids of queues begin. Only from the start on.
        ids: FirstIds,
        /// Commands.
        commands: Commands,
    }
}
table! {
    /// Registers of BAR0 (VF layout).
    Registers {
        /// 0x08, 8 bytes.
        doorbell_offset: Option<u64>,
        /// 0x10, 4 bytes.
        doorbell_page_size: Option<u32>,
        /// 0x18, 8 bytes.
        shm_offset: Option<u64>,
    }
}
table! {
    /// `HWC_INIT_DATA_*`.
    Channel {
        /// Type 1.
        cq: Option<u32>,
        /// Type 2.
        rq: Option<u32>,
        /// Type 3.
        sq: Option<u32>,
        /// Type 4.
        queue_depth: Option<u32>,
        /// Type 5, bytes.
        max_request: Option<u32>,
        /// Type 6, bytes.
        max_response: Option<u32>,
        /// Type 7: ids of completion queues are below this.
        max_cqs: Option<u32>,
        /// Type 8.
        pd: Option<u32>,
    }
}
table! {
    /// Versions and capabilities of GDMA.
    Version {
        /// `gdma_protocol_ver`.
        protocol: Option<u64>,
        /// `pf_cap_flags1`; without this, moderation for drivers that know of it.
        pf_flags: Option<u64>,
        /// Answer to GDMA_QUERY_HWC_TIMEOUT, milliseconds. Asked for only if `pf_flags` has bit 3.
        hwc_timeout: Option<u32>,
    }
}
table! {
    /// Fields of GDMA_QUERY_MAX_RESOURCES.
    MaxResources {
        /// `max_sq`.
        max_sq: Option<u32>,
        /// `max_rq`.
        max_rq: Option<u32>,
        /// `max_cq`.
        max_cq: Option<u32>,
        /// `max_eq`.
        max_eq: Option<u32>,
        /// `max_db`.
        max_db: Option<u32>,
        /// `max_mst`.
        max_mst: Option<u32>,
        /// `max_msix`.
        max_msix: Option<u32>,
    }
}
table! {
    /// The list of devices.
    Devices {
        /// `mana`, `rdma`, `hwc`, `hole`, or `TYPE:INSTANCE`, at most 64.
        list: Option<Vec<String>>,
        /// `num_of_devs`, if it is not the list's length.
        count: Option<u32>,
    }
}
table! {
    /// What registration gives.
    Registration {
        /// `pdid`.
        pd: Option<u32>,
        /// `gpa_mkey`.
        gpa_mkey: Option<u32>,
        /// `db_id`.
        doorbell_page: Option<u32>,
    }
}
table! {
    /// The Ethernet device.
    Adapter {
        /// Highest version of the response.
        version: Option<u16>,
        /// `max_num_vports`.
        ports: Option<u16>,
        /// `max_num_eqs`.
        max_eqs: Option<u32>,
        /// `adapter_mtu`: bytes, the Ethernet header included.
        mtu: Option<u16>,
        /// `bm_hostmode`.
        host_mode: Option<u8>,
        /// `pf_cap_flags1`.
        pf_flags: Option<u64>,
    }
}
table! {
    /// Each vPort.
    Port {
        /// `max_num_sq`.
        max_sq: Option<u32>,
        /// `max_num_rq`.
        max_rq: Option<u32>,
        /// `num_indirection_ent`.
        indirection_entries: Option<u32>,
        /// `vport`: the handle of the first; the others follow. The card knows its vPorts by this handle.
        handle: Option<u64>,
    }
}
table! {
    /// First ids.
    FirstIds {
        /// Event queues.
        eq: Option<u16>,
        /// Completion queues.
        cq: Option<u16>,
        /// Send queues.
        sq: Option<u16>,
        /// Receive queues.
        rq: Option<u16>,
    }
}
table! {
    /// Commands.
    Commands {
        /// Names of those that the host does not know.
        unsupported: Vec<String>,
    }
}

/// Profiles that come with the card: name and text.
const SHIPPED: &[(&str, &str)] = &[
    ("default", include_str!("../../profiles/default.toml")),
    ("azure-old", include_str!("../../profiles/azure-old.toml")),
    ("azure-new", include_str!("../../profiles/azure-new.toml")),
    ("impatient", include_str!("../../profiles/impatient.toml")),
    ("minimal", include_str!("../../profiles/minimal.toml")),
    ("holes", include_str!("../../profiles/holes.toml")),
    ("mtu-zero", include_str!("../../profiles/mtu-zero.toml")),
    ("jumbo", include_str!("../../profiles/jumbo.toml")),
    ("few-eqs", include_str!("../../profiles/few-eqs.toml")),
    ("high-ids", include_str!("../../profiles/high-ids.toml")),
    ("pf-like", include_str!("../../profiles/pf-like.toml")),
    ("no-device", include_str!("../../profiles/no-device.toml")),
    ("hostile-zero", include_str!("../../profiles/hostile-zero.toml")),
    ("hostile-huge", include_str!("../../profiles/hostile-huge.toml")),
    ("hostile-registers", include_str!("../../profiles/hostile-registers.toml")),
    ("hostile-ids", include_str!("../../profiles/hostile-ids.toml")),
];

/// Largest first id: beyond the largest number of queues, ids still have 16 bits.
const MAX_FIRST_ID: u16 = 0x4000;

impl Profile {
    /// The profile that a TOML text describes.
    ///
    /// # Errors
    /// One sentence that names the key that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let profile: Self = toml::from_str(text).map_err(|error| {
            let before = |start: usize| text.get(..start).unwrap_or_default().matches('\n').count();
            let line = error.span().map(|span| before(span.start) + 1);
            let place = line.map(|line| format!("line {line}: ")).unwrap_or_default();
            format!("{place}{}", error.message().replace('\n', " "))
        })?;
        profile.check()?;
        Ok(profile)
    }
    /// The profile `name` that comes with the card.
    ///
    /// # Errors
    /// There is none; the sentence names those there are.
    pub fn named(name: &str) -> Result<Self, String> {
        match SHIPPED.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text).map_err(|error| format!("profile {name}: {error}")),
            None => Err(format!("there is no profile `{name}`, but {}", Self::names().join(", "))),
        }
    }
    /// Names of the profiles that come with the card.
    pub fn names() -> Vec<&'static str> {
        SHIPPED.iter().map(|(name, _)| *name).collect()
    }
    /// Whether all values can be shown.
    ///
    /// # Errors
    /// One sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        let list = self.devices.list.iter().flatten();
        if let Some(bad) = list.clone().find(|entry| device_id(entry).is_none()) {
            return Err(format!(
                "devices.list: `{bad}` is neither mana, rdma, hwc, hole, nor TYPE:INSTANCE such as 2:0"
            ));
        }
        if list.count() > DEVICE_LIST {
            return Err(format!("devices.list: the driver has room for {DEVICE_LIST}"));
        }
        let mut unsupported = self.commands.unsupported.iter();
        if let Some(bad) = unsupported.find(|name| command::code(name).is_none()) {
            return Err(format!("commands.unsupported: there is no command `{bad}`"));
        }
        let FirstIds { eq, cq, sq, rq } = self.ids;
        for (name, first) in [("eq", eq), ("cq", cq), ("sq", sq), ("rq", rq)] {
            if first.is_some_and(|first| !(1..=MAX_FIRST_ID).contains(&first)) {
                return Err(format!("ids.{name} must be from 1 to {MAX_FIRST_ID}"));
            }
        }
        if self.port.handle.is_some_and(|handle| handle > u64::MAX - 0x1_0000) {
            return Err(
                "port.handle must leave room for those of more vPorts, and for the invalid one".into()
            );
        }
        Ok(())
    }
    /// Entries of the list of devices, if it has its own.
    pub(crate) fn device_list(&self) -> Option<Vec<DeviceId>> {
        self.devices.list.as_ref().map(|list| list.iter().filter_map(|entry| device_id(entry)).collect())
    }
    /// The host knows command `code`.
    pub(crate) fn knows(&self, code: u32) -> bool {
        self.commands.unsupported.is_empty()
            || !self.commands.unsupported.iter().any(|name| command::code(name) == Some(code))
    }
    /// Change the limit `name`, as `limits` writes it; `false` if there is none.
    #[must_use]
    pub fn limit(&mut self, name: &str, value: u32) -> bool {
        let Self { limits, adapter, port, .. } = self;
        let to = match name {
            "max-sq" => &mut limits.max_sq,
            "max-rq" => &mut limits.max_rq,
            "max-cq" => &mut limits.max_cq,
            "max-eq" => &mut limits.max_eq,
            "max-msix" => &mut limits.max_msix,
            "max-queues" => {
                (port.max_sq, port.max_rq) = (Some(value), Some(value));
                return true;
            }
            "indirection-entries" => &mut port.indirection_entries,
            "ports" => {
                adapter.ports = u16::try_from(value).ok();
                return adapter.ports.is_some();
            }
            "mtu" => {
                // As on the command line, the largest IP packet.
                adapter.mtu = value.checked_add(14).and_then(|frame| u16::try_from(frame).ok());
                return adapter.mtu.is_some();
            }
            _ => return false,
        };
        *to = Some(value);
        true
    }
}

impl Registers {
    /// Nothing but the truth.
    pub(crate) fn are_true(&self) -> bool {
        *self == Self::default()
    }
    /// What a read of `data` at `offset` finds, where it is not the truth.
    pub(crate) fn overlay(&self, offset: u64, data: &mut [u8]) {
        let Self { doorbell_offset, doorbell_page_size, shm_offset } = *self;
        let values =
            [(0x08, 8, doorbell_offset), (0x10, 4, doorbell_page_size.map(u64::from)), (0x18, 8, shm_offset)];
        for (start, len, value) in values {
            let Some(value) = value else { continue };
            for (at, byte) in (start..start + len).zip(value.to_le_bytes()) {
                let to = u64::checked_sub(at, offset).and_then(|at| data.get_mut(at as usize));
                to.into_iter().for_each(|to| *to = byte);
            }
        }
    }
}

/// A device by name or `TYPE:INSTANCE`.
fn device_id(text: &str) -> Option<DeviceId> {
    Some(match text {
        "mana" => DeviceId::new(device::MANA),
        "rdma" => DeviceId::new(device::MANA_IB),
        "hwc" => DeviceId::new(device::HWC),
        "hole" => DeviceId::default(),
        other => {
            let (kind, instance) = other.split_once(':')?;
            DeviceId {
                kind: kind.parse::<u16>().ok()?.into(),
                instance: instance.parse::<u16>().ok()?.into(),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_come_with_the_card_can_be_read() {
        for name in Profile::names() {
            Profile::named(name).unwrap();
        }
        assert_eq!(Profile::named("default"), Ok(Profile::default()));
        assert!(Profile::named("azure").unwrap_err().contains("azure-old, azure-new"));
    }

    #[test]
    fn errors_name_the_key() {
        for (text, says) in [
            ("[limits]\nmax-sqs = 1", "line 2: unknown field `max-sqs`"),
            ("[limit]\nmax-sq = 1", "unknown field `limit`"),
            ("[limits]\nmax-sq = -1", "line 2: "),
            ("[devices]\nlist = [\"mana\", \"eth\"]", "devices.list: `eth`"),
            (
                "[commands]\nunsupported = [\"MANA_FLY\"]",
                "commands.unsupported: there is no command `MANA_FLY`",
            ),
            ("[ids]\ncq = 0", "ids.cq must be from 1"),
            ("[port]\nhandle = 0x7fffffffffffffffff", "line 2"),
            ("limits", "line 1"),
        ] {
            let error = Profile::parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn registers_lie_where_they_are_told_to() {
        let registers = Registers { doorbell_offset: Some(0x1122_3344_5566_7788), ..Registers::default() };
        let mut data = [0xee; 8];
        registers.overlay(0x0c, &mut data);
        assert_eq!(data, [0x44, 0x33, 0x22, 0x11, 0xee, 0xee, 0xee, 0xee]);
        assert!(!registers.are_true() && Registers::default().are_true());
    }
}
