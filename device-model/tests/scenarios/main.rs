//! Scenarios: the whole device, driven in one process by a driver that knows only the interface.
//!
//! One program, so that it is linked once; a module a story.

mod host;
mod host_points;
mod hostile;
mod link;
mod moderation;
mod msix_table;
mod pci;
mod ports;
mod profiles;
mod receive;
mod restore;
mod send;
mod stress;
