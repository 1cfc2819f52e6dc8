//! Tells when block devices may have come or gone: to look for them in /sys takes several files of each, those included that are not in use.

use std::{borrow::Cow, path::PathBuf};

use crate::kept_files::{Kept, Reader};

/// After so many looks they may have all the same: paths of multipath disks are not listed.
const LOOK_AFTER: u32 = 30;

/// The kernel's list of those that have a size.
#[derive(Debug)]
pub(super) struct DeviceList {
    file: Kept,
    /// What it said at the last look.
    said: Option<String>,
    /// Looks since it said something else.
    same: u32,
}

impl Default for DeviceList {
    fn default() -> Self {
        Self::of("/proc/partitions".into())
    }
}

impl DeviceList {
    fn of(path: PathBuf) -> Self {
        Self { file: Kept::new(path), said: None, same: 0 }
    }

    /// Whether some may have come or gone since the last look but one: one is listed before all of it is in /sys.
    pub(super) fn may_have_changed(&mut self, reader: &mut Reader) -> bool {
        let says = reader.read(&mut self.file).ok();
        if says.is_some() && says.as_deref() == self.said.as_deref() {
            self.same += 1;
        } else {
            self.same = 0;
            self.said = says.map(Cow::into_owned);
        }
        self.same < 2 || self.same.is_multiple_of(LOOK_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_looked_for_twice_when_the_list_changes_and_now_and_then() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("partitions");
        let (mut reader, mut list) = (Reader::default(), DeviceList::of(path.clone()));
        assert!(list.may_have_changed(&mut reader) && list.may_have_changed(&mut reader), "nobody knows");
        let mut looks = |text: &str, count: u32| {
            std::fs::write(&path, text).unwrap();
            (0..count).filter(|_| list.may_have_changed(&mut reader)).count()
        };
        assert_eq!(looks("7 0 100 loop0\n", 10), 2);
        assert_eq!(looks("7 0 100 loop0\n", 4), 0);
        assert_eq!(looks("7 0 200 loop0\n", 10), 2);
        assert_eq!(looks("7 0 200 loop0\n", 2 * LOOK_AFTER), 2);
    }

    #[test]
    fn the_kernels_list_is_found() {
        let mut list = DeviceList::default();
        list.may_have_changed(&mut Reader::default());
        assert!(list.said.is_some());
    }
}
