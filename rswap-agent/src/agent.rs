//! The wiring: it connects the rooms and decides nothing.
//!
//! ```text
//! every window, on one thread:
//!   registry -> profiler -> forecaster -> planner -> board (what is shown)
//!                                            |
//!                          mode act: swaps and migrations, each on a thread of its own
//!                                            |
//!                                      planner.moved / failed
//! meanwhile, on the runtime's threads: status (HTTP, loopback), control (unix socket)
//! ```
//!
//! On SIGTERM or SIGINT it takes no more work, waits for the moves under way up to [`DRAIN_WITHIN`], and ends.
//! Instances keep running; the next agent finds them in the registry.

mod cold;
mod commands;
mod cores;
mod disks;
mod drain;
mod endings;
mod fleet;
mod incoming;
mod kin;
pub(crate) mod learnt;
mod moves;
mod parts;
mod record;
mod remembered;
mod shown;
mod swaps;
mod usage;
mod wiring;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use incoming::Incoming;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{SigSet, Signal},
};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::{self, MissedTickBehavior},
};

use wiring::Wiring;

use crate::{
    config::{Config, Mode},
    control::{self, Audit, ControlError, Gate},
    instance::{InstanceError, launch::Place, registry::Registry},
    migrate::{
        journal,
        ledger::Ledger,
        links::{Links, LinksError},
        linux,
        recovery::Recovery,
    },
    pool::{Pool, PoolKind},
    privilege::{self, PrivilegeError},
    status::{self, Board, BoardState, StatusError},
    swap::{share, storage},
    sys::heap,
    tracee::datagrams,
    units::UnixMillis,
};

/// How long moves under way may go on after the word to stop.
pub const DRAIN_WITHIN: Duration = Duration::from_secs(30);

/// How long callers may take to read their last answers.
const CALLERS_WITHIN: Duration = Duration::from_secs(3);

/// How often the journals are looked at for what is owed.
const RECOVER_EVERY: Duration = Duration::from_millis(500);

/// Calls that wait for the wiring.
const COMMANDS_WAITING: usize = 16;

/// Why the agent could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The runtime, a signal or a server failed.
    #[error("cannot {attempted}")]
    Io {
        /// What was attempted.
        attempted: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The status room.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The control room.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The instance room.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The links to other hosts.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// It may not enough.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// No such host.
    #[error("{host:?} is neither a host pool nor ADDRESS:PORT: the host pools are: {known}")]
    NoHost {
        /// As it was given.
        host: String,
        /// What there is.
        known: String,
    },
}

fn failed(attempted: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| AgentError::Io { attempted, source }
}

/// Where instances of this host live.
pub fn place(config: &Config) -> Place {
    Place {
        state_dir: config.agent.state_dir.clone(),
        cgroup_parent: config.agent.cgroup_parent.clone(),
        bridge: config.network.bridge.clone(),
        shared: config.files.shared.clone(),
        volumes: config.files.volumes.clone().unwrap_or_else(|| config.agent.state_dir.join("volumes")),
    }
}

/// Where `host`, a host pool's name or `ADDRESS:PORT`, takes migrations.
pub fn host_address(pools: &[Pool], host: &str) -> Result<SocketAddr, AgentError> {
    let address = |pool: &Pool| match pool.kind {
        PoolKind::Host { address } => Some(address),
        PoolKind::Cpu { .. } | PoolKind::ThisHost | PoolKind::Storage { .. } | PoolKind::Link { .. } => None,
    };
    let named = pools.iter().find(|pool| pool.name == host).and_then(address);
    named.or_else(|| host.parse().ok()).ok_or_else(|| {
        let known: Vec<_> = pools.iter().filter(|p| address(p).is_some()).map(|p| p.name.as_str()).collect();
        AgentError::NoHost { host: host.to_owned(), known: known.join(", ") }
    })
}

