//! An agent and somebody who only pretends to be its controller: an order that comes again, too late, or after a newer one does nothing.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use rswap_agent::{
    pool::{Pool, PoolState, THIS_HOST},
    units::UnixMillis,
};
use rswap_fleet::{
    Action, Order, OrderOutcome, Token,
    model::Revision,
    orders::OrderResult,
    report::{Answer, Envelope},
};
use rswap_tests::{Fleet, Host, HostOptions, reason_to_skip, wait_for};

const LIMIT: Duration = Duration::from_secs(30);

/// Takes one envelope, and answers with these orders.
fn answer(stream: &UnixStream, orders: &[Order]) -> anyhow::Result<Envelope> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if let Some(bytes) = line.strip_prefix("content-length:") {
            length = bytes.trim().parse()?;
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let envelope: Envelope = serde_json::from_slice(&body)?;
    let stored = envelope.reports.last().map_or(0, |report| report.sequence);
    let (lessons, knows, orders) = (Vec::new(), Revision::default(), orders.to_vec());
    let text = serde_json::to_string(&Answer { stored, lessons, knows, orders, places: false })?;
    let mut writer = stream;
    write!(writer, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len())?;
    Ok(envelope)
}

/// Pretends until the last order has been sent; the outcomes come back.
fn pretend(
    socket: &Path,
    orders: mpsc::Receiver<Vec<Order>>,
) -> anyhow::Result<mpsc::Receiver<Vec<OrderOutcome>>> {
    let listener = UnixListener::bind(socket)?;
    let (told, outcomes) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let next = orders.try_recv().unwrap_or_default();
            let Ok(envelope) = answer(&stream, &next) else { continue };
            let all = envelope.reports.into_iter().flat_map(|report| report.outcomes).collect();
            if told.send(all).is_err() {
                return;
            }
        }
    });
    Ok(outcomes)
}

fn state(host: &Host) -> anyhow::Result<Option<PoolState>> {
    let pools: Vec<Pool> = host.get("/v1/pools")?;
    Ok(pools.into_iter().find(|pool| pool.name == THIS_HOST).map(|pool| pool.state))
}

#[test]
fn an_order_is_carried_out_once_in_time_and_in_order() -> anyhow::Result<()> {
    if reason_to_skip("an_order_is_carried_out_once_in_time_and_in_order").is_some() {
        return Ok(());
    }
    let mut fleet = Fleet::new()?;
    let socket = fleet.scratch().join("pretended.sock");
    let (give, given) = mpsc::channel();
    let outcomes = pretend(&socket, given)?;
    let (address, spool) = (format!("unix:{}", socket.display()), fleet.scratch().join("spool"));
    let more = format!("[controller]\naddress = {address:?}\nspool = {spool:?}\nreport_every_ms = 200\n");
    let options = HostOptions { mode: "act", window_ms: 100, more, ..HostOptions::default() };
    let mut host = fleet.host("a", &options)?;
    let drain = |number: u64, undo: bool, ahead_ms: i64| Order {
        token: Token { life: 1, number },
        host: "a".parse().expect("a host's name"),
        deadline: UnixMillis(UnixMillis::now().0.saturating_add_signed(ahead_ms)),
        action: Action::Drain { pool: THIS_HOST.to_owned(), undo },
    };
    // What came of an order; `None`, if nothing has come of it when some further reports have been made.
    let order = |order: &Order| -> anyhow::Result<Option<OrderResult>> {
        // What came while we looked elsewhere is of before.
        while outcomes.try_recv().is_ok() {}
        give.send(vec![order.clone()])?;
        for _ in 0..12 {
            let all = outcomes.recv_timeout(LIMIT)?;
            if let Some(one) = all.into_iter().find(|one| one.token == order.token) {
                return Ok(Some(one.result));
            }
        }
        Ok(None)
    };
    let is = |host: &Host, wanted: &PoolState| {
        wait_for("the host's state", LIMIT, || Ok(state(host)?.filter(|state| state == wanted)))
    };
    let first = drain(1, false, 30_000);
    assert_eq!(order(&first)?, Some(OrderResult::Done));
    is(&host, &PoolState::Draining)?;
    assert_eq!(order(&drain(2, true, 30_000))?, Some(OrderResult::Done));
    is(&host, &PoolState::Ready)?;

    // It comes again; another one was overtaken; a third is too late; a fourth is another host's.
    let refused = |result: Option<OrderResult>, why: &str| {
        assert!(matches!(&result, Some(OrderResult::Refused { error }) if error.contains(why)), "{result:?}");
    };
    refused(order(&first)?, "a newer one about the same");
    refused(order(&drain(3, false, -1))?, "its deadline was");
    let foreign = Order { host: "b".parse()?, ..drain(4, false, 30_000) };
    refused(order(&foreign)?, "it is for host b");
    assert_eq!(state(&host)?, Some(PoolState::Ready));
    assert_eq!(order(&drain(5, false, 30_000))?, Some(OrderResult::Done));
    is(&host, &PoolState::Draining)?;
    host.call(&["drain", THIS_HOST, "--undo"])?;
    // The next agent knows what this one has done, and does not do it again.
    host.kill_agent()?;
    host.start_agent()?;
    assert_eq!(order(&drain(5, false, 30_000))?, None, "what was done is not done again");
    assert_eq!(state(&host)?, Some(PoolState::Ready));
    Ok(())
}
