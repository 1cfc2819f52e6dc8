//! rswap's forecast, and what it is compared with.

use std::collections::VecDeque;

use rswap_agent::forecast;

use crate::{DAY, LEADS_MIN};

/// The methods, in the order of the results.
pub(crate) const METHODS: [&str; 4] = ["rswap", "last", "vpa", "autopilot"];
/// The quantiles that are asked for.
pub(crate) const LEVELS: [f64; 4] = [0.5, 0.9, 0.95, 0.99];

/// Something that forecasts.
pub(crate) trait Method {
    /// The next window; NaN if it was not measured.
    fn observe(&mut self, value: f64);
    /// Quantiles for the lead of this number.
    fn forecast(&self, lead: usize) -> [f64; 4];
}

/// A fresh forecaster of each kind.
pub(crate) fn all() -> [Box<dyn Method>; 4] {
    [Box::new(Rswap::new()), Box::new(Last(0.0)), Box::new(Vpa::new()), Box::new(Autopilot::new())]
}

/// The production forecast.
pub(crate) struct Rswap(forecast::Series);

impl Rswap {
    /// Nothing seen yet.
    pub(crate) fn new() -> Self {
        let leads = LEADS_MIN.map(|minutes| (minutes * 60) as u64 / rswap_tests::traces::GRID_S);
        Self(forecast::Series::new(&leads, DAY as u64))
    }

    /// Memory that the series takes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl Method for Rswap {
    fn observe(&mut self, value: f64) {
        self.0.observe(value);
    }

    fn forecast(&self, lead: usize) -> [f64; 4] {
        self.0.quantiles().nth(lead).map_or([0.0; 4], |q| [q.p50, q.p90, q.p95, q.p99])
    }
}

/// It stays as it is.
struct Last(f64);

impl Method for Last {
    fn observe(&mut self, value: f64) {
        if value.is_finite() {
            self.0 = value;
        }
    }

    fn forecast(&self, _lead: usize) -> [f64; 4] {
        [self.0; 4]
    }
}

/// The ratio of one bucket to the one before, as in VPA.
const RATIO: f64 = 1.05;
const SMALLEST: f64 = 1e-9;
const BUCKETS: usize = 1200;

/// A histogram with exponential buckets whose contents fade; the newest weighs more, instead of the others less.
struct Fading {
    weights: Vec<f64>,
    total: f64,
    newest: f64,
    growth: f64,
    used: (usize, usize),
}

impl Fading {
    fn new(half_life: f64) -> Self {
        Self {
            weights: vec![0.0; BUCKETS],
            total: 0.0,
            newest: 1.0,
            growth: (1.0 / half_life).exp2(),
            used: (BUCKETS, 0),
        }
    }

    fn bucket(value: f64) -> usize {
        if value <= SMALLEST {
            0
        } else {
            (((value / SMALLEST).ln() / RATIO.ln()).ceil() as usize).min(BUCKETS - 1)
        }
    }

    /// Returns what has to be given to `take` to take it back.
    fn add(&mut self, value: f64) -> (usize, f64) {
        self.newest *= self.growth;
        let bucket = Self::bucket(value);
        self.weights[bucket] += self.newest;
        self.total += self.newest;
        self.used = (self.used.0.min(bucket), self.used.1.max(bucket));
        (bucket, self.newest)
    }

    fn take(&mut self, (bucket, weight): (usize, f64)) {
        self.weights[bucket] = (self.weights[bucket] - weight).max(0.0);
        self.total -= weight;
    }

    /// The end of the bucket in which the level falls, as both recommenders have it.
    fn quantiles(&self) -> [f64; 4] {
        let mut result = [0.0; 4];
        let (mut sum, mut wanted) = (0.0, 0);
        for bucket in self.used.0..=self.used.1 {
            sum += self.weights[bucket];
            while wanted < LEVELS.len() && sum >= LEVELS[wanted] * self.total * (1.0 - 1e-12) {
                result[wanted] = if bucket == 0 { 0.0 } else { SMALLEST * RATIO.powi(bucket as i32) };
                wanted += 1;
            }
        }
        result
    }
}

/// Kubernetes' Vertical Pod Autoscaler: a histogram that fades with a half-life of a day.
struct Vpa(Fading);

impl Vpa {
    fn new() -> Self {
        Self(Fading::new(DAY as f64))
    }
}

impl Method for Vpa {
    fn observe(&mut self, value: f64) {
        if value.is_finite() {
            self.0.add(value.max(0.0));
        }
    }

    fn forecast(&self, _lead: usize) -> [f64; 4] {
        self.0.quantiles()
    }
}

/// Autopilot's moving window: the last day, with a half-life of twelve hours.
struct Autopilot {
    histogram: Fading,
    window: VecDeque<(usize, f64)>,
}

impl Autopilot {
    fn new() -> Self {
        Self { histogram: Fading::new(DAY as f64 / 2.0), window: VecDeque::new() }
    }
}

impl Method for Autopilot {
    fn observe(&mut self, value: f64) {
        if !value.is_finite() {
            return;
        }
        if self.window.len() == DAY
            && let Some(oldest) = self.window.pop_front()
        {
            self.histogram.take(oldest);
        }
        self.window.push_back(self.histogram.add(value.max(0.0)));
    }

    fn forecast(&self, _lead: usize) -> [f64; 4] {
        self.histogram.quantiles()
    }
}
