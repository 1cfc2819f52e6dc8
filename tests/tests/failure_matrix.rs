//! Whatever is killed, wherever, whichever program: one copy runs in the end, nothing that was acknowledged is lost, and
//! the next try succeeds.

use std::{thread, time::Duration};

use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    proxy::{Fault, Proxy},
    reason_to_skip,
    subjects::{Memcheck, Redis, Stage, Subject, Tree, VolumeWorker},
};

/// Where the migration is held: what was not passed on, and what must have become of the instance when the source's
/// agent is killed just there, before anybody starts it again.
const PLACES: [(&str, Fault, Meanwhile); 12] = [
    ("the greeting", at(Tag::Hello, 0), Meanwhile::Runs),
    ("the offer", at(Tag::Offer, 0), Meanwhile::Runs),
    ("its acceptance", at(Tag::Accept, 0), Meanwhile::Runs),
    ("the first layout", at(Tag::Layout, 0), Meanwhile::Runs),
    ("the first round", at(Tag::RoundEnd, 0), Meanwhile::Runs),
    ("the second round", at(Tag::RoundEnd, 1), Meanwhile::Runs),
    ("the last delta, frozen", Fault::HoldInLastDelta, Meanwhile::Runs),
    ("the image, frozen", at(Tag::Image, 0), Meanwhile::Runs),
    ("the digest, frozen", at(Tag::Verified, 0), Meanwhile::Runs),
    ("the commit", at(Tag::Commit, 0), Meanwhile::StaysFrozen),
    ("the activation", at(Tag::Activated, 0), Meanwhile::Runs),
    ("the end", at(Tag::Settled, 0), Meanwhile::Runs),
];

/// Only with a volume: in the middle of its first pass.
const IN_THE_VOLUME: (&str, Fault, Meanwhile) = ("the volume", at(Tag::Volume, 4), Meanwhile::Runs);

const fn at(tag: Tag, nth: usize) -> Fault {
    Fault::HoldAt { tag, nth }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Runs,
    StaysFrozen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
    Network,
}

/// For each place: holds a migration there, kills the victim, and looks what is left.
fn each_place<S: Subject>(
    test: &str,
    victim: Victim,
    further: &[(&str, Fault, Meanwhile)],
) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let mut stage = Stage::<S>::set()?;
    // Whoever has still to be told of an end is told through its proxy.
    let mut proxies = Vec::new();
    for &(place, fault, meanwhile) in PLACES.iter().chain(further) {
        let began = std::time::Instant::now();
        let proxy = Proxy::start(stage.a.netns(), stage.b.migrate_address().parse()?, fault)?;
        let migration = stage.a.migrate(S::NAME, &proxy.address())?;
        proxy.wait_for_fault()?;
        happens(victim, &mut stage, &proxy, meanwhile)?;
        proxies.push(proxy);
        drop(migration.end()?);
        let there = stage.runs_at_one_host()?;
        let host = if there { "the destination" } else { "the source" };
        println!("{}: {victim:?} killed at {place}: it runs at {host} ({:?})", S::NAME, began.elapsed());
        stage.next_try_and_back(there)?;
    }
    stage.journals_close()?;
    stage.finish()
}

fn happens<S: Subject>(
    victim: Victim,
    stage: &mut Stage<S>,
    proxy: &Proxy,
    meanwhile: Meanwhile,
) -> anyhow::Result<()> {
    match victim {
        Victim::Source => {
            stage.a.kill_agent()?;
            proxy.cut();
            match meanwhile {
                Meanwhile::Runs => stage.subject.goes_on()?,
                Meanwhile::StaysFrozen => stage.stands_still()?,
            }
            stage.a.start_agent()
        }
        Victim::Destination => {
            stage.b.kill_agent()?;
            proxy.cut();
            stage.b.start_agent()
        }
        Victim::Network => {
            proxy.break_down();
            thread::sleep(Duration::from_millis(200));
            proxy.heal();
            Ok(())
        }
    }
}

/// A test for each victim.
macro_rules! matrix {
    ($program:ident, $subject:ty, $further:expr) => {
        mod $program {
            use super::*;

            #[test]
            fn the_source_is_killed() -> anyhow::Result<()> {
                each_place::<$subject>(
                    concat!(stringify!($program), "::the_source_is_killed"),
                    Victim::Source,
                    $further,
                )
            }

            #[test]
            fn the_destination_is_killed() -> anyhow::Result<()> {
                let test = concat!(stringify!($program), "::the_destination_is_killed");
                each_place::<$subject>(test, Victim::Destination, $further)
            }

            #[test]
            fn the_network_is_cut() -> anyhow::Result<()> {
                each_place::<$subject>(
                    concat!(stringify!($program), "::the_network_is_cut"),
                    Victim::Network,
                    $further,
                )
            }
        }
    };
}

matrix!(redis, Redis, &[]);
matrix!(memcheck, Memcheck, &[]);
matrix!(tree, Tree, &[]);
matrix!(volume, VolumeWorker, &[IN_THE_VOLUME]);
