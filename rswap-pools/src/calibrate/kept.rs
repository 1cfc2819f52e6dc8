//! What was measured, kept in files, and laid over what is found.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};

use super::Result;
use crate::{
    Device, Inventory, Known, LocalKind, LocalPool, Measure, Settings, Source, State, cpu_list,
    discover::RELATIVE_SPEED,
};

/// What `rswap calibrate` measured of one pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The pool's name.
    pub pool: String,
    /// What it was made of: measures of another device under the same name are worth nothing.
    pub fingerprint: String,
    /// When.
    pub at: UnixMillis,
    /// On which host.
    pub host: String,
    /// With which kernel: its release.
    pub kernel: String,
    /// What, with its unit, and how much.
    pub measures: Vec<(String, f64)>,
}

/// Why calibrations could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}")]
pub struct KeptError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What a pool is made of, as far as its performance depends on it.
pub fn fingerprint(pool: &LocalPool) -> String {
    match &pool.kind {
        LocalKind::Cores { cpus, .. } => format!("cpus {}", cpu_list::format(cpus)),
        LocalKind::Memory { nodes, .. } => format!("nodes {}", cpu_list::format(nodes)),
        LocalKind::Swap { path, .. } => format!("swap {}", path.display()),
        LocalKind::Storage { fs_type, mounted, devices, .. } => {
            format!("{fs_type} {mounted} {}", devices.join(" "))
        }
        LocalKind::Link { interface, what, .. } => format!("{what} {interface}"),
    }
}

/// [`fingerprint`], with size and model of its devices: after a reboot another disk may have the name.
fn made_of(pool: &LocalPool, devices: &[Device]) -> String {
    let LocalKind::Storage { devices: names, .. } = &pool.kind else { return fingerprint(pool) };
    let known = names.iter().filter_map(|name| devices.iter().find(|device| device.name == *name));
    let each = known.map(|device| {
        let bytes = device.bytes.map_or_else(String::new, |bytes| bytes.to_string());
        let what = device.file.as_deref().or(device.model.as_deref()).unwrap_or_default();
        format!(", {} {bytes} {what}", device.name)
    });
    fingerprint(pool) + &each.collect::<String>()
}

impl Calibration {
    /// Of these results, of a pool in what was found.
    pub fn new(
        pool: &LocalPool,
        found: &Inventory,
        at: UnixMillis,
        host: &str,
        kernel: &str,
        results: Vec<Result>,
    ) -> Self {
        Self {
            pool: pool.name.clone(),
            fingerprint: made_of(pool, &found.devices),
            at,
            host: host.to_owned(),
            kernel: kernel.to_owned(),
            measures: results.into_iter().map(|(what, value)| (what.to_owned(), value)).collect(),
        }
    }
}

/// Writes it into `directory`, in place of what was measured of this pool before.
pub fn keep(directory: &Path, calibration: &Calibration) -> std::result::Result<PathBuf, KeptError> {
    let path = directory.join(file_name(&calibration.pool));
    let half = directory.join(format!(".{}.{}", file_name(&calibration.pool), std::process::id()));
    let text = serde_json::to_vec_pretty(calibration).map_err(io::Error::other);
    let written = fs::create_dir_all(directory)
        .and(text)
        .and_then(|text| fs::write(&half, text))
        .and_then(|()| fs::rename(&half, &path));
    match written {
        Ok(()) => Ok(path),
        Err(source) => Err(KeptError { path, source }),
    }
}

/// Names of pools have slashes.
fn file_name(pool: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    let name: String = pool
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02x}") })
        .collect();
    name + ".json"
}

/// All that `directory` keeps of this host with this kernel. What can't be read is left out: it can be measured again.
pub fn kept(directory: &Path, host: &str, kernel: &str) -> Vec<Calibration> {
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(std::result::Result::ok);
    let paths =
        entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "json"));
    let read = |path: PathBuf| serde_json::from_slice::<Calibration>(&fs::read(path).ok()?).ok();
    paths.filter_map(read).filter(|kept| kept.host == host && kept.kernel == kernel).collect()
}

