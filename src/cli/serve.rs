//! `mana-vmm serve`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::options;
use crate::config::{ServeConfig, Topology};
use crate::keyval::OptionError;
use crate::seccomp;

/// `mana-vmm serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Where clients connect; the n-th socket is the n-th device's.
    #[arg(long, value_name = "PATH", required = true)]
    socket: Vec<PathBuf>,
    /// Cable: peer,id=ID | tap,id=ID,ifname=NAME | null,id=ID.
    #[arg(long, value_name = "KIND,id=ID")]
    netdev: Vec<String>,
    #[allow(rustdoc::broken_intra_doc_links, reason = "the brackets of the help are no links")]
    /// Network device: mana[,netdev=ID]...[,mac=][,mtu=][,max-msix=][,msix-table=][,max-queues=][,max-eq=][,rdma=on|off]
    /// [,strict=on|off]; one vPort for each netdev, a peer if there is none.
    #[arg(long, value_name = "mana[,KEY=VALUE]...", default_value = "mana")]
    device: Vec<String>,
    /// Write the devices' events to this file (JSON lines; `mana-vmm trace` reads it).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Everything that passes the netdev ID to this file.
    #[arg(long, value_name = "ID=FILE")]
    pcap: Vec<String>,
    /// End when every device's first client has left.
    #[arg(long)]
    once: bool,
    /// Take requests to the simulated host here (`mana-vmm ctl`).
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// What becomes of a thread of this process that makes a system call for which it has no use: on ends the process,
    /// log lets it pass and the kernel's log has it, off does without filters.
    #[arg(long, value_enum, default_value = "on", hide_possible_values = true, value_name = "on|log|off")]
    seccomp: seccomp::Mode,
    /// End with exit code 3 after so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
}

impl ServeArgs {
    /// The functions that the arguments ask for.
    ///
    /// # Errors
    /// [`OptionError`] for the first value that makes no sense.
    pub fn into_config(self) -> Result<ServeConfig, OptionError> {
        let places = |text: &&String| {
            text.split(',').any(|item| item.starts_with("node=") || item.starts_with("slot="))
        };
        if let Some(text) = self.device.iter().find(places) {
            let reason = format!("`{text}`: node and slot are up to the VMM that plugs the device in");
            return Err(OptionError::new("--device", reason));
        }
        if self.socket.len() != self.device.len() {
            let reason = format!("{} for {} devices; each needs one", self.socket.len(), self.device.len());
            return Err(OptionError::new("--socket", reason));
        }
        let topology = Topology { cpus: 1, threads: 1, cores: 1, sockets: 1, nodes: 1 };
        let mut netdevs = options::netdevs(&self.netdev)?;
        let (nics, virtio) = options::devices(&self.device, &mut netdevs, &topology)?;
        if !virtio.is_empty() {
            let reason = "virtio-net is not served: QEMU and others have their own".to_owned();
            return Err(OptionError::new("--device", reason));
        }
        options::pcaps(&self.pcap, &mut netdevs)?;
        Ok(ServeConfig {
            sockets: self.socket,
            netdevs,
            nics,
            trace: self.trace,
            once: self.once,
            timeout: self.timeout.map(Duration::from_secs),
            control: self.control,
            seccomp: self.seccomp,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    fn config(arguments: &[&str]) -> Result<ServeConfig, String> {
        let cli = Cli::try_parse_from(["mana-vmm", "serve"].iter().chain(arguments));
        let Command::Serve(serve) = cli.map_err(|error| error.to_string())?.command else {
            panic!("serve was asked for")
        };
        serve.into_config().map_err(|error| error.to_string())
    }

    #[test]
    fn a_socket_alone_serves_a_device_with_a_peer() {
        let config = config(&["--socket=/tmp/s"]).unwrap();
        assert_eq!((config.sockets.len(), config.nics.len(), config.netdevs.len()), (1, 1, 1));
    }

    #[test]
    fn errors_name_the_option() {
        for (arguments, says) in [
            (vec![], "--socket"),
            (vec!["--socket=/a", "--socket=/b"], "--socket: 2 for 1 devices"),
            (vec!["--socket=/a", "--device=mana,node=0"], "--device"),
            (vec!["--socket=/a", "--device=mana,slot=root"], "--device"),
            (vec!["--socket=/a", "--device=mana,max-msix=0"], "max-msix"),
            (vec!["--socket=/a", "--netdev=tap"], "--netdev"),
            (vec!["--socket=/a", "--pcap=n0=/x"], "--pcap"),
            (vec!["--socket=/a", "--timeout=0"], "--timeout"),
        ] {
            let error = config(&arguments).expect_err(&format!("{arguments:?} is wrong"));
            assert!(error.contains(says), "{arguments:?}: {error}");
        }
    }
}
