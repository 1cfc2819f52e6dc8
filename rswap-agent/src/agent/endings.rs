//! What follows from a move's end: what is remembered, shown and answered.

use std::time::Duration;

use rswap_fleet::LinkMeasured;
use tokio::sync::mpsc;

use super::{
    moves::{Ended, Moved, Stake, Stayed},
    remembered,
    wiring::{Wiring, refused},
};
use crate::{
    control::{MigrateEvent, Reply, SwapDone, SwapVolumeEvent},
    instance::{Instance, InstanceName, cgroup},
    status::{ApiError, MigrationState},
    swap::storage::StorageReport,
    units::UnixMillis,
};

/// Copies of less than this say more about what comes before and after them than about the disks.
const TELLING_BYTES: u64 = 16 << 20;

/// How fast a volume was copied, in bytes per second, if that can be told.
fn copy_rate(report: &StorageReport) -> Option<f64> {
    let seconds = (report.duration_ms - report.unavailability_ms) / 1e3;
    (report.bytes_copied >= TELLING_BYTES && seconds > 0.0).then(|| report.bytes_copied as f64 / seconds)
}

impl Wiring {
    /// Takes note of a move's end, and answers whoever asked for it.
    pub(super) fn move_ended(&mut self, ended: Ended) {
        let now = UnixMillis::now();
        let Ended { instance, to, result, stake, took } = ended;
        self.moving.remove(&instance);
        self.show_end(&instance, &result, now);
        match &result {
            Ok(moved) => {
                tracing::info!(%instance, to, ms = took.as_millis(), "moved");
                if let Moved::Migration(report) = moved {
                    self.planner.link_measured(&to, report.memory_bytes_per_s);
                }
                if let Moved::Volume(report) = moved
                    && let Some(rate) = copy_rate(report)
                {
                    self.planner.copy_measured(&to, rate);
                }
                if let Some(kind) = stake.kind() {
                    let took_ms = took.as_millis() as u64;
                    self.planner.lasted(&instance, kind, stake.volume(), &to, took_ms);
                    self.planner.part_moved(&instance, kind, stake.volume(), now);
                }
            }
            Err(stayed @ (Stayed::Here(error) | Stayed::Still(error))) => {
                match stayed {
                    Stayed::Still(_) => {
                        tracing::error!(%instance, to, %error, "not moved, and it stands still")
                    }
                    // It may have been refused for that.
                    _ if self.is_frozen(&instance) => {
                        tracing::warn!(%instance, to, %error, "not moved: it stands still, as before")
                    }
                    _ => tracing::warn!(%instance, to, %error, "not moved: it runs where it ran"),
                }
                if let Some(kind) = stake.kind() {
                    let error = error.to_string();
                    self.planner.part_failed(&instance, kind, stake.volume(), &error, now);
                }
            }
            Err(Stayed::InDoubt(error)) => {
                // For the planner it stays on its way, as long as the journal says so.
                tracing::error!(%instance, to, %error, "in doubt: it stays frozen here");
            }
        }
        if let (Stake::Migration { .. }, Some(member)) = (&stake, &mut self.member) {
            let measured = match &result {
                Ok(Moved::Migration(report)) => {
                    let address = super::host_address(&self.pools, &to).ok();
                    address.map(|to| LinkMeasured { to, bytes_per_s: report.memory_bytes_per_s })
                }
                _ => None,
            };
            match &result {
                Ok(_) => member.migrated(&instance, None, measured),
                Err(Stayed::Here(error) | Stayed::Still(error)) => {
                    member.migrated(&instance, Some(error.to_string()), measured)
                }
                // For the controller it goes on, too: a report says how it ended when the doubt is over.
                Err(Stayed::InDoubt(_)) => {}
            }
        }
        remembered::keep(&self.config, &self.planner);
        match stake {
            Stake::Swap { reply, asked } => {
                if !asked {
                    self.cores_settled(&instance, result.is_ok());
                }
                // What nobody asked for only brought about what the registry says.
                let note = |instance: &mut Instance, pool| {
                    if asked {
                        instance.pool = Some(pool);
                    }
                };
                self.swap_ended(instance, to, result, took, reply, note);
            }
            Stake::Uplink { reply, asked } => {
                // As above.
                let note = |instance: &mut Instance, pool| {
                    if asked {
                        instance.uplink = Some(pool);
                    }
                };
                self.swap_ended(instance, to, result, took, reply, note);
            }
            Stake::Memory(reply) => {
                let result = match result {
                    Ok(Moved::Memory(report, held)) => {
                        held.into_iter().for_each(|held| self.cold.learn(*held));
                        Ok(Moved::Memory(report, None))
                    }
                    result => result,
                };
                let note = |instance: &mut Instance, pool| instance.memory = Some(pool);
                self.swap_ended(instance, to, result, took, Some(reply), note);
            }
            Stake::Migration { id, events } => self.migration_ended(id, result, events, now),
            Stake::Volume { events, .. } => self.volume_ended(result, events),
        }
    }

