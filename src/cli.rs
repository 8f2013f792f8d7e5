//! The command line: what may be written, and the [`VmConfig`] that it means.
//!
//! clap knows the options; `options` knows the `key=value` lists behind them, which follow QEMU's conventions
//! where a user of QEMU would look for them.

mod guest;
mod options;
mod restore;
mod serve;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Accel, VmConfig};
use crate::keyval::OptionError;
use crate::peer::PeerConfig;
use crate::seccomp;
use crate::trace::TraceArgs;

pub use options::{MAX_CPUS, is_memory};
pub use serve::ServeArgs;

/// A small VMM with an emulated MANA NIC (Microsoft Azure Network Adapter).
#[derive(Debug, Parser)]
#[command(name = "mana-vmm", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest kernel.
    ///
    /// Exit code: 0 the guest powered off; 1 bad arguments or a host error; 2 guest kernel panic or oops;
    /// 3 time-out; 4 the driver broke a device rule and strict=on; 5 the --exec command failed.
    Boot(Box<BootArgs>),
    /// Boot machines one after another; where KVM runs no guests, in one emulated machine, which then comes up once.
    ///
    /// FILE has a line of JSON for each: {"options": [boot's options...], "stdout": FILE, "stderr": FILE, "exit": FILE}.
    /// The last file is written when the boot has ended, with its exit code; after a boot that the emulated machine does
    /// not survive, no further one is begun. Exit code: 0 unless nothing could be booted.
    Batch {
        /// What to boot.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Serve MANA functions to other VMMs over vfio-user: QEMU from 10.1 on, Cloud Hypervisor.
    ///
    /// It runs until a signal ends it (exit code 0); 1 bad arguments or a host error; 3 time-out; 4 the driver broke a
    /// device rule and strict=on.
    Serve(ServeArgs),
    /// Be the built-in host (`--netdev peer`) at the end of another VMM's cable: QEMU's `-netdev stream`.
    ///
    /// One client at a time; it has DHCP, ping, and echo, discard and chargen over TCP and UDP at 10.0.2.2. A signal
    /// ends it (exit code 0); 1 bad arguments or a host error; 3 time-out.
    Peer(PeerArgs),
    /// Ask the simulated host of a running machine for something, and print its answer.
    ///
    /// The words, and what they do: `fault add command=NAME|0xCODE|any|smc|eqe|cqe|msix|reg [nth=N] [count=M|all]
    /// [queue=ID] do=ACTION`, `fault list`, `fault clear [ID]`; `event TYPE [port=N] [after=MS] [every=MS] [count=N]
    /// [at-command=N]`, `event list`, `event stop [ID]`; `limits LIMIT=N...`, `profile NAME|FILE`, `profile list`;
    /// `hostile SEED [rate=N] [at=WHERE]... [only=LIE]...`, `hostile list`, `hostile stop`; `mark NAME`,
    /// `commands`, `ledger`, `counters`, `rules`; `pause`, `resume`, `save FILE`; in front of them `device=N` if the machine
    /// has several. Exit code: 1 if it can't be done.
    Ctl {
        /// The machine's --control.
        #[arg(value_name = "SOCKET")]
        socket: PathBuf,
        /// What is wanted.
        #[arg(required = true, value_name = "WORDS", trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// Tell what a trace file holds, in words or as a page with the interrupt vectors over time.
    Trace(TraceArgs),
    /// Write the initramfs that `boot` with these options would make, for use with another VMM.
    Initramfs {
        /// The file to write.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// The boot's options.
        #[command(flatten)]
        boot: Box<BootArgs>,
    },
    /// Run a program in the emulated machine of nested runs, where KVM works.
    ///
    /// It finds there what it is given with --take and nothing else, so it is linked statically or brings its
    /// libraries. Exit code: that of the program.
    Level1(Level1Args),
    /// Show what this machine can do, what is missing and how to get it.
    Check {
        /// Start the emulated machine of nested runs too, and see whether its KVM runs guests.
        #[arg(long)]
        deep: bool,
    },
}

/// `--accel`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AccelArg {
    /// This machine's KVM if it can run a guest, else nested.
    Auto,
    /// This machine's KVM or nothing.
    Kvm,
    /// The same VM inside QEMU TCG with nested SVM.
    Nested,
}