/// Lays what was measured over `inventory`. Core sets get their speed from it, unless the configuration says it: relative to the
/// fastest set of the host, once all sets that are there were measured.
pub fn apply(inventory: &mut Inventory, calibrations: &[Calibration], settings: &Settings) {
    for pool in &mut inventory.pools {
        let print = made_of(pool, &inventory.devices);
        let own = calibrations.iter().find(|kept| kept.pool == pool.name && kept.fingerprint == print);
        for (what, value) in own.iter().flat_map(|kept| &kept.measures) {
            let at = own.map_or_else(UnixMillis::default, |kept| kept.at);
            pool.performance.retain(|measure| measure.what != *what);
            let known = Known { value: *value, source: Source::Measured { at } };
            pool.performance.push(Measure { what: what.clone(), known });
        }
    }
    let operations = |pool: &LocalPool| {
        pool.performance.iter().find(|measure| measure.what == "operations_per_s").cloned()
    };
    let sets = inventory.pools.iter().filter(|pool| pool.kind.cpus().is_some());
    let there = sets.filter(|pool| !matches!(pool.state, State::Gone { .. }));
    let Some(rates) =
        there.map(|pool| operations(pool).map(|measure| measure.known.value)).collect::<Option<Vec<f64>>>()
    else {
        return;
    };
    let fastest = rates.into_iter().fold(0.0, f64::max);
    for pool in inventory.pools.iter_mut().filter(|pool| pool.kind.cpus().is_some()) {
        let configured =
            settings.pools.iter().any(|wanted| wanted.name == pool.name && wanted.performance.is_some());
        let Some(measured) = operations(pool).filter(|_| !configured && fastest > 0.0) else { continue };
        let value = settings.performance.value * measured.known.value / fastest;
        let known = Known { value, source: measured.known.source };
        for measure in pool.performance.iter_mut().filter(|measure| measure.what == RELATIVE_SPEED) {
            measure.known = known.clone();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Member,
        discover::tests::{server, wanted},
    };

    fn measured_in(found: &Inventory, pool: &LocalPool, at: u64, value: f64) -> Calibration {
        Calibration::new(pool, found, UnixMillis(at), "h", "6.1", vec![("operations_per_s", value)])
    }

    fn measured(pool: &LocalPool, at: u64, value: f64) -> Calibration {
        measured_in(&server().discover(&Settings::default(), 1), pool, at, value)
    }

    #[test]
    fn another_disk_of_the_same_name_is_not_what_was_measured() {
        let found = server().discover(&Settings::default(), 1);
        let pool = found.pool("fs:/").unwrap().clone();
        let LocalKind::Storage { devices, .. } = &pool.kind else { panic!("{pool:?}") };
        let kept = [measured_in(&found, &pool, 1, 7.0)];
        let applied = |found: &Inventory| {
            let mut found = found.clone();
            apply(&mut found, &kept, &Settings::default());
            found.pool("fs:/").unwrap().measured("operations_per_s")
        };
        assert_eq!(applied(&found), Some(7.0));
        let mut another = found.clone();
        let disk = another.devices.iter_mut().find(|device| device.name == devices[0]).unwrap();
        disk.bytes = disk.bytes.map(|bytes| bytes + 512);
        assert_eq!(applied(&another), None);
    }

    #[test]
    fn what_is_kept_is_read_back_for_this_host_and_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let found = server().discover(&Settings::default(), 1);
        for name in ["cores", "fs:/", "fs:/mnt/a cd"] {
            keep(dir.path(), &measured(found.pool(name).unwrap(), 1, 1.0)).unwrap();
        }
        let path = keep(dir.path(), &measured(found.pool("fs:/").unwrap(), 2, 7.0)).unwrap();
        fs::write(dir.path().join("broken.json"), "{").unwrap();
        let all = kept(dir.path(), "h", "6.1");
        assert_eq!(all.len(), 3);
        assert!(
            all.contains(&measured(found.pool("fs:/").unwrap(), 2, 7.0)),
            "the later one counts: {}",
            path.display()
        );
        assert!(kept(dir.path(), "h", "6.2").is_empty() && kept(dir.path(), "g", "6.1").is_empty());
        assert!(kept(Path::new("/nonexistent"), "h", "6.1").is_empty());
    }

    #[test]
    fn speeds_are_relative_to_the_fastest_set_and_the_configuration_wins() {
        let set = |name: &str, cpu: usize| wanted(name, Member::Cpus([cpu].into()));
        let mut fixed = set("fixed", 2);
        fixed.performance = Some(0.3);
        let settings = Settings { pools: vec![set("slow", 0), set("fast", 1), fixed], ..Settings::default() };
        let found = server().discover(&settings, 1);
        let of = |name: &str, value| measured(found.pool(name).unwrap(), 5, value);
        let speeds = |calibrations: &[Calibration]| {
            let mut found = found.clone();
            apply(&mut found, calibrations, &settings);
            apply(&mut found, calibrations, &settings);
            ["slow", "fast", "fixed"].map(|name| found.pool(name).unwrap().relative_speed().unwrap())
        };
        assert_eq!(speeds(&[of("slow", 2e8), of("fast", 8e8)]), [1.0, 1.0, 0.3], "fixed was not measured");
        assert_eq!(speeds(&[of("slow", 2e8), of("fast", 8e8), of("fixed", 1e8)]), [0.25, 1.0, 0.3]);
        let mut of_others = of("slow", 2e8);
        of_others.fingerprint = "cpus 9".to_owned();
        assert_eq!(speeds(&[of_others, of("fast", 8e8), of("fixed", 1e8)]), [1.0, 1.0, 0.3]);
    }
}
