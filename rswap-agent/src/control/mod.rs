//! The agent's mutating calls, over a unix socket, and the client that the command line uses.
//!
//! The kernel says who calls: root, and those that the configuration names ([`Gate`]); without such, the socket's mode is 0600.
//! Each changing call is written down ([`Audit`]). Calls become
//! [`Command`]s for the wiring, each with a way to answer; a migration answers with a stream of
//! [`MigrateEvent`]s, one JSON object per line. A caller that goes away doesn't stop a migration.

pub mod client;
mod gate;
mod routes;

use std::{
    collections::BTreeMap,
    fs::Permissions,
    future::Future,
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use utoipa::ToSchema;

use crate::{
    forecast::Lessons,
    instance::{Instance, InstanceName},
    migrate::recovery::Decision,
    status::{ApiError, Board, CALLERS_WITHIN, MigrationProgress, MigrationReport},
    swap::storage::{StorageProgress, StorageReport},
};
pub use gate::Gate;
pub use routes::{document, router};
pub use rswap_audit::Audit;
use rswap_http::serving::{self, Entrance, Limits};

/// What is served at a time. A migration is followed for as long as it takes, so that no connection is cut.
const LIMITS: Limits =
    Limits { connections: 128, of_one: 8, connection_within: None, end_within: CALLERS_WITHIN };

/// Body of `POST /v1/swap`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SwapRequest {
    /// Which instance.
    pub instance: InstanceName,
    /// To which set of cores, or link.
    pub pool: String,
}

/// Answer to `POST /v1/swap`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SwapDone {
    /// Which instance.
    pub instance: InstanceName,
    /// The pool that it sits on now.
    pub pool: String,
    /// How long the swap took, in milliseconds.
    pub duration_ms: f64,
    /// What the swap says about itself.
    pub detail: serde_json::Value,
}

/// Body of `POST /v1/swap-volume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SwapVolumeRequest {
    /// Which instance.
    pub instance: InstanceName,
    /// Which of its volumes.
    pub volume: InstanceName,
    /// To which storage pool; the configuration names its directory for volumes.
    pub pool: String,
}

/// One line of the answer to `POST /v1/swap-volume`. The last one is no `progress`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum SwapVolumeEvent {
    /// It goes on.
    Progress(StorageProgress),
    /// The volume is in the pool.
    Done(StorageReport),
    /// The volume is where it was.
    Failed(ApiError),
}

/// Body of `POST /v1/migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Which instance.
    pub instance: InstanceName,
    /// To which host: the name of a host pool, or `ADDRESS:PORT` of the agent there.
    pub host: String,
    /// Stop it, copy it, and start it there: nothing is copied while it runs.
    #[serde(default)]
    pub stop_and_copy: bool,
}

/// Body of `POST /v1/adopt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    /// An existing cgroup v2 directory: absolute, or as `/proc/PID/cgroup` shows it.
    #[schema(value_type = String)]
    pub cgroup: PathBuf,
    /// What to call it.
    pub name: InstanceName,
    /// Free `key=value` pairs.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// Body of `POST /v1/register`: an instance that `rswap run` has written to the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    /// Which.
    pub instance: InstanceName,
}

/// Body of `POST /v1/recover`: a person names the copy that counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// Which instance; it is in doubt.
    pub instance: InstanceName,
    /// Which copy.
    pub decision: Decision,
}

/// Answer to `POST /v1/recover`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RecoverDone {
    /// Which instance.
    pub instance: InstanceName,
    /// What was carried out.
    pub decision: Decision,
}

/// Body of `POST /v1/drain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Which pool: a core set, `this-host`, or another host.
    pub pool: String,
    /// It takes instances again.
    #[serde(default)]
    pub undo: bool,
}

/// Answer to `POST /v1/drain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DrainDone {
    /// Which pool.
    pub pool: String,
    /// Whether it is being emptied now.
    pub draining: bool,
    /// Whether plans are carried out, or only made.
    pub acts: bool,
}

