//! The vector matrix: many functions with other limits each in one guest, and what the driver made of each.

pub mod check;
pub mod plan;
