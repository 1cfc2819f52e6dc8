//! Plans know what others take of cores, by what instances wait for them: a niced job that uses all that an instance leaves of a core takes
//! nothing. And they know how much longer work takes there: a fast core on which work waits is slower than an idle slow one.

use std::time::Duration;

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rswap_agent::{
    plan::{Decision, MoveKind, Plan, explain},
    pool::{Inventory, Known, Pool},
    status::InstanceView,
};
use rswap_tests::{
    Fleet, Host, HostOptions,
    hog::{Hog, set_nice},
    moves::{program, python},
    reason_to_skip, wait_for,
};

const LIMIT: Duration = Duration::from_secs(30);
/// What else runs on the machine of the test hardly counts next to the instance, and next to whom it waits for.
const ABOVE_ALL: i32 = -20;
const GIVES_WAY: i32 = 19;

/// Two pools of a core each; what `plan` says besides, and each pool.
fn options(plan: &str, pools: [&str; 2]) -> HostOptions {
    let [one, two] = pools;
    let more = format!(
        "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n[pools]\nlook_every_ms = 200\n\n\
         [plan]\nhorizon_ms = 2000\ncool_down_ms = 500\n{plan}\n\n\
         [[pool]]\nname = \"one\"\ncpus = \"0\"\n{one}\n\n[[pool]]\nname = \"two\"\ncpus = \"1\"\n{two}\n"
    );
    HostOptions { mode: "act", window_ms: 200, more, ..HostOptions::default() }
}

/// An instance on the first pool that computes for so many milliseconds in every period.
fn run_paced(host: &Host, name: &str, more: &[&str], cpu_ms: u32, period_ms: u32) -> anyhow::Result<()> {
    let program = program("paced.py").to_string_lossy().into_owned();
    let options = [&["--pool", "one"], more].concat();
    // Starting should take next to nothing.
    let python = python()?.to_string_lossy().into_owned();
    host.run(name, &options, &[&python, &program, &cpu_ms.to_string(), &period_ms.to_string()])?;
    // Until the program itself runs, there are others that only start it.
    let pid = wait_for("the program", LIMIT, || {
        let is_it = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("python3"))
        };
        Ok(host.pids(name)?.into_iter().find(is_it))
    })?;
    set_nice(pid.try_into()?, ABOVE_ALL)
}

fn pool_of(host: &Host) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let worker = views.into_iter().find(|view| view.instance.name.as_str() == "worker");
    Ok(worker.and_then(|view| view.instance.pool))
}

fn decided(host: &Host) -> anyhow::Result<Option<Decision>> {
    let plan: Plan = host.get("/v1/plan")?;
    let is_it = |decision: &Decision| {
        decision.instance.as_str() == "worker" && decision.kind == MoveKind::Cpu && decision.need.is_some()
    };
    Ok(plan.decisions.into_iter().find(is_it))
}

fn wait_for_pool(host: &Host, pool: &str) -> anyhow::Result<()> {
    let moved = wait_for(&format!("the instance to be on {pool}"), LIMIT, || {
        Ok((pool_of(host)?.as_deref() == Some(pool)).then_some(()))
    });
    moved.or_else(|error| Err(error.context(host.call(&["pools"])?).context(host.call(&["plan"])?)))
}

fn measure(host: &Host, what: &str) -> anyhow::Result<Option<Known>> {
    let found: Inventory = host.get("/v1/inventory")?;
    let pool = found.pool("one").context("the pool is missing")?;
    Ok(pool.performance.iter().find(|measure| measure.what == what).map(|measure| measure.known.clone()))
}

fn wait_for_measure(host: &Host, what: &str, is: impl Fn(f64) -> bool) -> anyhow::Result<f64> {
    let found = wait_for(what, LIMIT, || {
        Ok(measure(host, what)?.map(|known| known.value).filter(|value| is(*value)))
    });
    found.map_err(|error| match (host.call(&["pools"]), host.call(&["plan"])) {
        (Ok(pools), Ok(plan)) => error.context(format!("{pools}\n{plan}")),
        _ => error,
    })
}

/// Why it moved there, as `explain` says it.
fn why(host: &Host, to: &str) -> anyhow::Result<String> {
    let explained = host.call(&["explain", "worker", "-n", "400"])?;
    let moves = format!("moves to {to} in");
    let why = explained.split("\n\n").filter(|text| text.contains(&moves)).last();
    why.map(str::to_owned).with_context(|| format!("no decision to move is kept:\n{explained}"))
}

