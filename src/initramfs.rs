//! The guest's initramfs, made at boot: the driver and what it needs, busybox, and the agent as `/init`.
//!
//! Nothing in it is compressed, since unpacking costs more than copying where the guest is emulated. The agent
//! is told what to do by `/etc/mana-agent.conf`, a JSON object:
//!
//! | key | value |
//! |---|---|
//! | `modules` | files to load first, in order; a failure is only reported |
//! | `driver` | files of the driver, in order, loaded after those |
//! | `ports` | network interfaces to wait for once the driver is loaded |
//! | `dhcp` | whether an address is asked for on each of them |
//! | `exec` | shell command to run before powering off, or null for a shell on the console |

pub mod modules;

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, bail};
use object::Endianness;
use object::read::elf::{ElfFile64, ProgramHeader};
use serde_json::json;

use crate::config::{NetdevKind, VmConfig};
use crate::cpio::Archive;
use modules::{Module, ModuleFolder};

/// Modules that make a guest complete where its kernel has them as modules: packet sockets (DHCP), the reporter of
/// panics, and the clock that wakes it from suspend.
const USEFUL: [&str; 3] = ["af_packet", "pvpanic_mmio", "rtc_cmos"];

/// Modules that a guest with a NIC may ask for (`ip link add ... type vlan`), which are not loaded at start.
const ON_DEMAND: [&str; 1] = ["8021q"];

/// Commands of busybox that kernels and scripts call by path; its shell finds the others by itself.
const APPLETS: [&str; 6] = ["sh", "modprobe", "rmmod", "udhcpc", "ip", "ping"];

/// Commands of the agent.
const VERBS: &[&str] = &[
    "begin-scenario",
    "bench-net",
    "bind",
    "coverage",
    "cpu-offline",
    "cpu-online",
    "datagrams",
    "dhcp",
    "echo-tcp",
    "echo-udp",
    "end-scenario",
    "establish-again",
    "ethtool",
    "flr",
    "functions",
    "host",
    "link-up",
    "link-wait",
    "log-check",
    "mana-agent",
    "namespace",
    "offloads",
    "queues",
    "rebind",
    "reload",
    "super-frames",
    "suspend",
    "sweep",
    "topology",
    "transfer",
    "udhcpc-script",
    "unbind",
    "vectors",
    "xdp",
];

/// Builds the archive for `config`.
///
/// # Errors
/// One sentence when the kernel's modules, the driver, busybox or the agent can't be found or don't fit together.
pub fn build(config: &VmConfig) -> Result<Vec<u8>> {
    let Some(folder) = &config.modules else {
        bail!("--kernel without --initrd needs --modules, the kernel's lib/modules/VERSION folder");
    };
    let mut kernel = ModuleFolder::open(folder)?;
    if let Some(driver) = &config.driver {
        kernel.replace_from(driver)?;
    }
    let useful: Vec<&str> = USEFUL.into_iter().filter(|name| kernel.contains(name)).collect();
    let driver = driver_modules(config, &kernel)?;
    let loaded = kernel.closure(&[useful.as_slice(), &virtio_modules(config), &driver].concat())?;
    let (first, driver) = split_at_driver(&loaded);
    let mut on_demand = kernel.closure(&on_demand_modules(config, &kernel))?;
    on_demand.retain(|module| loaded.iter().all(|other| other.name != module.name));
    let carried: Vec<&Module> = loaded.iter().chain(&on_demand).collect();

    let mut archive = Archive::new(Vec::new());
    let home = format!("/lib/modules/{}", kernel.version());
    archive.copy("/init", 0o755, &agent()?)?;
    archive.copy("/bin/busybox", 0o755, &busybox(folder)?)?;
    for name in APPLETS {
        archive.symlink(&format!("/bin/{name}"), "busybox")?;
    }
    for name in VERBS {
        archive.symlink(&format!("/bin/{name}"), "/init")?;
    }
    // Where the kernel looks for it (CONFIG_MODPROBE_PATH).
    archive.symlink("/sbin/modprobe", "/bin/busybox")?;
    archive.char_device("/dev/console", 0o600, 5, 1)?;
    for folder in ["/proc", "/sys", "/tmp", "/run"] {
        archive.dir(folder, 0o755)?;
    }
    for module in &carried {
        archive.file(&format!("{home}/{}", file_name(module)), 0o644, &module.image)?;
    }
    archive.file(&format!("{home}/modules.dep"), 0o644, dependencies(&carried).as_bytes())?;
    archive.file(&format!("{home}/modules.alias"), 0o644, aliases(&carried).as_bytes())?;
    let path = |module: &Module| format!("{home}/{}", file_name(module));
    let orders = json!({
        "modules": first.iter().map(path).collect::<Vec<_>>(),
        "driver": driver.iter().map(path).collect::<Vec<_>>(),
        "ports": config.nics.iter().map(|nic| nic.device.vports.len()).sum::<usize>() + config.virtio_nics.len(),
        "dhcp": has_peer(config),
        "exec": config.exec,
    });
    archive.file("/etc/mana-agent.conf", 0o644, orders.to_string().as_bytes())?;
    Ok(archive.finish()?)
}

