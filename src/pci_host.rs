//! The PCI host bridges: root buses, configuration space, and the windows in which functions' BARs live.

pub mod plan;