/// `mana-vmm level1`.
#[derive(Args, Debug)]
pub struct Level1Args {
    /// A file or folder to take along; it has the same path there.
    #[arg(long, value_name = "PATH")]
    pub take: Vec<PathBuf>,
    /// Memory for the program: 512M, 2G; a bare number is MiB.
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    memory: String,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub argv: Vec<String>,
}

impl Level1Args {
    /// `--memory` in bytes.
    ///
    /// # Errors
    /// [`OptionError`] if it is no size.
    pub fn memory(&self) -> Result<u64, OptionError> {
        options::size("--memory", &self.memory)
    }
}

/// `mana-vmm peer`.
#[derive(Args, Debug)]
pub struct PeerArgs {
    /// Listen here, for `-netdev stream,addr.type=unix,addr.path=SOCKET`.
    #[arg(long, value_name = "SOCKET")]
    socket: PathBuf,
    /// Bytes of the longest IP packet.
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(1280..))]
    mtu: u16,
    /// End with exit code 3 after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// As boot's.
    #[arg(long, value_enum, default_value = "on", hide_possible_values = true, value_name = "on|log|off")]
    seccomp: seccomp::Mode,
}

impl PeerArgs {
    /// What the arguments ask for.
    pub fn into_config(self) -> PeerConfig {
        let timeout = self.timeout.map(Duration::from_secs);
        PeerConfig { socket: self.socket, mtu: self.mtu, timeout, seccomp: self.seccomp }
    }
}

