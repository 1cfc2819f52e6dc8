//! What takes too long for the suite: many moves in a row, and many more random inputs for the decoders.

use xshell::{Shell, cmd};

use crate::{compile, project_root, setup, step};

/// `cargo xtask soak`: so many moves of a Redis under load.
pub(crate) fn soak(moves: u32) -> anyhow::Result<()> {
    setup::run()?;
    let shell = Shell::new()?;
    shell.change_dir(project_root());
    let bin_dir = compile::everything(false)?;
    step(&format!("{moves} moves in a row"));
    cmd!(shell, "cargo test --locked -p rswap-tests --test soak -- --nocapture")
        .env("RSWAP_SOAK_MOVES", moves.to_string())
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
