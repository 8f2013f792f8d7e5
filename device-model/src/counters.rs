//! Named counters: every drop and error has one, so that nothing is lost silently.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::observe::Fields;
use crate::state::{StateError, check};

/// A count that several threads may raise.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more; the answer is the new count.
    pub fn bump(&self) -> u64 {
        self.add(1)
    }
    /// `n` more; the answer is the new count.
    pub fn add(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed).wrapping_add(n)
    }
    /// Count on from `n`.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Whether the `n`-th of something that a guest can repeat at will is worth a line in a log: the first ones, then
/// ever fewer.
pub fn worth_a_line(n: u64) -> bool {
    n <= 8 || n.is_power_of_two()
}

/// Count one and, for the first few and then ever fewer, write a log line.
#[macro_export]
macro_rules! count {
    ($counter:expr, $($message:tt)+) => {{
        let n = $counter.bump();
        if $crate::counters::worth_a_line(n) {
            log::warn!($($message)+);
        }
    }};
}

/// Names and counts, as a state keeps them.
pub fn save(fields: &Fields) -> Vec<(String, u64)> {
    fields.0.iter().map(|&(name, count)| (name.into(), count)).collect()
}

macro_rules! counters {
    ($(#[$outer:meta])* $group:ident { $($(#[$meta:meta])* $name:ident,)+ }) => {
        $(#[$outer])*
        #[derive(Debug, Default)]
        pub struct $group { $($(#[$meta])* pub $name: Counter,)+ }

        impl $group {
            /// Names and counts.
            pub fn fields(&self) -> Fields {
                Fields(vec![$((stringify!($name), self.$name.get()),)+])
            }
            fn named(&self, name: &str) -> Option<&Counter> {
                match name {
                    $(stringify!($name) => Some(&self.$name),)+
                    _ => None,
                }
            }
            /// Whether all of `saved` are counters of this group.
            ///
            /// # Errors
            /// One is not.
            pub fn check(&self, saved: &[(String, u64)]) -> Result<(), StateError> {
                let unknown = saved.iter().find(|(name, _)| self.named(name).is_none());
                check(unknown.is_none(), || format!("there is no counter {:?}", unknown.map(|(name, _)| name)))
            }
            /// Count on from what was saved; what was not starts at 0.
            pub fn load(&self, saved: &[(String, u64)]) {
                for (name, _) in self.fields().0 {
                    let count = saved.iter().find(|(known, _)| known == name).map_or(0, |(_, count)| *count);
                    self.named(name).into_iter().for_each(|counter| counter.set(count));
                }
            }
        }
    };
}

counters! {
    /// Counts of the function as a whole.
    Counters {
        /// Doorbells that named no live queue, or came through another queue's page.
        doorbell_dead,
        /// Doorbells whose tail makes no sense.
        doorbell_tail,
        /// Descriptors, rings or buffers outside guest memory.
        dma_errors,
        /// Events lost because a ring was full or outside memory.
        events_lost,
        /// Completions lost because a ring was full or outside memory.
        completions_lost,
        /// Requests of the hardware channel that could not be read.
        hwc_bad_requests,
        /// Responses of the hardware channel that could not be delivered.
        hwc_lost_responses,
        /// Commands answered with an error.
        hwc_failed_commands,
        /// Commands that the card does not know.
        hwc_unknown_commands,
        /// Objects that a driver had not destroyed when it deregistered its device or destroyed its channel.
        objects_leaked,
        /// Requests in the shared-memory channel answered with an error.
        smc_failed,
        /// Interrupts sent.
        msix_fired,
        /// Interrupts kept because the vector was masked.
        msix_pended,
        /// Interrupts for vectors beyond the table.
        msix_out_of_range,
        /// Breaches of the device's rules by the driver.
        rule_violations,
        /// Strikes of the simulated host's faults.
        faults,
    }
}

counters! {
    /// Traffic of a vPort, as MANA_QUERY_GF_STAT reports it.
    VportCounters {
        /// Frames dropped for want of a receive WQE.
        rx_discards_nowqe,
        /// Frames dropped because the vPort's receive side is off.
        rx_err_vport_disabled,
        /// Bytes received, drops excluded.
        rx_bytes,
        /// Unicast frames received.
        rx_ucast_pkts,
        /// Unicast bytes received.
        rx_ucast_bytes,
        /// Multicast frames received.
        rx_mcast_pkts,
        /// Multicast bytes received.
        rx_mcast_bytes,
        /// Broadcast frames received.
        rx_bcast_pkts,
        /// Broadcast bytes received.
        rx_bcast_bytes,
        /// Frames not sent because the vPort was not configured for transmission.
        tx_err_vport_disabled,
        /// Frames not sent because their OOB named another vPort offset.
        tx_err_inval_vport_offset,
        /// Frames not sent because they were longer than the MTU.
        tx_err_mtu_violation,
        /// Frames not sent because their OOB made no sense.
        tx_err_inval_oob,
        /// Bytes sent.
        tx_bytes,
        /// Unicast frames sent.
        tx_ucast_pkts,
        /// Unicast bytes sent.
        tx_ucast_bytes,
        /// Multicast frames sent.
        tx_mcast_pkts,
        /// Multicast bytes sent.
        tx_mcast_bytes,
        /// Broadcast frames sent.
        tx_bcast_pkts,
        /// Broadcast bytes sent.
        tx_bcast_bytes,
        /// Frames not sent because the function must not send.
        tx_err_gf_disabled,
        /// Frames not sent because of the VLAN tag to insert.
        tx_err_vlan_enforcement,
        /// Frames not sent because of their EtherType.
        tx_err_ethtype_enforcement,
        /// Frames not sent because of their source address.
        tx_err_sa_enforcement,
        /// Frames not sent because their headers did not fit the offloads asked for.
        tx_err_header,
        /// WQEs that could not be read or whose buffers are not guest memory.
        tx_err_gdma,
        /// Frames that the port had no room for.
        tx_port_dropped,
        /// Frames for the guest too long for their receive buffer.
        rx_truncated,
        /// Frames for the guest shorter than an Ethernet header.
        rx_runts,
        /// Receive WQEs that could not be read or whose buffers are not guest memory.
        rx_err_gdma,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_rare() {
        assert_eq!((1..=1024).filter(|&n| worth_a_line(n)).count(), 8 + 7);
    }

    #[test]
    fn counters_are_named() {
        let counters = Counters::default();
        counters.dma_errors.bump();
        assert!(counters.fields().0.contains(&("dma_errors", 1)));
    }
}