/// Answer to `POST /v1/learn`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LearnDone {
    /// Of how many instances, by identity, something was learnt.
    pub identities: usize,
}

/// One line of the answer to `POST /v1/migrate`. The last one is no `progress`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum MigrateEvent {
    /// It goes on.
    Progress(MigrationProgress),
    /// The instance runs at the destination.
    Done(MigrationReport),
    /// The commit was sent and not answered: the instance is frozen here until a person has looked.
    InDoubt(ApiError),
    /// The instance runs where it ran before.
    Failed(ApiError),
}

/// How the wiring answers a command.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// A call, for the wiring.
#[derive(Debug)]
pub enum Command {
    /// Move an instance to a CPU pool.
    Swap(SwapRequest, Reply<SwapDone>),
    /// Move a volume of an instance to a storage pool. Events are sent as those of a migration.
    SwapVolume(SwapVolumeRequest, mpsc::Sender<SwapVolumeEvent>),
    /// Migrate an instance. Events that nobody reads are dropped, the last one never before it was tried to send.
    Migrate(MigrateRequest, mpsc::Sender<MigrateEvent>),
    /// Take over an existing cgroup.
    Adopt(AdoptRequest, Reply<Instance>),
    /// Look at the registry again, now.
    Register(RegisterRequest, Reply<Instance>),
    /// Empty a pool, or let it be used again.
    Drain(DrainRequest, Reply<DrainDone>),
    /// Take in what another forecaster has learnt.
    Learn(Box<Lessons>, Reply<LearnDone>),
    /// Decide about an instance in doubt.
    Recover(RecoverRequest, Reply<RecoverDone>),
}

/// Why the control socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another agent answers on it.
    #[error("another agent already serves {0}: stop it first, or set another agent.control_socket")]
    InUse(PathBuf),
    /// Something that is not a socket is in the way.
    #[error("{0} exists and is not a socket: remove it, or set another agent.control_socket")]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("cannot {action} for the control socket {path}: check the directory and that this runs as root")]
    Socket {
        /// What was attempted.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The bound control socket; its file goes when this is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone with its directory already: nothing more to do then.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes the control socket: for its owner only, or (`open`) for everybody, of whom a [`Gate`] takes some. A socket that a dead agent left behind is replaced.
pub async fn bind(path: &Path, open: bool) -> Result<ControlSocket, ControlError> {
    let failed = |action| move |source| ControlError::Socket { action, path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed("create the directory"))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ControlError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(ControlError::InUse(path.to_owned())),
        Ok(_) => std::fs::remove_file(path).map_err(failed("remove the old file"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("look at the file")(error)),
    }
    // Made under another name and renamed when its mode is set: at its own name nobody else could ever open it.
    let mut unready = path.as_os_str().to_owned();
    unready.push(format!(".{}", std::process::id()));
    let unready = PathBuf::from(unready);
    let _ = std::fs::remove_file(&unready);
    let listener = UnixListener::bind(&unready).map_err(failed("listen"))?;
    let mode = if open { 0o666 } else { 0o600 };
    std::fs::set_permissions(&unready, Permissions::from_mode(mode)).map_err(failed("set the mode"))?;
    std::fs::rename(&unready, path).map_err(failed("put the socket in place"))?;
    Ok(ControlSocket { listener, file: SocketFile(path.to_owned()) })
}

/// Serves the read-only and the mutating routes until `stop` resolves.
pub async fn serve(
    socket: ControlSocket,
    board: Board,
    commands: mpsc::Sender<Command>,
    gate: Gate,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let ControlSocket { listener, file } = socket;
    let door: Box<dyn Entrance<gate::Caller>> = Box::new(gate.callers(listener));
    serving::serve(gate.before(router(board, commands)), vec![door], LIMITS, stop).await;
    drop(file);
}

#[cfg(test)]
mod tests;
