//! Faults at events, completions, interrupts, registers and the shared-memory channel, and events that the simulated
//! host raises.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mana_device::observe::{Event, Fields};
use mana_test_driver::message::Request;
use mana_test_driver::{DeviceId, Driver, Errno, Transmit, V6_12, V7_3, World};

/// Words for the host.
fn host(world: &World, words: &str) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    format!("{:?}", world.device.control(&words).unwrap())
}

fn query() -> Request {
    Request::new(2, DeviceId::NONE, 40, 72)
}

/// What the driver panics with: what would make Linux WARN.
fn warning(work: impl FnOnce()) -> String {
    let why = catch_unwind(AssertUnwindSafe(work)).expect_err("the driver should notice");
    why.downcast_ref::<String>().cloned().or(why.downcast_ref::<&str>().map(|&why| why.to_owned())).unwrap()
}

fn kinds(driver: &Driver<'_>) -> Vec<(u8, u32)> {
    driver.other_events.iter().map(|event| (event.kind, event.details[0])).collect()
}

#[test]
fn a_lost_interrupt_is_a_command_that_times_out() {
    let world = World::default();
    let mut driver = Driver::probe_hwc(&world, &V6_12).unwrap();
    host(&world, "fault add command=msix queue=0 do=drop");
    assert_eq!(driver.exchange(&query()).unwrap_err().errno, Errno::Etimedout);
    assert_eq!(world.counter("faults"), 1);
}

#[test]
fn interrupts_come_late_and_twice() {
    let world = World::default();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    let before = world.interrupts.count();
    host(&world, "fault add command=msix queue=1 do=duplicate");
    driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
    driver.service();
    assert_eq!(world.interrupts.count(), before + 2);
    host(&world, "fault add command=msix queue=1 do=delay:7");
    driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
    let due = driver.service().expect("an interrupt is to come");
    assert_eq!((world.interrupts.count(), due), (before + 2, world.now() + 7_000_000));
    assert_eq!(driver.in_flight(0, 0), 1);
    world.clock.advance(7_000_000);
    driver.service();
    assert_eq!(driver.in_flight(0, 0), 0);
}

#[test]
fn a_lost_test_event_fails_the_probe_of_its_queue() {
    let world = World::default();
    host(&world, "fault add command=eqe type=64 nth=2 do=drop");
    let error = Driver::probe(&world, &V6_12).err().expect("the second test event is lost");
    assert_eq!(error.errno, Errno::Etimedout);
    assert!(error.what.contains("test event on EQ 1"), "{}", error.what);
    Driver::probe(&world, &V6_12).unwrap().remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn events_change_and_come_twice() {
    let world = World::default();
    let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
    host(&world, "fault add command=eqe queue=0 type=3 do=edit:type=0x99");
    driver.post_request(&query(), 40);
    driver.service();
    assert!(driver.take_answer().is_none());
    assert_eq!(kinds(&driver), [(0x99, 0)]);
    // The same event once more: the first finds the completions, the second none.
    let world = World::default();
    let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
    host(&world, "fault add command=eqe type=3 do=duplicate");
    let why = warning(|| drop(driver.exchange(&query())));
    assert!(why.contains("a completion event for the channel's CQ without a completion"), "{why}");
}

#[test]
fn a_wrong_owner_is_an_overflow_to_the_driver() {
    for words in ["command=eqe queue=0 do=edit:owner=2", "command=cqe queue=0 do=edit:owner=2"] {
        let world = World::default();
        let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
        host(&world, &format!("fault add {words}"));
        let why = warning(|| drop(driver.exchange(&query())));
        assert!(why.to_lowercase().contains("overflow"), "{words}: {why}");
    }
}

#[test]
fn completions_get_lost_change_and_wait() {
    let world = World::default();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    let cq = driver.netdevs[0].tx[0].cq;
    let send = |driver: &mut Driver<'_>| {
        driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
        driver.service();
        driver.netdevs[0].tx[0].completions.clone()
    };
    // CQE_TX_MTU_DROP instead of CQE_TX_OKAY.
    host(&world, &format!("fault add command=cqe queue={cq} do=edit:type=33"));
    assert_eq!(send(&mut driver), [33]);
    assert_eq!(send(&mut driver), [33, 32]);
    // What was held keeps its place behind those that came meanwhile.
    host(&world, &format!("fault add command=cqe queue={cq} do=hold"));
    assert_eq!(send(&mut driver).len(), 2);
    assert_eq!(driver.in_flight(0, 0), 1);
    host(&world, "fault clear");
    driver.service();
    assert_eq!(driver.in_flight(0, 0), 0);
    // Lost for good: the driver waits for ever, as for a queue that has died.
    host(&world, &format!("fault add command=cqe queue={cq} count=all do=drop"));
    assert_eq!(send(&mut driver).len(), 3);
    assert_eq!(driver.in_flight(0, 0), 1);
    host(&world, "fault clear");
    assert_eq!(world.cables[0].take().len(), 4, "all frames were sent");
}

