//! What is told of a large fleet is put together a part at a time, and nothing is missing or there twice.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod common;

use std::ops::Range;

use common::{Running, envelope, instance, report, settings};
use rswap_controller::Settings;
use rswap_fleet::Report;
use serde_json::{Value, json};

/// More than two parts.
const HOSTS: u8 = 140;
/// Of those, in the order of their names, whose instances end: more than a part in a row, which must not look like the end of the list.
/// What is left is more than a part, too.
const ENDED: Range<usize> = 60..126;

/// A member of each thing in a list.
fn each(list: &Value, member: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one[member].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn hosts_and_instances_are_told_of_once_each_in_the_order_of_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings { acts: false, ..settings() };
    let running = Running::start_with(directory.path(), settings.clone()).await;
    for list in ["/v1/hosts", "/v1/instances"] {
        assert_eq!(running.get(list).await, json!([]), "{list}");
    }
    // The order of names is not that of numbers.
    let mut ends: Vec<String> = (0..HOSTS).map(|number| number.to_string()).collect();
    ends.sort();
    let named = |first: char| -> Vec<String> { ends.iter().map(|end| format!("{first}{end}")).collect() };
    let (hosts, instances) = (named('h'), named('i'));
    for ((host, local), number) in hosts.iter().zip(&instances).zip(1..) {
        running.report(&envelope(vec![report(host, number, vec![instance(local)])])).await.unwrap();
    }
    assert_eq!(each(&running.get("/v1/hosts").await, "host"), hosts);
    let told = running.get("/v1/instances").await;
    assert_eq!((each(&told, "instance"), each(&told, "host")), (instances.clone(), hosts.clone()));

    for (host, number) in hosts.iter().zip(1..).skip(ENDED.start).take(ENDED.len()) {
        let without = Report { sequence: 2, ..report(host, number, vec![]) };
        running.report(&envelope(vec![without])).await.unwrap();
    }
    let left = |all: &[String]| [&all[..ENDED.start], &all[ENDED.end..]].concat();
    let told = running.get("/v1/instances").await;
    assert_eq!((each(&told, "instance"), each(&told, "host")), (left(&instances), left(&hosts)));
    assert_eq!(running.get("/v1/status").await["instances"], json!(left(&instances).len()));
    let told = running.get("/v1/hosts").await;
    assert_eq!(each(&told, "host"), hosts);
    for (number, host) in told.as_array().unwrap().iter().enumerate() {
        assert_eq!(host["instances"], json!(usize::from(!ENDED.contains(&number))), "{host}");
    }

    // Of the next one, nobody has said yet what runs there.
    running.stop().await;
    let running = Running::start_with(directory.path(), settings).await;
    assert_eq!(each(&running.get("/v1/hosts").await, "host"), hosts);
    assert_eq!(running.get("/v1/instances").await, json!([]));
    running.stop().await;
}
