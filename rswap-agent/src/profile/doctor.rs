//! Which features of the kernel are there, and what each lack costs.

use serde::Serialize;

/// One feature that rswap uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// What it is called.
    pub name: String,
    /// Whether it is there.
    pub present: bool,
    /// What was found, or how it was missed.
    pub detail: String,
    /// What does not work without it.
    pub cost_of_lack: String,
}