#[test]
fn an_instance_leaves_a_core_that_others_take_and_not_one_that_they_only_use() -> anyhow::Result<()> {
    if reason_to_skip("an_instance_leaves_a_core_that_others_take_and_not_one_that_they_only_use").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    // Nothing is worth a move that is not needed.
    let host = fleet.host("a", &options("hysteresis = 1000.0", ["", ""]))?;
    run_paced(&host, "worker", &[], 12, 20)?;
    wait_for("a plan that finds room for it", LIMIT, || {
        let fits = |decision: &Decision| {
            decision
                .current
                .as_ref()
                .is_some_and(|current| current.dropped.is_none() && current.terms.limit_cores > 0.5)
        };
        Ok(decided(&host)?.filter(fits))
    })?;

    // All of the core that it leaves is used, and it does not wait for that.
    let niced = Hog::start(0, GIVES_WAY)?;
    let used = wait_for_measure(&host, "others_use_cores", |cores| cores > 0.2)?;
    std::thread::sleep(Duration::from_secs(2));
    let taken = wait_for_measure(&host, "others_take_cores", |_| true)?;
    println!("a niced program uses {used:.2} cores and takes {taken:.2}");
    ensure!(taken < 0.15, "{}", host.call(&["pools"])?);
    ensure!(pool_of(&host)?.as_deref() == Some("one"), "it moved for no reason: {}", why(&host, "two")?);
    let kept = decided(&host)?.context("nothing is decided")?;
    ensure!(!explain(&kept).contains("moves to"), "{}", explain(&kept));
    drop(niced);

    // One that gives way to nobody.
    let hog = Hog::start(0, ABOVE_ALL)?;
    wait_for_pool(&host, "two")?;
    let why = why(&host, "two")?;
    println!("{why}");
    ensure!(why.contains("the present one can't meet the need: others than instances take 0."), "{why}");
    let shown = host.call(&["pools"])?;
    ensure!(shown.contains("others_take_cores") && shown.contains("others_use_cores"), "{shown}");

    // It waits there no longer, and what nobody waits for now counts as far as it is not niced.
    let taken = wait_for_measure(&host, "others_take_cores", |cores| cores > 0.5)?;
    let pools: Vec<Pool> = host.get("/v1/pools")?;
    let one = pools.iter().find(|pool| pool.name == "one").context("the pool is missing")?;
    ensure!(one.used.cores > 0.3, "{taken} are taken, {:?}", one.used);
    std::thread::sleep(Duration::from_secs(2));
    ensure!(pool_of(&host)?.as_deref() == Some("two"), "it was led back");
    drop(hog);
    Ok(())
}

#[test]
fn an_idle_slow_core_is_preferred_to_a_fast_one_on_which_work_waits() -> anyhow::Result<()> {
    if reason_to_skip("an_idle_slow_core_is_preferred_to_a_fast_one_on_which_work_waits").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    // Speed is worth much, so that only speed decides.
    let host = fleet.host(
        "a",
        &options("weight = 100.0\nthreshold = -1000.0", ["performance = 1.0", "performance = 0.9"]),
    )?;
    run_paced(&host, "worker", &[], 5, 20)?;
    wait_for("a plan that finds room for it on both", LIMIT, || {
        let fits = |decision: &Decision| {
            let possible = decision.candidates.iter().any(|candidate| candidate.dropped.is_none());
            decision.current.as_ref().is_some_and(|current| current.dropped.is_none()) && possible
        };
        Ok(decided(&host)?.filter(fits))
    })?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(pool_of(&host)?.as_deref() == Some("one"), "it left the fast core: {}", why(&host, "two")?);

    // Both fit there, but each waits for the other one.
    run_paced(&host, "neighbour", &["--label", "rswap.pin=one"], 15, 50)?;
    wait_for_pool(&host, "two")?;
    let why_slow = why(&host, "two")?;
    println!("{why_slow}");
    ensure!(why_slow.contains("its score is better: work takes"), "it was not for the waiting: {why_slow}");
    let slowdown = wait_for_measure(&host, "slowdown", |times| times > 1.0)?;
    println!("work takes {slowdown:.2} times as long on the fast core");

    // At the load that is left there it never waited. What is only cheaper is not undone within ten cool-downs.
    for pid in host.pids("neighbour")? {
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("cannot end the neighbour")?;
    }
    wait_for_pool(&host, "one")?;
    let why_fast = why(&host, "one")?;
    println!("{why_fast}");
    ensure!(why_fast.contains("its score is better"), "{why_fast}");
    Ok(())
}
