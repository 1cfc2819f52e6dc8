use proptest::prelude::*;

use super::*;

fn host() -> HostName {
    "a".parse().unwrap()
}

fn drain(token: (u64, u64), deadline: u64, undo: bool) -> Order {
    Order {
        token: Token { life: token.0, number: token.1 },
        host: host(),
        deadline: UnixMillis(deadline),
        action: Action::Drain { pool: "this-host".to_owned(), undo },
    }
}

#[test]
fn a_repeated_a_late_an_outdated_and_a_foreign_order_do_nothing() {
    let mut ledger = Ledger::default();
    let mut take = |order: &Order, now: u64| ledger.take(order, &host(), UnixMillis(now));
    let first = drain((1, 1), 5_000, false);
    assert_eq!(take(&first, 1_000), Ok(()));
    assert_eq!(take(&first, 1_001), Err(Refusal::Repeated));
    assert_eq!(take(&drain((1, 2), 1_999, true), 2_000), Err(Refusal::Late { late_ms: 1 }));
    assert_eq!(take(&drain((1, 3), 9_000, true), 2_000), Ok(()));
    assert_eq!(take(&drain((1, 2), 9_000, false), 2_000), Err(Refusal::Outdated));
    let foreign = Order { host: "b".parse().unwrap(), ..drain((1, 9), 9_000, false) };
    assert_eq!(take(&foreign, 2_000), Err(Refusal::OtherHost("b".parse().unwrap())));
    let far = 2_000 + LONGEST_MS + SKEW_MS + 1;
    assert!(matches!(take(&drain((1, 9), far, false), 2_000), Err(Refusal::Ahead { .. })));
    assert_eq!(take(&drain((2, 1), 9_000, false), 2_000), Ok(()), "a later life's first is newer");
    assert_eq!(take(&drain((1, 99), 9_000, true), 2_000), Err(Refusal::EarlierLife));
    // A clock that is set back opens no deadline again.
    assert!(matches!(take(&drain((2, 2), 1_500, true), 1_000), Err(Refusal::Late { .. })));
}

#[test]
fn a_ledger_outlives_its_agent_and_stays_small() {
    let mut ledger = Ledger::default();
    for number in 0..50u64 {
        let now = number * (LONGEST_MS + 3 * SKEW_MS);
        let instance = format!("i{number}").parse().unwrap();
        let address = "10.0.0.1:7791".parse().unwrap();
        let action = Action::Migrate { instance, to: "b".parse().unwrap(), address };
        let order = Order { action, ..drain((1, number), now + 1_000, false) };
        ledger.take(&order, &host(), UnixMillis(now)).unwrap();
        let text = serde_json::to_string(&ledger).unwrap();
        ledger = serde_json::from_str(&text).unwrap();
        assert_eq!(ledger.take(&order, &host(), UnixMillis(now)), Err(Refusal::Repeated));
    }
    assert_eq!(ledger.taken.len(), 1);
}

#[test]
fn the_same_wish_is_one_order_until_its_outcome_is_known() {
    let mut book = Book::new(3);
    let wish = |undo| Action::Drain { pool: "this-host".to_owned(), undo };
    let token = book.give(&host(), wish(false), 60_000, UnixMillis(0));
    assert_eq!(book.give(&host(), wish(false), 60_000, UnixMillis(10)), token);
    let newer = book.give(&host(), wish(true), 60_000, UnixMillis(20));
    assert!(newer > token);
    assert_eq!(book.of(&host()).len(), 1, "the newer one stands for the older");
    assert_eq!(book.of(&"b".parse().unwrap()), []);
    let done = |token| OrderOutcome { token, result: OrderResult::Done };
    assert_eq!(book.ended(&host(), &done(token)), None);
    assert!(book.ended(&host(), &done(newer)).is_some());
    assert_eq!(book.ended(&host(), &done(newer)), None);
    book.give(&host(), wish(false), u64::MAX, UnixMillis(30));
    assert_eq!(book.expired(UnixMillis(30 + LONGEST_MS + SKEW_MS)), []);
    assert_eq!(book.expired(UnixMillis(31 + LONGEST_MS + SKEW_MS)).len(), 1);
}

proptest! {
    /// Orders of several lives about some pools, which a network repeats, delays, reorders and loses, to an agent whose clock jumps
    /// and which starts anew from what it kept.
    #[test]
    fn each_order_is_carried_out_once_in_order_and_in_time(
        made in prop::collection::vec((1u64..3, 0usize..3, 1_000u64..LONGEST_MS, any::<bool>()), 1..40),
        deliveries in prop::collection::vec((any::<prop::sample::Index>(), 0u64..400_000, any::<bool>()), 1..200),
    ) {
        let mut lives: Vec<u64> = made.iter().map(|(life, ..)| *life).collect();
        lives.sort_unstable();
        let mut at = 1_000_000;
        let orders: Vec<(u64, Order)> = made.iter().zip(lives).enumerate().map(|(number, (order, life))| {
            at += 5_000;
            let (_, pool, within, undo) = order;
            let token = Token { life, number: number as u64 };
            let action = Action::Drain { pool: format!("pool {pool}"), undo: *undo };
            (at, Order { token, host: host(), deadline: UnixMillis(at + within), action })
        }).collect();
        let (mut ledger, mut now) = (Ledger::default(), 1_000_000u64);
        let mut taken: Vec<&Order> = Vec::new();
        for (which, wait, restarted) in &deliveries {
            now += wait;
            let (given_at, order) = which.get(&orders);
            if *given_at > now {
                continue; // Nobody has given it yet.
            }
            if *restarted {
                ledger = serde_json::from_str(&serde_json::to_string(&ledger).unwrap()).unwrap();
            }
            if ledger.take(order, &host(), UnixMillis(now)).is_ok() {
                prop_assert!(order.deadline.0 >= now, "after its deadline");
                for earlier in &taken {
                    prop_assert!(earlier.token != order.token, "twice");
                    if earlier.action.subject() == order.action.subject() {
                        prop_assert!(earlier.token < order.token, "after a newer one");
                    }
                    prop_assert!(earlier.token.life <= order.token.life);
                }
                taken.push(order);
            }
            prop_assert!(ledger.taken.len() <= 3);
        }
    }
}