/// Runs the agent until SIGTERM or SIGINT.
pub fn run(config: Config) -> Result<(), AgentError> {
    // Whoever started us may have blocked them for itself, and a blocked signal would never stop us.
    let mut stops = SigSet::empty();
    stops.add(Signal::SIGTERM);
    stops.add(Signal::SIGINT);
    stops.thread_unblock().map_err(|errno| failed("unblock SIGTERM and SIGINT")(errno.into()))?;
    // While there is but this thread: those that it starts have no more.
    privilege::keep_what_is_needed()?;
    open_as_many_as_allowed().map_err(failed("raise the limit of open files"))?;
    heap::limit().map_err(failed("limit what the heap keeps"))?;
    // Two threads serve; the windows' work is done on this one.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("rswap-serves")
        .on_thread_start(serve_without_privileges)
        .enable_all()
        .build()
        .map_err(failed("start the runtime"))?;
    runtime.block_on(serve(config))
}

/// What callers of the sockets say is read by threads that may nothing else.
fn serve_without_privileges() {
    if let Err(error) = privilege::serve_only() {
        tracing::error!(%error, "a thread that serves calls can't give up its capabilities: ending");
        std::process::exit(1);
    }
}

/// A migration opens what it looks at: hundreds of files. The usual limit of a service is low for the sake of select(2), which
/// nobody here calls (systemd.exec(5), LimitNOFILE).
fn open_as_many_as_allowed() -> io::Result<()> {
    let (_, allowed) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, allowed, allowed)?)
}

