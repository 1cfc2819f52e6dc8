//! The instances of a host: one small file each under the state directory, so that they outlive the agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    Instance, InstanceError, InstanceName, Origin,
    affinity::Choices,
    cgroup,
    standing::{Changes, Standing},
};
use crate::kept_files::Reader;

/// The files are read again after this, even if their directory does not say that one has changed: somebody may have written into one.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// More than the times of files advance by at a time: a tick on most file systems, one second or two on some.
const TIME_STEP: Duration = Duration::from_millis(2100);

/// An instance that has been dead for so long is forgotten: whoever started it has had the time to do so himself.
const DEAD_FOR: Duration = Duration::from_secs(30);
/// So many in one window.
const AT_A_TIME: usize = 8;
/// The inode of the cgroup namespace in which the host was started (`PROC_CGROUP_INIT_INO`, include/linux/proc_ns.h).
const INITIAL_CGROUP_NAMESPACE: u64 = 0xeffffffb;

/// What was read of a registry, and of its instances' cgroups.
#[derive(Debug, Default)]
pub struct Listing {
    /// When the directory had changed last, and when it was read; nothing, if it may have changed since without a sign.
    read: Option<(SystemTime, SystemTime)>,
    instances: Vec<Instance>,
    /// Which of them lived when that was answered last; nothing, if it is to be answered again.
    answered: Option<Vec<usize>>,
    /// By the cgroup's id.
    files: BTreeMap<u64, Standing>,
    changes: Changes,
    still: BTreeSet<InstanceName>,
    /// Since when each of the dead is known to be dead, by the cgroup's id.
    dead: BTreeMap<u64, Instant>,
    reader: Reader,
}

impl Listing {
    /// Those of the last listing that stood still, or were about to ([`super::cgroup::stands_still`]).
    pub fn still(&self) -> &BTreeSet<InstanceName> {
        &self.still
    }

    /// Takes in what the files say.
    fn take_in(&mut self, instances: Vec<Instance>) {
        if self.instances == instances {
            return;
        }
        let ids: BTreeSet<u64> = instances.iter().map(|instance| instance.cgroup_id).collect();
        self.files.retain(|id, _| ids.contains(id));
        self.dead.retain(|id, _| ids.contains(id));
        self.changes.retain(&ids);
        (self.instances, self.answered) = (instances, None);
    }

