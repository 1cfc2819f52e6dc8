//! One resource of one instance: its scale, its recent positions, and their forecasts per lead.

use serde::{Deserialize, Serialize};

use super::{
    Evidence, Quantiles,
    amounts::Amounts,
    habit::{Day, Histogram},
    history::{History, MOST, SEARCH_AT_LEAST_EVERY},
    lead::{Lead, Moment, TAILS},
    level::Level,
    numeric::{Position, asinh},
    prior::{Known, Prior, PriorError},
    profile::{BLOCK, Profile, Profiler},
    regression::{ALWAYS, Features},
};

/// Half-lives of the smoothed positions, in windows.
const HALF_LIVES: [f32; 5] = [1.5, 6.0, 24.0, 96.0, 288.0];
/// Windows over which the mean amount, the unit of the scale, is taken.
const MEAN_WINDOWS: u64 = 288;
/// Weight of the newest window in how much the value moves of late.
const MOVING: f32 = 0.3;
/// Half-life from which on a smoothed position follows a change of the level at once, and how far.
const FOLLOWS: (usize, f32) = (2, 0.5);
/// Windows over which the typical unrest is taken.
const TYPICAL_WINDOWS: u64 = 100;

/// The unit of the scale, in mean amounts.
pub(super) const UNIT: f64 = 0.5;
/// The highest amount that is taken for one.
pub(super) const HIGHEST: f64 = (f32::MAX / 1e6) as f64;
/// Windows of its own that outweigh what others have taught.
const PRIOR_WINDOWS: u64 = 3;
/// Windows after which a series can teach others.
pub(super) const TEACHES_AFTER: u64 = 48;

/// Amounts are seen on the scale asinh(amount / unit), with the mean amount as the unit: a burst of ten times the usual
/// is no farther than it should be, 0 is nothing special, and a change of a percent is the same everywhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Series {
    tick: u32,
    seen: u64,
    /// Whether any of them had more than 0.
    was_used: bool,
    /// Windows that what others have taught counts as.
    taught: u64,
    /// What is known of what it will use, where it returns, or is of a class.
    known: Known,
    unit: f64,
    mean: f64,
    lowest: f64,
    highest: f64,
    value: f64,
    newest: [f32; 4],
    smoothed: [f32; 5],
    typical: f32,
    moving: f32,
    level: Level,
    profiler: Profiler,
    history: History,
    day: Day,
    long: Histogram,
    leads: Vec<Lead>,
}

impl Series {
    /// A series that has seen nothing; `leads` are in windows, and `day` is the number of windows in a day.
    pub fn new(leads: &[u64], day: u64) -> Self {
        Self {
            tick: 0,
            seen: 0,
            was_used: false,
            taught: 0,
            known: Known::default(),
            unit: 0.0,
            mean: 0.0,
            lowest: f64::MAX,
            highest: 0.0,
            value: 0.0,
            newest: [0.0; 4],
            smoothed: [0.0; 5],
            typical: 0.0,
            moving: 0.0,
            level: Level::default(),
            profiler: Profiler::default(),
            history: History::new(),
            day: Day::new(day),
            long: Histogram::new(day),
            leads: leads.iter().map(|&steps| Lead::new(steps)).collect(),
        }
    }

    /// A series that has seen nothing, of a kind that others have taught about.
    ///
    /// # Errors
    ///
    /// If the prior is none for these leads.
    pub fn from_prior(leads: &[u64], day: u64, prior: &Prior) -> Result<Self, PriorError> {
        prior.check(leads.len())?;
        let mut new = Self::new(leads, day);
        new.mean = prior.amounts().mean();
        new.taught = PRIOR_WINDOWS;
        new.known = prior.known();
        let usual = prior.amounts().shares(new.mean);
        new.long.start_from(&usual, PRIOR_WINDOWS as f32);
        // What others reached is possible here, too.
        new.lowest = 0.0;
        new.highest = prior.highest();
        for (number, lead) in new.leads.iter_mut().enumerate() {
            lead.start_from(prior, number, &usual);
        }
        Ok(new)
    }

