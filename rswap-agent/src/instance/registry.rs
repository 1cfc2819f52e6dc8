//! The instances of a host: one small file each under the state directory, so that they outlive the agent.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{Instance, InstanceError, InstanceName, affinity::Choices};

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
                match read::<Instance>(&path) {
                    Ok(instance) if instance.is_alive() => instances.push(instance),
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
        match read::<Instance>(&self.path(name)) {
            Ok(instance) => Ok(Some(instance).filter(Instance::is_alive)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(InstanceError::io(format!("reading {}", self.path(name).display()))(error)),
        }
    }

    /// Writes an instance's file, whole or not at all.
    pub fn put(&self, instance: &Instance) -> Result<(), InstanceError> {
        put(&self.path(&instance.name), instance)
    }

    /// Forgets an instance; one that isn't there is no error.
    pub fn remove(&self, name: &InstanceName) -> Result<(), InstanceError> {
        for path in [self.choices_path(name), self.path(name)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(InstanceError::io(format!("removing {}", path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Which processors the threads of an instance chose for themselves, if it was moved between sets of cores.
    pub fn choices(&self, instance: &Instance) -> Result<Option<Choices>, InstanceError> {
        let path = self.choices_path(&instance.name);
        match read::<Choices>(&path) {
            Ok(choices) => Ok(Some(choices).filter(|choices| choices.cgroup_id == instance.cgroup_id)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(InstanceError::io(format!("reading {}", path.display()))(error)),
        }
    }

    /// Writes them, whole or not at all.
    pub fn put_choices(&self, name: &InstanceName, choices: &Choices) -> Result<(), InstanceError> {
        put(&self.choices_path(name), choices)
    }

    fn choices_path(&self, name: &InstanceName) -> PathBuf {
        self.directory.join(format!("{name}.affinity"))
    }

    fn path(&self, name: &InstanceName) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

fn put(path: &Path, content: &impl Serialize) -> Result<(), InstanceError> {
    let what = || format!("writing {}", path.display());
    let text = serde_json::to_vec_pretty(content)
        .map_err(|error| InstanceError::io(what())(io::Error::other(error)))?;
    let mut temporary = path.to_owned().into_os_string();
    temporary.push(".new");
    fs::write(&temporary, text).map_err(InstanceError::io(what()))?;
    fs::rename(&temporary, path).map_err(InstanceError::io(what()))
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
