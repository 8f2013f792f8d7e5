//! The MANA NIC (Microsoft Azure Network Adapter) as a device model.
#![forbid(unsafe_code)]

pub mod checksum;
pub mod config;
mod device;
pub mod doors;
pub mod observe;
pub mod offload;
pub mod packet;
pub mod segment;
pub mod steer;
#[cfg(test)]
mod testing;
pub mod wire;

pub use device::{AccessError, Bar, ConfigEffect, ConfigError, Host, ManaDevice, Ran};
