//! The command line of mana-vmm.

fn main() {}
