//! Demand + pools -> [`Plan`]. Pure: no I/O, no clock.

use serde::{Deserialize, Serialize};

use crate::units::UnixMillis;

/// What to do in this round, and why; every candidate with its numbers is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// When it was made.
    pub at: UnixMillis,
    /// One per instance and pool kind looked at.
    pub decisions: Vec<Decision>,
}

/// What was decided for one instance and one pool kind. (Skeleton: the plan room fills it.)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {}
