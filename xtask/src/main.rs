//! The project's own commands: set up, build, run, demonstrate, test.

mod ebpf;

fn main() -> anyhow::Result<()> {
    let object = ebpf::build(true)?;
    println!("{}", object.display());
    Ok(())
}