/// `mana-vmm boot`.
#[derive(Args, Debug)]
pub struct BootArgs {
    /// Guest made by resources/fetch-guests: 6.1, 6.12, newest, ...
    #[arg(
        long,
        value_name = "SERIES",
        conflicts_with = "kernel",
        required_unless_present_any = ["kernel", "restore"]
    )]
    guest: Option<String>,
    /// bzImage or vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initramfs; without one it is made from --modules and the guest agent.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["driver", "exec"])]
    initrd: Option<PathBuf>,
    /// The kernel's lib/modules/VERSION.
    #[arg(long, value_name = "DIR", conflicts_with = "guest")]
    modules: Option<PathBuf>,
    /// Folder with the mana.ko (and mana_ib.ko) to use instead of the kernel's own.
    #[arg(long, value_name = "DIR")]
    driver: Option<PathBuf>,
    /// Added to the kernel command line.
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    append: String,
    /// Shell command for the guest, run once the driver is loaded; then the guest powers off.
    #[arg(long, value_name = "CMD", allow_hyphen_values = true)]
    exec: Option<String>,
    /// N, or cpus=,threads=,cores=,sockets=,nodes= (sockets counts those of one node).
    ///
    /// [default: 1]
    #[arg(long, value_name = "N|LIST")]
    cpus: Option<String>,
    /// Guest RAM: 512M, 2G; a bare number is MiB.
    ///
    /// [default: 1G]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// Where guest code runs.
    #[arg(long, value_enum, default_value = "auto")]
    accel: AccelArg,
    /// Cable: peer,id=ID | tap,id=ID,ifname=NAME | stream,id=ID,path=SOCKET[,server=on|off] (QEMU's framing; passt) |
    /// loopback,id=ID,peer=ID (the other end) | switch,id=ID[,name=NAME|,path=SOCKET] | null,id=ID.
    #[arg(long, value_name = "KIND,id=ID")]
    netdev: Vec<String>,
    #[allow(rustdoc::broken_intra_doc_links, reason = "the brackets of the help are no links")]
    /// Network device: mana[,netdev=ID]...[,mac=][,mtu=][,max-msix=][,msix-table=][,max-queues=][,max-eq=][,node=]
    /// [,slot=root|port][,workers=][,rdma=on|off][,strict=on|off][,profile=NAME|FILE]
    /// [,hostile=SEED[,rate=N][,at=completions|events|messages|registers]...]; one vPort for each netdev, a peer if there is none.
    /// Or virtio-net[,netdev=ID][,mac=][,mtu=][,workers=].
    #[arg(long, value_name = "mana|virtio-net[,KEY=VALUE]...")]
    device: Vec<String>,
    /// File or block device as a virtio-blk disk: FILE[,readonly=on|off].
    #[arg(long, value_name = "FILE")]
    disk: Vec<String>,
    /// Write the device's events to this file (JSON lines; `mana-vmm trace` reads it).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Guest console to this file instead of the terminal.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// Everything that passes the netdev ID to this file.
    #[arg(long, value_name = "ID=FILE")]
    pcap: Vec<String>,
    /// Take requests to the simulated host here (`mana-vmm ctl`).
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// What becomes of a thread of this process that makes a system call for which it has no use: on ends the process,
    /// log lets it pass and the kernel's log has it, off does without filters.
    #[arg(long, value_enum, default_value = "on", hide_possible_values = true, value_name = "on|log|off")]
    seccomp: seccomp::Mode,
    /// Go on with the machine that `ctl SOCKET save FILE` has saved, with the options it was booted with: of those, only
    /// netdevs may be others. The file is only read, and must stay as it is until the end.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["guest", "kernel", "initrd", "modules", "driver", "append", "boot_timeout"]
    )]
    restore: Option<PathBuf>,
    /// Run the machine once for each seed, under a host that lies (device=mana,hostile=SEED):
    /// `FIRST[-LAST][,rate=N][,at=completions|events|messages|registers]...[,for=MS][,only=LIE]...`. With --restore it
    /// goes on from where it was saved, for MS 2000; without, it boots each time, and the driver is lied to from its probe
    /// on, for MS 60000 or until --exec ends. Exit code 2 if the guest crashed with any, and what it had been told is said.
    #[arg(long, value_name = "SEEDS[,KEY=VALUE]...")]
    lies: Option<String>,
    /// Of the lies that crashed the guest, find the shortest list that still does.
    #[arg(long, requires = "lies")]
    minimise: bool,
    /// End with exit code 3 after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    /// End with exit code 3 if the guest's agent does not run after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    boot_timeout: Option<u64>,
}

impl BootArgs {
    /// The virtual machine that the arguments ask for.
    ///
    /// # Errors
    /// [`OptionError`] for the first value that makes no sense, and for a file that is not there.
    pub fn into_config(self) -> Result<VmConfig, OptionError> {
        if let Some(file) = self.restore.clone() {
            return self.restored(file);
        }
        let topology = options::cpus(self.cpus.as_deref().unwrap_or("1"))?;
        let memory = options::memory(self.memory.as_deref().unwrap_or("1G"), &topology)?;
        let mut netdevs = options::netdevs(&self.netdev)?;
        let (nics, virtio_nics) = options::devices(&self.device, &mut netdevs, &topology)?;
        options::pcaps(&self.pcap, &mut netdevs)?;
        let disks = options::disks(&self.disk)?;
        disks.iter().try_for_each(|disk| guest::must_exist("--disk", Some(&disk.path)))?;
        let guest = guest::find(self.guest.as_deref(), self.kernel, self.modules)?;
        for (option, path) in [("--initrd", &self.initrd), ("--driver", &self.driver)] {
            guest::must_exist(option, path.as_deref())?;
        }
        Ok(VmConfig {
            kernel: guest.kernel,
            initrd: self.initrd,
            modules: guest.modules,
            driver: self.driver,
            append: self.append,
            exec: self.exec,
            topology,
            memory,
            accel: self.accel.into(),
            netdevs,
            nics,
            virtio_nics,
            disks,
            trace: self.trace,
            console: self.console,
            timeout: self.timeout.map(Duration::from_secs),
            boot_timeout: self.boot_timeout.map(Duration::from_secs),
            control: self.control,
            restore: None,
            lies: self.lies.as_deref().map(|text| options::lies(text, self.minimise)).transpose()?,
            seccomp: self.seccomp,
        })
    }
}

