//! The one file.

use std::{collections::BTreeMap, path::Path};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use rswap_fleet::{HostName, Roll, amounts::Tier};
use rswap_forecast::{Lessons, Part};
use rswap_types::{InstanceName, UnixMillis};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    Knowledge, Maintenance, Member, Membership, Owner, OwnerChange, Ownership, StoreError, Taught,
    error::failed,
};

/// Version of what is in the file.
const VERSION: u64 = 1;
/// Memory for pages of the file.
const CACHE_BYTES: usize = 64 << 20;

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const MEMBERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("members");
const OWNERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("owners");
/// As JSON, since its stages name themselves; its key is empty.
const ROLL: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("roll");
/// (host, part) -> lessons.
const LESSONS: TableDefinition<'_, (&str, &[u8]), &[u8]> = TableDefinition::new("lessons");

/// Everything that a controller keeps, in one file. Locked while it is open: there is no second process.
pub struct Store {
    pub(crate) database: Database,
    pub(crate) tiers: Vec<Tier>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("tiers", &self.tiers).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the file, or makes it. After a crash it is repaired first.
    ///
    /// # Errors
    ///
    /// If it can't be opened or made, is another process's, damaged, or of another release.
    pub fn open(path: &Path, tiers: &[Tier]) -> Result<Self, StoreError> {
        let open = |source: redb::Error| StoreError::Open { path: path.to_owned(), source: Box::new(source) };
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(path);
        let database = database.map_err(|error| open(error.into()))?;
        let store = Self { database, tiers: tiers.to_vec() };
        let found = store.number("version", |version| (version == 0).then_some(VERSION))?;
        match found {
            VERSION => Ok(store),
            found => Err(StoreError::Version { found, known: VERSION }),
        }
    }

    /// Changes a number, and says what it is then.
    fn number(&self, name: &str, change: impl FnOnce(u64) -> Option<u64>) -> Result<u64, StoreError> {
        let attempted = "change a number";
        let write = self.database.begin_write().map_err(failed(attempted))?;
        let number = {
            let mut table = write.open_table(META).map_err(failed(attempted))?;
            let before = table.get(name).map_err(failed(attempted))?.map_or(0, |found| found.value());
            let after = change(before).unwrap_or(before);
            table.insert(name, after).map_err(failed(attempted))?;
            after
        };
        write.commit().map_err(failed(attempted))?;
        Ok(number)
    }

    fn all<T: DeserializeOwned>(
        &self,
        of: TableDefinition<'_, &str, &[u8]>,
        what: &'static str,
    ) -> Result<Vec<(String, T)>, StoreError> {
        let attempted = "list what is kept";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(of) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let rows = table.iter().map_err(failed(attempted))?;
        rows.map(|row| {
            let (key, value) = row.map_err(failed(attempted))?;
            Ok((key.value().to_owned(), decode(value.value(), what)?))
        })
        .collect()
    }
}

/// Keys were names when they were written.
fn named<K: std::str::FromStr + Ord, T>(rows: Vec<(String, T)>) -> BTreeMap<K, T> {
    rows.into_iter().filter_map(|(key, value)| Some((key.parse().ok()?, value))).collect()
}

impl Membership for Store {
    fn new_life(&self) -> Result<u64, StoreError> {
        // Agents follow no earlier life than one that they have heard of: where the file was lost, the time is later still.
        let now = UnixMillis::now().0;
        self.number("life", |life| Some(now.max(life.saturating_add(1))))
    }

    fn members(&self) -> Result<BTreeMap<HostName, Member>, StoreError> {
        Ok(named(self.all(MEMBERS, "a member")?))
    }

    fn put_members(&self, members: &[(HostName, Member)]) -> Result<(), StoreError> {
        let attempted = "keep a member";
        let write = self.database.begin_write().map_err(failed(attempted))?;
        {
            let mut table = write.open_table(MEMBERS).map_err(failed(attempted))?;
            for (host, member) in members {
                let member = encode(member, "a member")?;
                table.insert(host.as_str(), member.as_slice()).map_err(failed(attempted))?;
            }
        }
        write.commit().map_err(failed(attempted))
    }

    fn remove_member(&self, host: &HostName) -> Result<(), StoreError> {
        let attempted = "remove a member";
        let write = self.database.begin_write().map_err(failed(attempted))?;
        {
            let mut table = write.open_table(MEMBERS).map_err(failed(attempted))?;
            table.remove(host.as_str()).map_err(failed(attempted))?;
        }
        write.commit().map_err(failed(attempted))
    }
}