async fn serve(config: Config) -> Result<(), AgentError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("watch for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("watch for SIGINT"))?;
    let links = Links::open(&config)?;
    // Before anything is changed on this host.
    config.migrate.listen.map_or(Ok(()), |address| links.may_listen(address))?;
    let registry = Registry::open(&config.agent.state_dir)?;
    let board = Board::new(BoardState {
        host: config.agent.host.clone(),
        mode: match config.agent.mode {
            Mode::Observe => "observe".to_owned(),
            Mode::Act => "act".to_owned(),
        },
        started: UnixMillis::now(),
        ..BoardState::default()
    });

    let listener = status::bind(config.agent.status_address).await?;
    let audit_log = config.control.audit_log.clone();
    let audit_log = audit_log.unwrap_or_else(|| config.agent.state_dir.join("audit.jsonl"));
    let audit = Audit::open(audit_log, config.control.audit_kib << 10);
    let audit = audit.map_err(failed("open control.audit_log"))?;
    let gate = Gate::new(config.control.grants.clone(), audit.clone());
    let socket = control::bind(&config.agent.control_socket, gate.is_open()).await?;
    let (stop, stopped) = watch::channel(false);
    let stopping = |mut stopped: watch::Receiver<bool>| async move {
        // An error says that the sender is gone: that is the end as well.
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let (sender, mut commands) = mpsc::channel(COMMANDS_WAITING);
    let (ended_sender, mut ended) = mpsc::unbounded_channel();
    let boot = journal::boot_id().map_err(failed("read which run of the kernel this is"))?;
    datagrams::keep_in(&config.agent.state_dir.join("datagrams"), &boot)
        .map_err(failed("open what was seen of datagrams"))?;
    let ledger = Arc::new(Ledger::new(config.migrate.journal_dir.clone()));
    let mut recovery = Recovery::new(place(&config), links.clone(), config.migrate.journal_dir.clone());
    // Before anything else: what an agent that was killed has left standing still goes on.
    // On a thread of its own: it talks to the kernel by a runtime of its own.
    let recovery = std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            // Before the guards of an earlier agent are ended: one may be at it.
            storage::recover_all(&recovery.place.state_dir);
            storage::bury_left(&registry.list().unwrap_or_default());
            recovery.at_start(&ledger);
            linux::sweep_volumes(&recovery.place, &ledger);
            share::sweep(&recovery.place);
            recovery
        });
        started.join().map_err(|_| failed("recover")(io::Error::other("the recovery panicked")))
    })?;
    let (answered_sender, mut answered) = mpsc::unbounded_channel();
    let wiring = Wiring::new(
        config.clone(),
        registry,
        board.clone(),
        ended_sender,
        recovery.clone(),
        answered_sender,
        audit,
    );
    let mut wiring = wiring.map_err(failed("open what is kept for the controller (controller.spool)"))?;
    let owing = ledger.clone();
    std::thread::spawn(move || recover_for_ever(recovery, &owing));
    // The kernel's type information and the state that was read are large, and no longer needed.
    drop(heap::GiveBack);
    // Before anybody can ask: an empty answer would mean that nothing runs here.
    wiring.refresh();
    let serving_status = tokio::spawn(status::serve(listener, board.clone(), stopping(stopped.clone())));
    let serving_control = tokio::spawn(control::serve(socket, board, sender, gate, stopping(stopped)));
    tracing::info!(
        host = config.agent.host,
        mode = ?config.agent.mode,
        status = %config.agent.status_address,
        control = %config.agent.control_socket.display(),
        "rswap watches"
    );

    let (arrived_sender, mut arrived) = mpsc::unbounded_channel();
    let incoming = Incoming::new(place(&config), links, ledger, config.migrate.deadline_s, arrived_sender);
    let arrivals = listen(config.migrate.listen).await?;
    let window = Duration::from_millis(config.agent.window_ms);
    let mut windows = time::interval(window);
    windows.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = windows.tick() => wiring.window(UnixMillis::now()),
            Some(command) = commands.recv() => wiring.command(command),
            Some(end) = ended.recv() => wiring.move_ended(end),
            Some(answer) = answered.recv() => wiring.answered(answer),
            Some(_instance) = arrived.recv() => wiring.refresh(),
            connected = accept(arrivals.as_ref()) => match connected {
                Ok((stream, from)) => incoming.accept(stream, from),
                Err(error) => {
                    // Out of descriptors, mostly: it would come again at once.
                    tracing::warn!(%error, "a migration could not be accepted");
                    time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    tracing::info!("stopping: instances keep running");
    wiring.stop_waiting();
    drop(arrivals);
    // Nobody is left to ask when the receiver is gone, and the servers end with their last answers.
    drop(commands);
    let deadline = time::Instant::now() + DRAIN_WITHIN;
    while wiring.is_moving() || incoming.is_busy() {
        tokio::select! {
            Some(end) = ended.recv() => wiring.move_ended(end),
            // An arrival's end has no message when it failed: look again.
            () = time::sleep(Duration::from_millis(50)) => {}
            () = time::sleep_until(deadline) => {
                tracing::warn!("moves are still under way: ending anyway, which rolls them back");
                break;
            }
        }
    }
    wiring.end();
    stop.send_replace(true);
    let served = async {
        for server in [serving_status, serving_control] {
            if let Err(error) = server.await {
                tracing::warn!(%error, "a server ended badly");
            }
        }
    };
    if time::timeout(CALLERS_WITHIN, served).await.is_err() {
        tracing::warn!("callers are still connected: ending anyway");
    }
    Ok(())
}

/// Ends with the process.
fn recover_for_ever(mut recovery: Recovery, ledger: &Ledger) {
    loop {
        recovery.round(ledger);
        std::thread::sleep(RECOVER_EVERY);
    }
}

/// Where migrations arrive, if this host takes any.
async fn listen(address: Option<SocketAddr>) -> Result<Option<TcpListener>, AgentError> {
    let Some(address) = address else { return Ok(None) };
    let listener =
        TcpListener::bind(address).await.map_err(failed("listen on migrate.listen for migrations"))?;
    tracing::info!(%address, "taking migrations");
    Ok(Some(listener))
}

/// The next connection; never, without a listener.
async fn accept(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => std::future::pending().await,
    }
}