    /// Whether what was read can go on as a series for these leads, in windows, and a day of so many: whatever the bytes were, it
    /// then does not fail.
    pub(crate) fn is_sound(&self, leads: &[u64], day: u64) -> bool {
        let amounts = [self.unit, self.mean, self.highest, self.value];
        let positions = self.newest.iter().chain(&self.smoothed).chain([&self.typical, &self.moving]);
        let possible = |amount: &f64| (0.0..=HIGHEST).contains(amount);
        let new = self.seen == 0 && self.unit == 0.0;
        let old = (1..MOST).contains(&self.seen) && self.unit > 0.0 && self.lowest <= self.highest;
        let numbers = amounts.iter().chain(self.known.amounts()).all(possible)
            && positions.copied().all(f32::is_finite)
            && self.taught <= PRIOR_WINDOWS
            && (new || old);
        let leads = self.leads.len() == leads.len()
            && self.leads.iter().zip(leads).all(|(lead, &steps)| lead.is_sound(steps));
        numbers
            && leads
            && self.level.is_sound()
            && self.profiler.is_sound()
            && self.history.is_sound()
            && self.day.is_sound(day)
            && self.long.is_sound()
    }

    /// What it is like, at the moment in which that becomes known.
    pub(super) fn first_profile(&self) -> Option<Profile> {
        if self.seen == BLOCK as u64 { self.profiler.profile() } else { None }
    }

    /// One that starts from `prior` and has seen the same.
    pub(super) fn again_from(&self, prior: &Prior) -> Result<Self, PriorError> {
        let leads: Vec<u64> = self.leads.iter().map(|lead| lead.steps() as u64).collect();
        let mut new = Self::from_prior(&leads, self.day.windows(), prior)?;
        let positions = self.history.ordered();
        new.tick = self.tick.wrapping_sub(positions.len() as u32);
        positions.iter().for_each(|position| new.observe(f64::from(position.sinh()) * self.unit));
        Ok(new)
    }

    /// Where it was never used, and forecasts nothing else, or would know no better if it saw more: its tick, and the windows that it has seen.
    pub(super) fn is_unused(&self) -> Option<(u32, u64)> {
        let forecasts_nothing =
            || self.quantiles().all(|quantiles| quantiles.p99 == 0.0) || self.seen >= self.remembered();
        (self.seen > 0 && !self.was_used && forecasts_nothing()).then_some((self.tick, self.seen))
    }

    /// So many windows in which nothing was used are shown to it again, at most: with them its history is full, and all that waits for its outcome was said by every
    /// expert.
    fn remembered(&self) -> u64 {
        let longest = self.leads.iter().map(Lead::steps).max().unwrap_or_default();
        (History::KEPT + 2 * longest) as u64
    }

    /// Goes on from `tick`, with which `seen` windows were seen, and nothing was used in any: what it still would know of them is shown to it. `resemble` is called
    /// after each.
    pub(super) fn see_nothing(&mut self, tick: u32, seen: u64, resemble: impl Fn(&mut Self)) {
        let remembered = self.remembered();
        // A whole number of searches for a season is left out: the next one comes when it would have come.
        let again = match seen.checked_sub(remembered) {
            None => seen,
            Some(more) => remembered + more % SEARCH_AT_LEAST_EVERY,
        };
        self.tick = tick.wrapping_sub(again as u32);
        for _ in 0..again {
            self.observe(0.0);
            resemble(self);
        }
        self.day.saw_nothing(tick, seen, again);
        self.long.saw_nothing(seen - again);
        self.seen = seen;
        self.leads.iter_mut().for_each(|lead| lead.saw_nothing(seen, again));
    }

    /// What it can teach others of its kind; `None` while that is too little.
    pub fn teach(&self) -> Option<Prior> {
        if self.seen < TEACHES_AFTER {
            return None;
        }
        let amounts = Amounts::of(&self.long, self.unit);
        let mut prior = Prior::of(self.mean, self.profiler.profile()?, amounts);
        self.leads.iter().for_each(|lead| lead.teach(&mut prior));
        Some(prior)
    }

