//! `[control]`: who else may call the control socket, and where it is written down.

use std::path::PathBuf;

use rswap_types::bounds::positive_integer;
use serde::{Deserialize, Serialize};

/// What somebody may do by the control socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Right {
    /// Read the status.
    Read,
    /// Call everything, too.
    Operate,
}

/// A right of a user or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawGrant", untagged)]
pub enum Grant {
    /// Of a user.
    User {
        /// Whose.
        uid: u32,
        /// Which.
        right: Right,
    },
    /// Of whoever is in a group.
    Group {
        /// Whose.
        gid: u32,
        /// Which.
        right: Right,
    },
}

impl Grant {
    /// Which right.
    pub fn right(&self) -> Right {
        match self {
            Self::User { right, .. } | Self::Group { right, .. } => *right,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGrant {
    uid: Option<u32>,
    gid: Option<u32>,
    right: Right,
}

impl TryFrom<RawGrant> for Grant {
    type Error = String;

    fn try_from(RawGrant { uid, gid, right }: RawGrant) -> Result<Self, String> {
        match (uid, gid) {
            (Some(uid), None) => Ok(Self::User { uid, right }),
            (None, Some(gid)) => Ok(Self::Group { gid, right }),
            _ => Err("a grant is of a `uid` or of a `gid`".to_owned()),
        }
    }
}

/// `[control]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControlConfig {
    /// Who else than root and the agent's user may call.
    #[serde(rename = "grant")]
    pub grants: Vec<Grant>,
    /// Where each changing call is written down [default: `audit.jsonl` in the state directory].
    pub audit_log: Option<PathBuf>,
    /// How long the log may become, in KiB; the one before it is kept.
    #[serde(deserialize_with = "positive_integer")]
    pub audit_kib: u64,
}

impl Default for ControlConfig {
    fn default() -> Self {
        Self { grants: Vec::new(), audit_log: None, audit_kib: 16 << 10 }
    }
}
