//! Byte layouts of what the driver and the card exchange in memory, a file a layer.
//!
//! Layouts only: little-endian, sizes and offsets asserted, each field with its source. Bit fields are methods
//! on the word that holds them.

pub mod queue;
pub mod rx;
pub mod tx;
