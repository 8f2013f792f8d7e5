//! Runs scenarios against real guest kernels, through the built `mana-vmm` binary only.

fn main() -> anyhow::Result<()> {
    Ok(())
}
