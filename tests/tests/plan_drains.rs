//! A pool that is drained is left by what is on it and entered by nobody, also after a new start of the agent; who is told to stay by
//! its label stays.

use std::time::Duration;

use rswap_agent::{
    plan::{Decision, Plan},
    pool::{Pool, PoolState},
    status::InstanceView,
};
use rswap_tests::{Fleet, Host, HostOptions, reason_to_skip, wait_for};

const LIMIT: Duration = Duration::from_secs(30);
const IDLE: &[&str] = &["sh", "-c", "while :; do sleep 0.1; done"];
const POOLS: &str = "[forecast]\nhorizons_ms = [400, 1200]\nmin_seen = 10\n\n\
                     [plan]\nhorizon_ms = 2000\ncool_down_ms = 500\nhysteresis = 1.0\n\n\
                     [[pool]]\nname = \"one\"\ncpus = \"0\"\n\n\
                     [[pool]]\nname = \"two\"\ncpus = \"1\"\n";

fn pool_of(host: &Host, name: &str) -> anyhow::Result<Option<String>> {
    let views: Vec<InstanceView> = host.get("/v1/profiles")?;
    let found = views.into_iter().find(|view| view.instance.name.as_str() == name);
    Ok(found.and_then(|view| view.instance.pool))
}

fn wait_until_on(host: &Host, name: &str, pool: &str) -> anyhow::Result<()> {
    wait_for(&format!("{name} to be on {pool}"), LIMIT, || {
        Ok((pool_of(host, name)?.as_deref() == Some(pool)).then_some(()))
    })
}

fn state_of(host: &Host, pool: &str) -> anyhow::Result<Option<PoolState>> {
    let pools: Vec<Pool> = host.get("/v1/pools")?;
    Ok(pools.into_iter().find(|found| found.name == pool).map(|found| found.state))
}

#[test]
fn a_drained_pool_is_left_and_stays_empty() -> anyhow::Result<()> {
    if reason_to_skip("a_drained_pool_is_left_and_stays_empty").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let options =
        HostOptions { mode: "act", window_ms: 200, more: POOLS.to_owned(), ..HostOptions::default() };
    let mut host = fleet.host("a", &options)?;
    host.run("web", &["--pool", "one"], IDLE)?;
    host.run("fixed", &["--pool", "one", "--label", "rswap.stay=true"], IDLE)?;

    let error = host.call(&["drain", "three"]).unwrap_err().to_string();
    assert!(error.contains("there is no pool \"three\""), "{error}");
    host.call(&["drain", "one"])?;
    wait_until_on(&host, "web", "two")?;
    assert_eq!(state_of(&host, "one")?, Some(PoolState::Draining));
    wait_for("a plan that says why the other one stays", LIMIT, || {
        let plan: Plan = host.get("/v1/plan")?;
        let stays = |d: &&Decision| d.instance.as_str() == "fixed" && !d.moves() && d.need.is_some();
        Ok(plan.decisions.iter().any(|d| stays(&d)).then_some(()))
    })?;
    assert_eq!(pool_of(&host, "fixed")?.as_deref(), Some("one"));

    // What was asked for outlives the agent.
    host.kill_agent()?;
    host.start_agent()?;
    assert_eq!(state_of(&host, "one")?, Some(PoolState::Draining));
    host.call(&["drain", "one", "--undo"])?;
    host.call(&["drain", "two"])?;
    wait_until_on(&host, "web", "one")?;
    let why = host.call(&["explain", "web", "-n", "400"])?;
    assert!(why.contains("the present one won't do: it is being emptied"), "{why}");
    Ok(())
}