    /// Windows went by unseen. Positions in the day and the season go on; forecasts for them are never judged.
    pub fn skip(&mut self, windows: u64) {
        if windows as usize >= History::KEPT {
            self.history = History::new();
            self.leads.iter_mut().for_each(Lead::interrupt);
            self.tick = self.tick.wrapping_add(windows as u32);
            self.level.forget();
            return;
        }
        for _ in 0..windows {
            self.tick = self.tick.wrapping_add(1);
            self.level.pass();
            if self.seen > 0 {
                self.history.guess(self.newest[0]);
                self.forecast(false);
            }
        }
    }

    /// Takes in the next window. A value that is no amount counts as unseen.
    pub fn observe(&mut self, value: f64) {
        if !(0.0..=HIGHEST).contains(&value) {
            return self.skip(1);
        }
        self.tick = self.tick.wrapping_add(1);
        self.seen += 1;
        self.was_used |= value > 0.0;
        self.value = value;
        self.profiler.learn(value);
        self.lowest = self.lowest.min(value);
        self.highest = self.highest.max(value);
        self.mean += (value - self.mean) / (self.seen + self.taught).min(MEAN_WINDOWS) as f64;
        self.rescale();

        let position = asinh(value / self.unit);
        if self.seen == 1 {
            self.newest = [position; 4];
            self.smoothed = [position; 5];
        }
        self.newest = [position, self.newest[0], self.newest[1], self.newest[2]];
        for (smoothed, step) in self.smoothed.iter_mut().zip(steps()) {
            *smoothed += (position - *smoothed) * step.max(1.0 / self.seen as f32);
        }
        let moved = (self.newest[0] - self.newest[1]).abs();
        self.moving += (moved - self.moving) * MOVING.max(1.0 / self.seen as f32);
        if self.level.learn(position) {
            self.level_changed();
        }
        self.day.learn(self.tick, position);
        self.long.learn(position);
        if self.history.learn(position) {
            self.season_changed();
        }
        self.forecast(true);
        let unrest = (position - self.smoothed[2]).abs();
        self.typical += (unrest - self.typical) / self.seen.min(TYPICAL_WINDOWS) as f32;
    }

    /// Quantiles per lead, in the order of the leads.
    pub fn quantiles(&self) -> impl Iterator<Item = Quantiles> {
        self.leads.iter().map(|lead| {
            let [p50, p90, p95, p99] = self.as_before(lead.quantiles());
            Quantiles { p50, p90, p95, p99 }
        })
    }

    /// Of what returns, it is known what it can do. What one window in a hundred exceeds it shows itself within some hundred of them:
    /// until then, its high quantiles are drawn up to those that they were before. What its class can do is no more than possible: the
    /// 99th percentile alone is drawn up to it, until it has shown whom it is like.
    fn as_before(&self, mut quantiles: [f64; 4]) -> [f64; 4] {
        if self.seen == 0 {
            return quantiles;
        }
        let draw = |quantile: &mut f64, to: Option<f64>, share: f64| {
            *quantile += to.map_or(0.0, |to| share * (to - *quantile).max(0.0));
        };
        let shown = (self.seen - 1) as f64 / BLOCK as f64;
        draw(&mut quantiles[3], self.known.class.map(|class| class[3]), (1.0 - shown).max(0.0));
        for k in 1..4 {
            let unshown = (1.0 - self.seen as f64 * f64::from(TAILS[k])).max(0.0);
            draw(&mut quantiles[k], self.known.own.map(|own| own[k]), unshown);
            quantiles[k] = quantiles[k].max(quantiles[k - 1]);
        }
        quantiles
    }

    /// Quantiles and evidence per lead.
    pub fn forecasts(&self, needed: u64) -> impl Iterator<Item = (Quantiles, Evidence)> {
        self.quantiles().zip(self.leads.iter().map(move |lead| lead.evidence(needed)))
    }

