//! The MANA NIC (Microsoft Azure Network Adapter) as a device model.
#![forbid(unsafe_code)]
// Guest input must reach no panic.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable))]

mod bar0;
mod card;
pub mod checksum;
mod command;
pub mod config;
pub mod counters;
mod describe;
mod device;
mod dma;
pub mod doors;
mod firmware;
mod gdma;
pub mod host;
mod hwc;
mod ledger;
mod mana;
pub mod observe;
pub mod offload;
pub mod packet;
pub mod pci;
mod pending;
mod queues;
mod region;
mod ring;
mod rules;
mod rx;
pub mod segment;
mod shaper;
mod smc;
pub mod state;
mod status;
pub mod steer;
mod sync;
mod table;
#[cfg(test)]
mod testing;
mod timers;
mod tx;
mod vport;
pub mod wire;

pub use config::ConfigError;
pub use device::{AccessError, Bar, ConfigEffect, Host, ManaDevice, Ran};