/// Names of the driver's modules. A 6.12 guest whose `mana_ib` finds no RDMA function oopses, so that one comes only
/// where the function has one.
fn driver_modules(config: &VmConfig, kernel: &ModuleFolder) -> Result<Vec<&'static str>> {
    if config.nics.is_empty() {
        return Ok(Vec::new());
    }
    if !kernel.contains("mana") && !kernel.is_builtin("mana") {
        bail!(
            "kernel {} has no mana driver: boot one that has, or give a built mana.ko with --driver DIR",
            kernel.version()
        );
    }
    let rdma = config.nics.iter().any(|nic| nic.device.rdma);
    Ok(if rdma && kernel.contains("mana_ib") { vec!["mana", "mana_ib"] } else { vec!["mana"] })
}

/// Names of the modules for virtio devices; what the kernel has built in is left out later.
fn virtio_modules(config: &VmConfig) -> Vec<&'static str> {
    let kinds = [(!config.disks.is_empty(), "virtio_blk"), (!config.virtio_nics.is_empty(), "virtio_net")];
    let drivers: Vec<_> = kinds.into_iter().filter(|(wanted, _)| *wanted).map(|(_, name)| name).collect();
    if drivers.is_empty() { drivers } else { [vec!["virtio_pci"], drivers].concat() }
}

/// Names of the modules that may be asked for; a kernel that lacks one refuses what needs it.
fn on_demand_modules(config: &VmConfig, kernel: &ModuleFolder) -> Vec<&'static str> {
    let wanted = |name: &&str| !config.nics.is_empty() && kernel.contains(name);
    ON_DEMAND.into_iter().filter(wanted).collect()
}

/// The modules that come before `mana` and can be loaded unseen, and the rest.
fn split_at_driver(loaded: &[Module]) -> (&[Module], &[Module]) {
    let at = loaded.iter().position(|module| module.name == "mana").unwrap_or(loaded.len());
    loaded.split_at(at)
}

/// Does any port have somebody to ask for an address?
fn has_peer(config: &VmConfig) -> bool {
    let plugged = config.nics.iter().flat_map(|nic| &nic.netdevs);
    let mut plugged = plugged.chain(config.virtio_nics.iter().map(|nic| &nic.netdev));
    plugged.any(|id| config.netdevs.iter().any(|netdev| netdev.id == *id && netdev.kind == NetdevKind::Peer))
}

fn file_name(module: &Module) -> String {
    format!("kernel/{}.ko", module.name)
}

/// `modules.dep` (depmod(8)): each file, then what it needs, the nearest first.
fn dependencies(modules: &[&Module]) -> String {
    let line = |module: &&Module| {
        let mut needed = Vec::new();
        add_needs(module, modules, &mut needed);
        let needed: String = needed.iter().map(|module| format!(" {}", file_name(module))).collect();
        format!("{}:{needed}\n", file_name(module))
    };
    modules.iter().map(line).collect()
}

fn add_needs<'a>(module: &Module, modules: &[&'a Module], needed: &mut Vec<&'a Module>) {
    for name in &module.depends {
        let Some(found) = modules.iter().find(|other| other.name == *name) else { continue };
        needed.retain(|other| other.name != *name);
        needed.push(found);
        add_needs(found, modules, needed);
    }
}

/// `modules.alias` (depmod(8)).
fn aliases(modules: &[&Module]) -> String {
    let line = |module: &Module, alias: &str| format!("alias {alias} {}\n", module.name);
    modules.iter().flat_map(|module| module.aliases.iter().map(move |alias| line(module, alias))).collect()
}

/// The agent lies beside the running program.
fn agent() -> Result<PathBuf> {
    let program = env::current_exe().context("can't tell where mana-vmm itself lies")?;
    let agent = program.with_file_name("mana-agent");
    if !agent.is_file() {
        bail!("{} is missing: build it with `cargo build --workspace`", agent.display());
    }
    Ok(agent)
}

/// busybox: the guest's, three folders above its modules, else this machine's if it needs no libraries.
fn busybox(modules: &Path) -> Result<PathBuf> {
    let guest = modules.ancestors().nth(3).map(|guest| guest.join("busybox"));
    let machine = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    let found = guest.into_iter().chain(machine).find(|file| is_static(file));
    found.with_context(|| {
        format!(
            "there is no static busybox for the guest: put one three folders above {} or install busybox-static",
            modules.display()
        )
    })
}

/// A program that names no interpreter starts without libraries.
fn is_static(file: &Path) -> bool {
    let Ok(image) = fs::read(file) else { return false };
    let Ok(elf) = ElfFile64::<Endianness>::parse(&image[..]) else { return false };
    let endian = elf.endian();
    elf.elf_program_headers().iter().all(|header| header.p_type(endian) != object::elf::PT_INTERP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str]) -> Module {
        Module {
            name: name.to_owned(),
            image: Vec::new(),
            depends: depends.iter().map(|&name| name.to_owned()).collect(),
            aliases: vec![format!("pci:{name}*")],
            kernel: String::new(),
        }
    }

    #[test]
    fn modules_dep_lists_the_nearest_first_and_each_once() {
        let modules = [
            module("core", &[]),
            module("mana", &["core"]),
            module("ib", &["core"]),
            module("mana_ib", &["mana", "ib", "builtin"]),
        ];
        let carried: Vec<&Module> = modules.iter().collect();
        let lines = dependencies(&carried);
        assert_eq!(
            lines,
            "kernel/core.ko:\nkernel/mana.ko: kernel/core.ko\nkernel/ib.ko: kernel/core.ko\n\
             kernel/mana_ib.ko: kernel/mana.ko kernel/ib.ko kernel/core.ko\n"
        );
        assert_eq!(aliases(&carried[1..2]), "alias pci:mana* mana\n");
        let (first, driver) = split_at_driver(&modules);
        assert_eq!((first.len(), driver.len()), (1, 3));
    }
}
