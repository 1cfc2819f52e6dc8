//! `rswap simulate` reads what is recorded, by an agent or otherwise, and says what would have been done: the same every time, as a table, as JSON and as a page.

use std::{fs, path::Path, process::Command, time::Duration};

use rswap_tests::{Fleet, HostOptions, binary, reason_to_skip, wait_for};
use serde_json::Value;

const POOLS: &str = r#"
[[pool]]
name = "fast"
kind = "cores"
cores = 8
cost_per_core_hour = 0.04

[[pool]]
name = "slow"
kind = "cores"
cores = 8
cost_per_core_hour = 0.01
performance = 0.5
"#;

/// Two services with a working day, and one that is always a little busy; four days.
fn traces(path: &Path) -> anyhow::Result<()> {
    let mut text = "trace,instance_id,class,timestamp_s,cpu\n".to_owned();
    for (name, idle, busy) in [("web", 20, 280), ("api", 30, 240), ("mail", 25, 30)] {
        for window in 0..4 * 288 {
            let percent = if (96..192).contains(&(window % 288)) { busy } else { idle } + (window * 7) % 11;
            text += &format!("made,{name},x,{},{percent}\n", window * 300);
        }
    }
    Ok(fs::write(path, text)?)
}

fn simulate(directory: &Path, more: &[&str]) -> anyhow::Result<std::process::Output> {
    let mut command = Command::new(binary("rswap")?);
    command.args(["simulate", "--scale", "0.01", "--traces"]).arg(directory.join("made.csv"));
    Ok(command.arg("--pools").arg(directory.join("pools.toml")).args(more).output()?)
}

#[test]
fn what_would_have_been_done_is_said() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let at = directory.path();
    traces(&at.join("made.csv"))?;
    fs::write(at.join("pools.toml"), POOLS)?;
    let page = at.join("report.html");
    let first = simulate(at, &["--json", "--html", &page.to_string_lossy()])?;
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    let report: Value = serde_json::from_slice(&first.stdout)?;
    let money = |policy: &str| {
        let mut rows = report["rows"].as_array().into_iter().flatten();
        rows.find(|row| row["policy"] == policy).and_then(|row| row["money"].as_f64())
    };
    let (act, never) = (money("act p95"), money("static"));
    assert!(act.is_some() && act < never && money("oracle") < act, "{report}");
    assert!(fs::read_to_string(page)?.contains("id=\"report\""));
    assert_eq!(simulate(at, &["--json"])?.stdout, first.stdout, "the same input has the same output");

    let table = String::from_utf8(simulate(at, &["--policy", "act,static"])?.stdout)?;
    assert!(table.contains("act p95") && table.contains("oracle") && !table.contains("reactive"), "{table}");
    Ok(())
}

#[test]
fn what_cannot_be_replayed_is_refused() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let at = directory.path();
    traces(&at.join("made.csv"))?;
    for (pools, more, word) in [
        ("", &[][..], "at least one [[pool]]"),
        ("[[pool]]\nname = \"a\"\ncores = 0\ncost_per_core_hour = 1\n", &[], "above 0"),
        ("[plan]\nhorizon = 1\n[[pool]]\nname = \"a\"\ncores = 1\ncost_per_core_hour = 1\n", &[], "horizon"),
        (POOLS, &["--column", "gpu"], "there are cpu"),
        (POOLS, &["--scale=-1"], "--scale"),
    ] {
        fs::write(at.join("pools.toml"), pools)?;
        let output = simulate(at, more)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(word), "{pools}: {error}");
    }
    Ok(())
}

#[test]
fn what_an_agent_recorded_can_be_replayed() -> anyhow::Result<()> {
    if reason_to_skip("what_an_agent_recorded_can_be_replayed").is_some() {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let recorded = directory.path().join("recorded");
    let mut fleet = Fleet::new()?;
    let more = format!("[record]\ndirectory = {recorded:?}\nevery_s = 1\n");
    let host = fleet.host("a", &HostOptions { window_ms: 200, more, ..HostOptions::default() })?;
    host.run("busy", &[], &["sh", "-c", "while :; do :; done"])?;
    let file = recorded.join("busy.csv");
    let text = wait_for("two rows", Duration::from_secs(30), || {
        let text = fs::read_to_string(&file).unwrap_or_default();
        Ok((text.lines().count() > 2).then_some(text))
    })?;
    let cores = text.lines().nth(2).and_then(|row| row.split(',').nth(4)?.parse::<f64>().ok());
    assert!(cores.is_some_and(|cores| cores > 0.2), "{text}");
    fs::write(directory.path().join("pools.toml"), POOLS)?;
    let mut command = Command::new(binary("rswap")?);
    command.args(["simulate", "--days", "7", "--traces"]).arg(&recorded);
    let output = command.arg("--pools").arg(directory.path().join("pools.toml")).output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && table.contains("act p95"), "{output:?}");
    Ok(())
}
