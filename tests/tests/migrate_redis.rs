//! A running Redis with its clients migrates to another host and back.

use std::{net::Ipv4Addr, time::Duration};

use rswap_tests::{
    Fleet, HostOptions,
    client::{DataSet, REDIS, VerifyingClient},
    pauses, reason_to_skip,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const DATA_BYTES: u64 = 110 << 20;
const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn no_acknowledged_write_is_lost_there_and_back() -> anyhow::Result<()> {
    if reason_to_skip("no_acknowledged_write_is_lost_there_and_back").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let a = fleet.host("a", &HostOptions::default())?;
    let b = fleet.host("b", &HostOptions::default())?;
    a.run("redis", &["--net", &format!("{SERVER}/24")], REDIS)?;
    let data = DataSet::load(&fleet.client, SERVER, DATA_BYTES)?;
    assert!(data.used_bytes(&fleet.client)? >= 100 << 20);
    let client = VerifyingClient::start(&fleet.client, SERVER, Duration::from_millis(1))?;
    client.wait_for_acks(500, LIMIT)?;

    for (from, to) in [(&a, &b), (&b, &a)] {
        let report = from.migrate("redis", &to.migrate_address())?.succeed()?;
        println!("{report:?}");
        // The old copy is gone, the new one serves.
        assert!(!from.has_instance("redis")?, "it is still listed at the source");
        assert!(to.has_instance("redis")?, "it is not listed at the destination");
        client.wait_for_acks(500, LIMIT)?;
    }

    let seen = client.finish(&fleet.client)?;
    println!("{seen:?}");
    pauses::waited("redis", seen.largest_gap_ms);
    assert_eq!(seen.lost_writes, 0);
    assert_eq!(data.wrong_keys(&fleet.client)?, 0);
    Ok(())
}
