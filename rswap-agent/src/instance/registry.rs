//! The instances of a host: one small file each under the state directory, so that they outlive the agent.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Instance, InstanceError, InstanceName, cgroup};

/// The instances of a host.
#[derive(Clone, Debug)]
pub struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// Opens (and makes, if need be) the registry in `state_dir`.
    pub fn open(state_dir: &Path) -> Result<Self, InstanceError> {
        let directory = state_dir.join("instances");
        fs::create_dir_all(&directory)
            .map_err(InstanceError::io(format!("making {}", directory.display())))?;
        Ok(Self { directory })
    }

    /// Every instance that is alive, by name. A file that can't be read is logged and passed over.
    pub fn list(&self) -> Result<Vec<Instance>, InstanceError> {
        let what = || format!("listing {}", self.directory.display());
        let mut instances = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(InstanceError::io(what()))? {
            let path = entry.map_err(InstanceError::io(what()))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match read(&path) {
                    Ok(instance) if cgroup::is_populated(&instance.cgroup) => instances.push(instance),
                    Ok(_) => {}
                    Err(error) => tracing::warn!(path = %path.display(), %error, "not an instance's file"),
                }
            }
        }
        instances.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(instances)
    }

    /// The living instance `name`.
    pub fn get(&self, name: &InstanceName) -> Result<Option<Instance>, InstanceError> {
        match read(&self.path(name)) {
            Ok(instance) => Ok(Some(instance).filter(|instance| cgroup::is_populated(&instance.cgroup))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(InstanceError::io(format!("reading {}", self.path(name).display()))(error)),
        }
    }

    /// Writes an instance's file, whole or not at all.
    pub fn put(&self, instance: &Instance) -> Result<(), InstanceError> {
        let path = self.path(&instance.name);
        let what = || format!("writing {}", path.display());
        let text = serde_json::to_vec_pretty(instance)
            .map_err(|error| InstanceError::io(what())(io::Error::other(error)))?;
        let temporary = path.with_extension("new");
        fs::write(&temporary, text).map_err(InstanceError::io(what()))?;
        fs::rename(&temporary, &path).map_err(InstanceError::io(what()))
    }

    /// Forgets an instance; one that isn't there is no error.
    pub fn remove(&self, name: &InstanceName) -> Result<(), InstanceError> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(InstanceError::io(format!("removing {}", self.path(name).display()))(error))
            }
            _ => Ok(()),
        }
    }

    fn path(&self, name: &InstanceName) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }
}

fn read(path: &Path) -> io::Result<Instance> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_instance_is_not_listed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let instance = Instance {
            name: "gone".parse().expect("a valid name"),
            labels: Default::default(),
            cgroup: directory.path().join("no-cgroup"),
            cgroup_id: 1,
            origin: super::super::Origin::Run,
            init_pid: None,
            command: vec!["true".into()],
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: Default::default(),
        };
        registry.put(&instance).expect("put");
        assert_eq!(registry.list().expect("list"), []);
        assert_eq!(registry.get(&instance.name).expect("get"), None);
        registry.remove(&instance.name).expect("remove");
        registry.remove(&instance.name).expect("removing twice");
    }
}
