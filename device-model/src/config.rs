//! What the host lets this function have: the limits, addresses and identities that the driver asks for.

use std::ops::{Range, RangeInclusive};

use crate::bar0;
use crate::host::{Hostility, Profile};
use crate::pci::msix;

use serde::{Deserialize, Serialize};

/// Most queue pairs of a vPort (`MANA_MAX_NUM_QUEUES`, mana.h).
pub const MAX_QUEUES_PER_VPORT: u16 = 64;
/// Most vPorts of a device (`MAX_PORTS_IN_MANA_DEV`, mana.h).
pub const MAX_VPORTS: usize = 256;
/// Legal MSI-X table sizes (PCIe base specification, 7.7.2.2).
pub const MSIX_TABLE_SIZES: RangeInclusive<u16> = 1..=2048;

/// Legal numbers of doorbell pages: one for the hardware channel, one for the Ethernet device, the rest to give out.
pub const DOORBELL_PAGES: RangeInclusive<u16> = 2..=4096;
/// Legal MTUs: IPv4's least, and the largest that the card's 16-bit frame length leaves room for.
pub const MTUS: RangeInclusive<u16> = 68..=9216;

/// Most entries that an indirection table is announced with.
pub const MAX_INDIRECTION_ENTRIES: u16 = 256;
/// Slowest link, Mbit/s: the smallest bandwidth clamp.
pub const MIN_LINK_SPEED_MBPS: u32 = 100;

/// A configuration the device can't be built from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {reason}")]
pub struct ConfigError {
    /// The command line's name of the option, e.g. `max-msix`.
    pub option: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
}

/// Where the MSI-X table or its pending-bit array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarLocation {
    /// BAR number; only even ones exist, since every BAR is 64-bit.
    pub bar: u8,
    /// Bytes from the BAR's start, a multiple of 8.
    pub offset: u32,
}

/// One vPort: a MAC address and its queue limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VportConfig {
    /// MAC address in transmission order.
    pub mac: [u8; 6],
    /// `max_num_sq` and `max_num_rq` of MANA_QUERY_VPORT_CONFIG, 1 to 64.
    pub max_queues: u16,
}

/// What the host lets a vPort send. All of it, if nobody says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TxPolicy {
    /// Nothing: the function's traffic is disabled (completions of type `CQE_TX_VF_DISABLED`).
    pub disabled: bool,
    /// Only frames whose source address is the vPort's (else `CQE_TX_SA_DROP`).
    pub own_source_only: bool,
    /// Only ARP, IPv4 and IPv6 (else `CQE_TX_INVALID_ETH_TYPE`).
    pub ip_only: bool,
    /// No VLAN tags, neither in the frame nor to be inserted (else `CQE_TX_VLAN_TAGGING_VIOLATION`).
    pub untagged_only: bool,
}

/// The whole device, as the host configured it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// vPorts in index order, at least one.
    pub vports: Vec<VportConfig>,
    /// `max_msix` of GDMA_QUERY_MAX_RESOURCES.
    pub max_msix: u32,
    /// Entries of the MSI-X table.
    pub msix_table_size: u16,
    /// Where the MSI-X table is.
    pub msix_table: BarLocation,
    /// Where the pending-bit array is.
    pub msix_pba: BarLocation,
    /// Largest IP packet, bytes (`adapter_mtu` is this plus 14).
    pub mtu: u16,
    /// List the RDMA function (GDMA device type 3) in GDMA_LIST_DEVICES.
    pub rdma: bool,
    /// Doorbell pages in BAR0; the first is the hardware channel's.
    pub doorbell_pages: u16,
    /// `num_indirection_ent` of MANA_QUERY_VPORT_CONFIG, a power of two up to 256: a larger table does not fit into a
    /// request of the hardware channel.
    pub indirection_entries: u16,
    /// Speed of the card's link, Mbit/s.
    pub link_speed_mbps: u32,
    /// What the host shows, where it is not what stands here.
    pub profile: Profile,
    /// The host lies.
    pub hostile: Option<Hostility>,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            vports: vec![VportConfig { mac: [0x52, 0x54, 0x00, 0x12, 0x34, 0x56], max_queues: 64 }],
            max_msix: 64,
            msix_table_size: 64,
            msix_table: BarLocation { bar: 4, offset: 0 },
            msix_pba: BarLocation { bar: 4, offset: 0x8000 },
            mtu: 1500,
            rdma: false,
            doorbell_pages: 128,
            indirection_entries: 64,
            link_speed_mbps: 200_000,
            profile: Profile::default(),
            hostile: None,
        }
    }
}

