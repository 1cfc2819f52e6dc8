//! The volumes of an instance: what they are called, and where it sees them.

use std::{
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{InstanceError, InstanceName};

/// A directory that belongs to an instance and moves with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Unique in the instance.
    pub name: InstanceName,
    /// Where the instance sees it.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not NAME:/PATH, such as data:/var/lib/data");
        let (name, path) = text.split_once(':').ok_or_else(wrong)?;
        let (name, path) = (name.parse().map_err(|_| wrong())?, PathBuf::from(path));
        let volume = Self { name, path };
        if volume.is_sound() { Ok(volume) } else { Err(wrong()) }
    }
}

impl Volume {
    /// Whether its path is absolute, plain, and not the root.
    pub fn is_sound(&self) -> bool {
        let mut parts = self.path.components();
        parts.next() == Some(Component::RootDir)
            && parts.clone().next().is_some()
            && parts.all(|part| matches!(part, Component::Normal(_)))
    }
}

/// Whether they can be an instance's together: sound, with different names, and none inside another.
pub fn require_sound(volumes: &[Volume]) -> Result<(), InstanceError> {
    for (at, volume) in volumes.iter().enumerate() {
        let collides = |other: &&Volume| {
            other.name == volume.name
                || other.path.starts_with(&volume.path)
                || volume.path.starts_with(&other.path)
        };
        if !volume.is_sound() || volumes[..at].iter().any(|other| collides(&other)) {
            let text = format!(
                "the volume {}:{} has no plain absolute path, or lies in another one",
                volume.name,
                volume.path.display()
            );
            return Err(InstanceError::Invalid(text));
        }
    }
    Ok(())
}

/// Mounts the directory `from` of this host at `to`, which is made if it is missing, in this process's mount namespace.
pub fn mount_at(from: &Path, to: &Path) -> Result<(), InstanceError> {
    std::fs::create_dir_all(to).map_err(InstanceError::io(format!("making {}", to.display())))?;
    let none: Option<&str> = None;
    mount(Some(from), to, none, MsFlags::MS_BIND, none).map_err(InstanceError::io(format!(
        "mounting the volume {} at {}",
        from.display(),
        to.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_absolute_paths_are_taken() {
        let good: Volume = "data:/srv/data".parse().expect("sound");
        assert_eq!((good.name.as_str(), good.path.as_path()), ("data", Path::new("/srv/data")));
        for bad in ["data", "data:", "data:srv", "data:/", "data:/a/../b", ":/srv", "UP:/srv"] {
            assert!(bad.parse::<Volume>().is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes_may_not_overlap() {
        let all =
            |texts: &[&str]| texts.iter().map(|text| text.parse().expect(text)).collect::<Vec<Volume>>();
        assert!(require_sound(&all(&["a:/srv/a", "b:/srv/b", "c:/srv/ab"])).is_ok());
        assert!(require_sound(&all(&["a:/srv/a", "a:/srv/b"])).is_err());
        assert!(require_sound(&all(&["a:/srv", "b:/srv/b"])).is_err());
    }
}
