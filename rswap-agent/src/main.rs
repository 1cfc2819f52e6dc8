//! `rswap`: the daemon and its command line.

fn main() -> std::process::ExitCode {
    rswap_agent::cli::main()
}
