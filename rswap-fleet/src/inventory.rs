//! Which hosts there are, what they have to sit on, and what runs where.
//!
//! Names of instances are unique on a host. In the fleet, the first that claims a name has it; another one is called `NAME.2`, and so
//! on. Whether an instance that appears on a host is one that came from another, or a twin, is known when that other host has
//! reported again; until then it is in no plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use rswap_types::{InstanceName, Pool, THIS_HOST, UnixMillis};
use serde::{Deserialize, Serialize};

pub use crate::placements::Placed;
use crate::{HostName, InstanceReport, Report, Running, placements::Placements};

/// An instance that is gone is remembered for so long, in milliseconds: it may appear on another host.
pub const GONE_MS: u64 = 5 * 60_000;
/// A host that has not reported for so many intervals is away.
pub const AWAY_INTERVALS: u64 = 3;
/// Measured links that are kept of a host at most.
pub const MOST_LINKS: usize = 1_000;

/// Free `key=value` pairs of the user's.
pub type Labels = BTreeMap<String, String>;

/// One host, as it was when it last reported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// When it was heard, by the controller's clock.
    pub heard: UnixMillis,
    /// When it made that report, by its own.
    pub at: UnixMillis,
    /// Whether its agent carries out what it is told.
    pub acts: bool,
    /// Where it takes migrations.
    pub address: Option<SocketAddr>,
    /// Which agent it is, and in which run of the kernel.
    pub running: Option<Running>,
    /// Its own pools.
    pub pools: Vec<Pool>,
    /// What runs there, by its name there; what it used and its labels are not in it.
    pub instances: BTreeMap<InstanceName, InstanceReport>,
    /// The labels of what has any, by its name there. Many have the same, and a map has room for
    /// eleven, however few there are.
    pub labels: BTreeMap<InstanceName, Arc<Labels>>,
    /// Bytes per second that migrations from here to other addresses had.
    pub links: BTreeMap<SocketAddr, f64>,
}

impl Host {
    /// The pool that stands for it as a whole.
    pub fn whole(&self) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == THIS_HOST)
    }
}

/// A change of where an instance is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which, by its name in the fleet.
    pub instance: InstanceName,
    /// Where it was.
    pub from: Option<HostName>,
    /// Where it is; `None`: it is gone.
    pub to: Option<HostName>,
}

/// The fleet.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// Shared, so that a plan can look at them while new reports take their place.
    hosts: BTreeMap<HostName, Arc<Host>>,
    placed: Placements,
    /// Appeared, and may be the one named here, which its host had in its last report; since when.
    unclear: BTreeMap<(HostName, InstanceName), (InstanceName, UnixMillis)>,
    /// Since when reports are listened to.
    since: UnixMillis,
}

impl Inventory {
    /// An inventory that knows where instances were when it was last kept.
    pub fn with_owners(
        owners: impl IntoIterator<Item = (InstanceName, HostName, InstanceName)>,
        now: UnixMillis,
    ) -> Self {
        let mut new = Self { since: now, ..Self::default() };
        for (name, host, local) in owners {
            // Gone until its host says that it is there.
            let placed = Placed { host, local, identity: String::new(), gone: Some(now) };
            new.placed.put(name, placed);
        }
        new
    }

