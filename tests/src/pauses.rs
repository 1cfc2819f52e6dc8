//! Every pause that the scenarios cause, in one place: `cargo xtask test` gathers them.

use std::{fs::File, io::Write as _, path::Path};

/// Where `cargo xtask test` wants them to be noted.
const LOG: &str = "RSWAP_PAUSE_LOG";

/// Notes how long instance `name` stood still in a move.
pub fn frozen(name: &str, ms: f64) {
    note(name, "frozen", ms);
}

/// Notes how long a client of instance `name` waited for an answer at most, over all of its moves.
pub fn waited(name: &str, ms: f64) {
    note(name, "waited", ms);
}

fn note(name: &str, what: &str, ms: f64) {
    let Some(path) = std::env::var_os(LOG) else { return };
    let program = std::env::args_os().next().unwrap_or_default();
    let scenario = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Cargo's hash follows the name.
    let scenario = scenario.rsplit_once('-').map_or(scenario.as_str(), |(name, _)| name);
    let log = File::options().append(true).create(true).open(path);
    // A pause that is not noted is still in what the test prints.
    if let Ok(mut log) = log {
        let _ = writeln!(log, "{scenario} {name} {what} {ms:.1}");
    }
}
