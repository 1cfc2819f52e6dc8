//! Calls that change which instances there are.

use std::path::{Path, PathBuf};

use axum::http::StatusCode;

use super::wiring::{Wiring, refused};
use crate::{
    control::{AdoptRequest, RecoverDone, RecoverRequest, RegisterRequest, Reply},
    instance::{Instance, InstanceName, Origin, cgroup},
    status::{ApiError, no_instance},
    units::UnixMillis,
};

impl Wiring {
    /// Carries out a person's decision, on a thread of its own: processes may have to end, and neighbours to be told.
    pub(super) fn recover(&mut self, request: RecoverRequest, reply: Reply<RecoverDone>) {
        let recovery = self.recovery.clone();
        std::thread::spawn(move || {
            let RecoverRequest { instance, decision } = request;
            let done = recovery.decide(&instance, decision).map_err(|error| {
                let text = format!("cannot recover {instance}: {error}");
                ApiError::new(StatusCode::CONFLICT, text, "see `rswap ps` for what is in doubt")
            });
            drop(reply.send(done.map(|()| RecoverDone { instance, decision })));
        });
    }

    pub(super) fn register(&mut self, request: &RegisterRequest) -> Result<Instance, ApiError> {
        self.look()?;
        self.known_now(&request.instance)
    }

    pub(super) fn known_now(&self, name: &InstanceName) -> Result<Instance, ApiError> {
        let found = self.registry.get(name).map_err(|error| refused("look up the instance", &error))?;
        found.ok_or_else(|| no_instance(name.as_str()))
    }

    pub(super) fn adopt(&mut self, request: AdoptRequest) -> Result<Instance, ApiError> {
        let conflict = |error: String, hint: &str| Err(ApiError::new(StatusCode::CONFLICT, error, hint));
        let get = |name| self.registry.get(name).map_err(|error| refused("look up the instance", &error));
        if get(&request.name)?.is_some() {
            return conflict(format!("an instance {} exists", request.name), "choose another --name");
        }
        let cgroup = resolve(&request.cgroup)?;
        let cgroup_id = cgroup::id(&cgroup).map_err(|error| refused("look at the cgroup", &error))?;
        let is_populated =
            cgroup::is_populated(&cgroup).map_err(|error| refused("look at the cgroup", &error))?;
        if !is_populated {
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
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
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
