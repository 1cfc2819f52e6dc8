//! Rolling maintenance, as it goes on: what is seen of the hosts moves the roll on, and the roll says which hosts are to be left.
//!
//! The roll is on the disk before its hosts are told anything; what they are to be told is worked out from it anew in each round, so a
//! controller that ended in between goes on where it was.

use std::{collections::BTreeMap, sync::PoisonError};

use rswap_fleet::{
    HostName, Roll,
    maintenance::{RollError, Seen, Stage},
};
use rswap_store::{Member, StoreError};
use rswap_types::{InstanceName, PoolState, UnixMillis};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::{server::Controller, state::State};

/// What somebody has decided about a host of the roll.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = RollDecision)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// It is empty, and has been worked on.
    WorkedOn,
    /// It is stuck, and is tried again.
    Retry,
    /// It waits or is stuck, and is left out, as it is.
    Skip,
}

/// Why a wish is not followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unwilling {
    /// What is wanted can't be.
    #[error("{0}")]
    No(String),
    /// The roll has no such host, or it is elsewhere.
    #[error(transparent)]
    Roll(#[from] RollError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl State {
    /// What is seen of each host of a roll.
    fn seen(&self, roll: &Roll, interval_ms: u64, now: UnixMillis) -> BTreeMap<HostName, Seen> {
        let seen = |host: &HostName| {
            let known = self.inventory.hosts().get(host)?;
            let is = |state| known.whole().is_some_and(|whole| whole.state == state);
            Some(Seen {
                present: !self.inventory.is_away(host, interval_ms, now),
                instances: known.instances.len(),
                heard: known.heard,
                ready: is(PoolState::Ready) && known.acts,
                draining: is(PoolState::Draining),
                coming: self.coming.get(host).copied().unwrap_or_default(),
                running: known.running.clone(),
            })
        };
        roll.stages().filter_map(|(host, _)| Some((host.clone(), seen(host)?))).collect()
    }

    /// A host of the roll is the roll's.
    fn no_roll_holds(&self, host: &HostName) -> Result<(), Unwilling> {
        let Some(stage) = self.roll.as_ref().and_then(|roll| roll.holds(host)) else { return Ok(()) };
        // One that waits, too: after its turn it would be used again.
        let first = match stage {
            Stage::Waiting | Stage::Stuck { .. } => {
                "leave it out of that first (`rswap fleet roll HOST --skip`)"
            }
            _ => "wait until it is done with that, or end the roll",
        };
        let stage = stage.name();
        Err(Unwilling::No(format!("host {host} is in the roll that is under way, and {stage}: {first}")))
    }

    /// Members that are not yet as the roll wants them.
    fn unlike(&self, roll: &Roll) -> Vec<(HostName, Member)> {
        let drained = roll.drained();
        let wanted = drained.iter().map(|host| (host, true));
        let wanted = wanted.chain(roll.coming_back().map(|host| (host, false)));
        let other = |(host, drained): (&HostName, bool)| {
            let is = self.members.get(host).filter(|is| is.drained != drained)?;
            Some((host.clone(), is.wanted(drained)))
        };
        wanted.filter_map(other).collect()
    }
}

impl Controller {
    /// One round of the roll, if there is one.
    pub(crate) fn roll_on(&self, now: UnixMillis) -> Result<(), StoreError> {
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.with_state(|state| {
            let mut roll = state.roll.clone()?;
            let before = roll.clone();
            let seen = state.seen(&roll, self.settings.interval_ms, now);
            roll.round(&seen, self.started, now);
            (roll != before || !state.unlike(&roll).is_empty()).then_some(roll)
        });
        next.map_or(Ok(()), |roll| self.keep_roll(roll))
    }

    /// On the disk, then in memory, then what it wants of its hosts in the same order.
    fn keep_roll(&self, roll: Roll) -> Result<(), StoreError> {
        self.stores.maintenance.put_roll(Some(&roll))?;
        let unlike = self.with_state(|state| {
            for (host, stage) in roll.stages() {
                let before =
                    state.roll.as_ref().and_then(|before| before.stages().find(|(of, _)| *of == host));
                if before.is_none_or(|(_, before)| before != stage) {
                    tracing::info!(%host, ?stage, "a host of the roll");
                }
            }
            let unlike = state.unlike(&roll);
            state.roll = Some(roll);
            unlike
        });
        self.keep_members(unlike)
    }

    fn keep_members(&self, members: Vec<(HostName, Member)>) -> Result<(), StoreError> {
        if members.is_empty() {
            return Ok(());
        }
        self.stores.membership.put_members(&members)?;
        self.with_state(|state| state.members.extend(members));
        Ok(())
    }

