//! How fast a copy may be: no faster than lets the instance have its own I/O.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Share of the time in which the instance may wait for I/O more than before the copy began.
const MORE_SHARE: f64 = 0.1;
/// How long the copy pauses when it waits more.
const PAUSE: Duration = Duration::from_millis(50);
/// Before the copy, for comparison.
const BEFORE: Duration = Duration::from_millis(200);

/// Looks at the instance's I/O pressure (`io.pressure`). Where the kernel has none, nothing is slowed down.
#[derive(Debug)]
pub(super) struct Pace {
    file: PathBuf,
    last: Option<(Instant, Duration)>,
    usual_share: f64,
    waited: Duration,
}

impl Pace {
    /// For the instance in `cgroup`, before anything is copied.
    pub(super) fn of(cgroup: &Path) -> Self {
        let file = cgroup.join("io.pressure");
        let mut pace = Self { file, last: None, usual_share: 0.0, waited: Duration::ZERO };
        pace.last = pace.stalled();
        if pace.last.is_some() {
            std::thread::sleep(BEFORE);
            pace.usual_share = pace.share().unwrap_or(0.0);
        }
        pace
    }

    /// Waits if the instance does.
    pub(super) fn keep(&mut self) {
        let due = self.last.is_some_and(|(at, _)| at.elapsed() >= LOOK_EVERY);
        if due && self.share().is_some_and(|share| share > self.usual_share + MORE_SHARE) {
            std::thread::sleep(PAUSE);
            self.waited += PAUSE;
        }
    }

    /// How long it has waited since this was asked last.
    pub(super) fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }

    /// Share of the time since the last look in which a task of the instance waited for I/O.
    fn share(&mut self) -> Option<f64> {
        let (before, stalled_before) = self.last?;
        self.last = self.stalled();
        let (now, stalled) = self.last?;
        let stalled = stalled.saturating_sub(stalled_before);
        Some(stalled.as_secs_f64() / (now - before).as_secs_f64().max(1e-3))
    }

    fn stalled(&self) -> Option<(Instant, Duration)> {
        let total = total(&fs::read_to_string(&self.file).ok()?)?;
        Some((Instant::now(), total))
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=1234`, in microseconds.
fn total(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    let total = line.split_whitespace().find_map(|word| word.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stalled_time_is_read() {
        let text = "some avg10=1.53 avg60=0.87 avg300=0.21 total=6231\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=17\n";
        assert_eq!(total(text), Some(Duration::from_micros(6231)));
        assert_eq!(total("full total=3"), None);
    }

    #[test]
    fn it_waits_as_long_as_the_instance_waits_more_than_before() {
        let cgroup = tempfile::tempdir().expect("a temporary directory");
        let stalled_ms = |ms: u64| {
            let text = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull total=0\n", ms * 1000);
            fs::write(cgroup.path().join("io.pressure"), text).expect("write");
        };
        // For a fifth of the time, as it always does.
        stalled_ms(0);
        let path = cgroup.path().to_owned();
        let before = std::thread::spawn(move || Pace::of(&path));
        std::thread::sleep(BEFORE / 2);
        stalled_ms(BEFORE.as_millis() as u64 / 5);
        let mut pace = before.join().expect("it came to an end");
        let mut total = BEFORE.as_millis() as u64 / 5;
        // Of the time since its last look, which is longer after it has waited.
        for (share, waits) in [(0, false), (15, false), (90, true), (80, true), (10, false)] {
            std::thread::sleep(LOOK_EVERY);
            let since = pace.last.map_or(0, |(at, _)| at.elapsed().as_millis() as u64);
            total += since * share / 100;
            stalled_ms(total);
            pace.keep();
            assert_eq!(pace.take_waited() > Duration::ZERO, waits, "at {share} %");
        }
    }

    #[test]
    fn without_pressure_nothing_is_slowed_down() {
        let mut pace = Pace::of(Path::new("/nonexistent"));
        pace.keep();
        assert_eq!(pace.take_waited(), Duration::ZERO);
    }
}
