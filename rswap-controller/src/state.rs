//! What the controller knows at the moment, and how reports change it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
};

use rswap_fleet::{
    Action, HostName, Inventory, Model, Order, OrderOutcome, Report, Roll,
    inventory::Change,
    orders::{Book, Subject},
};
use rswap_forecast::{Lessons, Part};
use rswap_plan::Plan;
use rswap_store::{MOST_BEFORE, Member, Owner, OwnerChange, StoreError};
use rswap_types::{InstanceName, PoolState, THIS_HOST, UnixMillis};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{metrics::OrderCounts, server::Controller};

/// An order to drain may be begun within so long, in milliseconds; it is given again as long as it is wanted.
const DRAIN_WITHIN_MS: u64 = 5 * 60_000;
/// Outcomes that are shown.
const OUTCOMES_SHOWN: usize = 200;

/// Everything but what is stored.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) inventory: Inventory,
    pub(crate) model: Model,
    pub(crate) book: Book,
    pub(crate) members: BTreeMap<HostName, Member>,
    pub(crate) owners: BTreeMap<InstanceName, Owner>,
    /// Shared: whoever shows it takes longer than others may wait.
    pub(crate) plan: Arc<Plan>,
    /// Migrations that are ordered, by where they go.
    pub(crate) coming: BTreeMap<HostName, usize>,
    /// Ended orders, for the planner and for people, the latest last.
    pub(crate) ended: Vec<Ended>,
    pub(crate) outcomes: std::collections::VecDeque<Ended>,
    pub(crate) counts: Counts,
    pub(crate) order_counts: OrderCounts,
    /// Rolling maintenance that is under way, or was last.
    pub(crate) roll: Option<Roll>,
}

/// What came of an order.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = EndedOrder)]
pub(crate) struct Ended {
    /// The order.
    pub(crate) order: Order,
    /// `None`: nobody began it in time.
    pub(crate) outcome: Option<OrderOutcome>,
    /// When that was known.
    pub(crate) at: UnixMillis,
}

/// Since the controller's start.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub(crate) struct Counts {
    /// Reports that were taken.
    pub(crate) reports_taken: u64,
    /// Of a host, by the certificate of somebody else.
    pub(crate) reports_foreign: u64,
    /// Calls of members that report more often than they may.
    pub(crate) reports_hasty: u64,
    /// Parts of lessons that were taken.
    pub(crate) lessons_taken: u64,
    /// Parts of lessons that were refused.
    pub(crate) lessons_refused: u64,
}

/// Of one envelope, the reports that are new, and the lessons.
pub(crate) struct Taken<'a> {
    pub(crate) host: &'a HostName,
    pub(crate) reports: Vec<&'a Report>,
    pub(crate) lessons: &'a [(Part, Lessons)],
}

/// What has changed in memory and is not stored yet: all of it, if the store failed, until it is written with a later batch.
#[derive(Debug, Default)]
pub(crate) struct Unwritten {
    /// Written as they are then.
    members: BTreeSet<HostName>,
    /// In the order in which they came: each expects the one before.
    owners: Vec<OwnerChange>,
    /// What was taught, and is not kept any more.
    forgotten: BTreeSet<(HostName, Part)>,
}

impl State {
    /// Hosts that are to be left.
    pub(crate) fn drained(&self) -> BTreeSet<HostName> {
        self.members.iter().filter(|(_, member)| member.drained).map(|(host, _)| host.clone()).collect()
    }

    pub(crate) fn end(&mut self, order: Order, outcome: Option<OrderOutcome>, at: UnixMillis) {
        let ended = Ended { order, outcome, at };
        self.order_counts.count(&ended);
        self.ended.push(ended.clone());
        self.outcomes.push_back(ended);
        while self.outcomes.len() > OUTCOMES_SHOWN {
            self.outcomes.pop_front();
        }
    }

    /// What is to become of owners by these changes.
    fn owner_changes(&self, changes: &[Change], now: UnixMillis) -> Vec<OwnerChange> {
        let mut owners = Vec::new();
        for change in changes {
            let name = &change.instance;
            let before = self.owners.get(name);
            let new = match &change.to {
                // What is gone for good has no owner; what is gone for a while still has.
                None if self.inventory.is_known(name) => continue,
                None => None,
                Some(host) => {
                    let Some(placed) = self.inventory.placed(name) else { continue };
                    if before.is_some_and(|owner| owner.host == *host && owner.local == placed.local) {
                        continue;
                    }
                    let mut earlier = before.map_or_else(Vec::new, |owner| owner.before.clone());
                    earlier.extend(before.map(|owner| (owner.host.clone(), owner.local.clone())));
                    let from = earlier.len().saturating_sub(MOST_BEFORE);
                    Some(Owner {
                        host: host.clone(),
                        local: placed.local.clone(),
                        since: now,
                        before: earlier.split_off(from),
                    })
                }
            };
            owners.push(OwnerChange { instance: name.clone(), expected: before.cloned(), new });
        }
        owners
    }

    /// Whether the host may be used again, and says for the first time that it is.
    fn undone(&mut self, host: &HostName) -> bool {
        let whole = self.inventory.hosts().get(host).and_then(|host| host.whole());
        // An order that waits may make it otherwise yet.
        let ready = whole.is_some_and(|whole| whole.state == PoolState::Ready) && self.told(host).is_none();
        match self.members.get_mut(host) {
            Some(member) if ready && member.undo => {
                member.undo = false;
                true
            }
            _ => false,
        }
    }

