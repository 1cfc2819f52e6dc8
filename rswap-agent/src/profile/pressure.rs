//! For how long tasks were held up for lack of a CPU, of memory, or by I/O, as the kernel adds it up (PSI).

use std::path::PathBuf;

use crate::kept_files::{Kept, Reader};

/// After so many windows it is taken for grown all the same: the kernel rounds what it adds up, of a host that hardly does anything to nothing.
const GROWN_AFTER_WINDOWS: u32 = 10;

/// Time in which tasks were held up, in microseconds; `None` where the kernel does not keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stalled {
    /// One of them, at least.
    pub(super) some_us: Option<u64>,
    /// All that had something to do.
    pub(super) full_us: Option<u64>,
}

impl Stalled {
    /// What a `.pressure` file says.
    fn of(text: &str) -> Self {
        let total = |kind: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
            line.split(' ').find_map(|word| word.strip_prefix("total="))?.parse().ok()
        };
        Self { some_us: total("some"), full_us: total("full") }
    }

    /// In which shares of a window it grew since `earlier`, 0 to 1: some, and full. What it grew by beyond the window's length, as no file is read at the very
    /// moment in which that ends, is left for the next window.
    pub(super) fn shares_since(&mut self, earlier: &Self, window_us: u64) -> [Option<f64>; 2] {
        let share = |now: &mut Option<u64>, earlier: Option<u64>| {
            let (now, earlier) = (now.as_mut()?, earlier?);
            *now = (*now).min(earlier.saturating_add(window_us));
            Some(now.saturating_sub(earlier) as f64 / window_us.max(1) as f64)
        };
        [share(&mut self.some_us, earlier.some_us), share(&mut self.full_us, earlier.full_us)]
    }
}

/// The same, by what they waited for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StalledFor {
    pub(super) cpu: Stalled,
    pub(super) memory: Stalled,
    pub(super) io: Stalled,
}

/// A file of pressures that is read only where those of the whole host grew.
#[derive(Debug)]
pub(super) struct Pressure {
    file: Kept,
    /// What it said when it was read last.
    said: Stalled,
}

impl Pressure {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { file: Kept::new(path), said: Stalled::default() }
    }

    pub(super) fn is_open(&self) -> bool {
        self.file.is_open()
    }

    /// What a cgroup says.
    pub(super) fn stalled(&mut self, reader: &mut Reader, host: &OfHost) -> Stalled {
        if host.has_grown || self.said.some_us.is_none() {
            self.said = read(reader, &mut self.file);
        }
        self.said
    }
}

/// What a file of pressures says; nothing, where it can't be read.
pub(super) fn read(reader: &mut Reader, file: &mut Kept) -> Stalled {
    reader.read(file).map(|text| Stalled::of(&text)).unwrap_or_default()
}

/// What the whole host says of its pressures: what did not grow there grew in no cgroup, as each of its tasks counts there, too. Where none of the tasks was held
/// up, all of some were not, either.
#[derive(Debug)]
pub(super) struct HostPressure {
    pub(super) memory: OfHost,
    pub(super) io: OfHost,
}

impl Default for HostPressure {
    fn default() -> Self {
        Self { memory: OfHost::new("/proc/pressure/memory"), io: OfHost::new("/proc/pressure/io") }
    }
}

impl HostPressure {
    /// To be called as a window ends, before its instances are looked at: of what comes behind it the next look knows.
    pub(super) fn look(&mut self, reader: &mut Reader) {
        for of in [&mut self.memory, &mut self.io] {
            let Stalled { some_us, .. } = read(reader, &mut of.file);
            of.found(some_us);
        }
    }
}

/// One of them.
#[derive(Debug)]
pub(super) struct OfHost {
    file: Kept,
    some_us: Option<u64>,
    /// Some task was held up since the look before, or nobody knows.
    has_grown: bool,
    windows_since: u32,
}

