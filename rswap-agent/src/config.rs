//! The agent's configuration: TOML, with defaults that work.
