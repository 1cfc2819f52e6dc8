//! Moves, each on a thread of its own: ptrace is bound to the thread that began it, and a move may block.

use std::{
    net::SocketAddr,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use axum::http::StatusCode;
use rswap_trust::Name;
use tokio::sync::mpsc::{Sender, UnboundedSender};

use super::{cold, wiring::refused};
use crate::{
    config::{Config, MigrateConfig, VolumePool},
    control::{MigrateEvent, Reply, SwapDone, SwapVolumeEvent},
    instance::{Instance, InstanceName, cgroup, launch::Place, volume::Volume},
    migrate::{MigrateError, Progress, Report, guard::Guard, linux, recovery::Recovery},
    plan::MoveKind,
    pool::cpu_list,
    profile::Profiler,
    status::{ApiError, Board, MigrationProgress, MigrationReport},
    swap::{
        self,
        cpu::Seat,
        memory::{Held, MemoryReport, Target},
        storage::{self, StorageError, StorageOrder, StorageProgress, StorageReport},
    },
    sys::heap,
    units::UnixMillis,
};

/// How long copying a volume may take in all.
const VOLUME_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What is to be done.
pub(super) enum Order {
    Swap {
        instance: Instance,
        from: Seat,
        to: Seat,
    },
    Uplink {
        instance: Instance,
        uplink: Uplink,
    },
    Memory {
        instance: Instance,
        to: Target,
        stopping: Arc<AtomicBool>,
    },
    Migration {
        instance: Instance,
        address: SocketAddr,
        /// Whose certificate has to be there; otherwise the configuration says that.
        whose: Option<Name>,
        stop_and_copy: bool,
        progress: ProgressSink,
    },
    Volume {
        instance: Instance,
        volume: Volume,
        pool: VolumePool,
        events: Option<Sender<SwapVolumeEvent>>,
    },
}

impl Order {
    pub(super) fn instance(&self) -> &Instance {
        match self {
            Self::Swap { instance, .. }
            | Self::Uplink { instance, .. }
            | Self::Memory { instance, .. }
            | Self::Migration { instance, .. }
            | Self::Volume { instance, .. } => instance,
        }
    }
}

/// Who waits for the end.
pub(super) enum Stake {
    /// Unless somebody or a plan `asked` for it, the registry names the pool already.
    Swap {
        reply: Option<Reply<SwapDone>>,
        asked: bool,
    },
    /// Unless somebody or a plan `asked` for it, the registry names the link already.
    Uplink {
        reply: Option<Reply<SwapDone>>,
        asked: bool,
    },
    Memory(Reply<SwapDone>),
    Migration {
        id: u64,
        events: Option<Sender<MigrateEvent>>,
    },
    Volume {
        volume: InstanceName,
        events: Option<Sender<SwapVolumeEvent>>,
    },
}

impl Stake {
    /// As what plans see it; they see nothing of memory, nor of what only brings about what the registry says.
    pub(super) fn kind(&self) -> Option<MoveKind> {
        match self {
            Self::Swap { asked: true, .. } => Some(MoveKind::Cpu),
            Self::Migration { .. } => Some(MoveKind::Host),
            Self::Volume { .. } => Some(MoveKind::Storage),
            Self::Uplink { asked: true, .. } => Some(MoveKind::Link),
            Self::Swap { .. } | Self::Uplink { .. } | Self::Memory(_) => None,
        }
    }

    /// Of which volume.
    pub(super) fn volume(&self) -> Option<&str> {
        match self {
            Self::Volume { volume, .. } => Some(volume.as_str()),
            Self::Swap { .. } | Self::Migration { .. } | Self::Uplink { .. } | Self::Memory(_) => None,
        }
    }
}

/// A link that an instance is to be on.
#[derive(Clone, Debug)]
pub(super) struct Uplink {
    /// The interface.
    pub(super) link: String,
    /// What the instance may send, and receive, in bytes per second.
    pub(super) bytes_per_s: Option<u64>,
}

/// What a move came to.
pub(super) enum Moved {
    Swap(serde_json::Value),
    /// With what was learnt of its pages, if it is on a swap pool now.
    Memory(MemoryReport, Option<Box<Held>>),
    Migration(MigrationReport),
    Volume(StorageReport),
}

impl Moved {
    /// How long the instance, or its traffic, stood still, in milliseconds; `None` where nothing had to.
    pub(super) fn pause_ms(&self) -> Option<f64> {
        match self {
            Self::Migration(report) => Some(report.unavailability_ms),
            Self::Volume(report) => Some(report.unavailability_ms),
            // Of these, only one to another uplink holds anything back.
            Self::Swap(detail) => detail.get("pause_us")?.as_f64().map(|us| us / 1e3),
            Self::Memory(..) => None,
        }
    }

    pub(super) fn into_detail(self) -> serde_json::Value {
        match self {
            Self::Swap(detail) => detail,
            Self::Memory(report, _) => serde_json::to_value(report).unwrap_or_default(),
            Self::Migration(_) | Self::Volume(_) => serde_json::Value::Null,
        }
    }

    pub(super) fn into_report(self) -> MigrationReport {
        match self {
            Self::Swap(_) | Self::Memory(..) | Self::Volume(_) => MigrationReport::default(),
            Self::Migration(report) => report,
        }
    }
}

/// Why a move did not happen.
pub(super) enum Stayed {
    /// The instance runs where it ran before.
    Here(ApiError),
    /// It is here, and stands still: the way back failed.
    Still(ApiError),
    /// Only the other host knows whether the instance runs there; here it stays frozen.
    InDoubt(ApiError),
}

/// A move's end.
pub(super) struct Ended {
    pub(super) instance: InstanceName,
    pub(super) to: String,
    pub(super) result: Result<Moved, Stayed>,
    pub(super) stake: Stake,
    pub(super) took: Duration,
}

/// Carries `order` out on a thread of its own; its end is told to `ended`, whatever happens.
pub(super) fn spawn(
    order: Order,
    to: String,
    stake: Stake,
    recovery: Recovery,
    config: &Config,
    ended: UnboundedSender<Ended>,
) {
    let config = config.clone();
    std::thread::spawn(move || {
        let _at_the_end = heap::GiveBack;
        let began = Instant::now();
        let instance = order.instance().name.clone();
        // An instance whose move panicked must not count as moving for ever.
        let result = panic::catch_unwind(AssertUnwindSafe(|| match order {
            Order::Swap { instance, from, to } => {
                cpu_swap(&recovery.place, &instance, &from, &to).map_err(Stayed::Here)
            }
            Order::Uplink { instance, uplink } => {
                uplink_swap(&recovery.place, &instance, &uplink).map_err(Stayed::Here)
            }
            Order::Memory { instance, to, stopping } => {
                let swapped = cold::swap(&instance, &to, &config.memory, &stopping);
                swapped.map(|(report, held)| Moved::Memory(report, held.map(Box::new))).map_err(Stayed::Here)
            }
            Order::Migration { instance, address, whose, stop_and_copy, mut progress } => {
                let migrate_config = MigrateConfig { stop_and_copy, ..config.migrate.clone() };
                migrate(&instance, (address, whose.as_ref()), &mut progress, &recovery, &migrate_config)
            }
            Order::Volume { instance, volume, pool, events } => {
                let place = recovery.place.clone();
                let order = StorageOrder {
                    place,
                    instance,
                    volume,
                    pool,
                    allowed: Duration::from_millis(config.migrate.max_unavailability_ms),
                    // Before the guard ends this process, which it can't while a disk does not answer.
                    patience: config.migrate.freeze_limit() / 2,
                    limit: VOLUME_LIMIT,
                };
                volume_swap(&order, &config.migrate, events.as_ref())
            }
        }));
        let result = result.unwrap_or_else(|_| {
            let answer =
                refused("end the move", &std::io::Error::other("its thread panicked: see the agent's log"));
            // It may have been past the commit point: only the other host knows.
            Err(match stake.kind() {
                Some(MoveKind::Host) => Stayed::InDoubt(answer),
                Some(MoveKind::Cpu | MoveKind::Storage | MoveKind::Link) | None => Stayed::Here(answer),
            })
        });
        let end = Ended { instance, to, result, stake, took: began.elapsed() };
        // The agent has stopped waiting: nobody is left to be told.
        drop(ended.send(end));
    });
}

fn cpu_swap(place: &Place, instance: &Instance, from: &Seat, to: &Seat) -> Result<Moved, ApiError> {
    let to_which = to.cpus.as_ref().map_or_else(|| "all".to_owned(), cpu_list::format);
    let attempted = format!("move {} to CPUs {to_which}", instance.name);
    let moved = swap::cpu::move_to(place, instance, from, to);
    let report = moved.map_err(|error| refused(&attempted, &error))?;
    let detail = serde_json::to_value(report).map_err(|error| refused("report the swap", &error))?;
    Ok(Moved::Swap(detail))
}

fn uplink_swap(place: &Place, instance: &Instance, to: &Uplink) -> Result<Moved, ApiError> {
    let attempted = format!("move {} to the link {}", instance.name, to.link);
    let port = linux::port(place, instance).ok_or_else(|| {
        let text = format!("cannot {attempted}: it has no address of its own");
        ApiError::new(StatusCode::CONFLICT, text, "start it with `rswap run --net ADDRESS/PREFIX`")
    })?;
    let report = swap::network::move_to(&port, &to.link, to.bytes_per_s);
    let report = report.map_err(|error| refused(&attempted, &error))?;
    let detail = serde_json::to_value(report).map_err(|error| refused("report the swap", &error))?;
    Ok(Moved::Swap(detail))
}

fn volume_swap(
    order: &StorageOrder,
    config: &MigrateConfig,
    events: Option<&Sender<SwapVolumeEvent>>,
) -> Result<Moved, Stayed> {
    let StorageOrder { place, instance, volume, pool, .. } = order;
    let attempted =
        format!("move the volume {} of {} to {}", volume.name, instance.name, pool.directory.display());
    let guard = Guard::start_for_volume(place, instance, storage::record_path(order), config.freeze_limit());
    let guard = guard.map_err(|error| {
        let text = format!("cannot {attempted}: {error}");
        Stayed::Here(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text, "see the agent's log"))
    })?;
    // Dropped for a reader that is too slow or gone.
    let mut tell = |progress: &StorageProgress| {
        if let Some(events) = events {
            drop(events.try_send(SwapVolumeEvent::Progress(progress.clone())));
        }
    };
    let moved = storage::move_to(order, &guard, &mut tell);
    moved.map(Moved::Volume).map_err(|error| {
        let stayed = match error {
            StorageError::NotRestored { .. } => Stayed::Still,
            // Whether it stands still, the cgroup knows.
            StorageError::NotAtItsEnd { .. } if cgroup::is_frozen(&instance.cgroup) => Stayed::Still,
            _ => Stayed::Here,
        };
        stayed(refused(&attempted, &error))
    })
}

