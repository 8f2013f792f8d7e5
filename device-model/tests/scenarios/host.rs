//! The simulated host does wrong on command: what a driver sees, and what the trace tells.

use mana_device::observe::{Event, Fields};
use mana_test_driver::message::Request;
use mana_test_driver::{DeviceId, Driver, Errno, Transmit, V6_12, V7_3, World};

/// The default machine, with what happens there kept.
fn observed() -> World {
    let world = World::default();
    world.recorder.start();
    world
}

/// Words for the host; the answer as JSON would show it.
fn host(world: &World, words: &str) -> String {
    let words: Vec<&str> = words.split(' ').collect();
    format!("{:?}", world.device.control(&words).unwrap())
}

/// What the trace tells of faults.
fn faults(world: &World) -> Vec<String> {
    let detail = |event: Event| match event {
        Event::Fault { detail } => Some(detail),
        _ => None,
    };
    world.recorder.events().into_iter().filter_map(detail).collect()
}

fn ledger(world: &World, kind: &str) -> u64 {
    let Fields(live) = world.device.ledger();
    live.into_iter().find(|(name, _)| *name == kind).unwrap().1
}

/// GDMA_QUERY_MAX_RESOURCES, whose answer is 72 bytes long.
fn query() -> Request {
    Request::new(2, DeviceId::NONE, 40, 72)
}

#[test]
fn a_command_fails_with_the_status_that_was_asked_for_and_does_nothing() {
    let world = observed();
    host(&world, "fault add command=MANA_CREATE_WQ_OBJ nth=2 do=status:0x77");
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    let error = driver.ifup(0).unwrap_err();
    assert_eq!((error.errno, error.status), (Errno::Eproto, Some(0x77)));
    assert_eq!(ledger(&world, "completion_queues"), 1, "the first alone is there");
    let told = faults(&world);
    assert_eq!(told.len(), 1);
    assert!(told[0].starts_with("fault 1: MANA_CREATE_WQ_OBJ (request "), "{told:?}");
    assert!(told[0].ends_with("): status:0x77"), "{told:?}");
    assert_eq!(world.counter("faults"), 1);
    assert!(host(&world, "fault list").contains("(\"hits\", Number(1))"));
    assert!(host(&world, "fault clear").contains("Number(1)"));
    // The host is well again, and so is the next driver.
    driver.abandon();
    world.device.reset();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    driver.ifup(0).unwrap();
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn every_command_of_a_probe_may_fail_and_the_next_probe_works() {
    let world = observed();
    host(&world, "mark probe");
    Driver::probe(&world, &V6_12).unwrap().remove().unwrap();
    let commands = host(&world, "commands");
    let count: u64 = commands.split(['(', ')']).rev().find_map(|part| part.parse().ok()).unwrap();
    assert!(count > 10, "{commands}");
    let mut failed = 0;
    for nth in 1..=count {
        host(&world, &format!("fault add command=any nth={nth} do=status:0x5"));
        match Driver::probe(&world, &V6_12) {
            Ok(driver) => {
                let _ = driver.remove();
            }
            Err(_) => failed += 1,
        }
        assert_eq!(host(&world, "fault clear"), host_answer("hits", 1), "command {nth}");
        Driver::probe(&world, &V6_12).unwrap().remove().unwrap();
        world.assert_empty_ledger();
    }
    assert!(failed > 5, "{failed} of {count}");
}

fn host_answer(name: &str, value: u64) -> String {
    format!("Answer([({name:?}, Number({value}))])")
}

#[test]
fn a_dropped_command_is_neither_done_nor_answered() {
    let world = observed();
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    host(&world, "fault add command=GDMA_CREATE_PD do=drop");
    let create = Request::new(29, DeviceId::NONE, 48, 48);
    assert_eq!(driver.exchange(&create).unwrap_err().errno, Errno::Etimedout);
    assert_eq!(ledger(&world, "protection_domains"), 0);
    assert_eq!(driver.exchange(&create).unwrap().status(), 0, "the channel goes on");
    assert_eq!(ledger(&world, "protection_domains"), 1);
}

#[test]
fn a_lost_answer_leaves_what_the_command_has_made() {
    let world = observed();
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    host(&world, "fault add command=GDMA_CREATE_PD do=lose");
    assert_eq!(
        driver.exchange(&Request::new(29, DeviceId::NONE, 48, 48)).unwrap_err().errno,
        Errno::Etimedout
    );
    assert_eq!(ledger(&world, "protection_domains"), 1);
}

#[test]
fn a_late_answer_comes_when_it_is_due_and_nothing_waits_for_it() {
    let world = observed();
    let mut driver = Driver::probe(&world, &V6_12).unwrap();
    driver.ifup(0).unwrap();
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=delay:20");
    let before = world.now();
    driver.post_request(&query(), 40);
    driver.service();
    assert!(driver.take_answer().is_none());
    driver.transmit(0, 0, &Transmit::plain(&[2; 60]));
    driver.service();
    assert_eq!(world.cables[0].take().len(), 1, "packets go on");
    let deadline = world.settle().expect("the answer is due some time");
    assert_eq!(deadline, before + 20_000_000);
    world.clock.advance(deadline - world.now() - 1);
    driver.service();
    assert!(driver.take_answer().is_none(), "a nanosecond too early");
    world.clock.advance(1);
    driver.service();
    assert_eq!(driver.take_answer().expect("it is time").status(), 0);
    driver.remove().unwrap();
    world.assert_empty_ledger();
}

#[test]
fn what_is_held_comes_when_the_faults_are_cleared() {
    let world = observed();
    let mut driver = Driver::probe_hwc(&world, &V6_12).unwrap();
    host(&world, "fault add command=any do=hold");
    driver.post_request(&query(), 40);
    world.clock.advance(3_600_000_000_000);
    driver.service();
    assert!(driver.take_answer().is_none());
    assert_eq!(host(&world, "fault clear"), host_answer("hits", 1));
    driver.service();
    assert_eq!(driver.take_answer().expect("healed").status(), 0);
}

#[test]
fn an_answer_may_come_twice() {
    let world = observed();
    let mut driver = Driver::probe_hwc(&world, &V6_12).unwrap();
    host(&world, "fault add command=any do=duplicate");
    let before = driver.hwc_send_completions();
    driver.post_request(&query(), 40);
    let twice = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.service()));
    let message = twice.expect_err("the driver notices");
    let message = message.downcast_ref::<String>().expect("words");
    assert!(message.contains("a response that no command waits for"), "{message}");
    assert_eq!(driver.hwc_send_completions(), before + 1, "one request, one send completion");
}