impl DeviceConfig {
    /// Whether a device can be built from this.
    ///
    /// # Errors
    /// [`ConfigError`] names the first option that is out of range.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fail = |option, reason| Err(ConfigError { option, reason });
        if self.vports.is_empty() || self.vports.len() > MAX_VPORTS {
            return fail(
                "netdev",
                format!("{} ports, but 1 to {MAX_VPORTS} are possible", self.vports.len()),
            );
        }
        if let Some(bad) =
            self.vports.iter().find(|vport| !(1..=MAX_QUEUES_PER_VPORT).contains(&vport.max_queues))
        {
            let reason = format!("{} queues, but 1 to {MAX_QUEUES_PER_VPORT} are possible", bad.max_queues);
            return fail("max-queues", reason);
        }
        if self.vports.iter().any(|vport| vport.mac[0] & 1 != 0 || vport.mac == [0; 6]) {
            return fail("mac", "not the address of one card (zero, or the multicast bit is set)".into());
        }
        let in_range = |option, value: u16, range: RangeInclusive<u16>| match range.contains(&value) {
            true => Ok(()),
            false => fail(option, format!("{value}, but {} to {} are possible", range.start(), range.end())),
        };
        in_range("mtu", self.mtu, MTUS)?;
        in_range("msix-table", self.msix_table_size, MSIX_TABLE_SIZES)?;
        in_range("doorbell-pages", self.doorbell_pages, DOORBELL_PAGES)?;
        if !self.indirection_entries.is_power_of_two() || self.indirection_entries > MAX_INDIRECTION_ENTRIES {
            let reason = format!(
                "{}, but powers of two up to {MAX_INDIRECTION_ENTRIES} are possible",
                self.indirection_entries
            );
            return fail("indirection-entries", reason);
        }
        if self.link_speed_mbps < MIN_LINK_SPEED_MBPS {
            let reason = format!("{} Mbit/s, but {MIN_LINK_SPEED_MBPS} is the least", self.link_speed_mbps);
            return fail("link-speed", reason);
        }
        if self.hostile.as_ref().is_some_and(|hostile| hostile.rate == 0) {
            return fail("rate", "0, but a lie comes once in 1 or more".into());
        }
        self.profile.check().or_else(|reason| fail("profile", reason))?;
        let (table, pba) = (self.table_range(), self.pba_range());
        self.check_place("msix-table", self.msix_table, &table)?;
        self.check_place("msix-pba", self.msix_pba, &pba)?;
        if self.msix_table.bar == self.msix_pba.bar && table.start < pba.end && pba.start < table.end {
            return fail(
                "msix-pba",
                format!("overlaps the MSI-X table at {:#x} to {:#x}", table.start, table.end),
            );
        }
        Ok(())
    }
    fn check_place(
        &self,
        option: &'static str,
        place: BarLocation,
        range: &Range<u64>,
    ) -> Result<(), ConfigError> {
        let fail = |reason| Err(ConfigError { option, reason });
        if !matches!(place.bar, 0 | 2 | 4) || !place.offset.is_multiple_of(8) {
            return fail(format!(
                "BAR{} + {:#x} is not a multiple of 8 in BAR 0, 2 or 4",
                place.bar, place.offset
            ));
        }
        let free = u64::from(bar0::Layout::HEAD)..bar0::Layout::new(self).zone();
        if place.bar == 0 && (range.start < free.start || range.end > free.end) {
            return fail(format!("does not fit into BAR0's free part, {:#x} to {:#x}", free.start, free.end));
        }
        if range.end > MAX_BAR {
            return fail(format!("ends at {:#x}, but a BAR has at most {MAX_BAR:#x} bytes", range.end));
        }
        Ok(())
    }
    /// Bytes of its BAR that the MSI-X table takes.
    pub fn table_range(&self) -> Range<u64> {
        let start = u64::from(self.msix_table.offset);
        start..start + u64::from(self.msix_table_size) * u64::from(msix::ENTRY_SIZE)
    }
    /// Bytes of its BAR that the pending-bit array takes: a bit a vector, in whole 8-byte words.
    pub fn pba_range(&self) -> Range<u64> {
        let start = u64::from(self.msix_pba.offset);
        start..start + u64::from(self.msix_table_size).div_ceil(64) * 8
    }
    /// Number and size of each BAR.
    pub fn bars(&self) -> Vec<(u8, u64)> {
        let mut bars = vec![(0, bar0::Layout::new(self).size())];
        for bar in [2, 4] {
            let ends =
                [(self.msix_table.bar, self.table_range().end), (self.msix_pba.bar, self.pba_range().end)];
            let end = ends.into_iter().filter(|&(at, _)| at == bar).map(|(_, end)| end).max();
            bars.extend(end.map(|end| (bar, end.next_power_of_two().max(MIN_BAR))));
        }
        bars
    }
}