    /// Windows since its level last changed; `None` if no change was found, or nothing was seen for long.
    ///
    /// It is found some windows after it began (three where it is clear): until then, there is none.
    pub fn level_changed_windows_ago(&self) -> Option<u32> {
        self.level.changed_windows_ago()
    }

    /// Memory that it takes, in bytes, all in all.
    pub fn bytes(&self) -> usize {
        let leads: usize = self.leads.iter().map(Lead::bytes).sum();
        size_of::<Self>()
            + self.leads.capacity() * size_of::<Lead>()
            + leads
            + self.history.bytes()
            + self.day.bytes()
    }

    fn forecast(&mut self, seen: bool) {
        let level = self.newest[0];
        // As what is usual is kept: what never moves is where it usually is, to the last bit.
        let rounded = Position::new(level).get();
        let now = Moment {
            tick: self.tick,
            value: self.value,
            level,
            unit: self.unit as f32,
            range: (asinh(self.lowest / self.unit), asinh(self.highest / self.unit)),
            highest: self.highest,
            unrest: (level - self.smoothed[1]).abs(),
            typical: self.typical,
            moving: self.moving,
            long: self.long.quantiles(),
        };
        for lead in &mut self.leads {
            let steps = lead.steps();
            let season = self.history.repeat(steps);
            let (here, there) = (self.day.at(self.tick), self.day.at(self.tick.wrapping_add(steps as u32)));
            let features: Features = [
                ALWAYS,
                level - self.smoothed[0],
                level - self.smoothed[1],
                level - self.smoothed[2],
                level - self.smoothed[3],
                level - self.smoothed[4],
                self.newest[0] - self.newest[1],
                self.newest[1] - self.newest[2],
                there.map_or(0.0, |there| there - rounded),
                there.zip(here).map_or(0.0, |(there, here)| there - here),
                season.map_or(0.0, |season| season - level),
                self.newest[2] - self.newest[3],
            ];
            lead.settle(&now, seen);
            lead.forecast(&now, &features, season);
        }
    }

    fn wanted_unit(&self) -> f64 {
        (self.mean * UNIT).max(self.highest * 1e-6).max(1e-9)
    }

    /// Keeps the unit near the mean amount.
    fn rescale(&mut self) {
        let wanted = self.wanted_unit();
        if self.unit > 0.0 && wanted <= self.unit * 2.0 && wanted >= self.unit * 0.5 {
            return;
        }
        let ratio = self.unit / wanted;
        self.unit = wanted;
        if self.seen <= 1 {
            return;
        }
        let convert = |position: f32| asinh(f64::from(position).sinh() * ratio);
        self.newest.iter_mut().chain(&mut self.smoothed).for_each(|position| *position = convert(*position));
        self.level.rescale(convert);
        self.history.rescale(convert);
        self.day.rescale(convert);
        self.long.rescale(convert);
        self.leads.iter_mut().for_each(|lead| lead.rescale(convert));
    }

    /// What belongs to the level before is forgotten: half of the way at once, and outcomes of then count less.
    fn level_changed(&mut self) {
        let (level, since) = (self.level.mean(), self.level.changed_windows_ago().unwrap_or_default());
        for smoothed in &mut self.smoothed[FOLLOWS.0..] {
            *smoothed += (level - *smoothed) * FOLLOWS.1;
        }
        let (now, tick) = (self.tick, self.tick.wrapping_sub(since));
        self.leads.iter_mut().for_each(|lead| lead.level_changed(tick, now));
    }

    fn season_changed(&mut self) {
        for lead in &mut self.leads {
            match self.history.season_errors(lead.steps()) {
                Some(errors) => lead.season_found(errors),
                None => lead.no_season(),
            }
        }
    }
}

fn steps() -> &'static [f32; 5] {
    static STEPS: std::sync::OnceLock<[f32; 5]> = std::sync::OnceLock::new();
    STEPS.get_or_init(|| HALF_LIVES.map(|half| -super::numeric::expm1(-std::f32::consts::LN_2 / half)))
}