fn migrate(
    instance: &Instance,
    (address, whose): (SocketAddr, Option<&Name>),
    progress: &mut ProgressSink,
    recovery: &Recovery,
    config: &MigrateConfig,
) -> Result<Moved, Stayed> {
    let sent = linux::send(recovery, instance, address, whose, config, &mut |now| progress.show(now));
    sent.map(|report| Moved::Migration(reported(&report))).map_err(|error| {
        let answer = refused(&format!("migrate {} to {address}", instance.name), &error);
        match error {
            MigrateError::InDoubt(_) => Stayed::InDoubt(answer),
            _ => Stayed::Here(answer),
        }
    })
}

/// Shows a migration's progress on the board, to the caller if there is one, and its dirty rate in the profile.
pub(super) struct ProgressSink {
    board: Board,
    profiler: Arc<Profiler>,
    instance: InstanceName,
    id: u64,
    events: Option<Sender<MigrateEvent>>,
    round: u32,
    /// Pages sent before this round, and until the last event.
    before_round: u64,
    last: u64,
}

impl ProgressSink {
    pub(super) fn new(
        board: Board,
        profiler: Arc<Profiler>,
        instance: InstanceName,
        id: u64,
        events: Option<Sender<MigrateEvent>>,
    ) -> Self {
        Self { board, profiler, instance, id, events, round: 0, before_round: 0, last: 0 }
    }

