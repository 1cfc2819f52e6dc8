//! Why an instance stays, and why a pool is out of the question.

use std::fmt;

use rswap_types::{Flow, InstanceName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What to do about it.
const UNMEASURED: &str = "run `rswap calibrate` for it, or configure what it gives";

/// Why an instance stays where it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum StayReason {
    /// The forecast is not calibrated yet.
    TooLittleSeen {
        /// Outcomes known.
        seen: u64,
        /// Outcomes needed.
        needed: u64,
    },
    /// The present pool meets the need, and its score is not past the threshold.
    UnderThreshold,
    /// No other pool is better by the margin.
    NothingBetter {
        /// Gain of the best one, in money per hour, after the price of the move; `None` if every pool was dropped.
        best_gain: Option<f64>,
        /// Gain that it must exceed.
        hysteresis: f64,
    },
    /// The need exceeds the present pool, and no other pool can meet it either.
    NoPoolFits,
    /// It moved a short while ago, and nothing forces another move.
    CoolDown {
        /// Milliseconds left.
        left_ms: u64,
    },
    /// The only better pools are ones that it left a short while ago, and nothing forces it back.
    JustLeft {
        /// The best of them.
        pool: String,
        /// Milliseconds until it may return.
        left_ms: u64,
    },
    /// Its last move failed.
    BackOff {
        /// Failures in a row.
        failures: u32,
        /// Milliseconds left.
        left_ms: u64,
        /// Why, as far as whoever made the move said it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A move of it is under way.
    InFlight,
    /// Another kind of move was decided in the same round, and comes first.
    OtherMoveFirst,
    /// Its labels say that it is not to be moved.
    ToldToStay,
    /// What is to be decided about lies on no pool that plans know.
    OnNoPool,
    /// Nobody knows what the present pool gives.
    Unmeasured {
        /// Which.
        pool: String,
    },
}

impl fmt::Display for StayReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLittleSeen { seen, needed } => {
                write!(f, "too little seen: {seen} of {needed} forecast outcomes")
            }
            Self::UnderThreshold => {
                write!(f, "the present pool meets the need, and its score is under the threshold")
            }
            Self::NothingBetter { best_gain: Some(gain), hysteresis } => {
                write!(
                    f,
                    "the best other pool gains {gain:.5}/h, which is not above the margin of {hysteresis:.5}/h"
                )
            }
            Self::NothingBetter { best_gain: None, .. } => write!(f, "no other pool is possible"),
            Self::NoPoolFits => write!(f, "the need exceeds the present pool, and no other pool can meet it"),
            Self::CoolDown { left_ms } => write!(f, "cooling down after a move: {left_ms} ms left"),
            Self::JustLeft { pool, left_ms } => {
                write!(f, "it left {pool} a short while ago, and may return in {left_ms} ms")
            }
            Self::BackOff { failures, left_ms, error } => {
                let error = error.as_deref().map_or_else(String::new, |error| format!(" ({error})"));
                write!(f, "waiting after {failures} failed move(s){error}: {left_ms} ms left")
            }
            Self::InFlight => write!(f, "a move is under way"),
            Self::OtherMoveFirst => write!(f, "another kind of move comes first"),
            Self::ToldToStay => write!(f, "its label {} says so", crate::rules::STAY),
            Self::OnNoPool => write!(f, "it is on no pool that plans use: a person can move it to one"),
            Self::Unmeasured { pool } => write!(f, "what {pool} gives is not known: {UNMEASURED}"),
        }
    }
}

