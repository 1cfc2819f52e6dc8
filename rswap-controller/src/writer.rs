//! One thread writes: what has come in while it wrote is the next batch, so that one fsync serves many.

pub(crate) use rswap_http::chain;
use std::{sync::Arc, thread};

use rswap_fleet::Report;
use rswap_forecast::{Lessons, Part};
use rswap_store::Entry;
use rswap_types::UnixMillis;
use tokio::sync::{mpsc, oneshot};

use crate::{
    server::{Alive, Controller},
    state::{Taken, Unwritten},
};

/// Envelopes of one batch at most.
const BATCH: usize = 256;
/// Envelopes that may wait; then callers wait to hand theirs in.
const WAITING: usize = 1024;
/// A clock that is ahead of ours by more counts for now, in milliseconds: no row may be in the future.
const AHEAD_MS: u64 = 60_000;

/// What one envelope has, checked.
pub(crate) struct Handed {
    pub(crate) reports: Vec<Report>,
    pub(crate) lessons: Vec<(Part, Lessons)>,
    pub(crate) host: rswap_fleet::HostName,
    /// Told when it is stored; an error is for people.
    pub(crate) stored: oneshot::Sender<Result<(), String>>,
}

/// The way to the writer.
pub(crate) type Writer = mpsc::Sender<Handed>;

/// Starts the thread. It ends when nobody can hand in any more; `alive` is dropped if it can't go on before.
pub(crate) fn start(
    controller: Arc<Controller>,
    mut handed: mpsc::Receiver<Handed>,
    alive: Alive,
) -> thread::JoinHandle<()> {
    let work = move || {
        let mut unwritten = Unwritten::default();
        while let Some(first) = handed.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH {
                let Ok(more) = handed.try_recv() else { break };
                batch.push(more);
            }
            store(&controller, batch, &mut unwritten);
        }
        drop(alive);
    };
    thread::spawn(work)
}

pub(crate) fn channel() -> (Writer, mpsc::Receiver<Handed>) {
    mpsc::channel(WAITING)
}

fn store(controller: &Controller, mut batch: Vec<Handed>, unwritten: &mut Unwritten) {
    let now = UnixMillis::now();
    // What was used goes into the history, and nowhere else. If that fails, the agent sends all of it again.
    let entry = |report: &mut Report| {
        let mut used = std::mem::take(&mut report.gone);
        let instances = report.instances.iter_mut();
        used.extend(instances.map(|one| (one.view.instance.clone(), std::mem::take(&mut one.used))));
        Entry {
            host: report.host.clone(),
            epoch: report.epoch,
            sequence: report.sequence,
            at: report.at.min(UnixMillis(now.0 + AHEAD_MS)),
            used,
        }
    };
    let entries: Vec<Entry> = batch.iter_mut().flat_map(|handed| &mut handed.reports).map(entry).collect();
    let stored = match entries.is_empty() {
        true => Ok(Vec::new()),
        false => controller.stores.history.append(&entries, now),
    };
    match stored {
        Ok(new) => {
            let mut new = new.into_iter();
            let taken: Vec<Taken> = batch
                .iter()
                .map(|handed| {
                    let reports = handed.reports.iter().filter(|_| new.next().unwrap_or(false)).collect();
                    Taken { host: &handed.host, reports, lessons: &handed.lessons }
                })
                .collect();
            let kept = controller.take(&taken, unwritten, now).map_err(|error| chain(&error));
            if let Err(error) = &kept {
                tracing::error!(
                    error,
                    "members or owners could not be stored: nothing is acknowledged until they are"
                );
            }
            for handed in batch {
                drop(handed.stored.send(kept.clone()));
            }
        }
        Err(error) => {
            let error = chain(&error);
            tracing::error!(error, "reports could not be stored: they are not acknowledged");
            for handed in batch {
                drop(handed.stored.send(Err(error.clone())));
            }
        }
    }
}