    /// Takes in a report that is newer than all others of its host.
    pub fn take(&mut self, report: &Report, heard: UnixMillis) -> Vec<Change> {
        let mut links = self.hosts.get(&report.host).map_or_else(BTreeMap::new, |host| host.links.clone());
        let measured = || report.links.iter().map(|link| (link.to, link.bytes_per_s));
        links.extend(measured());
        if links.len() > MOST_LINKS {
            // More than any host migrates to: what it says now is all that is known.
            links = measured().take(MOST_LINKS).collect();
        }
        let instances = report.instances.iter().map(|one| {
            // What was used is history, not how it is.
            let (mut view, kin) = (one.view.clone(), one.kin.clone());
            view.labels = Labels::new();
            if view.demand.instance == view.instance {
                // Read twice, and kept once.
                view.demand.instance = view.instance.clone();
            }
            (view.instance.clone(), InstanceReport { view, kin, used: BTreeMap::new() })
        });
        let host = Host {
            heard,
            at: report.at,
            acts: report.acts,
            address: report.address,
            running: report.running.clone(),
            pools: report.pools.clone(),
            instances: instances.collect(),
            labels: labels(report),
            links,
        };
        let mut changes = Vec::new();
        let mut unnamed = Vec::new();
        for (local, one) in &host.instances {
            if !self.placed.is_taken(&report.host, local) {
                unnamed.push((local.clone(), one.kin.identity.clone()));
            }
        }
        let named: Vec<_> =
            self.placed.on(&report.host).map(|(name, local)| (name.clone(), local.clone())).collect();
        for (name, local) in named {
            match host.instances.get(&local) {
                Some(one) => {
                    if self.placed.set_gone(&name, None).is_some() {
                        let to = Some(report.host.clone());
                        changes.push(Change { instance: name.clone(), from: None, to });
                    }
                    self.placed.set_identity(&name, &one.kin.identity);
                }
                None if self.placed.get(&name).is_some_and(|placed| placed.gone.is_none()) => {
                    self.placed.set_gone(&name, Some(heard));
                    changes.push(Change { instance: name, from: Some(report.host.clone()), to: None });
                }
                None => {}
            }
        }
        self.unclear.retain(|(at, local), _| *at != report.host || host.instances.contains_key(local));
        self.hosts.insert(report.host.clone(), Arc::new(host));
        for (local, identity) in unnamed {
            let key = (report.host.clone(), local);
            if !self.unclear.contains_key(&key) {
                changes.extend(self.appeared(key, identity, heard));
            }
        }
        changes.extend(self.tick(heard));
        changes
    }

    /// An instance that no report named there before.
    fn appeared(
        &mut self,
        key: (HostName, InstanceName),
        identity: String,
        now: UnixMillis,
    ) -> Option<Change> {
        let same = |placed: &Placed| placed.identity == identity || placed.identity.is_empty();
        let alike: Vec<_> = self.placed.called(&key.1).filter(|(_, placed)| same(placed)).collect();
        let gone = alike.iter().find(|(_, placed)| placed.gone.is_some()).map(|(name, _)| (*name).clone());
        if let Some(name) = gone {
            return Some(self.came(&name, key, identity));
        }
        match alike.first().map(|(name, _)| (*name).clone()) {
            Some(name) => {
                self.unclear.insert(key, (name, now));
                None
            }
            None => Some(self.new_one(key, identity)),
        }
    }

    fn came(&mut self, name: &InstanceName, key: (HostName, InstanceName), identity: String) -> Change {
        let (host, local) = key;
        let to = Some(host.clone());
        let before = self.placed.put(name.clone(), Placed { host, local, identity, gone: None });
        Change { instance: name.clone(), from: before.map(|before| before.host), to }
    }

    fn new_one(&mut self, key: (HostName, InstanceName), identity: String) -> Change {
        let name = self.free_name(&key.1);
        self.came(&name, key, identity)
    }

    fn free_name(&self, local: &InstanceName) -> InstanceName {
        let mut name = local.clone();
        for number in 2u64.. {
            if self.placed.get(&name).is_none() {
                break;
            }
            let end = format!(".{number}");
            let kept = local.as_str().len().min(63 - end.len());
            // Names are ASCII.
            name = format!("{}{end}", &local.as_str()[..kept]).parse().unwrap_or(name);
        }
        name
    }

    /// What time alone makes clear.
    pub fn tick(&mut self, now: UnixMillis) -> Vec<Change> {
        let mut changes = Vec::new();
        for (key, (name, since)) in std::mem::take(&mut self.unclear) {
            let identity = self.hosts.get(&key.0).and_then(|host| host.instances.get(&key.1));
            let identity = identity.map(|one| one.kin.identity.clone()).unwrap_or_default();
            let before = self.placed.get(&name);
            let reported = before.and_then(|before| self.hosts.get(&before.host)).map(|host| host.heard);
            let gone = before.is_none_or(|before| before.gone.is_some());
            if gone && before.is_some() {
                changes.push(self.came(&name, key, identity));
            } else if gone || reported.is_some_and(|at| at > since) || now.since(since) >= GONE_MS {
                changes.push(self.new_one(key, identity));
            } else {
                self.unclear.insert(key, (name, since));
            }
        }
        let long_ago = now.0.checked_sub(GONE_MS).map(UnixMillis);
        for name in long_ago.map_or_else(Vec::new, |until| self.placed.gone_until(until)) {
            if let Some(placed) = self.placed.remove(&name) {
                changes.push(Change { instance: name, from: Some(placed.host), to: None });
            }
        }
        changes
    }

