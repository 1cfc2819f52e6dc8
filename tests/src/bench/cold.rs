//! What moving cold pages to swap and back costs a program of which a tenth is in use.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use rswap_agent::config::MemoryConfig;
use serde::Serialize;

use super::{AFTER, BEFORE, median};
use crate::{
    cold::{ColdScene, Plan},
    hot::HotReader,
    wait_for,
};

const HOT_SHARE: f64 = 0.1;
const PAUSE: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(60);

/// What one swap to the pool and back came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ColdCase {
    /// From the call until its answer, in milliseconds; most of it is waiting for pages to become cold.
    pub out_ms: f64,
    /// The same on the way back.
    pub back_ms: f64,
    /// The longest time without an answer, on either way, less the longest one in as long a time without a swap.
    pub pause_ms: f64,
    /// What went, in MB.
    pub out_mb: f64,
    /// By the time in which pages were moved.
    pub out_mb_per_s: f64,
    /// By the same.
    pub back_mb_per_s: f64,
    /// By how much the client had fewer answers while pages went than in the second before.
    pub slowdown_out_pct: f64,
    /// The same while pages came back.
    pub slowdown_back_pct: f64,
    /// The same in the five seconds after, on the pool.
    pub slowdown_held_pct: f64,
}

/// Redis holds so many MB, and goes so often.
pub fn measure(mb: u64, runs: usize) -> anyhow::Result<(ColdCase, Vec<f64>)> {
    let mut cases = Vec::new();
    for _ in 0..runs {
        cases.push(once(mb)?);
    }
    let of = |figure: fn(&ColdCase) -> f64| median(cases.iter().map(figure).collect());
    let middle = ColdCase {
        out_ms: of(|case| case.out_ms),
        back_ms: of(|case| case.back_ms),
        pause_ms: of(|case| case.pause_ms),
        out_mb: of(|case| case.out_mb),
        out_mb_per_s: of(|case| case.out_mb_per_s),
        back_mb_per_s: of(|case| case.back_mb_per_s),
        slowdown_out_pct: of(|case| case.slowdown_out_pct),
        slowdown_back_pct: of(|case| case.slowdown_back_pct),
        slowdown_held_pct: of(|case| case.slowdown_held_pct),
    };
    Ok((middle, cases.iter().map(|case| case.pause_ms).collect()))
}

fn once(mb: u64) -> anyhow::Result<ColdCase> {
    // As the agent does it by itself, but that pages are cold sooner.
    let memory = MemoryConfig { cold_after_s: 5, ..MemoryConfig::default() };
    let plan = Plan { data_bytes: mb * 1_000_000, memory, ..Plan::default() };
    let scene = ColdScene::set(&plan)?;
    let hot = HotReader::start(&scene.fleet.client, scene.set, HOT_SHARE, PAUSE)?;
    wait_for("the hot keys to be read", LIMIT, || Ok((hot.rounds() >= 3).then_some(())))?;
    thread::sleep(BEFORE);
    let out = timed(|| scene.swap("zram"))?;
    let held_from = Instant::now();
    thread::sleep(Duration::from_secs(5));
    let held_to = Instant::now();
    let memory = scene.memory_pool()?;
    thread::sleep(BEFORE);
    let back = timed(|| scene.swap(&memory))?;
    thread::sleep(AFTER);
    // As long again, without a swap: in half a minute anybody waits for the processor once.
    let usual_from = Instant::now();
    thread::sleep(out.1 - out.0);
    let usual_to = Instant::now();
    ensure!(scene.swapped()? == 0, "not all is back");
    let times = hot.finish()?;
    scene.check()?;
    let ms = |(from, to, _): &(Instant, Instant, _)| (*to - *from).as_secs_f64() * 1e3;
    let gap_ms = |from, to| times.largest_gap(from, to).map_or(0.0, |(gap, _)| gap.as_secs_f64() * 1e3);
    let usual = times.rate(out.0 - BEFORE, out.0);
    let slower = |from, to| (1.0 - times.rate(from, to) / usual.max(1e-9)) * 100.0;
    let mb_per_s = |bytes: u64, ms: f64| bytes as f64 / 1e3 / ms.max(1e-9);
    let case = ColdCase {
        out_ms: ms(&out),
        back_ms: ms(&back),
        pause_ms: gap_ms(out.0, out.1).max(gap_ms(back.0, back.1)) - gap_ms(usual_from, usual_to),
        out_mb: out.2.swapped_bytes as f64 / 1e6,
        out_mb_per_s: mb_per_s(out.2.moved_bytes, out.2.moving_ms),
        back_mb_per_s: mb_per_s(back.2.moved_bytes, back.2.moving_ms),
        slowdown_out_pct: slower(out.0, out.1),
        slowdown_back_pct: slower(back.0, back.1),
        slowdown_held_pct: slower(held_from, held_to),
    };
    println!("  {case:?}");
    Ok(case)
}

fn timed<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Instant, Instant, T)> {
    let began = Instant::now();
    let done = work()?;
    Ok((began, Instant::now(), done))
}
