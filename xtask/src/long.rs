//! What takes too long for the suite: many moves in a row, and many more random inputs for the decoders.

use xshell::{Shell, cmd};

use crate::{compile, project_root, setup, step};

/// `cargo xtask soak`: so many moves of a Redis under load.
pub(crate) fn soak(moves: u32) -> anyhow::Result<()> {
    run(&format!("{moves} moves in a row"), "soak", "RSWAP_SOAK_MOVES", moves)
}

/// `cargo xtask soak --profile`: so many minutes of instances that come and go.
pub(crate) fn soak_profile(minutes: u32) -> anyhow::Result<()> {
    let what = format!("Instances that come and go for {minutes} min");
    run(&what, "soak_profile", "RSWAP_SOAK_PROFILE_SECONDS", minutes.saturating_mul(60))
}

fn run(what: &str, test: &str, variable: &str, value: u32) -> anyhow::Result<()> {
    setup::run()?;
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    let bin_dir = compile::everything(false)?;
    step(what);
    cmd!(shell, "cargo test --locked -p rswap-tests --test {test} -- --nocapture")
        .env(variable, value.to_string())
        .env("RSWAP_BIN_DIR", bin_dir)
        .run()?;
    Ok(())
}

/// `cargo xtask fuzz`: so many random inputs for each decoder of what a peer sends or a disk holds.
pub(crate) fn fuzz(cases: u32) -> anyhow::Result<()> {
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    step(&format!("{cases} random inputs for each decoder"));
    cmd!(shell, "cargo test --locked -p rswap-agent --lib --release fuzz -- --nocapture")
        .env("PROPTEST_CASES", cases.to_string())
        .run()?;
    Ok(())
}
