//! Whatever is killed, wherever, whichever program: one copy runs in the end, nothing that was acknowledged is lost, and
//! the next try succeeds. A test binary for each program says which.

use std::{thread, time::Duration};

use crate::{
    moves::held,
    proxy::{Fault, Proxy},
    reason_to_skip,
    subjects::{Stage, Subject},
};
use rswap_agent::migrate::wire::Tag;

/// Where the migration is held: what was not passed on, and what must have become of the instance when the source's
/// agent is killed just there, before anybody starts it again.
const PLACES: [Place; 12] = [
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
pub const IN_THE_VOLUME: Place = ("the volume", at(Tag::Volume, 4), Meanwhile::Runs);

/// A place: its name, how a migration is held there, and what becomes of the instance.
pub type Place = (&'static str, Fault, Meanwhile);

const fn at(tag: Tag, nth: usize) -> Fault {
    Fault::HoldAt { tag, nth }
}

/// What an instance does whose source's agent was killed, until that is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meanwhile {
    /// It goes on.
    Runs,
    /// It is committed to the other host, and stands still.
    StaysFrozen,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent that the instance leaves.
    Source,
    /// The agent that it goes to.
    Destination,
    /// The link between them.
    Network,
}

/// For each place: holds a migration there, kills the victim, and looks what is left. The next try goes on from there, so that
/// the two hosts take turns.
///
/// # Errors
/// What is not as it must be.
pub fn each_place<S: Subject>(test: &str, victim: Victim, further: &[Place]) -> anyhow::Result<()> {
    if reason_to_skip(test).is_some() {
        return Ok(());
    }
    let mut stage = Stage::<S>::set()?;
    // Whoever has still to be told of an end is told through its proxy.
    let mut proxies = Vec::new();
    for &(place, fault, meanwhile) in PLACES.iter().chain(further) {
        let began = std::time::Instant::now();
        let (proxy, migration) = held(S::NAME, &stage.a, &stage.b, fault)?;
        happens(victim, &mut stage, &proxy, meanwhile)?;
        proxies.push(proxy);
        drop(migration.end()?);
        let there = stage.runs_at_one_host()?;
        let host = if there { "the destination" } else { "the source" };
        println!("{}: {victim:?} killed at {place}: it runs at {host} ({:?})", S::NAME, began.elapsed());
        // Towards the other host, wherever it is; the next place is looked at from there.
        if there {
            std::mem::swap(&mut stage.a, &mut stage.b);
        }
        stage.next_try()?;
        std::mem::swap(&mut stage.a, &mut stage.b);
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
#[macro_export]
macro_rules! failure_matrix {
    ($subject:ty, $further:expr) => {
        #[test]
        fn the_source_is_killed() -> anyhow::Result<()> {
            $crate::matrix::each_place::<$subject>(
                "the_source_is_killed",
                $crate::matrix::Victim::Source,
                $further,
            )
        }

        #[test]
        fn the_destination_is_killed() -> anyhow::Result<()> {
            let test = "the_destination_is_killed";
            $crate::matrix::each_place::<$subject>(test, $crate::matrix::Victim::Destination, $further)
        }

        #[test]
        fn the_network_is_cut() -> anyhow::Result<()> {
            $crate::matrix::each_place::<$subject>(
                "the_network_is_cut",
                $crate::matrix::Victim::Network,
                $further,
            )
        }
    };
}