    /// Begins a roll over hosts.
    pub(crate) fn begin_roll(
        &self,
        hosts: Vec<HostName>,
        at_once: usize,
        limit_ms: u64,
        now: UnixMillis,
    ) -> Result<Roll, Unwilling> {
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let no = |text: String| Err(Unwilling::No(text));
        if !self.settings.acts {
            return no("the controller observes only (fleet.mode): no host would be emptied".to_owned());
        }
        if hosts.is_empty() || at_once == 0 || limit_ms == 0 {
            return no("a roll needs hosts, at least one at once, and time".to_owned());
        }
        let problem = self.with_state(|state| {
            if state.roll.as_ref().is_some_and(|roll| !roll.is_over()) {
                return Some("a roll is under way: end it, or wait for its end".to_owned());
            }
            hosts.iter().find_map(|host| match state.members.get(host) {
                None => Some(format!("there is no host {host} in the fleet")),
                // It would be used again at the end.
                Some(member) if member.drained => {
                    Some(format!("host {host} is drained already: let it be used again first"))
                }
                Some(_) => None,
            })
        });
        if let Some(problem) = problem {
            return no(problem);
        }
        let mut roll = Roll::new(hosts, at_once, limit_ms);
        let seen = self.with_state(|state| state.seen(&roll, self.settings.interval_ms, now));
        roll.round(&seen, self.started, now);
        self.keep_roll(roll.clone())?;
        Ok(roll)
    }

    /// Follows a decision about a host of the roll.
    pub(crate) fn decide_roll(
        &self,
        host: &HostName,
        decision: Decision,
        now: UnixMillis,
    ) -> Result<Roll, Unwilling> {
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let roll = self.with_state(|state| state.roll.clone());
        let mut roll = roll.ok_or_else(|| Unwilling::No("there is no roll".to_owned()))?;
        match decision {
            Decision::WorkedOn => roll.worked_on(host, now),
            Decision::Retry => roll.retry(host, now),
            Decision::Skip => roll.skip(host),
        }?;
        self.keep_roll(roll.clone())?;
        Ok(roll)
    }

    /// Ends the roll: hosts that are drained for it may be used again.
    pub(crate) fn end_roll(&self) -> Result<(), Unwilling> {
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let freed = self.with_state(|state| {
            let drained = state.roll.as_ref()?.drained();
            let free = |host: &HostName| Some((host.clone(), state.members.get(host)?.wanted(false)));
            Some(drained.iter().filter_map(free).collect::<Vec<_>>())
        });
        let freed = freed.ok_or_else(|| Unwilling::No("there is no roll".to_owned()))?;
        // In this order: what is left drained by an end in between, a second call finds again.
        self.keep_members(freed)?;
        self.stores.maintenance.put_roll(None)?;
        self.with_state(|state| state.roll = None);
        Ok(())
    }

    /// Drains a host, or lets it be used again; `None` if there is no such host.
    pub(crate) fn drain_host(&self, host: &HostName, undo: bool) -> Result<Option<Member>, Unwilling> {
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.with_state(|state| {
            state.no_roll_holds(host)?;
            Ok::<_, Unwilling>(state.members.get(host).copied())
        })?;
        let Some(known) = known else { return Ok(None) };
        let member = known.wanted(!undo);
        // Stored before it is answered, and before it is acted upon.
        self.keep_members(vec![(host.clone(), member)])?;
        if self.settings.acts {
            self.with_state(|state| state.overtake(host, UnixMillis::now()));
        }
        Ok(Some(member))
    }

    /// Takes a host that does not report any more out of the fleet, and says what ran there, which has to be `lost` if it is anything;
    /// `None` if there is no such host.
    pub(crate) fn forget_host(
        &self,
        host: &HostName,
        lost: bool,
        now: UnixMillis,
    ) -> Result<Option<Vec<InstanceName>>, Unwilling> {
        // No report of it is taken meanwhile, either.
        let _one = self.wishes.lock().unwrap_or_else(PoisonError::into_inner);
        let there = self.with_state(|state| {
            if !state.members.contains_key(host) {
                return Ok(None);
            }
            state.no_roll_holds(host)?;
            if !state.inventory.is_away(host, self.settings.interval_ms, now) {
                return Err(Unwilling::No(format!("host {host} reports: stop its agent first")));
            }
            Ok(Some(state.inventory.last_on(host)))
        })?;
        let Some(there) = there else { return Ok(None) };
        if !(there.is_empty() || lost) {
            let names = there.iter().map(InstanceName::as_str).collect::<Vec<_>>().join(", ");
            return Err(Unwilling::No(format!(
                "host {host} had {names} when it last reported, and they may run on: say that they are lost, if they are"
            )));
        }
        self.stores.membership.remove_member(host)?;
        self.with_state(|state| {
            state.members.remove(host);
            state.inventory.forget_host(host, now);
        });
        Ok(Some(there))
    }
}
