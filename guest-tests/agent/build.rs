//! Strips the agent in every profile: it travels in every guest's initramfs, and copies of RAM are slow in
//! emulated machines.

fn main() {
    println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
    println!("cargo::rerun-if-changed=build.rs");
}