#[test]
fn registers_lie() {
    let world = World::default();
    host(&world, "fault add command=reg queue=0x10 do=edit:value=512");
    let error = Driver::probe(&world, &V7_3).err().expect("a page of 512 bytes");
    assert!(error.what.contains("512"), "{}", error.what);
    host(&world, "fault add command=reg queue=8 do=drop");
    assert!(Driver::probe(&world, &V7_3).err().expect("all ones").what.contains("outside BAR0"));
    Driver::probe(&world, &V7_3).unwrap().remove().unwrap();
}

#[test]
fn the_shared_memory_channel_refuses_waits_and_is_silent() {
    let world = World::default();
    host(&world, "fault add command=smc do=status:5");
    assert_eq!(Driver::probe(&world, &V7_3).err().unwrap().errno, Errno::Eproto);
    assert_eq!(world.device.ledger().0[0], ("hardware_channels", 0), "refused is not done");
    host(&world, "fault add command=smc do=delay:500");
    let before = world.now();
    let driver = Driver::probe(&world, &V7_3).unwrap();
    assert!(world.now() - before >= 500_000_000);
    driver.remove().unwrap();
    world.assert_empty_ledger();
    // Silence lasts until the host is healed; then the window is the driver's again.
    host(&world, "fault add command=smc do=drop");
    assert_eq!(Driver::probe(&world, &V7_3).err().unwrap().errno, Errno::Etimedout);
    assert_eq!(Driver::probe(&world, &V7_3).err().unwrap().errno, Errno::Etimedout);
    host(&world, "fault clear");
    Driver::probe(&world, &V7_3).unwrap().remove().unwrap();
    // Done, but nobody hears of it.
    host(&world, "fault add command=smc do=lose");
    assert_eq!(Driver::probe(&world, &V7_3).err().unwrap().errno, Errno::Etimedout);
    host(&world, "fault clear");
    host(&world, "fault add command=smc do=edit:msg_type=2");
    let error = Driver::probe(&world, &V7_3).err().unwrap();
    assert!(error.what.contains("header 0x00000082 answers request 1"), "{}", error.what);
}

#[test]
fn events_come_at_their_time_again_and_again() {
    let world = World::default();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    host(&world, "event link-down port=1");
    driver.service();
    assert_eq!(kinds(&driver), [(133, 0x0300_0001)]);
    host(&world, "event reset after=5 every=2 count=3");
    let mut times = Vec::new();
    let start = world.now();
    while let Some(deadline) = driver.service().filter(|&deadline| deadline < start + 50_000_000) {
        let seen = driver.other_events.len();
        world.clock.advance(deadline - world.now());
        driver.service();
        times.extend((driver.other_events.len() > seen).then(|| (world.now() - start) / 1_000_000));
    }
    assert_eq!(times, [5, 7, 9]);
    assert!(host(&world, "event list").contains("List([])"));
}

#[test]
fn a_storm_of_events_is_delivered_whole() {
    let world = World::default();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    host(&world, "event 0xfe value=7 count=1000");
    driver.service();
    assert_eq!(kinds(&driver), vec![(0xfe, 7); 1000]);
    assert_eq!(world.counter("events_lost"), 0);
    driver.remove().unwrap();
}

#[test]
fn events_come_before_the_nth_command_and_on_any_queue() {
    let world = World::default();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    world.recorder.start();
    host(&world, "event 135 eq=1 at-command=2");
    driver.exchange(&query()).unwrap();
    assert_eq!(kinds(&driver), []);
    driver.exchange(&query()).unwrap();
    assert_eq!(kinds(&driver), [(135, 0)]);
    let raised = world.recorder.position(
        "host.event",
        |event| matches!(event, Event::HostEvent { detail } if detail.contains("event 135 (0x0) on EQ 1")),
    );
    let answered = |event: &Event| matches!(event, Event::HwcResponse { .. });
    let answers = world.recorder.events().into_iter().take(raised).filter(answered).count();
    assert_eq!(answers, 1, "after the first answer and before the second");
}

#[test]
fn what_nobody_takes_is_counted() {
    let world = World::default();
    host(&world, "event reset");
    assert_eq!(world.counter("events_lost"), 1);
    let driver = Driver::probe(&world, &V7_3).unwrap();
    host(&world, "event reset eq=9");
    assert_eq!(world.counter("events_lost"), 2);
    // Events outlast a driver.
    host(&world, "event reset after=10");
    driver.remove().unwrap();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    world.clock.advance(10_000_000);
    driver.service();
    assert_eq!(kinds(&driver), [(135, 0)]);
    // Healed, the host raises no more.
    host(&world, "event reset after=10");
    host(&world, "fault clear");
    world.clock.advance(10_000_000);
    driver.service();
    assert_eq!(driver.other_events.len(), 1);
    driver.remove().unwrap();
    let Fields(live) = world.device.ledger();
    assert!(live.iter().all(|&(_, count)| count == 0));
}
