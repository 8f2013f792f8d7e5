//! The PCI function: configuration space and MSI-X.

pub mod config_space;
pub mod msix;
