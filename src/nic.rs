//! One `--device mana` with everything around it: cables, worker threads, interrupts, and who watches it.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use mana_device::doors::{Clock, Memory, MsiSink, Port};
use mana_device::observe::{Event, Observer};
use mana_device::{Host, ManaDevice};

use crate::config::{ManaNic, Netdev};
use crate::net::{Cable, Exchange};
use crate::stop::{Outcome, Stop};
use crate::trace::TraceFile;
use crate::workers::{Mailboxes, Workers};

/// Worker threads beyond this many bring a function nothing: the guest's side is busier than ours.
const MAX_WORKERS: usize = 4;

/// What all functions of a machine share.
pub struct Surroundings<'a> {
    /// Every `--netdev`.
    pub netdevs: &'a [Netdev],
    /// Where cables come from.
    pub cables: &'a Exchange,
    /// Functions that there will be; the trace numbers them if they are several.
    pub functions: usize,
    /// The guest's CPUs, if we know.
    pub cpus: Option<u32>,
    /// Time for devices, cables and the trace.
    pub clock: &'a Arc<dyn Clock>,
    /// `--trace`.
    pub trace: Option<&'a TraceFile>,
    /// Told when a driver breaks a rule under `strict=on`.
    pub stop: &'a Arc<Stop>,
}

/// A running function.
pub struct Nic {
    device: Arc<ManaDevice>,
    workers: Workers,
    clock: Arc<dyn Clock>,
    observer: Option<Arc<dyn Observer>>,
}

impl Nic {
    /// Plug in `nic`, the `index`-th of the machine, whose DMA goes to `memory` and whose interrupts go to `msi`.
    ///
    /// # Errors
    /// A cable can't be opened, or an option of the device makes no sense.
    pub fn start(
        nic: &ManaNic,
        index: usize,
        around: &Surroundings<'_>,
        memory: Memory,
        msi: Arc<dyn MsiSink>,
    ) -> anyhow::Result<Self> {
        let cables = open_cables(nic, around)?;
        let mailboxes = Mailboxes::new(worker_count(nic, around.cpus))?;
        let observer = observer(nic, index, around);
        let host = Host {
            memory,
            msi,
            clock: around.clock.clone(),
            waker: mailboxes.clone(),
            ports: cables.iter().map(|cable| cable.clone() as Arc<dyn Port>).collect(),
            observer: observer.clone(),
        };
        let device =
            ManaDevice::new(nic.device.clone(), host).map_err(|error| anyhow!("--device: {error}"))?;
        let device = Arc::new(device);
        let workers = mailboxes.start(&device, cables, around.clock)?;
        Ok(Self { device, workers, clock: around.clock.clone(), observer })
    }

    /// The PCI function.
    pub fn device(&self) -> &Arc<ManaDevice> {
        &self.device
    }

    /// The workers do nothing until [`resume`](Self::resume).
    pub fn pause(&self) {
        self.workers.pause();
    }

    /// They go on.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Brings what is alive now into the trace, whenever it is called, and `detail` of what the host does about it.
    pub fn ledger_report(&self, detail: Option<&'static str>) -> impl Fn() + Send + 'static {
        let (device, clock, observer) = (self.device.clone(), self.clock.clone(), self.observer.clone());
        move || {
            let Some(observer) = &observer else { return };
            observer.event(clock.now_ns(), &Event::Ledger { live: device.ledger() });
            if let Some(detail) = detail {
                observer.event(clock.now_ns(), &Event::HostEvent { detail: detail.to_owned() });
            }
        }
    }

    /// Stop the workers, and let the trace end with what the driver has left behind.
    ///
    /// # Errors
    /// A worker had failed.
    pub fn finish(self) -> anyhow::Result<()> {
        let report = self.ledger_report(None);
        self.workers.stop()?;
        report();
        log::info!("mana: {:?}", self.device.counters());
        Ok(())
    }
}

/// The cables of `nic`, one a vPort.
fn open_cables(nic: &ManaNic, around: &Surroundings<'_>) -> anyhow::Result<Vec<Arc<dyn Cable>>> {
    let open = |id: &String| {
        let netdevs = around.netdevs;
        let index = netdevs.iter().position(|netdev| netdev.id == *id);
        let index = index.with_context(|| format!("--device: there is no --netdev with id={id}"))?;
        around.cables.open(&netdevs[index], index, nic.device.mtu)
    };
    nic.netdevs.iter().map(open).collect()
}

/// As many as were asked for, or can run at once and have queues to run.
fn worker_count(nic: &ManaNic, cpus: Option<u32>) -> usize {
    if let Some(workers) = nic.workers {
        return workers.into();
    }
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = nic.device.vports.iter().map(|vport| usize::from(vport.max_queues)).sum();
    MAX_WORKERS.min(host).min(cpus.map_or(usize::MAX, |cpus| cpus as usize)).min(queues)
}

/// The trace, and the rules where they end the run.
fn observer(nic: &ManaNic, index: usize, around: &Surroundings<'_>) -> Option<Arc<dyn Observer>> {
    let number = (around.functions > 1).then_some(index);
    let trace = around.trace.map(|trace| trace.observer(number));
    if nic.strict {
        return Some(Arc::new(RuleWatch { stop: around.stop.clone(), next: trace }));
    }
    trace
}

/// `strict=on`.
struct RuleWatch {
    stop: Arc<Stop>,
    next: Option<Arc<dyn Observer>>,
}

impl Observer for RuleWatch {
    fn event(&self, t_ns: u64, event: &Event) {
        if let Some(next) = &self.next {
            next.event(t_ns, event);
        }
        if let Event::RuleViolation { rule, detail } = event {
            self.stop.request(Outcome::RuleBroken(format!("the driver broke rule {rule}: {detail}")));
        }
    }
}
