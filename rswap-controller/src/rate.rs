//! How often members may report: a token bucket for each. Pure: what time it is, is said to it.
//!
//! A call needs one token, and what it brings is paid afterwards, if need be by those that come later: so a call is never too large to
//! be taken, and over time no member brings more than its rate.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rswap_fleet::HostName;

/// What every member may.
#[derive(Debug)]
pub(crate) struct Rates {
    /// Tokens that come back in a second.
    per_s: f64,
    /// Tokens of a full bucket.
    most: f64,
    /// Those that are not full.
    buckets: BTreeMap<HostName, Bucket>,
}

/// What one may at the moment `at`; below 0 it is in debt.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Rates {
    pub(crate) fn new(per_s: u32, at_once: u32) -> Self {
        Self { per_s: f64::from(per_s), most: f64::from(at_once), buckets: BTreeMap::new() }
    }

    /// Takes a token of `member`, or says when there will be one.
    pub(crate) fn take(&mut self, member: &HostName, now: Instant) -> Result<(), Duration> {
        if !self.buckets.contains_key(member) {
            let (per_s, most) = (self.per_s, self.most);
            self.buckets.retain(|_, bucket| bucket.tokens(per_s, most, now) < most);
        }
        let tokens = self.tokens(member, now);
        if tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - tokens) / self.per_s));
        }
        self.put(member, tokens - 1.0, now);
        Ok(())
    }

    /// So many reports came with a call that has taken a token.
    pub(crate) fn brought(&mut self, member: &HostName, reports: usize, now: Instant) {
        let more = reports.saturating_sub(1) as f64;
        let tokens = self.tokens(member, now);
        self.put(member, tokens - more, now);
    }

    fn tokens(&self, member: &HostName, now: Instant) -> f64 {
        self.buckets.get(member).map_or(self.most, |bucket| bucket.tokens(self.per_s, self.most, now))
    }

    fn put(&mut self, member: &HostName, tokens: f64, at: Instant) {
        self.buckets.insert(member.clone(), Bucket { tokens, at });
    }
}

impl Bucket {
    fn tokens(&self, per_s: f64, most: f64, now: Instant) -> f64 {
        (self.tokens + now.saturating_duration_since(self.at).as_secs_f64() * per_s).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        name.parse().expect("a name")
    }

    /// How many calls with so many reports each are taken in a second, a try each millisecond.
    fn in_a_second(rates: &mut Rates, member: &HostName, reports: usize, from: Instant) -> usize {
        let tries = (0..1000).map(|ms| from + Duration::from_millis(ms));
        tries
            .filter(|now| {
                let taken = rates.take(member, *now).is_ok();
                if taken {
                    rates.brought(member, reports, *now);
                }
                taken
            })
            .count()
    }

    #[test]
    fn a_member_brings_its_rate_and_what_it_has_saved_and_nobody_else_less() {
        let (flood, other, start) = (host("flood"), host("other"), Instant::now());
        let mut rates = Rates::new(10, 50);
        // What was saved, and then the rate.
        assert_eq!(in_a_second(&mut rates, &flood, 1, start), 59);
        let later = start + Duration::from_secs(1);
        assert_eq!(in_a_second(&mut rates, &flood, 1, later), 10);
        assert_eq!(in_a_second(&mut rates, &other, 1, later), 59);
        // It is saved again, and no more than that.
        let much_later = later + Duration::from_secs(3600);
        assert_eq!(in_a_second(&mut rates, &flood, 1, much_later), 59);
    }

    #[test]
    fn many_at_once_are_taken_and_paid_for() {
        let (member, start) = (host("a"), Instant::now());
        let mut rates = Rates::new(10, 50);
        rates.take(&member, start).expect("it has saved");
        rates.brought(&member, 1000, start);
        let wait = rates.take(&member, start).expect_err("it is in debt");
        assert!((wait.as_secs_f64() - 95.1).abs() < 0.01, "{wait:?}");
        assert!(rates.take(&member, start + wait - Duration::from_millis(10)).is_err());
        rates.take(&member, start + wait + Duration::from_millis(10)).expect("as it was told");
        // Over time no more comes than the rate lets, however it is put together.
        let mut rates = Rates::new(10, 50);
        let calls: usize =
            (0..60).map(|s| in_a_second(&mut rates, &member, 32, start + Duration::from_secs(s))).sum();
        assert!((600..=700).contains(&(calls * 32)), "{} in a minute", calls * 32);
    }

    #[test]
    fn nothing_is_kept_of_those_that_have_been_quiet() {
        let start = Instant::now();
        let mut rates = Rates::new(10, 50);
        for number in 0..100 {
            rates.take(&host(&format!("h{number}")), start).expect("it has saved");
        }
        assert_eq!(rates.buckets.len(), 100);
        rates.take(&host("late"), start + Duration::from_secs(1)).expect("it has saved");
        assert_eq!(rates.buckets.len(), 1);
    }
}