/// Smallest BAR: a page, so that none shares one.
const MIN_BAR: u64 = 4096;
/// Largest MSI-X BAR that makes sense.
const MAX_BAR: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_legal_and_leaves_no_gap() {
        let config = DeviceConfig::default();
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.bars(), [(0, 0x10_0000), (4, 0x1_0000)]);
    }

    #[test]
    fn the_table_may_lie_anywhere_it_fits() {
        let mut config =
            DeviceConfig { msix_table: BarLocation { bar: 0, offset: 0x1000 }, ..Default::default() };
        assert_eq!(config.check(), Ok(()));
        config.msix_pba = BarLocation { bar: 2, offset: 0x20 };
        assert_eq!(config.bars(), [(0, 0x10_0000), (2, 4096)]);
        config.msix_table.offset = 0x40;
        assert_eq!(config.check().unwrap_err().option, "msix-table");
        config.msix_table = BarLocation { bar: 2, offset: 0 };
        assert_eq!(config.check().unwrap_err().option, "msix-pba");
        config.msix_pba = BarLocation { bar: 3, offset: 0 };
        assert_eq!(config.check().unwrap_err().option, "msix-pba");
    }

    #[test]
    fn values_out_of_range_name_their_option() {
        let bad = |change: fn(&mut DeviceConfig)| {
            let mut config = DeviceConfig::default();
            change(&mut config);
            config.check().map_err(|error| error.option)
        };
        assert_eq!(bad(|config| config.vports.clear()), Err("netdev"));
        assert_eq!(bad(|config| config.vports[0].max_queues = 65), Err("max-queues"));
        assert_eq!(bad(|config| config.vports[0].mac = [1, 0, 0, 0, 0, 0]), Err("mac"));
        assert_eq!(bad(|config| config.mtu = 67), Err("mtu"));
        assert_eq!(bad(|config| config.msix_table_size = 2049), Err("msix-table"));
        assert_eq!(bad(|config| config.doorbell_pages = 1), Err("doorbell-pages"));
        assert_eq!(bad(|config| config.indirection_entries = 48), Err("indirection-entries"));
        assert_eq!(bad(|config| config.indirection_entries = 1024), Err("indirection-entries"));
        assert_eq!(bad(|config| config.link_speed_mbps = 99), Err("link-speed"));
        assert_eq!(bad(|config| config.max_msix = 1), Ok(()));
    }
}
