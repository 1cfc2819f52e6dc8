//! How long the scenarios' programs stood still, gathered over the whole suite.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::Context;
use serde::Serialize;

/// Scenarios with real programs, by the beginning of their names: these are shown.
const SHOWN: [&str; 2] = ["program_", "migrate_redis"];

/// The pauses of one program in one scenario file.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Pauses {
    scenario: String,
    instance: String,
    moves: usize,
    /// From the freeze to the activation, as the source's agent measured it.
    frozen_median_ms: f64,
    frozen_longest_ms: f64,
    /// The longest that a client waited for an answer, moves or not; where there are clients.
    clients_waited_longest_ms: Option<f64>,
}

/// What was noted of one of them, in ms.
#[derive(Debug, Default)]
struct Noted {
    frozen: Vec<f64>,
    waited: Option<f64>,
}

/// Reads what the scenarios noted in `log`: a line of scenario, instance, `frozen` or `waited`, and milliseconds for each.
fn gather(log: &str) -> Vec<Pauses> {
    let mut found: BTreeMap<(&str, &str), Noted> = BTreeMap::new();
    for line in log.lines() {
        let [scenario, instance, what, ms] = line.split(' ').collect::<Vec<_>>()[..] else { continue };
        let Ok(ms) = ms.parse::<f64>() else { continue };
        let noted = found.entry((scenario, instance)).or_default();
        match what {
            "frozen" => noted.frozen.push(ms),
            _ => noted.waited = Some(noted.waited.unwrap_or(0.0).max(ms)),
        }
    }
    let pauses = |((scenario, instance), Noted { mut frozen, waited }): ((&str, &str), Noted)| {
        frozen.sort_by(f64::total_cmp);
        Pauses {
            scenario: scenario.to_owned(),
            instance: instance.to_owned(),
            moves: frozen.len(),
            frozen_median_ms: frozen.get(frozen.len() / 2).copied().unwrap_or(0.0),
            frozen_longest_ms: frozen.last().copied().unwrap_or(0.0),
            clients_waited_longest_ms: waited,
        }
    };
    found.into_iter().map(pauses).collect()
}

/// Writes all pauses that were noted in `log` to `path`, and prints those of real programs.
pub(crate) fn report(log: &Path, path: &Path) -> anyhow::Result<()> {
    // Without a scenario that moves something there is none.
    let all = gather(&fs::read_to_string(log).unwrap_or_default());
    let text = serde_json::to_string_pretty(&all).context("cannot write the pauses")?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    let shown: Vec<_> =
        all.iter().filter(|one| SHOWN.iter().any(|name| one.scenario.starts_with(name))).collect();
    if shown.is_empty() {
        return Ok(());
    }
    println!("\npauses in ms ({} has all):", path.display());
    println!(
        "{:<18}{:<14}{:>6}{:>10}{:>10}{:>16}",
        "scenario", "program", "moves", "median", "longest", "client waited"
    );
    for one in shown {
        let waited = one.clients_waited_longest_ms.map_or("-".to_owned(), |ms| format!("{ms:.0}"));
        println!(
            "{:<18}{:<14}{:>6}{:>10.1}{:>10.1}{waited:>16}",
            one.scenario, one.instance, one.moves, one.frozen_median_ms, one.frozen_longest_ms
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_gathered_by_program() {
        let log = "program_x go frozen 5.0\nprogram_x go frozen 9.0\nnonsense\nprogram_x go frozen 7.5\n\
                   program_x go waited 30.0\nprogram_x go waited 12\nmigrate_y tree frozen 1\n";
        let found = gather(log);
        assert_eq!(found.len(), 2);
        let go = &found[1];
        assert_eq!((go.scenario.as_str(), go.instance.as_str(), go.moves), ("program_x", "go", 3));
        assert_eq!((go.frozen_median_ms, go.frozen_longest_ms), (7.5, 9.0));
        assert_eq!((go.clients_waited_longest_ms, found[0].clients_waited_longest_ms), (Some(30.0), None));
    }
}