#[test]
fn fields_of_an_answer_are_what_was_asked_for() {
    let world = observed();
    let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=edit:max_eq=4");
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=edit:@68=2");
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=edit:activity_id=9");
    let answer = driver.exchange(&query()).unwrap();
    assert_eq!([48, 68, 20].map(|at| answer.u32(at)), [4, 2, 9]);
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=edit:length=4000");
    assert_eq!(driver.exchange(&query()).unwrap_err().errno, Errno::Eproto, "longer than asked for");
}

#[test]
fn the_same_seed_corrupts_the_same_bytes() {
    let corrupt = |seed: u32| {
        let world = observed();
        let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
        host(&world, &format!("fault add command=MANA_QUERY_GF_STAT do=corrupt:{seed}"));
        driver.post_request(&Request::new(0x20002, DeviceId { kind: 2, instance: 0 }, 48, 256), 48);
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.service()));
        faults(&world)
    };
    let told = corrupt(1);
    assert_eq!(told.len(), 2);
    assert!(told[1].contains("byte ") && told[1].contains(" becomes 0x"), "{told:?}");
    assert_eq!(told, corrupt(1));
    assert_ne!(told, corrupt(2));
}

#[test]
fn an_event_comes_before_the_answer() {
    let world = observed();
    let mut driver = Driver::probe(&world, &V7_3).unwrap();
    host(&world, "fault add command=GDMA_QUERY_MAX_RESOURCES do=event:135");
    driver.exchange(&query()).unwrap();
    let kinds: Vec<u8> = driver.other_events.iter().map(|event| event.kind).collect();
    assert_eq!(kinds, [135]);
}

#[test]
fn marks_name_moments_and_begin_the_count_of_commands() {
    let world = observed();
    let mut driver = Driver::probe_hwc(&world, &V7_3).unwrap();
    host(&world, "mark here");
    driver.exchange(&query()).unwrap();
    driver.exchange(&query()).unwrap();
    assert_eq!(host(&world, "commands"), host_answer("commands", 2));
    assert!(world.recorder.events().contains(&Event::Mark { name: "here".into() }));
    assert!(host(&world, "ledger").contains("(\"hardware_channels\", 1)"));
    assert_eq!(host(&world, "rules"), "Answer([(\"rules\", Fields(Fields([])))])");
    assert!(host(&world, "counters").contains("(\"rule_violations\", 0)"));
}