/// Why a pool is out of the question for an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Dropped {
    /// The pool takes nobody.
    Unavailable {
        /// Why.
        reason: String,
    },
    /// It cannot give the cores.
    Cores {
        /// Needed there.
        needed: f64,
        /// Left there.
        available: f64,
    },
    /// It cannot give the memory.
    Memory {
        /// Needed there, in bytes.
        needed_bytes: u64,
        /// Left there, in bytes.
        available_bytes: u64,
    },
    /// As many moves as are allowed at once are on their way there.
    Busy {
        /// How many.
        moves: u32,
    },
    /// As many moves as are allowed at once use a host's link.
    LinkBusy {
        /// Whose.
        host: String,
        /// How many.
        moves: u32,
    },
    /// As many moves as are allowed in an hour went to or from a host in the last one.
    HourSpent {
        /// Which.
        host: String,
        /// How many.
        moves: u32,
    },
    /// It is being emptied.
    Draining,
    /// The instance's label names other pools.
    Pinned {
        /// Which.
        to: String,
    },
    /// Another one of its group, of which no two are to be on one host, is there.
    Apart {
        /// The group.
        group: String,
        /// The other one.
        with: InstanceName,
    },
    /// Its group, which is to be on one host, is elsewhere.
    Together {
        /// The group.
        group: String,
        /// Its first member.
        with: InstanceName,
    },
    /// It cannot give the requests or bytes per second.
    Flow {
        /// Needed there.
        needed: Flow,
        /// Left there.
        available: Flow,
    },
    /// It has no room for the volume.
    Space {
        /// Needed there, in bytes.
        needed_bytes: u64,
        /// Left there, in bytes.
        available_bytes: u64,
    },
    /// It left that a short while ago, and lacks nothing here but what others use: that may be what the kernel does for it, and
    /// would come along.
    LeftForOthers {
        /// Milliseconds until it may return for that.
        left_ms: u64,
    },
    /// Nobody knows what it gives.
    Unmeasured,
    /// Memory is written faster than the link can send it.
    WillNotConverge {
        /// Written, in bytes per second.
        dirty_bytes_per_s: f64,
        /// Sent, in bytes per second.
        link_bytes_per_s: f64,
    },
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable { reason } => write!(f, "unavailable: {reason}"),
            Self::Cores { needed, available } => write!(f, "needs {needed:.2} cores, has {available:.2}"),
            Self::Memory { needed_bytes, available_bytes } => {
                write!(f, "needs {} MiB, has {} MiB", needed_bytes >> 20, available_bytes >> 20)
            }
            Self::Busy { moves } => write!(f, "{moves} move(s) are on their way there"),
            Self::LinkBusy { host, moves } => write!(f, "{moves} move(s) use the link of {host}"),
            Self::HourSpent { host, moves } => {
                write!(f, "{moves} move(s) to and from {host} in the last hour are enough")
            }
            Self::Draining => write!(f, "it is being emptied"),
            Self::Pinned { to } => write!(f, "the instance is pinned to {to}"),
            Self::Apart { group, with } => write!(f, "{with} is there, and {group} is to be apart"),
            Self::Together { group, with } => write!(f, "{with} is elsewhere, and {group} is to be together"),
            Self::Flow { needed, available } => write!(
                f,
                "needs {:.0} requests/s and {:.2} MB/s, has {:.0} and {:.2}",
                needed.operations_per_s,
                needed.bytes_per_s / 1e6,
                available.operations_per_s,
                available.bytes_per_s / 1e6
            ),
            Self::Space { needed_bytes, available_bytes } => {
                write!(f, "needs {} MiB of room, has {} MiB", needed_bytes >> 20, available_bytes >> 20)
            }
            Self::LeftForOthers { left_ms } => {
                write!(
                    f,
                    "it left that a short while ago, and others' use here leads it back in {left_ms} ms only"
                )
            }
            Self::Unmeasured => write!(f, "what it gives is not known: {UNMEASURED}"),
            Self::WillNotConverge { dirty_bytes_per_s, link_bytes_per_s } => write!(
                f,
                "writes {:.1} MB/s, the link sends {:.1} MB/s",
                dirty_bytes_per_s / 1e6,
                link_bytes_per_s / 1e6
            ),
        }
    }
}
