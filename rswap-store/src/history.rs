//! The history in the store's file: a table per tier, a row per host and span of time.
//!
//! Each entry is added to the row of every tier in the one transaction that also notes its sequence number. So coarse rows are exact sums of
//! fine ones at any moment, whatever comes late, comes twice, or is cut off; nothing has to be caught up on later.

use std::{collections::BTreeMap, thread, time::Duration};

use redb::{Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction};
use rswap_fleet::{HostName, amounts::Tier, sequence::Received};
use rswap_types::UnixMillis;

use crate::{
    Amounts, Entry, History, Query, Row, Store, StoreError,
    error::failed,
    store::{decode, encode},
};

/// (host, beginning of the row in milliseconds) -> [`Amounts`].
type Rows<'a> = TableDefinition<'a, (&'static str, u64), &'static [u8]>;
const RECEIVED: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("received");

/// Hosts whose old rows are dropped in one transaction: there is one at a time, and reports wait for it.
const TRIMMED_AT_ONCE: usize = 32;
/// Between two of them.
const LET_IN: Duration = Duration::from_millis(1);

fn rows(name: &str) -> Rows<'_> {
    TableDefinition::new(name)
}

/// A tier's table is named by what its rows are, not by its place: tiers may be added between others.
fn table_name(tier: &Tier) -> String {
    format!("history {} ms", tier.row_ms)
}

impl History for Store {
    fn append(&self, entries: &[Entry], now: UnixMillis) -> Result<Vec<bool>, StoreError> {
        let attempted = "append to the history";
        let write = self.database.begin_write().map_err(failed(attempted))?;
        let new = append(&write, entries, &self.tiers, now)?;
        write.commit().map_err(failed(attempted))?;
        Ok(new)
    }

    fn received(&self, host: &HostName) -> Result<Received, StoreError> {
        let attempted = "read what was received";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(RECEIVED) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Received::default()),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let found = table.get(host.as_str()).map_err(failed(attempted))?;
        found.map_or_else(|| Ok(Received::default()), |found| decode(found.value(), "what was received"))
    }

    fn read(&self, query: &Query) -> Result<Vec<Row>, StoreError> {
        let attempted = "read the history";
        let tier = self.tiers.get(query.tier).ok_or(StoreError::Tier(self.tiers.len(), query.tier))?;
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let name = table_name(tier);
        let table = match read.open_table(rows(&name)) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let host = query.host.as_str();
        let range = table.range((host, query.from.0)..(host, query.to.0)).map_err(failed(attempted))?;
        let mut found = Vec::new();
        for row in range {
            let (key, value) = row.map_err(failed(attempted))?;
            let mut used: Amounts = decode(value.value(), "a row")?;
            if let Some(of) = used.remove(&query.instance) {
                found.push((UnixMillis(key.value().1), of));
            }
        }
        Ok(found)
    }

    fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    fn trim(&self, now: UnixMillis) -> Result<u64, StoreError> {
        let mut dropped = 0;
        for hosts in self.hosts_received()?.chunks(TRIMMED_AT_ONCE) {
            dropped += self.trim_hosts(hosts, now)?;
            // Whoever waits to append goes first.
            thread::sleep(LET_IN);
        }
        Ok(dropped)
    }
}

impl Store {
    fn trim_hosts(&self, hosts: &[String], now: UnixMillis) -> Result<u64, StoreError> {
        let attempted = "drop old history";
        let mut write = self.database.begin_write().map_err(failed(attempted))?;
        // On the disk with the next append: what comes back until then is dropped again.
        write.set_durability(Durability::None).map_err(failed(attempted))?;
        let mut dropped = 0;
        for tier in &self.tiers {
            let name = table_name(tier);
            let mut table = write.open_table(rows(&name)).map_err(failed(attempted))?;
            let oldest = tier.oldest_kept(now).0;
            for host in hosts {
                let host = host.as_str();
                table
                    .retain_in((host, 0)..(host, oldest), |_, _| {
                        dropped += 1;
                        false
                    })
                    .map_err(failed(attempted))?;
            }
        }
        write.commit().map_err(failed(attempted))?;
        Ok(dropped)
    }

    fn hosts_received(&self) -> Result<Vec<String>, StoreError> {
        let attempted = "list the hosts";
        let read = self.database.begin_read().map_err(failed(attempted))?;
        let table = match read.open_table(RECEIVED) {
            Ok(table) => table,
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(error) => return Err(failed(attempted)(error)),
        };
        let all = table.iter().map_err(failed(attempted))?;
        all.map(|row| row.map(|(host, _)| host.value().to_owned()).map_err(failed(attempted))).collect()
    }
}

fn append(
    write: &WriteTransaction,
    entries: &[Entry],
    tiers: &[Tier],
    now: UnixMillis,
) -> Result<Vec<bool>, StoreError> {
    let attempted = "append to the history";
    let mut new = Vec::with_capacity(entries.len());
    let mut received = write.open_table(RECEIVED).map_err(failed(attempted))?;
    // Of one host, many may come at once: their rows are written once.
    let mut changed: BTreeMap<&HostName, Received> = BTreeMap::new();
    for entry in entries {
        let of = match changed.entry(&entry.host) {
            std::collections::btree_map::Entry::Occupied(of) => of.into_mut(),
            std::collections::btree_map::Entry::Vacant(none) => {
                let found = received.get(entry.host.as_str()).map_err(failed(attempted))?;
                let found = found.map(|found| decode(found.value(), "what was received")).transpose()?;
                none.insert(found.unwrap_or_default())
            }
        };
        new.push(of.take(entry.epoch, entry.sequence));
    }
    for (host, of) in &changed {
        let of = encode(of, "what was received")?;
        received.insert(host.as_str(), of.as_slice()).map_err(failed(attempted))?;
    }
    for tier in tiers {
        let oldest = tier.oldest_kept(now);
        let mut sums: BTreeMap<(&HostName, UnixMillis), Amounts> = BTreeMap::new();
        for (entry, _) in entries.iter().zip(&new).filter(|(_, new)| **new) {
            let row = tier.row_of(entry.at);
            if row >= oldest {
                add(sums.entry((&entry.host, row)).or_default(), &entry.used);
            }
        }
        let name = table_name(tier);
        let mut table = write.open_table(rows(&name)).map_err(failed(attempted))?;
        for ((host, row), mut sum) in sums {
            let key = (host.as_str(), row.0);
            if let Some(before) = table.get(key).map_err(failed(attempted))? {
                add(&mut sum, &decode(before.value(), "a row")?);
            }
            let sum = encode(&sum, "a row")?;
            table.insert(key, sum.as_slice()).map_err(failed(attempted))?;
        }
    }
    Ok(new)
}

fn add(to: &mut Amounts, more: &Amounts) {
    for (instance, used) in more {
        let of = to.entry(instance.clone()).or_default();
        for (resource, sum) in used {
            of.entry(*resource).or_default().merge(sum);
        }
    }
}