    /// The living; nothing, if they are those that were answered last.
    fn look(&mut self) -> Option<Vec<Instance>> {
        let Self { instances, answered, files, changes, still, dead, reader, .. } = self;
        reader.are_open(files.values().map(Standing::open_files).sum());
        let changed = changes.take();
        still.clear();
        let mut living = Vec::with_capacity(instances.len());
        for (number, instance) in instances.iter().enumerate() {
            let of = files.entry(instance.cgroup_id).or_insert_with(|| Standing::new(instance));
            if !of.is_of(instance) {
                changes.forget(instance.cgroup_id);
                *of = Standing::new(instance);
            }
            let Some(stands_still) = of.look(instance, reader, changes, &changed) else {
                // Its file may stay for long: what was open of it must not.
                files.remove(&instance.cgroup_id);
                changes.forget(instance.cgroup_id);
                dead.entry(instance.cgroup_id).or_insert_with(Instant::now);
                continue;
            };
            dead.remove(&instance.cgroup_id);
            if stands_still {
                still.insert(instance.name.clone());
            }
            living.push(number);
        }
        if answered.as_ref() == Some(&living) {
            return None;
        }
        let living = answered.insert(living);
        Some(living.iter().map(|&number| instances[number].clone()).collect())
    }
}

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

    /// Every instance that is alive, or may be, by name. A file that can't be read is logged and passed over.
    pub fn list(&self) -> Result<Vec<Instance>, InstanceError> {
        let (mut instances, _) = self.read_all()?;
        instances.retain(|instance| instance.is_alive().unwrap_or(true));
        Ok(instances)
    }

    /// Dead ones, too; and whether all files could be read.
    fn read_all(&self) -> Result<(Vec<Instance>, bool), InstanceError> {
        let what = || format!("listing {}", self.directory.display());
        let (mut instances, mut all) = (Vec::new(), true);
        for entry in fs::read_dir(&self.directory).map_err(InstanceError::io(what()))? {
            let path = entry.map_err(InstanceError::io(what()))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                match read::<Instance>(&path) {
                    Ok(instance) => instances.push(instance),
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "not an instance's file");
                        all = false;
                    }
                }
            }
        }
        instances.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((instances, all))
    }

    /// As [`Self::list`], window by window: the files are only read again when one of them has come, was replaced or has gone since, and now and then.
    /// Nothing, if all is as it was answered last for this listing.
    pub fn list_again(&self, listing: &mut Listing) -> Result<Option<Vec<Instance>>, InstanceError> {
        let now = SystemTime::now();
        let changed = fs::metadata(&self.directory).and_then(|directory| directory.modified());
        let changed =
            changed.map_err(InstanceError::io(format!("looking at {}", self.directory.display())))?;
        let is_known = listing.read.as_ref().is_some_and(|(of, when)| {
            *of == changed && when.elapsed().is_ok_and(|since| since < READ_AGAIN_AFTER)
        });
        if !is_known {
            let (instances, all) = self.read_all()?;
            listing.take_in(instances);
            // What changes within the same step as the last change would not be seen.
            let is_past = now.duration_since(changed).is_ok_and(|since| since > TIME_STEP);
            listing.read = (is_past && all).then_some((changed, now));
        }
        Ok(listing.look())
    }

    /// Removes the files of those that a listing has found dead for half a minute, and that won't come back: what was adopted, when its cgroup has gone; what rswap
    /// started, when no process is left. Nobody else does, as nobody need wait for their end.
    pub fn forget_dead(&self, listing: &mut Listing) {
        let has_been = |instance: &&Instance| {
            listing.dead.get(&instance.cgroup_id).is_some_and(|since| since.elapsed() >= DEAD_FOR)
        };
        let due: Vec<Instance> = listing.instances.iter().filter(has_been).take(AT_A_TIME).cloned().collect();
        // Where not all cgroups of the host can be seen, nobody is known to be dead.
        let Some(mount) = due.first().and_then(|_| seen_from_the_root()) else { return };
        for instance in due {
            // Its file is not there at the next reading; if it is, it is looked at again in half a minute.
            listing.dead.remove(&instance.cgroup_id);
            if !instance.cgroup.starts_with(&mount) {
                continue;
            }
            match self.forget_if_dead(&instance) {
                Ok(true) => tracing::debug!(instance = %instance.name, "forgotten"),
                Ok(false) => {}
                Err(error) => tracing::warn!(
                    instance = %instance.name, %error,
                    "what is kept of a dead instance can't be removed"
                ),
            }
        }
    }

    fn forget_if_dead(&self, instance: &Instance) -> Result<bool, InstanceError> {
        if instance.is_alive()? || (instance.origin == Origin::Adopted && instance.is_here()?) {
            return Ok(false);
        }
        let (choices, path) = (self.choices_path(&instance.name), self.path(&instance.name));
        let own = |id: u64| id == instance.cgroup_id;
        let removing = |path: &Path| InstanceError::io(format!("removing {}", path.display()));
        // The file that says that there is one goes last: what fails before is tried again.
        remove_if(&choices, |file| read::<Choices>(file).is_ok_and(|found| own(found.cgroup_id)))
            .map_err(removing(&choices))?;
        remove_if(&path, |file| read::<Instance>(file).is_ok_and(|found| own(found.cgroup_id)))
            .map_err(removing(&path))
    }

    /// The living instance `name`.
    ///
    /// # Errors
    /// Its file can't be read, or it isn't known whether it lives.
    pub fn get(&self, name: &InstanceName) -> Result<Option<Instance>, InstanceError> {
        match read::<Instance>(&self.path(name)) {
            Ok(instance) => Ok(instance.is_alive()?.then_some(instance)),
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

/// The mount of cgroup v2, if all of the host's cgroups are in it: in a cgroup namespace of its own, this process sees only some, by other paths.
fn seen_from_the_root() -> Option<PathBuf> {
    let own = fs::metadata("/proc/self/ns/cgroup").ok()?.ino();
    (own == INITIAL_CGROUP_NAMESPACE).then(|| cgroup::mount_point().ok())?
}

/// Removes a file, if it is the one that is meant: one of the same name may come at any time.
fn remove_if(path: &Path, is_it: impl Fn(&Path) -> bool) -> io::Result<bool> {
    if !is_it(path) {
        return Ok(false);
    }
    let mut aside = path.to_owned().into_os_string();
    aside.push(".dead");
    let aside = PathBuf::from(aside);
    match fs::rename(path, &aside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        moved => moved?,
    }
    if is_it(&aside) {
        fs::remove_file(&aside)?;
        return Ok(true);
    }
    match renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // And another one behind it: that counts.
        Err(rustix::io::Errno::EXIST) => fs::remove_file(&aside)?,
        Err(error) => return Err(error.into()),
    }
    Ok(false)
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

    fn instance(name: &str, cgroup: PathBuf, cgroup_id: u64) -> Instance {
        Instance {
            name: name.parse().expect("a valid name"),
            labels: Default::default(),
            cgroup,
            cgroup_id,
            origin: super::super::Origin::Run,
            init_pid: None,
            command: vec!["true".into()],
            network: None,
            volumes: Vec::new(),
            pool: None,
            uplink: None,
            memory: None,
            since: Default::default(),
        }
    }

    #[test]
    fn a_dead_instance_is_not_listed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let instance = instance("gone", directory.path().join("no-cgroup"), 1);
        registry.put(&instance).expect("put");
        assert_eq!(registry.list().expect("list"), []);
        assert_eq!(registry.list_again(&mut Listing::default()).expect("list"), Some(Vec::new()));
        assert_eq!(registry.get(&instance.name).expect("get"), None);
        registry.remove(&instance.name).expect("remove");
        registry.remove(&instance.name).expect("removing twice");
    }

    #[test]
    fn what_is_kept_of_the_dead_is_removed_and_of_nobody_else() {
        let Some(mount) = seen_from_the_root() else {
            eprintln!("not tested: no cgroup v2, or only a part of it");
            return;
        };
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let gone = instance("gone", mount.join("rswap-never-was"), 1);
        // Elsewhere, nobody sees whether it is there.
        let elsewhere = instance("elsewhere", directory.path().join("no-cgroup"), 2);
        for instance in [&gone, &elsewhere] {
            registry.put(instance).expect("put");
            registry.put_choices(&instance.name, &Choices::new(instance.cgroup_id, None)).expect("put");
        }
        let mut listing = Listing::default();
        let files = || {
            let entries = fs::read_dir(directory.path().join("instances")).expect("list");
            let names =
                entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text"));
            names.collect::<BTreeSet<_>>()
        };
        let all = files();
        let look = |listing: &mut Listing, dead_for: Duration| {
            assert_eq!(registry.list_again(listing).expect("list").unwrap_or_default(), []);
            let since = Instant::now().checked_sub(dead_for).expect("a machine that has run for a minute");
            listing.dead.values_mut().for_each(|of| *of = since);
            registry.forget_dead(listing);
        };
        look(&mut listing, Duration::ZERO);
        assert_eq!(files(), all);
        // Another one of the name has been started meanwhile.
        registry.put_choices(&gone.name, &Choices::new(3, None)).expect("put");
        registry.put(&Instance { cgroup_id: 3, ..gone.clone() }).expect("put");
        assert!(!registry.forget_if_dead(&gone).expect("looked at"));
        assert_eq!(files(), all);
        registry.put(&gone).expect("put");
        look(&mut listing, DEAD_FOR);
        let left = ["elsewhere.affinity", "elsewhere.json", "gone.affinity"].map(str::to_owned);
        assert_eq!(files(), left.into(), "choices of the next one stay");
        // Into a cgroup that is empty but there others may come, unless rswap made it.
        let path = directory.path().join("empty");
        fs::create_dir(&path).expect("a directory");
        fs::write(path.join("cgroup.events"), "populated 0\nfrozen 0\n").expect("write");
        let empty = instance("empty", path.clone(), cgroup::id(&path).expect("its id"));
        registry.put(&empty).expect("put");
        let adopted = Instance { origin: Origin::Adopted, ..empty.clone() };
        assert!(!registry.forget_if_dead(&adopted).expect("looked at"));
        assert!(registry.forget_if_dead(&empty).expect("looked at"));
        fs::write(path.join("cgroup.events"), "populated 1\nfrozen 0\n").expect("write");
        registry.put(&empty).expect("put");
        assert!(!registry.forget_if_dead(&empty).expect("looked at"));
    }

    #[test]
    fn an_instance_whose_cgroup_can_not_be_read_is_not_taken_for_dead() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let path = directory.path().join("cgroup");
        let events = path.join("cgroup.events");
        // It can be opened, and not be read.
        fs::create_dir_all(&events).expect("directories");
        let instance = instance("one", path.clone(), cgroup::id(&path).expect("its id"));
        registry.put(&instance).expect("put");
        assert_eq!(registry.list().expect("list"), std::slice::from_ref(&instance));
        let again = registry.list_again(&mut Listing::default()).expect("list");
        assert_eq!(again, Some(vec![instance.clone()]));
        assert!(registry.get(&instance.name).is_err());
        fs::remove_dir(&events).expect("remove");
        fs::write(&events, "populated 1\nfrozen 0\n").expect("write");
        assert_eq!(registry.get(&instance.name).expect("get"), Some(instance.clone()));
        fs::write(&events, "populated 0\nfrozen 0\n").expect("write");
        assert_eq!(registry.list().expect("list"), []);
        assert_eq!(registry.get(&instance.name).expect("get"), None);
    }

    #[test]
    fn who_lives_is_answered_again_only_when_that_has_changed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let path = directory.path().join("cgroup");
        fs::create_dir(&path).expect("a directory");
        let is_populated = |word: &str| {
            fs::write(path.join("cgroup.events"), format!("populated {word}\nfrozen 0\n")).expect("write");
        };
        let mut listing = Listing::default();
        let mut again = || registry.list_again(&mut listing).expect("list");
        assert_eq!((again(), again()), (Some(Vec::new()), None), "nobody, which is told, too");
        let mut one = instance("one", path.clone(), cgroup::id(&path).expect("its id"));
        is_populated("1");
        registry.put(&one).expect("put");
        assert_eq!((again(), again()), (Some(vec![one.clone()]), None));
        one.pool = Some("fast".to_owned());
        registry.put(&one).expect("put");
        assert_eq!((again(), again()), (Some(vec![one.clone()]), None));
        is_populated("0");
        assert_eq!((again(), again()), (Some(Vec::new()), None));
        is_populated("1");
        assert_eq!((again(), again()), (Some(vec![one.clone()]), None));
        registry.remove(&one.name).expect("remove");
        assert_eq!((again(), again()), (Some(Vec::new()), None));
    }

    #[test]
    fn what_changes_is_seen_at_once_however_often_it_was_listed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let registry = Registry::open(directory.path()).expect("open");
        let files = directory.path().join("instances");
        let mut listing = Listing::default();
        let mut names = |registry: &Registry| {
            // No process is in these: only what was read of the files is looked at here.
            registry.list_again(&mut listing).expect("list");
            listing.instances.iter().map(|instance| instance.name.to_string()).collect::<Vec<_>>()
        };
        let text = |name: &str| {
            format!(
                r#"{{"name":"{name}","labels":{{}},"cgroup":"/none","cgroup_id":1,"origin":"run","command":["true"],"since":0}}"#
            )
        };
        for (number, pause_ms) in [0, 0, 0, 10, 2200].into_iter().enumerate() {
            fs::write(files.join(format!("i{number}.json")), text(&format!("i{number}"))).expect("write");
            assert_eq!(names(&registry).len(), number + 1);
            std::thread::sleep(Duration::from_millis(pause_ms));
            assert_eq!(names(&registry).len(), number + 1);
            assert_eq!(names(&registry).len(), number + 1);
        }
        registry.remove(&"i3".parse().expect("a name")).expect("remove");
        assert_eq!(names(&registry), ["i0", "i1", "i2", "i4"]);
    }
}