impl From<AccelArg> for Accel {
    fn from(argument: AccelArg) -> Self {
        match argument {
            AccelArg::Auto => Self::Auto,
            AccelArg::Kvm => Self::Kvm,
            AccelArg::Nested => Self::Nested,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::{NetdevKind, Slot};

    fn config(arguments: &[&str]) -> Result<VmConfig, String> {
        let kernel = ["mana-vmm", "boot", "--kernel", "/proc/self/exe"];
        let cli = Cli::try_parse_from(kernel.iter().chain(arguments)).map_err(|error| error.to_string())?;
        let Command::Boot(boot) = cli.command else { panic!("boot was asked for") };
        boot.into_config().map_err(|error| error.to_string())
    }

    #[test]
    fn clap_agrees_with_itself() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bare_device_gets_a_peer() {
        let config = config(&["--device", "mana"]).unwrap();
        assert_eq!(config.netdevs.len(), 1);
        assert_eq!(config.netdevs[0].kind, NetdevKind::Peer);
        assert_eq!(config.nics[0].netdevs, [config.netdevs[0].id.clone()]);
        assert_eq!(config.nics[0].slot, Slot::Port);
        assert_eq!(config.topology.cpus, 1);
        assert_eq!(config.memory, 1 << 30);
    }

    #[test]
    fn a_whole_machine() {
        let config = config(&[
            "--cpus=cpus=8,threads=2,cores=2,sockets=1,nodes=2",
            "--memory=2G",
            "--netdev=null,id=n0",
            "--netdev=tap,id=n1,ifname=tap0",
            "--device=mana,netdev=n0,netdev=n1,mac=52:54:00:00:00:ff,max-msix=5,msix-table=33,node=1,slot=root",
            "--pcap=n0=/tmp/a.pcap",
            "--timeout=60",
        ])
        .unwrap();
        assert_eq!((config.topology.sockets, config.topology.nodes), (2, 2));
        let nic = &config.nics[0];
        assert_eq!(nic.device.vports[0].mac, [0x52, 0x54, 0, 0, 0, 0xff]);
        assert_eq!(nic.device.vports[1].mac, [0x52, 0x54, 0, 0, 1, 0]);
        assert_eq!((nic.device.max_msix, nic.device.msix_table_size), (5, 33));
        assert_eq!((nic.node, nic.slot), (Some(1), Slot::Root));
        assert!(config.netdevs[0].pcap.is_some() && config.netdevs[1].pcap.is_none());
        assert_eq!(config.timeout, Some(Duration::from_secs(60)));
    }

    #[test]
    fn netdevs_of_all_kinds() {
        let config = config(&[
            "--netdev=stream,id=a,path=/tmp/s,server=on",
            "--netdev=stream,id=b,addr.type=unix,addr.path=/tmp/t",
            "--netdev=loopback,id=c,peer=d",
            "--netdev=loopback,id=d,peer=c",
            "--netdev=loopback,id=e,peer=f",
            "--netdev=switch,id=g",
            "--netdev=switch,id=h,name=s",
        ]);
        let netdevs = config.unwrap().netdevs;
        let kind = |id: &str| netdevs.iter().find(|netdev| netdev.id == id).unwrap().kind.clone();
        assert_eq!(kind("a"), NetdevKind::Stream { path: "/tmp/s".into(), server: true });
        assert_eq!(kind("b"), NetdevKind::Stream { path: "/tmp/t".into(), server: false });
        assert_eq!(kind("d"), NetdevKind::Loopback { peer: "c".into() });
        assert_eq!(kind("f"), NetdevKind::Loopback { peer: "e".into() });
        assert_eq!(kind("g"), NetdevKind::Switch { name: String::new(), path: None });
        assert_eq!(kind("h"), NetdevKind::Switch { name: "s".into(), path: None });
        assert_eq!(netdevs.len(), 8);
    }

    #[test]
    fn errors_name_the_option() {
        for (arguments, option) in [
            (vec!["--cpus=0"], "--cpus"),
            (vec!["--cpus=cpus=8,threads=3"], "--cpus"),
            (vec!["--memory=3"], "--memory"),
            (vec!["--memory=1Q"], "--memory"),
            (vec!["--netdev=peer"], "--netdev"),
            (vec!["--netdev=bridge,id=a"], "--netdev"),
            (vec!["--netdev=tap,id=a"], "--netdev"),
            (vec!["--netdev=peer,id=a", "--netdev=null,id=a"], "--netdev"),
            (vec!["--netdev=stream,id=a"], "path=SOCKET"),
            (vec!["--netdev=stream,id=a,addr.type=inet,addr.path=x"], "addr.type must be unix"),
            (vec!["--netdev=stream,id=a,path=x,addr.path=x"], "one of them"),
            (vec!["--netdev=stream,id=a,path=x,server=yes"], "server must be on or off"),
            (vec!["--netdev=loopback,id=a"], "peer=ID"),
            (vec!["--netdev=loopback,id=a,peer=a"], "a peer of its own"),
            (vec!["--netdev=loopback,id=a,peer=b", "--netdev=null,id=b"], "a peer of its own"),
            (vec!["--netdev=loopback,id=a,peer=b", "--netdev=loopback,id=c,peer=b"], "a peer of its own"),
            (vec!["--netdev=switch,id=a,name=s,path=/tmp/s"], "path= names the switch"),
            (vec!["--netdev=switch,id=a,ports=3"], "there is no `ports`"),
            (vec!["--device=e1000"], "neither mana nor virtio-net"),
            (vec!["--device=virtio-net,netdev=n9"], "no --netdev with id=n9"),
            (vec!["--device=virtio-net,max-msix=3"], "there is no `max-msix`"),
            (
                vec!["--netdev=peer,id=a", "--device=virtio-net,netdev=a", "--device=mana,netdev=a"],
                "one port only",
            ),
            (vec!["--disk=/nowhere"], "--disk: /nowhere"),
            (vec!["--disk=/dev/null,cache=none"], "there is no `cache`"),
            (vec!["--device=mana,netdev=n9"], "--device"),
            (vec!["--netdev=peer,id=a", "--device=mana,netdev=a", "--device=mana,netdev=a"], "--device"),
            (vec!["--device=mana,mac=01:00:00:00:00:00"], "--device"),
            (vec!["--device=mana,mtu=60"], "--device"),
            (vec!["--device=mana,hostile=x"], "hostile must be a number"),
            (vec!["--device=mana,hostile=1,rate=0"], "rate must be a number from 1"),
            (vec!["--device=mana,hostile=1,at=home"], "at must be completions, events"),
            (vec!["--device=mana,rate=7"], "hostile is missing"),
            (vec!["--device=mana,profile=none"], "there is no profile `none`, but default, azure-old"),
            (vec!["--device=mana,profile=/nowhere"], "profile: /nowhere"),
            (vec!["--device=mana,profile=/proc/self/status"], "profile: /proc/self/status: line 1: "),
            (vec!["--device=mana,max-msix=0"], "--device"),
            (vec!["--device=mana,msix-table=2049"], "--device"),
            (vec!["--device=mana,max-queues=65"], "--device"),
            (vec!["--device=mana,node=1"], "--device"),
            (vec!["--device=mana,slot=left"], "--device"),
            (vec!["--device=mana,workers=0"], "workers must be a number from 1 to 64"),
            (vec!["--pcap=n0=/tmp/x"], "--pcap"),
            (vec!["--initrd=/nowhere"], "--initrd"),
            (vec!["--modules=/nowhere"], "--modules"),
            (vec!["--timeout=0"], "--timeout"),
            (vec!["--guest=6.1"], "--guest"),
        ] {
            let error = config(&arguments).expect_err(&format!("{arguments:?} is wrong"));
            assert!(error.contains(option), "{arguments:?}: {error}");
        }
    }
}
