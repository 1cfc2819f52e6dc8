//! What a controller keeps.
//!
//! | trait | what | what may take its place in a large fleet |
//! | --- | --- | --- |
//! | [`History`] | what instances used, per report, minute and hour | a Prometheus-compatible database |
//! | [`Membership`] | which hosts belong to the fleet, and what is wanted of them | etcd |
//! | [`Ownership`] | which host an instance is on, changed by compare-and-set | etcd |
//! | [`Maintenance`] | the roll over hosts that is under way | etcd |
//! | [`Knowledge`] | what hosts have taught | |
//!
//! [`Store`] is all of them in one file. What a call has answered is on the disk; a process that is killed in the middle of a write
//! leaves all of it or nothing.

mod error;
mod history;
mod store;

use std::collections::BTreeMap;

use rswap_fleet::{
    HostName, Roll,
    amounts::{Sum, Tier},
    sequence::Received,
};
use rswap_forecast::{Lessons, Part, Resource};
use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};

pub use error::StoreError;
pub use store::Store;

/// What instances used: per instance and resource.
pub type Amounts = BTreeMap<InstanceName, BTreeMap<Resource, Sum>>;

/// One report's part of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of which host.
    pub host: HostName,
    /// The spool that its sequence counts in.
    pub epoch: u64,
    /// Its number there: an entry that was stored before does nothing.
    pub sequence: u64,
    /// The moment that it counts for.
    pub at: UnixMillis,
    /// What was used.
    pub used: Amounts,
}

/// What is asked of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// On which host.
    pub host: HostName,
    /// By its name there.
    pub instance: InstanceName,
    /// Rows that begin from here on,
    pub from: UnixMillis,
    /// up to here, exclusive.
    pub to: UnixMillis,
    /// Which of the store's tiers, the finest is 0.
    pub tier: usize,
}

/// When a row begins, and what was used in it.
pub type Row = (UnixMillis, BTreeMap<Resource, Sum>);

/// What instances used.
pub trait History: Send + Sync {
    /// Stores entries, all or none of them: they are on the disk when it returns. For each, whether it was new.
    ///
    /// # Errors
    ///
    /// If the store fails; nothing of it may be taken for stored then.
    fn append(&self, entries: &[Entry], now: UnixMillis) -> Result<Vec<bool>, StoreError>;

    /// What was received of a host.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn received(&self, host: &HostName) -> Result<Received, StoreError>;

    /// Rows of an instance, the oldest first.
    ///
    /// # Errors
    ///
    /// If the store fails, or has no such tier.
    fn read(&self, query: &Query) -> Result<Vec<Row>, StoreError>;

    /// The tiers, the finest first.
    fn tiers(&self) -> &[Tier];

    /// Drops what is older than its tier keeps, and says how many rows that were. Others may append meanwhile; what is dropped may come back
    /// if the process ends before the next of them.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn trim(&self, now: UnixMillis) -> Result<u64, StoreError>;
}

/// A host of the fleet, as it is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// When it first reported.
    pub joined: UnixMillis,
    /// It is to be left by all instances, and entered by none.
    pub drained: bool,
    /// It was, and its agent is still to be told that it may be used again.
    pub undo: bool,
}

impl Member {
    /// The same, to be left, or to be used again: which its agent is told if it was to be left before.
    pub fn wanted(self, drained: bool) -> Self {
        Self { drained, undo: !drained && (self.drained || self.undo), ..self }
    }
}

/// Which hosts belong to the fleet.
pub trait Membership: Send + Sync {
    /// Begins another life of the controller, and says which it is: it is on the disk when it returns. It is greater than all before it, also
    /// than those that are not known any more, and at least the time in milliseconds.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn new_life(&self) -> Result<u64, StoreError>;

    /// All members.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn members(&self) -> Result<BTreeMap<HostName, Member>, StoreError>;

    /// Adds members, or changes what is wanted of them; all or none.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn put_members(&self, members: &[(HostName, Member)]) -> Result<(), StoreError>;

    /// Takes a member out. What it has taught, and its history, stay.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn remove_member(&self, host: &HostName) -> Result<(), StoreError>;
}

/// Where an instance is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// On which host.
    pub host: HostName,
    /// Its name there.
    pub local: InstanceName,
    /// Since when.
    pub since: UnixMillis,
    /// Where it was before, the latest last: its history is there.
    pub before: Vec<(HostName, InstanceName)>,
}

/// Hosts that are remembered of an instance.
pub const MOST_BEFORE: usize = 16;

/// Which host an instance is on.
pub trait Ownership: Send + Sync {
    /// Who owns an instance, by its name in the fleet.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn owner(&self, instance: &InstanceName) -> Result<Option<Owner>, StoreError>;

    /// All of them.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn owners(&self) -> Result<BTreeMap<InstanceName, Owner>, StoreError>;

    /// Makes each change whose instance has the expected owner, and says of each whether it had.
    ///
    /// # Errors
    ///
    /// If the store fails; none is made then.
    fn compare_and_set(&self, changes: &[OwnerChange]) -> Result<Vec<bool>, StoreError>;
}

/// A change of who owns an instance; `None` is nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerChange {
    /// Which, by its name in the fleet.
    pub instance: InstanceName,
    /// Who owns it now, as far as is known.
    pub expected: Option<Owner>,
    /// Who is to own it.
    pub new: Option<Owner>,
}

/// The work that goes over hosts, one after the other.
pub trait Maintenance: Send + Sync {
    /// The roll that was kept last.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn roll(&self) -> Result<Option<Roll>, StoreError>;

    /// Keeps a roll in place of the one before, or none: it is on the disk when it returns.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn put_roll(&self, roll: Option<&Roll>) -> Result<(), StoreError>;
}

/// What a host has taught.
pub type Taught = (HostName, Vec<(Part, Lessons)>);

/// What hosts have taught.
pub trait Knowledge: Send + Sync {
    /// All of it: from whom, of what, and what.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn lessons(&self) -> Result<Vec<(HostName, Part, Lessons)>, StoreError>;

    /// Keeps what hosts have taught of these parts, in place of what it had taught of them before.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn put_lessons(&self, taught: &[Taught]) -> Result<(), StoreError>;

    /// Keeps nothing more of what these hosts have taught of these parts.
    ///
    /// # Errors
    ///
    /// If the store fails.
    fn drop_lessons(&self, of: &[(HostName, Part)]) -> Result<(), StoreError>;
}

/// The tiers of a store that nobody has configured: reports for an hour, minutes for two days, hours for half a year.
pub const TIERS: [Tier; 3] = [
    Tier { row_ms: 0, kept_ms: 3_600_000 },
    Tier { row_ms: 60_000, kept_ms: 48 * 3_600_000 },
    Tier { row_ms: 3_600_000, kept_ms: 183 * 24 * 3_600_000 },
];
