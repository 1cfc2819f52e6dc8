//! The project's own commands: set up, build, run, demonstrate, test.

fn main() {}
