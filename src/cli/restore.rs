//! `--restore FILE`: the options that the machine in the file was booted with, and what may be said anew.

use std::path::PathBuf;
use std::time::Duration;

use super::{BootArgs, guest, options};
use crate::config::VmConfig;
use crate::keyval::OptionError;
use crate::snapshot::{Options, Snapshot};

impl BootArgs {
    /// The virtual machine in `file`, with what else the arguments say.
    ///
    /// # Errors
    /// [`OptionError`] if the file holds none, or an argument contradicts it.
    pub(super) fn restored(self, file: PathBuf) -> Result<VmConfig, OptionError> {
        let refuse =
            |error: anyhow::Error| OptionError::new("--restore", format!("{}: {error:#}", file.display()));
        let opened = std::fs::File::open(&file).map_err(|error| refuse(error.into()))?;
        let saved = Snapshot::read(opened).map_err(refuse)?.state.options;
        let lies = self.lies.as_deref().map(|text| options::lies(text, self.minimise)).transpose()?;
        let config = self.merge(saved)?;
        Ok(VmConfig { restore: Some(file), lies, ..config })
    }

    fn merge(self, saved: Options) -> Result<VmConfig, OptionError> {
        let other = |option, what: String| {
            Err(OptionError::new(option, format!("the machine of --restore was booted with {what}")))
        };
        let topology = self.cpus.as_deref().map(options::cpus).transpose()?;
        if topology.is_some_and(|topology| topology != saved.topology) {
            return other("--cpus", format!("{} CPUs, in {:?}", saved.topology.cpus, saved.topology));
        }
        let memory = self.memory.as_deref().map(|text| options::memory(text, &saved.topology)).transpose()?;
        if memory.is_some_and(|memory| memory != saved.memory) {
            return other("--memory", format!("{} MiB", saved.memory >> 20));
        }
        if self.exec.is_some() && self.exec != saved.exec {
            return other("--exec", saved.exec.map_or("none".into(), |command| format!("`{command}`")));
        }
        let disks = options::disks(&self.disk)?;
        if disks.iter().map(|disk| disk.read_only).ne(saved.disks.iter().copied()) {
            let kind = |&read_only: &bool| if read_only { "FILE,readonly=on" } else { "FILE" };
            let kinds: Vec<_> = saved.disks.iter().map(kind).collect();
            return other("--disk", if kinds.is_empty() { "none".into() } else { kinds.join(" and ") });
        }
        disks.iter().try_for_each(|disk| guest::must_exist("--disk", Some(&disk.path)))?;
        if self.lies.is_some() && disks.iter().any(|disk| !disk.read_only) {
            let reason =
                "a machine that goes on again and again must find its disks as they were: readonly=on";
            return Err(OptionError::new("--disk", reason));
        }
        if self.netdev.is_empty()
            && let Some(netdev) = saved.foreign_netdev()
        {
            let reason = format!("a restored machine needs its netdev `{}` again", netdev.id);
            return Err(OptionError::new("--netdev", reason));
        }
        let mut netdevs =
            if self.netdev.is_empty() { saved.netdevs.clone() } else { options::netdevs(&self.netdev)? };
        if !self.device.is_empty() {
            let (nics, virtio) = options::devices(&self.device, &mut netdevs, &saved.topology)?;
            if nics != saved.nics || virtio != saved.virtio_nics {
                return other("--device", "other devices".into());
            }
        }
        let ids =
            |netdevs: &[crate::config::Netdev]| netdevs.iter().map(|it| it.id.clone()).collect::<Vec<_>>();
        if ids(&netdevs) != ids(&saved.netdevs) {
            return other("--netdev", format!("those with id={}", ids(&saved.netdevs).join(", ")));
        }
        options::pcaps(&self.pcap, &mut netdevs)?;
        let Options { topology, memory, exec, nics, virtio_nics, netdevs: _, disks: _ } = saved;
        Ok(VmConfig {
            kernel: PathBuf::new(),
            initrd: None,
            modules: None,
            driver: None,
            append: String::new(),
            exec,
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
            // It runs already.
            boot_timeout: None,
            control: self.control,
            restore: None,
            lies: None,
            seccomp: self.seccomp,
        })
    }
}
