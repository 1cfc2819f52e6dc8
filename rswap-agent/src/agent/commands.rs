//! What is connected, and how calls reach it.

use std::path::{Path, PathBuf};

use axum::http::StatusCode;

use crate::{
    config::Config,
    control::{AdoptRequest, Command, MigrateEvent, RegisterRequest},
    instance::{Instance, InstanceName, Origin, cgroup, registry::Registry},
    status::{ApiError, Board},
    units::UnixMillis,
};

/// All rooms' nouns, and what is under way.
pub(super) struct Wiring {
    registry: Registry,
    board: Board,
}

impl Wiring {
    pub(super) fn new(_config: &Config, registry: Registry, board: Board) -> Self {
        Self { registry, board }
    }

    /// One window's work.
    pub(super) fn window(&mut self, _now: UnixMillis) {
        if let Err(error) = self.look() {
            tracing::warn!(%error, "the registry can't be read: going on with the instances known");
        }
        self.board.write(|board| board.windows += 1);
    }

    fn look(&self) -> Result<(), ApiError> {
        let instances = self.registry.list().map_err(|error| refused("list the instances", &error))?;
        self.board.write(|board| board.set_instances(instances));
        Ok(())
    }

    pub(super) fn command(&mut self, command: Command) {
        // A caller that went away doesn't need its answer.
        match command {
            Command::Adopt(request, reply) => drop(reply.send(self.adopt(request))),
            Command::Register(request, reply) => drop(reply.send(self.register(&request))),
            Command::Swap(_, reply) => drop(reply.send(Err(cannot("swap")))),
            Command::Migrate(_, events) => drop(events.try_send(MigrateEvent::Failed(cannot("migrate")))),
        }
    }

    fn register(&self, request: &RegisterRequest) -> Result<Instance, ApiError> {
        self.look()?;
        self.known(&request.instance)
    }

    fn known(&self, name: &InstanceName) -> Result<Instance, ApiError> {
        let found = self.registry.get(name).map_err(|error| refused("look up the instance", &error))?;
        found.ok_or_else(|| ApiError::no_instance(name.as_str()))
    }

    fn adopt(&self, request: AdoptRequest) -> Result<Instance, ApiError> {
        let conflict = |error: String, hint: &str| Err(ApiError::new(StatusCode::CONFLICT, error, hint));
        let get = |name| self.registry.get(name).map_err(|error| refused("look up the instance", &error));
        if get(&request.name)?.is_some() {
            return conflict(format!("an instance {} exists", request.name), "choose another --name");
        }
        let cgroup = resolve(&request.cgroup)?;
        let cgroup_id = cgroup::id(&cgroup).map_err(|error| refused("look at the cgroup", &error))?;
        if !cgroup::is_populated(&cgroup) {
            return conflict(format!("no process is in {}", cgroup.display()), "adopt it when it runs");
        }
        let instances = self.registry.list().map_err(|error| refused("list the instances", &error))?;
        if let Some(holder) =
            instances.iter().find(|i| i.cgroup.starts_with(&cgroup) || cgroup.starts_with(&i.cgroup))
        {
            let error = format!("{} overlaps the instance {}", cgroup.display(), holder.name);
            return conflict(error, "a process belongs to one instance only");
        }
        let instance = Instance {
            name: request.name,
            labels: request.labels,
            cgroup,
            cgroup_id,
            origin: Origin::Adopted,
            init_pid: None,
            command: Vec::new(),
            network: None,
            pool: None,
            since: UnixMillis::now(),
        };
        self.registry.put(&instance).map_err(|error| refused("keep the instance", &error))?;
        self.look()?;
        Ok(instance)
    }
}

/// The cgroup's directory under the cgroup v2 mount; its root is no instance.
fn resolve(given: &Path) -> Result<PathBuf, ApiError> {
    let mount = cgroup::mount_point().map_err(|error| refused("find the cgroup v2 mount", &error))?;
    let under = given.strip_prefix("/").unwrap_or(given);
    let path = if given.starts_with(&mount) { given.to_owned() } else { mount.join(under) };
    let found = path.canonicalize().ok().filter(|p| p.is_dir() && p.starts_with(&mount) && *p != mount);
    found.ok_or_else(|| {
        ApiError::new(
            StatusCode::NOT_FOUND,
            format!("there is no cgroup {} under {}", given.display(), mount.display()),
            "give its directory, or the path in /proc/PID/cgroup",
        )
    })
}

fn cannot(what: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_IMPLEMENTED, format!("this version can't {what} yet"), "use a later one")
}

/// An answer that keeps the error's causes.
pub(super) fn refused(attempted: &str, error: &dyn std::error::Error) -> ApiError {
    let mut text = format!("cannot {attempted}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, text, "see the agent's log, and `rswap doctor`")
}