    /// What the host is being told of its own pool: whether that is to be used again.
    fn told(&self, host: &HostName) -> Option<bool> {
        match self.book.about(host, Subject::Pool(THIS_HOST.to_owned()))?.action {
            Action::Drain { undo, .. } => Some(undo),
            Action::Migrate { .. } => None,
        }
    }

    /// What waits and is not wanted any more is overtaken at once; all else is ordered when the host reports.
    pub(crate) fn overtake(&mut self, host: &HostName, now: UnixMillis) {
        let drained = self.members.get(host).is_some_and(|member| member.drained);
        if self.told(host).is_some_and(|undo| undo == drained) {
            self.drain_wish(host, now);
        }
    }

    /// Whether the host's own pool differs from what is wanted, or will by an order that its agent may have by now: then what is wanted is
    /// ordered, and overtakes that.
    fn drain_wish(&mut self, host: &HostName, now: UnixMillis) {
        let Some(member) = self.members.get(host) else { return };
        let Some(known) = self.inventory.hosts().get(host) else { return };
        let Some(whole) = known.whole().filter(|_| known.acts) else { return };
        let differs = match whole.state {
            PoolState::Ready => member.drained,
            // A person at the host may have drained it: only what this controller has asked for is undone by it.
            PoolState::Draining => !member.drained && member.undo,
            PoolState::Unavailable { .. } => false,
        };
        let overtakes = self.told(host).is_some_and(|undo| undo == member.drained);
        if differs || overtakes {
            let action = Action::Drain { pool: THIS_HOST.to_owned(), undo: !member.drained };
            self.book.give(host, action, DRAIN_WITHIN_MS, now);
        }
    }
}

impl Controller {
    /// Takes in what is new of a batch; what has to be kept of it, and of batches before, is kept when this returns. Nobody
    /// waits for the state longer than one host of the batch takes.
    ///
    /// A batch that comes again because of an error is not new any more: what it changed is in `unwritten` until then.
    pub(crate) fn take(
        &self,
        taken: &[Taken<'_>],
        unwritten: &mut Unwritten,
        now: UnixMillis,
    ) -> Result<(), StoreError> {
        let mut taught = Vec::new();
        // Else what somebody wants meanwhile could be overwritten by what was known before.
        let wishes = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        for of in taken {
            self.with_state(|state| {
                for report in &of.reports {
                    state.counts.reports_taken += 1;
                    if !state.members.contains_key(of.host) {
                        let member = Member { joined: now, ..Member::default() };
                        state.members.insert(of.host.clone(), member);
                        unwritten.members.insert(of.host.clone());
                    }
                    for outcome in &report.outcomes {
                        if let Some(order) = state.book.ended(of.host, outcome) {
                            state.end(order, Some(outcome.clone()), now);
                        }
                    }
                    let changes = state.inventory.take(report, now);
                    let changes = state.owner_changes(&changes, now);
                    for change in &changes {
                        match &change.new {
                            Some(new) => drop(state.owners.insert(change.instance.clone(), new.clone())),
                            None => drop(state.owners.remove(&change.instance)),
                        }
                    }
                    unwritten.owners.extend(changes);
                }
                if state.undone(of.host) {
                    unwritten.members.insert(of.host.clone());
                }
                if self.settings.acts {
                    state.drain_wish(of.host, now);
                }
                let mut good = Vec::new();
                for (part, lessons) in of.lessons {
                    match state.model.teach(of.host, part, lessons, now) {
                        Ok(()) => good.push((part.clone(), lessons.clone())),
                        Err(error) => {
                            tracing::warn!(host = %of.host, ?part, %error, "lessons are of no use");
                            state.counts.lessons_refused += 1;
                        }
                    }
                }
                state.counts.lessons_taken += good.len() as u64;
                if !good.is_empty() {
                    taught.push((of.host.clone(), good));
                }
            });
        }
        let members: Vec<(HostName, Member)> = self.with_state(|state| {
            unwritten.forgotten.extend(state.model.dropped());
            // One that could not be written before may be kept again.
            unwritten.forgotten.retain(|(host, part)| !state.model.teaches(host, part));
            let member = |host: &HostName| Some((host.clone(), *state.members.get(host)?));
            unwritten.members.iter().filter_map(member).collect()
        });
        if !members.is_empty() {
            self.stores.membership.put_members(&members)?;
        }
        drop(wishes);
        unwritten.members.clear();
        // What makes room for others at once is not written first.
        for (host, parts) in &mut taught {
            parts.retain(|(part, _)| !unwritten.forgotten.contains(&(host.clone(), part.clone())));
        }
        taught.retain(|(_, parts)| !parts.is_empty());
        if !taught.is_empty() {
            self.stores.knowledge.put_lessons(&taught)?;
        }
        if !unwritten.forgotten.is_empty() {
            let forgotten: Vec<_> = unwritten.forgotten.iter().cloned().collect();
            self.stores.knowledge.drop_lessons(&forgotten)?;
            unwritten.forgotten.clear();
        }
        if !unwritten.owners.is_empty() {
            let set = self.stores.ownership.compare_and_set(&unwritten.owners)?;
            for (change, _) in unwritten.owners.drain(..).zip(set).filter(|(_, set)| !set) {
                tracing::warn!(instance = %change.instance, "its owner was changed by somebody else");
            }
        }
        Ok(())
    }
}
