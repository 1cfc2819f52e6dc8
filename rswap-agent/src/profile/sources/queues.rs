//! Which times the kernel keeps of block requests, by what is set of a device's queue.
//!
//! When a request was made, it keeps where it keeps statistics for /proc/diskstats (`queue/iostats`), or has an I/O scheduler (`blk_mq_need_time_stamp`).
//! When the driver was given it, it keeps where somebody has asked for that (`QUEUE_FLAG_STATS`): writeback throttling, once it has been set up, or a
//! scheduler.

use std::{fs, path::Path};

use crate::profile::doctor::Finding;

/// Schedulers that ask for when the driver was given a request; bfq since Linux 6.0.
const ASKING: [&str; 2] = ["kyber", "bfq"];

/// The queue of a device.
#[derive(Debug)]
pub(super) struct Queue {
    device: String,
    /// `queue/iostats`.
    has_statistics: bool,
    /// `queue/wbt_lat_usec` can be read: it can't where throttling has never been on.
    has_throttling: bool,
    /// The I/O scheduler that is chosen.
    scheduler: Option<String>,
}

impl Queue {
    /// Those of the devices in `/sys/block` that are in use and complete requests.
    pub(super) fn all_in(directory: &Path) -> Vec<Self> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        let mut all: Vec<Self> = entries.filter_map(|entry| Self::of(&entry.path())).collect();
        all.sort_unstable_by(|a, b| a.device.cmp(&b.device));
        all
    }

    fn of(device: &Path) -> Option<Self> {
        let read = |file: &str| fs::read_to_string(device.join(file)).ok();
        if read("size")?.trim() == "0" || !device.join("mq/0").exists() {
            return None;
        }
        Some(Self {
            device: device.file_name()?.to_str()?.to_owned(),
            has_statistics: read("queue/iostats").is_none_or(|text| text.trim() != "0"),
            has_throttling: read("queue/wbt_lat_usec").is_some(),
            scheduler: read("queue/scheduler").as_deref().and_then(chosen),
        })
    }

    /// Whether it is kept when a request was made.
    fn knows_made(&self) -> bool {
        self.has_statistics || self.scheduler.is_some()
    }

    /// Whether it is kept when the driver was given it.
    fn knows_issued(&self) -> bool {
        self.has_throttling || self.scheduler.as_deref().is_some_and(|name| ASKING.contains(&name))
    }
}

/// The one in brackets.
fn chosen(schedulers: &str) -> Option<String> {
    let (_, rest) = schedulers.split_once('[')?;
    let (name, _) = rest.split_once(']')?;
    (name != "none").then(|| name.to_owned())
}

const NOT_MADE: &str =
    "the kernel does not keep when requests were made (`echo 1 > /sys/block/DEVICE/queue/iostats`)";
const NOT_ISSUED: &str = "the kernel does not keep when the driver was given a request \
                          (`echo -1 > /sys/block/DEVICE/queue/wbt_lat_usec`, or the I/O scheduler kyber)";

/// Whether it is known of all how long their requests take.
pub(super) fn times(queues: &[Queue]) -> Finding {
    found(queues, &[(NOT_MADE, &|queue| !queue.knows_made() && !queue.knows_issued())])
}

/// Whether it is known of all how much of that they wait for the driver.
pub(super) fn split(queues: &[Queue]) -> Finding {
    found(queues, &[(NOT_MADE, &|queue| !queue.knows_made()), (NOT_ISSUED, &|queue| !queue.knows_issued())])
}

/// What may be missing, and of which devices it is.
type Missing<'a> = (&'a str, &'a dyn Fn(&Queue) -> bool);

/// The devices, or what is missing of which.
fn found(queues: &[Queue], missing: &[Missing<'_>]) -> Finding {
    let names = |concerned: &dyn Fn(&Queue) -> bool| {
        let names = queues.iter().filter(|queue| concerned(queue)).map(|queue| queue.device.as_str());
        names.collect::<Vec<_>>().join(", ")
    };
    let lacks = missing.iter().map(|(what, concerned)| (names(concerned), what));
    let lacks: Vec<String> = lacks
        .filter(|(names, _)| !names.is_empty())
        .map(|(names, what)| format!("{names}: {what}"))
        .collect();
    match (lacks.is_empty(), queues.is_empty()) {
        (false, _) => Err(lacks.join("; ")),
        (true, false) => Ok(names(&|_| true)),
        (true, true) => Ok("no device completes requests".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(directory: &Path, name: &str, files: &[(&str, &str)]) {
        let path = directory.join(name);
        fs::create_dir_all(path.join("queue")).unwrap();
        fs::create_dir_all(path.join("mq/0")).unwrap();
        for (file, text) in [("size", "100\n"), ("queue/iostats", "1\n")].iter().chain(files) {
            fs::write(path.join(file), text).unwrap();
        }
    }

    #[test]
    fn a_device_is_named_with_what_the_kernel_does_not_keep_of_its_requests() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        assert_eq!(times(&Queue::all_in(&at.join("none"))), Ok("no device completes requests".to_owned()));
        const NONE: (&str, &str) = ("queue/scheduler", "[none] mq-deadline kyber\n");
        const DEADLINE: (&str, &str) = ("queue/scheduler", "none [mq-deadline] kyber\n");
        const KYBER: (&str, &str) = ("queue/scheduler", "none mq-deadline [kyber]\n");
        const NO_STATISTICS: (&str, &str) = ("queue/iostats", "0\n");
        const THROTTLING: (&str, &str) = ("queue/wbt_lat_usec", "2000\n");
        device(at, "vda", &[DEADLINE, THROTTLING]);
        device(at, "nvme0n1", &[NONE, ("queue/wbt_lat_usec", "0\n")]);
        device(at, "sda", &[KYBER, NO_STATISTICS]);
        let all = "nvme0n1, sda, vda".to_owned();
        let queues = Queue::all_in(at);
        assert_eq!((times(&queues), split(&queues)), (Ok(all.clone()), Ok(all)));
        // These are not in use, or pass on what they are asked for.
        device(at, "loop0", &[NONE, NO_STATISTICS, ("size", "0\n")]);
        device(at, "dm-0", &[NONE, NO_STATISTICS]);
        fs::remove_dir_all(at.join("dm-0/mq")).unwrap();
        assert_eq!(Queue::all_in(at).len(), 3);

        device(at, "sdb", &[DEADLINE]);
        device(at, "sdc", &[DEADLINE, NO_STATISTICS]);
        device(at, "sdd", &[NONE, NO_STATISTICS, THROTTLING]);
        let queues = Queue::all_in(at);
        assert!(times(&queues).is_ok(), "one of both times is known of each");
        let made = format!("sdd: {NOT_MADE}");
        assert_eq!(split(&queues), Err(format!("{made}; sdb, sdc: {NOT_ISSUED}")));
        device(at, "sde", &[NO_STATISTICS]);
        let queues = Queue::all_in(at);
        assert_eq!(times(&queues), Err(format!("sde: {NOT_MADE}")));
        assert_eq!(split(&queues), Err(format!("sdd, sde: {NOT_MADE}; sdb, sdc, sde: {NOT_ISSUED}")));
    }
}
