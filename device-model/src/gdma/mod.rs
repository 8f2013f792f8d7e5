//! GDMA commands: the function as a whole, its event queues, DMA regions, and what user space may own.

pub mod device;
pub mod queue;
pub mod region;
pub mod resource;