impl Ownership for Store {
    fn owner(&self, instance: &InstanceName) -> Result<Option<Owner>, StoreError> {
        let attempted = "look up an owner";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(OWNERS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let found = table.get(instance.as_str()).map_err(failed(attempted))?;
        found.map(|found| decode(found.value(), "an owner")).transpose()
    }

    fn owners(&self) -> Result<BTreeMap<InstanceName, Owner>, StoreError> {
        Ok(named(self.all(OWNERS, "an owner")?))
    }

    fn compare_and_set(&self, changes: &[OwnerChange]) -> Result<Vec<bool>, StoreError> {
        let attempted = "set owners";
        let write = self.database.begin_write().map_err(failed(attempted))?;
        let mut made = Vec::with_capacity(changes.len());
        {
            let mut table = write.open_table(OWNERS).map_err(failed(attempted))?;
            for OwnerChange { instance, expected, new } in changes {
                let found: Option<Owner> = {
                    let found = table.get(instance.as_str()).map_err(failed(attempted))?;
                    found.map(|found| decode(found.value(), "an owner")).transpose()?
                };
                let is_expected = found == *expected;
                made.push(is_expected);
                if !is_expected {
                    continue;
                }
                match new {
                    Some(new) => {
                        let new = encode(new, "an owner")?;
                        table.insert(instance.as_str(), new.as_slice()).map_err(failed(attempted))?;
                    }
                    None => drop(table.remove(instance.as_str()).map_err(failed(attempted))?),
                }
            }
        }
        write.commit().map_err(failed(attempted))?;
        Ok(made)
    }
}

impl Maintenance for Store {
    fn roll(&self) -> Result<Option<Roll>, StoreError> {
        let attempted = "read the roll";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(ROLL) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let found = table.get("").map_err(failed(attempted))?;
        found.map(|found| serde_json::from_slice(found.value()).map_err(StoreError::Roll)).transpose()
    }

    fn put_roll(&self, roll: Option<&Roll>) -> Result<(), StoreError> {
        let attempted = "keep the roll";
        let roll = roll.map(serde_json::to_vec).transpose().map_err(StoreError::Roll)?;
        let write = self.database.begin_write().map_err(failed(attempted))?;
        {
            let mut table = write.open_table(ROLL).map_err(failed(attempted))?;
            match roll {
                Some(roll) => drop(table.insert("", roll.as_slice()).map_err(failed(attempted))?),
                None => drop(table.remove("").map_err(failed(attempted))?),
            }
        }
        write.commit().map_err(failed(attempted))
    }
}

impl Knowledge for Store {
    fn lessons(&self) -> Result<Vec<(HostName, Part, Lessons)>, StoreError> {
        let attempted = "read what was taught";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(LESSONS) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let mut found = Vec::new();
        for row in table.iter().map_err(failed(attempted))? {
            let (key, value) = row.map_err(failed(attempted))?;
            let (host, part) = key.value();
            // What another release has taught is of no use: it is taught anew.
            let lessons = decode::<Lessons>(value.value(), "lessons");
            if let (Ok(host), Ok(part), Ok(lessons)) = (host.parse(), decode(part, "a part"), lessons) {
                found.push((host, part, lessons));
            }
        }
        Ok(found)
    }

    fn put_lessons(&self, taught: &[Taught]) -> Result<(), StoreError> {
        let attempted = "keep what was taught";
        let mut write = self.database.begin_write().map_err(failed(attempted))?;
        // On the disk with the next append: what is lost until then is taught again.
        write.set_durability(Durability::None).map_err(failed(attempted))?;
        {
            let mut table = write.open_table(LESSONS).map_err(failed(attempted))?;
            for (host, part, lessons) in
                taught.iter().flat_map(|(host, of)| of.iter().map(move |(p, l)| (host, p, l)))
            {
                let (part, lessons) = (encode(part, "a part")?, encode(lessons, "lessons")?);
                table
                    .insert((host.as_str(), part.as_slice()), lessons.as_slice())
                    .map_err(failed(attempted))?;
            }
        }
        write.commit().map_err(failed(attempted))
    }

    fn drop_lessons(&self, of: &[(HostName, Part)]) -> Result<(), StoreError> {
        if of.is_empty() {
            return Ok(());
        }
        let attempted = "drop what was taught";
        let mut write = self.database.begin_write().map_err(failed(attempted))?;
        // What comes back is dropped again.
        write.set_durability(Durability::None).map_err(failed(attempted))?;
        {
            let mut table = write.open_table(LESSONS).map_err(failed(attempted))?;
            for (host, part) in of {
                let part = encode(part, "a part")?;
                table.remove((host.as_str(), part.as_slice())).map_err(failed(attempted))?;
            }
        }
        write.commit().map_err(failed(attempted))
    }
}

pub(crate) fn encode(value: &impl Serialize, what: &'static str) -> Result<Vec<u8>, StoreError> {
    postcard::to_stdvec(value).map_err(|source| StoreError::Value { what, source })
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8], what: &'static str) -> Result<T, StoreError> {
    postcard::from_bytes(bytes).map_err(|source| StoreError::Value { what, source })
}
