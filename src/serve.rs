//! `mana-vmm serve`: functions for other VMMs, from start to end.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use mana_device::doors::{Clock, Memory};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::clock::MonotonicClock;
use crate::config::ServeConfig;
use crate::control::{Control, ControlSocket};
use crate::events;
use crate::net::Exchange;
use crate::nic::{Nic, Surroundings};
use crate::seccomp::{self, Role};
use crate::stop::{Outcome, Stop};
use crate::trace::TraceFile;
use crate::vfio_user::irqs::EventDescriptors;
use crate::vfio_user::server::Server;
use crate::vfio_user::session::Function;

/// Traced between the ledger of what a client has left and the teardown; guest-tests look for it.
const CLIENT_LEFT: &str = "the client has left";

/// Serve until something ends it, and say how.
///
/// # Errors
/// Anything of the host's that fails.
pub fn run(config: &ServeConfig) -> anyhow::Result<ExitCode> {
    seccomp::set_mode(config.seccomp);
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::new());
    let stop = Stop::new()?;
    let mut events = events::until_stopped(&stop, config.timeout)?;
    let cables = Exchange::new(clock.clone());
    let trace = config.trace.as_deref().map(TraceFile::create).transpose()?;
    let around = Surroundings {
        netdevs: &config.netdevs,
        cables: &cables,
        functions: config.nics.len(),
        cpus: None,
        clock: &clock,
        trace: trace.as_ref(),
        stop: &stop,
    };
    let (mut nics, mut servers) = (Vec::new(), Vec::new());
    let awaited = Arc::new(AtomicUsize::new(config.nics.len()));
    for (index, (nic, socket)) in config.nics.iter().zip(&config.sockets).enumerate() {
        let memory: Memory = GuestMemoryAtomic::new(GuestMemoryMmap::default());
        let descriptors = Arc::new(EventDescriptors::new(nic.device.msix_table_size));
        let running = Nic::start(nic, index, &around, memory.clone(), descriptors.clone())?;
        let device = running.device().clone();
        let function = Function { device, config: nic.device.clone(), memory, events: descriptors };
        let on_left = on_left(config.once, &awaited, &stop);
        let before_end = Box::new(running.ledger_report(Some(CLIENT_LEFT)));
        servers.push(Server::start(socket, function, before_end, on_left)?);
        nics.push(running);
    }
    let control = Arc::new(Control::default());
    control.set_devices(nics.iter().map(|nic| nic.device().clone()).collect());
    let _socket = config.control.as_deref().map(|path| ControlSocket::open(path, &control)).transpose()?;
    seccomp::enter(Role::Main)?;
    for socket in &config.sockets {
        eprintln!("mana-vmm: serves {}", socket.display());
    }
    let outcome = loop {
        events.run().context("event loop")?;
        if let Some(outcome) = stop.outcome() {
            break outcome;
        }
    };
    // Clients first, so that the ledgers at the end are those of functions at rest.
    drop(servers);
    nics.into_iter().try_for_each(Nic::finish)?;
    Ok(report(outcome))
}

/// Under `--once` the run ends when every function's first client has left.
fn on_left(once: bool, awaited: &Arc<AtomicUsize>, stop: &Arc<Stop>) -> Box<dyn Fn() + Send> {
    let (awaited, stop) = (awaited.clone(), stop.clone());
    let first = std::sync::Once::new();
    Box::new(move || {
        if once {
            first.call_once(|| {
                if awaited.fetch_sub(1, Ordering::SeqCst) == 1 {
                    stop.request(Outcome::PowerOff);
                }
            });
        }
    })
}

/// The exit code, with a sentence on standard error where it is not 0. A signal is how a server is meant to end.
fn report(outcome: &Outcome) -> ExitCode {
    match outcome {
        Outcome::TimedOut => eprintln!("mana-vmm: --timeout is over"),
        Outcome::RuleBroken(rule) => eprintln!("mana-vmm: strict=on: {rule}"),
        Outcome::HostError(reason) => {
            log::info!("{reason}");
            return ExitCode::SUCCESS;
        }
        Outcome::PowerOff | Outcome::Reset | Outcome::GuestPanic(_) => {}
    }
    outcome.exit_code()
}
