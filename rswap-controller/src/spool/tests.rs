use std::collections::BTreeMap;

use rswap_fleet::report::VERSION;
use rswap_types::UnixMillis;

use super::*;

fn report(at: u64) -> Report {
    Report {
        version: VERSION,
        host: "a".parse().unwrap(),
        epoch: 0,
        sequence: 0,
        at: UnixMillis(at),
        acts: false,
        address: None,
        running: None,
        pools: Vec::new(),
        instances: Vec::new(),
        gone: BTreeMap::new(),
        links: Vec::new(),
        outcomes: Vec::new(),
        dropped: 0,
    }
}

fn spool(directory: &Path, reports: u64) -> Spool {
    let one = serde_json::to_vec(&Report { epoch: u64::MAX, ..report(0) }).unwrap().len() as u64 + 8;
    Spool::open(directory, one * reports).unwrap()
}

fn numbers(reports: &[Report]) -> Vec<u64> {
    reports.iter().map(|report| report.sequence).collect()
}

#[test]
fn reports_wait_until_they_are_acknowledged_also_for_the_next_agent() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = spool(directory.path(), 100);
    (1..=5).for_each(|at| first.push(report(at)).unwrap());
    let reports = first.oldest(3, u64::MAX);
    assert_eq!(numbers(&reports), [1, 2, 3]);
    first.acknowledge(&reports, 2).unwrap();
    drop(first);
    let mut next = spool(directory.path(), 100);
    next.push(report(6)).unwrap();
    let reports = next.oldest(10, u64::MAX);
    assert_eq!(numbers(&reports), [3, 4, 5, 6]);
    assert!(reports.iter().all(|report| report.epoch == reports[0].epoch && report.dropped == 0));
    assert_eq!(numbers(&next.oldest(10, 1)), [3], "one goes even if it is long");
    next.acknowledge(&reports, 6).unwrap();
    assert!(next.is_empty());
    drop(next);
    let mut last = spool(directory.path(), 100);
    last.push(report(7)).unwrap();
    assert_eq!(numbers(&last.oldest(10, u64::MAX)), [7], "no number is given twice");
}

#[test]
fn a_full_spool_drops_the_oldest_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = spool(directory.path(), 3);
    (1..=9).for_each(|at| spool.push(report(at)).unwrap());
    let reports = spool.oldest(10, u64::MAX);
    assert!(reports.len() >= 2 && reports.len() <= 4, "{}", reports.len());
    assert_eq!(reports.last().unwrap().sequence, 9);
    spool.push(report(10)).unwrap();
    let last = spool.oldest(10, u64::MAX).pop().unwrap();
    assert_eq!((last.sequence, last.dropped + spool.len() as u64), (10, 10));
    assert!(spool.bytes() <= spool.most_bytes + 8, "but for the digits of what was dropped");
}

#[test]
fn what_is_damaged_is_set_aside_and_another_epoch_begins_where_the_head_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = spool(directory.path(), 100);
    (1..=3).for_each(|at| first.push(report(at)).unwrap());
    let epoch = first.head.epoch;
    fs::write(first.path(2), "{").unwrap();
    assert_eq!(numbers(&first.oldest(10, u64::MAX)), [1, 3]);
    assert_eq!((first.len(), first.head.dropped), (2, 1));
    assert!(directory.path().join(format!("{:020}.aside", 2)).exists());
    drop(first);
    fs::remove_file(directory.path().join("head")).unwrap();
    let mut next = spool(directory.path(), 100);
    next.push(report(4)).unwrap();
    assert_ne!(next.head.epoch, epoch);
    let old = next.oldest(10, u64::MAX);
    assert_eq!(numbers(&old), [1, 3], "those of one epoch go together");
    next.acknowledge(&old, 3).unwrap();
    assert_eq!(numbers(&next.oldest(10, u64::MAX)), [4]);
}

#[test]
fn what_is_set_aside_counts_and_goes_first() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = spool(directory.path(), 3);
    (1..=3).for_each(|at| first.push(report(at)).unwrap());
    first.set_aside(1);
    first.set_aside(2);
    drop(first);
    let mut next = spool(directory.path(), 3);
    assert_eq!((next.len(), next.aside.len()), (1, 2), "the next agent knows of them");
    let aside = |number: u64| directory.path().join(format!("{number:020}.aside")).exists();
    (4..=5).for_each(|at| next.push(report(at)).unwrap());
    assert_eq!(numbers(&next.oldest(10, u64::MAX)), [3, 4, 5], "none that waits had to go");
    assert!(!aside(1) && !aside(2));
    assert!(next.aside.is_empty());
}