    /// All hosts.
    pub fn hosts(&self) -> &BTreeMap<HostName, Arc<Host>> {
        &self.hosts
    }

    /// What ran on a host when it last reported; of one that was not heard of since the beginning, what was kept of it.
    pub fn last_on(&self, host: &HostName) -> Vec<InstanceName> {
        let heard = self.hosts.contains_key(host);
        let is_there =
            |name: &InstanceName| self.placed.get(name).is_some_and(|placed| placed.gone.is_none());
        let there = self.placed.on(host).map(|(name, _)| name);
        there.filter(|name| !heard || is_there(name)).cloned().collect()
    }

    /// Takes a host out: it has left the fleet. What ran there is gone.
    pub fn forget_host(&mut self, host: &HostName, now: UnixMillis) {
        self.hosts.remove(host);
        self.unclear.retain(|(on, _), _| on != host);
        let there: Vec<_> = self.placed.on(host).map(|(name, _)| name.clone()).collect();
        for name in there {
            if self.placed.get(&name).is_some_and(|placed| placed.gone.is_none()) {
                self.placed.set_gone(&name, Some(now));
            }
        }
    }

    /// What runs, by its name in the fleet; without what is gone.
    pub fn instances(&self) -> impl Iterator<Item = (&InstanceName, &Placed)> {
        self.placed.iter().filter(|(_, placed)| placed.gone.is_none())
    }

    /// [`Inventory::instances`] whose names come after this one; all of them after none.
    pub fn instances_after(
        &self,
        name: Option<&InstanceName>,
    ) -> impl Iterator<Item = (&InstanceName, &Placed)> {
        self.placed.after(name).filter(|(_, placed)| placed.gone.is_none())
    }

    /// How many instances run: found without a look at each.
    pub fn count(&self) -> usize {
        self.placed.present()
    }

    /// Where an instance is.
    pub fn placed(&self, name: &InstanceName) -> Option<&Placed> {
        self.placed.get(name).filter(|placed| placed.gone.is_none())
    }

    /// Whether an instance is there, or was a short while ago.
    pub fn is_known(&self, name: &InstanceName) -> bool {
        self.placed.get(name).is_some()
    }

    /// Instances that may be others on their way, or twins: on which host, their name there, and which they may be.
    pub fn unclear(&self) -> impl Iterator<Item = (&HostName, &InstanceName, &InstanceName)> {
        self.unclear.iter().map(|((host, local), (name, _))| (host, local, name))
    }

    /// An instance's labels, as its host last reported them; `None` if it has none, or its host has not said it.
    pub fn labels(&self, placed: &Placed) -> Option<&Labels> {
        self.hosts.get(&placed.host)?.labels.get(&placed.local).map(Arc::as_ref)
    }

    /// An instance's last report, without what it used and its labels.
    pub fn report(&self, placed: &Placed) -> Option<&InstanceReport> {
        self.hosts.get(&placed.host)?.instances.get(&placed.local)
    }

    /// The names in the fleet of what is on a host, by the name there; what is gone among them.
    pub fn names(&self, host: &HostName) -> Arc<BTreeMap<InstanceName, InstanceName>> {
        self.placed.names(host)
    }

    /// Whether a host has not reported for long, which one that was not heard of yet has had time for since the beginning.
    pub fn is_away(&self, host: &HostName, interval_ms: u64, now: UnixMillis) -> bool {
        let heard = self.hosts.get(host).map_or(self.since, |host| host.heard);
        now.since(heard) > interval_ms.saturating_mul(AWAY_INTERVALS)
    }
}

/// The labels of what has any, each set of them once.
fn labels(report: &Report) -> BTreeMap<InstanceName, Arc<Labels>> {
    let mut distinct: BTreeSet<Arc<Labels>> = BTreeSet::new();
    let mut all = BTreeMap::new();
    for view in report.instances.iter().map(|one| &one.view).filter(|view| !view.labels.is_empty()) {
        let labels = distinct.get(&view.labels).cloned().unwrap_or_else(|| Arc::new(view.labels.clone()));
        distinct.insert(labels.clone());
        all.insert(view.instance.clone(), labels);
    }
    all
}
