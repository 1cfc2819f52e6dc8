//! What goes wrong before the commit leaves the instance running where it was, with nothing lost.

use rswap_agent::migrate::wire::Tag;
use rswap_tests::{
    moves::held,
    proxy::Fault,
    reason_to_skip,
    subjects::{LIMIT, Redis, Stage, Subject},
    wait_for,
};

#[test]
fn a_destination_killed_before_the_commit_changes_nothing() -> anyhow::Result<()> {
    if reason_to_skip("a_destination_killed_before_the_commit_changes_nothing").is_some() {
        return Ok(());
    }
    let mut stage = Stage::<Redis>::set()?;
    let at = |tag, nth| Fault::HoldAt { tag, nth };
    let places = [
        ("the offer", at(Tag::Offer, 0)),
        ("the first round", at(Tag::RoundEnd, 0)),
        ("the second round", at(Tag::RoundEnd, 1)),
        ("the third round", at(Tag::RoundEnd, 2)),
        ("the last delta, frozen", Fault::HoldInLastDelta),
        ("the image, frozen", at(Tag::Image, 0)),
        ("the digests, frozen", at(Tag::Verified, 0)),
    ];
    for (place, fault) in places {
        println!("killed at {place}");
        let (proxy, migration) = held(Redis::NAME, &stage.a, &stage.b, fault)?;
        stage.b.kill_agent()?;
        proxy.cut();
        let reason = migration.end()?.expect_err("it was moved to a dead host");
        println!("{reason}");
        stage.subject.goes_on()?;
        // What was ready to run stands still until the next agent removes it.
        stage.b.start_agent()?;
        runs_at_the_source_alone(&stage)?;
        stage.next_try_and_back()?;
    }
    stage.finish()
}

#[test]
fn a_page_damaged_on_the_wire_is_noticed_and_rolled_back() -> anyhow::Result<()> {
    if reason_to_skip("a_page_damaged_on_the_wire_is_noticed_and_rolled_back").is_some() {
        return Ok(());
    }
    let stage = Stage::<Redis>::set()?;
    let (_proxy, migration) = held(Redis::NAME, &stage.a, &stage.b, Fault::DamagePage)?;
    let reason = migration.end()?.expect_err("a damaged copy was let run");
    println!("{reason}");
    runs_at_the_source_alone(&stage)?;
    stage.next_try_and_back()?;
    stage.finish()
}

fn runs_at_the_source_alone(stage: &Stage<Redis>) -> anyhow::Result<()> {
    assert!(stage.a.has_instance(Redis::NAME)?, "the source does not list it any more");
    stage.subject.goes_on()?;
    let left = || Ok((!stage.b.has_processes()?).then_some(()));
    wait_for("what was built at the destination to go", LIMIT, left)
}