    fn show(&mut self, progress: &Progress) {
        if progress.round != self.round {
            (self.round, self.before_round) = (progress.round, self.last);
        }
        self.last = progress.pages_sent;
        // A rate of 0 is one that has not been measured yet.
        let known = |rate: f64| (rate > 0.0).then_some(rate);
        self.profiler.set_dirty_rate(&self.instance, known(progress.dirty_bytes_per_s));
        let shown = MigrationProgress {
            phase: format!("{:?}", progress.phase).to_lowercase(),
            round: progress.round + 1,
            round_pages_sent: progress.pages_sent.saturating_sub(self.before_round),
            round_pages: progress.round_pages,
            pages_sent: progress.pages_sent,
            bytes_sent: progress.bytes_sent,
            bytes_per_s: progress.bytes_per_s,
            dirty_bytes_per_s: known(progress.dirty_bytes_per_s),
            expected_unavailability_ms: known(progress.expected_unavailability_ms),
        };
        if let Some(events) = &self.events {
            // Dropped for a reader that is too slow or gone: the migration waits for nobody.
            drop(events.try_send(MigrateEvent::Progress(shown.clone())));
        }
        self.board.write(|board| board.migration_went_on(self.id, shown, UnixMillis::now()));
    }
}

impl Drop for ProgressSink {
    fn drop(&mut self) {
        // Writes are tracked no longer.
        self.profiler.set_dirty_rate(&self.instance, None);
    }
}

fn reported(report: &Report) -> MigrationReport {
    MigrationReport {
        unavailability_ms: report.freeze_ms,
        duration_ms: report.total_ms.round() as u64,
        rounds: report.rounds,
        pages_sent: report.pages_sent,
        pages_dirtied: report.pages_dirtied,
        bytes_sent: report.bytes_sent,
        memory_bytes_per_s: report.memory_bytes_per_s,
        freeze_steps_ms: report.freeze_steps_ms.clone(),
        streams: report.streams,
        digest: report.digest.clone(),
    }
}
