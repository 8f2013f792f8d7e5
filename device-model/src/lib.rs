//! The MANA NIC (Microsoft Azure Network Adapter) as a device model.
#![forbid(unsafe_code)]
#![allow(dead_code, reason = "rings and rules come into use with the hardware channel and the data path")]

mod bar0;
pub mod checksum;
pub mod config;
mod counters;
mod device;
mod dma;
pub mod doors;
pub mod observe;
pub mod offload;
pub mod packet;
mod pci;
mod queues;
mod region;
mod ring;
mod rules;
mod rx;
pub mod segment;
pub mod steer;
mod sync;
#[cfg(test)]
mod testing;
mod tx;
mod vport;
pub mod wire;

pub use config::ConfigError;
pub use device::{AccessError, Bar, ConfigEffect, Host, ManaDevice, Ran};