impl OfHost {
    fn new(path: &str) -> Self {
        Self { file: Kept::new(path.into()), some_us: None, has_grown: true, windows_since: 0 }
    }

    fn found(&mut self, some_us: Option<u64>) {
        self.windows_since += 1;
        let is_known = some_us.is_some() && some_us == self.some_us;
        self.has_grown = !is_known || self.windows_since >= GROWN_AFTER_WINDOWS;
        if self.has_grown {
            self.windows_since = 0;
        }
        self.some_us = some_us;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn both_totals_are_found_where_the_kernel_has_them() {
        let both = "some avg10=0.00 avg60=0.00 avg300=0.00 total=81\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
        assert_eq!(Stalled::of(both), Stalled { some_us: Some(81), full_us: Some(3) });
        // That of CPUs, before Linux 5.13.
        let some = "some avg10=0.00 avg60=0.00 avg300=0.00 total=81\n";
        assert_eq!(Stalled::of(some), Stalled { some_us: Some(81), full_us: None });
        assert_eq!(Stalled::of(""), Stalled::default());
    }

    #[test]
    fn shares_of_windows_add_up_to_what_the_kernel_counted() {
        let of = |some_us, full_us| Stalled { some_us, full_us };
        // A file that is read now a little later, now a little sooner than a window ends.
        let mut before = of(Some(500), None);
        let mut told_us = 0.0;
        for (total_us, full_us) in [(1_540, None), (2_480, Some(7)), (3_520, Some(107)), (3_520, Some(107))] {
            let mut now = of(Some(total_us), full_us);
            let [some, full] = now.shares_since(&before, 1000);
            let some = some.unwrap();
            assert!((0.0..=1.0).contains(&some), "{some}");
            assert_eq!(full.is_some(), before.full_us.is_some(), "none is known before there were two");
            told_us += some * 1000.0;
            before = now;
        }
        assert_eq!(told_us, 3_020.0);
        assert_eq!(before, of(Some(3_520), Some(107)));
        // Whatever the kernel may do.
        assert_eq!(of(Some(3), None).shares_since(&of(Some(9), Some(1)), 1000), [Some(0.0), None]);
    }

    #[test]
    fn pressure_is_read_where_the_hosts_has_grown_and_now_and_then() {
        let mut host = OfHost::new("/nothing");
        let mut grown = |us| {
            host.found(us);
            host.has_grown
        };
        assert!(grown(Some(5)));
        assert!(!grown(Some(5)));
        assert!(grown(Some(6)) && !grown(Some(6)));
        // Where the kernel does not keep it, or it can't be read, nobody knows.
        assert!(grown(None) && grown(None) && grown(Some(6)));
        let windows: Vec<bool> = (0..2 * GROWN_AFTER_WINDOWS).map(|_| grown(Some(6))).collect();
        assert_eq!(windows.iter().filter(|grown| **grown).count(), 2);
    }

    #[test]
    fn a_cgroups_file_is_not_read_while_its_host_has_no_pressure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("io.pressure");
        let write = |some_us: u64, full_us: u64| {
            fs::write(&path, format!("some avg10=0.00 total={some_us}\nfull avg10=0.00 total={full_us}\n"))
                .unwrap();
        };
        let (mut reader, mut file, mut host) =
            (Reader::default(), Pressure::new(path.clone()), OfHost::new("/nothing"));
        let mut stalled_with = |host_us| {
            host.found(Some(host_us));
            let Stalled { some_us, full_us } = file.stalled(&mut reader, &host);
            (some_us, full_us)
        };
        stalled_with(1);
        assert_eq!(stalled_with(1), (None, None), "it is not there");
        write(5, 2);
        assert_eq!(stalled_with(1), (Some(5), Some(2)), "it was never read");
        write(7, 3);
        assert_eq!(stalled_with(1), (Some(5), Some(2)));
        assert_eq!(stalled_with(2), (Some(7), Some(3)));
    }
}
