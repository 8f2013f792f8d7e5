//! Traces: what the devices did, as JSON lines; and how they are read.
//!
//! A line is `{"t_ns": TIME, "event": NAME, ...}` with the fields of [`mana_device::observe::Event`], and
//! `"device": N` where a machine has several. [`TraceFile`] writes them.

mod writer;

pub use writer::TraceFile;
