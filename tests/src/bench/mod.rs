//! What the benchmarks measure with: clients that note every answer's time, and medians.

pub mod alternatives;
pub mod cases;
pub mod cold;
pub mod many;
pub mod paced;
pub mod process;
pub mod turns;

use std::time::{Duration, Instant};

/// Before a move the client's rate is measured.
pub const BEFORE: Duration = Duration::from_secs(1);
/// After it, the rest of the answers come in.
pub const AFTER: Duration = Duration::from_millis(500);

/// What a client has seen of a move.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The longest time in which it got no answer.
    pub gap: Duration,
    /// By how much it had fewer answers before that than before the move, in percent.
    pub slowdown_pct: f64,
}

/// When answers came, and how many at a time.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Vec<(Instant, u32)>);

impl Timeline {
    /// Notes answers that came just now.
    pub fn note(&mut self, answers: u32) {
        self.0.push((Instant::now(), answers));
    }

    /// The longest time without an answer of which any part lies between the two moments, and when it began.
    pub fn largest_gap(&self, from: Instant, to: Instant) -> Option<(Duration, Instant)> {
        let pairs = self.0.windows(2).filter(|pair| pair[1].0 >= from && pair[0].0 <= to);
        pairs.map(|pair| (pair[1].0 - pair[0].0, pair[0].0)).max()
    }

    /// What there is to be seen of a move that `began` and `ended` then.
    pub fn of_move(&self, began: Instant, ended: Instant) -> Seen {
        let (gap, frozen) = self.largest_gap(began, ended + AFTER).unwrap_or((Duration::ZERO, ended));
        let before = self.rate(began - BEFORE / 2, began);
        let slowdown_pct = (1.0 - self.rate(began, frozen.max(began)) / before.max(1e-9)) * 100.0;
        Seen { gap, slowdown_pct }
    }

    /// Answers per second between two moments.
    pub fn rate(&self, from: Instant, to: Instant) -> f64 {
        let within = self.0.iter().filter(|(at, _)| (from..to).contains(at));
        let answers: u64 = within.map(|(_, answers)| u64::from(*answers)).sum();
        answers as f64 / to.saturating_duration_since(from).as_secs_f64().max(1e-9)
    }
}

/// The middle one of some figures; 0 of none.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_and_rates_are_of_the_time_asked_for() {
        let start = Instant::now();
        let ms = |ms| start + Duration::from_millis(ms);
        let times = Timeline(vec![(ms(0), 1), (ms(10), 5), (ms(100), 5), (ms(104), 1)]);
        assert_eq!(times.largest_gap(ms(20), ms(30)), Some((Duration::from_millis(90), ms(10))));
        assert_eq!(times.largest_gap(ms(101), ms(103)), Some((Duration::from_millis(4), ms(100))));
        assert!((times.rate(ms(0), ms(100)) - 60.0).abs() < 1e-6);
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![9.0, 1.0, 5.0]), 5.0);
    }
}