    fn is_frozen(&self, name: &InstanceName) -> bool {
        self.known_now(name).is_ok_and(|instance| cgroup::is_frozen(&instance.cgroup))
    }

    fn volume_ended(&mut self, result: Result<Moved, Stayed>, events: Option<mpsc::Sender<SwapVolumeEvent>>) {
        self.board.write(|board| match &result {
            Ok(_) => board.swaps_done += 1,
            Err(_) => board.swaps_failed += 1,
        });
        self.refresh();
        let last = match result {
            Ok(Moved::Volume(report)) => SwapVolumeEvent::Done(report),
            Ok(_) => return,
            Err(Stayed::Here(error) | Stayed::Still(error) | Stayed::InDoubt(error)) => {
                SwapVolumeEvent::Failed(error)
            }
        };
        if let Some(events) = events {
            // A slow reader gets it all the same, without holding up the windows.
            tokio::spawn(async move { drop(events.send(last).await) });
        }
    }

    fn swap_ended(
        &mut self,
        instance: InstanceName,
        to: String,
        result: Result<Moved, Stayed>,
        took: Duration,
        reply: Option<Reply<SwapDone>>,
        note: impl FnOnce(&mut Instance, String),
    ) {
        self.board.write(|board| match &result {
            Ok(_) => board.swaps_done += 1,
            Err(_) => board.swaps_failed += 1,
        });
        if result.is_ok()
            && let Err(error) = self.note_pool(&instance, |instance| note(instance, to.clone()))
        {
            tracing::warn!(%instance, %error, "the registry does not know its new pool");
        }
        let duration_ms = took.as_secs_f64() * 1e3;
        let answer = match result {
            Ok(moved) => Ok(SwapDone { instance, pool: to, duration_ms, detail: moved.into_detail() }),
            Err(Stayed::Here(error) | Stayed::Still(error) | Stayed::InDoubt(error)) => Err(error),
        };
        if let Some(reply) = reply {
            // A caller that went away doesn't need its answer.
            drop(reply.send(answer));
        }
    }

    fn migration_ended(
        &mut self,
        id: u64,
        result: Result<Moved, Stayed>,
        events: Option<mpsc::Sender<MigrateEvent>>,
        ended: UnixMillis,
    ) {
        let (state, last) = match result {
            Ok(moved) => {
                let report = moved.into_report();
                (MigrationState::Done { report: report.clone(), ended }, MigrateEvent::Done(report))
            }
            Err(Stayed::Here(error) | Stayed::Still(error)) => {
                (MigrationState::Failed { error: error.to_string(), ended }, MigrateEvent::Failed(error))
            }
            Err(Stayed::InDoubt(error)) => {
                (MigrationState::InDoubt { error: error.to_string(), ended }, MigrateEvent::InDoubt(error))
            }
        };
        // Whoever is told that it is done doesn't find the instance here any more.
        self.refresh();
        self.board.write(|board| board.set_migration(id, state));
        if let Some(events) = events {
            // A slow reader gets it all the same, without holding up the windows.
            tokio::spawn(async move { drop(events.send(last).await) });
        }
    }

    fn note_pool(&mut self, name: &InstanceName, note: impl FnOnce(&mut Instance)) -> Result<(), ApiError> {
        let mut instance = self.known_now(name)?;
        note(&mut instance);
        self.registry.put(&instance).map_err(|error| refused("keep the instance's pool", &error))?;
        self.look()
    }
}
