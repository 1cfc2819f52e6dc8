//! One lead of one series: what was forecast, how it turned out, and what follows for the next forecast.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{
    Evidence,
    analogs::{self, Analogs, KEPT, Sorted},
    history::MOST,
    mixture::{EXPERTS, Mixture, Opinions},
    numeric::{Position, Short, displaced, within},
    prior::Prior,
    regression::{ABOVE, ALWAYS, BACK, FEATURES, Features, Regression},
    steered::{Signs, Steered},
};

/// Share of outcomes above each quantile.
pub(super) const TAILS: [f32; 4] = [0.5, 0.1, 0.05, 0.01];
/// Longest lead, in windows.
const MAX_STEPS: u64 = 4096;
/// At most so many forecasts of a lead wait for their outcome: of a long one, not every forecast is judged.
const MAX_PENDING: usize = 6;
/// Outcomes without which nothing is said.
const MIN_OUTCOMES: usize = 4;
/// Step of the conformal correction, in mean absolute errors.
const SHIFT: f32 = 0.005;
/// The narrow expert's spread, as a share of the one that it is taken from.
const NARROWER: f32 = 0.6;
/// What has moved of late is never taken for less than this share of what usually moves.
const MOVING: f32 = 0.2;
/// What is known of a moment when nothing was ever used.
const STILL: Features = {
    let mut features = [0.0; FEATURES];
    features[0] = ALWAYS;
    features
};
/// After so many of these, a regression is as unsure as it may be of what it has never seen.
const MOST_STILL: u64 = 2600;
/// No forecast is above so many times the highest value.
const HIGHEST: f64 = 1.5;

// The experts: steered spreads around three centres; the regression with analogs of its errors; analogs of changes, and of values; the
// long histogram; the season; and one that is narrower than the others, so that their mixture can be, too.
const STEERED: [usize; CENTRES] = [0, 1, 8];
const MISSED: usize = 2;
const GONE: usize = 3;
const CAME: usize = 4;
const LONG: usize = 5;
const SEASON: usize = 6;
const NARROW: usize = 7;

/// What steered spreads are around: the regression's forecast, where the value was within the last windows, and where it usually is at
/// that time of the day. The regression fits what moves with it, the other two need no fit: of a long lead, there is little to
/// fit to.
pub(super) const CENTRES: usize = 3;

/// What is known at one moment; positions are on the series' scale.
pub(super) struct Moment {
    /// Windows since the series began.
    pub(super) tick: u32,
    /// The newest value.
    pub(super) value: f64,
    /// Its position.
    pub(super) level: f32,
    /// Unit of the scale.
    pub(super) unit: f32,
    /// Positions of the lowest and the highest value.
    pub(super) range: (f32, f32),
    /// The highest value.
    pub(super) highest: f64,
    /// How far it is from where it usually was of late.
    pub(super) unrest: f32,
    /// What that distance is usually.
    pub(super) typical: f32,
    /// How much it has moved from window to window of late.
    pub(super) moving: f32,
    /// Quantiles of all that was seen, as positions.
    pub(super) long: [f32; 4],
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pending {
    due: u32,
    features: Features,
    predicted: f32,
    level: f32,
    signs: Signs,
    season: Option<f32>,
    value: f64,
    /// What the experts said of each quantile, and what was given out, as distances from `value`.
    said: Option<[[Short; EXPERTS]; 4]>,
    given: [f32; 4],
}

/// The errors of repeating the season.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SeasonErrors {
    errors: Sorted,
    len: usize,
    next: usize,
}

/// One lead.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Lead {
    steps: u32,
    /// Of so many forecasts one is judged.
    stride: u32,
    pending: VecDeque<Pending>,
    regression: Regression,
    steered: [Steered; CENTRES],
    analogs: Analogs,
    season: Option<Box<SeasonErrors>>,
    known: [bool; EXPERTS],
    mixtures: [Mixture; 4],
    /// Conformal correction of each quantile, and the size of an error that it goes by.
    shift: [f32; 4],
    error: f32,
    /// The moment since which the level is what it is.
    level_since: u32,
    seen: u64,
    covered: u64,
    newest: [f64; 4],
}

impl Lead {
    pub(super) fn new(steps: u64) -> Self {
        let steps = steps.clamp(1, MAX_STEPS) as usize;
        let mut known = [true; EXPERTS];
        known[SEASON] = false;
        let stride = stride(steps);
        Self {
            steps: steps as u32,
            stride: stride as u32,
            pending: VecDeque::with_capacity(steps.div_ceil(stride) + 1),
            regression: Regression::new(),
            steered: std::array::from_fn(|_| Steered::new()),
            analogs: Analogs::new(),
            season: None,
            known,
            mixtures: std::array::from_fn(|_| Mixture::new(&known)),
            shift: [0.0; 4],
            error: 0.0,
            level_since: 0,
            seen: 0,
            covered: 0,
            newest: [0.0; 4],
        }
    }

    /// Whether it can be one of so many windows: its places are ones, and its numbers.
    pub(super) fn is_sound(&self, steps: u64) -> bool {
        let new = Self::new(steps);
        let shape =
            (self.steps, self.stride) == (new.steps, new.stride) && self.pending.len() <= MAX_PENDING + 1;
        let pending = self.pending.iter().all(|pending| {
            let all =
                pending.features.iter().chain(&pending.given).chain(&pending.season).chain(&pending.signs);
            let said = pending.said.iter().flatten().flatten().map(|opinion| opinion.get());
            let numbers = [pending.predicted, pending.level];
            all.copied().chain(said).chain(numbers).all(f32::is_finite) && pending.value.is_finite()
        });
        let season = self
            .season
            .as_ref()
            .is_none_or(|season| season.errors.is_sound() && season.len <= KEPT && season.next < KEPT);
        let own = self.covered <= self.seen
            && self.seen < MOST
            && self.shift.iter().chain([&self.error]).copied().all(f32::is_finite)
            && self.newest.iter().all(|need| need.is_finite() && *need >= 0.0);
        let mixtures = self.mixtures.iter().all(Mixture::is_sound);
        let learnt = self.regression.is_sound()
            && self.steered.iter().all(Steered::is_sound)
            && self.analogs.is_sound();
        shape && pending && season && own && mixtures && learnt
    }

    /// Adds what it has learnt to `prior`.
    pub(super) fn teach(&self, prior: &mut Prior) {
        prior.add_lead(&self.regression, &self.steered, &self.analogs, &self.mixtures);
    }

    /// Starts from what others have learnt about the lead of this number; `usual` are shares of time at each position.
    pub(super) fn start_from(&mut self, prior: &Prior, number: usize, usual: &[f32]) {
        let Self { regression, steered, analogs, mixtures, known, .. } = self;
        prior.teach(number, usual, regression, steered, analogs);
        prior.teach_mixtures(number, mixtures, known);
    }

    /// Of so many windows nothing was used in any, and it has seen the newest `known`.
    pub(super) fn saw_nothing(&mut self, windows: u64, known: u64) {
        let more = met_of_nothing(u64::from(self.steps), windows).saturating_sub(self.seen);
        self.seen += more;
        self.covered += more;
        let unknown = (windows.saturating_sub(known) / u64::from(self.stride)).min(MOST_STILL);
        for _ in 0..unknown {
            self.regression.learn(&STILL, 0.0);
        }
        for _ in 0..unknown.min((KEPT - self.analogs.len()) as u64) {
            self.analogs.add(0.0, 0.0, 0.0);
        }
    }

    /// How far ahead, in windows.
    pub(super) fn steps(&self) -> usize {
        self.steps as usize
    }

    /// The newest forecast.
    pub(super) fn quantiles(&self) -> [f64; 4] {
        self.newest
    }

    pub(super) fn evidence(&self, needed: u64) -> Evidence {
        evidence(self.seen * u64::from(self.stride), needed, self.covered as f64 / self.seen as f64)
    }

    /// A window has gone by: the forecast for it, if there is one, has met its outcome, or never will.
    pub(super) fn settle(&mut self, now: &Moment, seen: bool) {
        // Ticks wrap; none that waits is half a round away.
        let is_due = |pending: &mut Pending| now.tick.wrapping_sub(pending.due) < 1 << 31;
        while let Some(due) = self.pending.pop_front_if(is_due) {
            if seen && due.due == now.tick {
                self.judge(&due, now);
            }
        }
    }

    fn judge(&mut self, due: &Pending, now: &Moment) {
        let gone = now.level - due.level;
        self.regression.learn(&due.features, gone);
        if let (Some(kept), Some(season)) = (&mut self.season, due.season) {
            kept.add(now.level - season);
        }
        let missed = gone - due.predicted;
        for (steered, centre) in self.steered.iter_mut().zip(centres(due.predicted, &due.features)) {
            steered.learn(&due.signs, gone - centre, self.stride);
        }
        self.analogs.add(due.level, missed, gone);
        if due.due.wrapping_sub(self.steps) < self.level_since {
            self.analogs.level_changed(0);
        }
        let Some(said) = &due.said else { return };
        let outcome = (now.value - due.value) as f32;
        let size = (outcome - due.given[0]).abs();
        self.seen += 1;
        self.covered += u64::from(outcome <= due.given[2]);
        self.error += (size - self.error) * (1.0 / self.seen as f32).max(0.01);
        // Of a long lead, only every so many forecasts are judged: each then stands for as many.
        let step = SHIFT * self.error * self.stride as f32;
        for k in 0..4 {
            self.mixtures[k].learn(&said[k].map(Short::get), outcome, TAILS[k], &self.known);
            let off = f32::from(u8::from(outcome > due.given[k])) - TAILS[k];
            self.shift[k] += step * off;
        }
    }

    /// Forecasts from the present moment.
    pub(super) fn forecast(&mut self, now: &Moment, features: &Features, season: Option<f32>) {
        let predicted =
            within(self.regression.predict(features), now.range.0 - now.level, now.range.1 - now.level);
        // A feature is how far the value is from where it usually is at the time that is forecast.
        let signs = [now.typical, now.unrest, now.moving + MOVING * now.typical, features[BACK]];
        let said = (self.analogs.len() >= MIN_OUTCOMES)
            .then(|| self.ask(now, centres(predicted, features), season, &signs));
        let mut given = [0.0f32; 4];
        if let Some(said) = &said {
            for k in 0..4 {
                let quantile = (self.mixtures[k].of(&said[k]) + self.shift[k]).max(-now.value as f32);
                // Quantiles are made one by one: put them in order again.
                given[k] = if k == 0 { quantile } else { quantile.max(given[k - 1]) };
            }
        }
        self.newest = given.map(|distance| (now.value + f64::from(distance)).max(0.0));
        if now.tick.is_multiple_of(self.stride) {
            self.pending.push_back(Pending {
                due: now.tick.wrapping_add(self.steps),
                features: *features,
                predicted,
                level: now.level,
                signs,
                season,
                value: now.value,
                said: said.map(|said| said.map(|opinions| opinions.map(Short::new))),
                given,
            });
        }
    }

    /// What each expert says of each quantile, as a distance from the present value.
    fn ask(
        &self,
        now: &Moment,
        centres: [f32; CENTRES],
        season: Option<f32>,
        signs: &Signs,
    ) -> [Opinions; 4] {
        let like = self.analogs.likeness(now.level, now.typical);
        let mut far = [[0.0f32; EXPERTS]; 4];
        let mut put = |expert: usize, at: f32, quantiles: [f32; 4]| {
            for k in 0..4 {
                far[k][expert] = at + quantiles[k];
            }
        };
        for ((expert, centre), steered) in STEERED.into_iter().zip(centres).zip(&self.steered) {
            put(expert, centre, steered.quantiles(signs));
        }
        put(MISSED, centres[0], self.analogs.missed(&like));
        put(GONE, 0.0, self.analogs.gone(&like));
        // Rounded as where outcomes came to: what never moves is forecast as itself.
        put(CAME, -Position::new(now.level).get(), self.analogs.came(&like));
        put(LONG, -now.level, now.long.map(|position| within(position, now.range.0, now.range.1)));
        if let (Some(errors), Some(season)) = (&self.season, season) {
            put(SEASON, season - now.level, errors.quantiles());
        }
        for k in 0..4 {
            let mid = if k == 0 { 0.0 } else { far[0][STEERED[0]] };
            far[k][NARROW] = mid + NARROWER * (far[k][STEERED[0]] - mid);
        }
        let value = now.value as f32;
        let slope = (value * value + now.unit * now.unit).sqrt();
        let most = (HIGHEST * now.highest) as f32 - value;
        for quantile in &mut far {
            for distance in quantile.iter_mut() {
                *distance = within(displaced(value, slope, *distance), -value, most);
            }
        }
        far
    }

    /// Memory that it takes, in bytes, next to itself.
    pub(super) fn bytes(&self) -> usize {
        let season = if self.season.is_some() { size_of::<SeasonErrors>() } else { 0 };
        self.pending.capacity() * size_of::<Pending>() + season
    }

    /// At `now` it was found that the level has changed at `tick`: what came of moments before counts less from now on.
    pub(super) fn level_changed(&mut self, tick: u32, now: u32) {
        self.level_since = tick;
        let met = now.wrapping_sub(tick).saturating_sub(self.steps) / self.stride;
        self.analogs.level_changed(met as usize);
    }

    /// The unit of the scale has changed.
    pub(super) fn rescale(&mut self, convert: impl Fn(f32) -> f32) {
        self.analogs.rescale(&convert);
        for pending in &mut self.pending {
            pending.level = convert(pending.level);
            pending.season = pending.season.map(&convert);
        }
    }

    /// What was forecast before can't be judged any more.
    pub(super) fn interrupt(&mut self) {
        self.pending.clear();
        self.no_season();
    }

    /// There is no season any more.
    pub(super) fn no_season(&mut self) {
        self.season = None;
        self.known[SEASON] = false;
    }

    /// A season was found; `errors` are those that repeating it would have made, oldest first. It can be judged by
    /// them at once.
    pub(super) fn season_found(&mut self, errors: impl Iterator<Item = f32>) {
        let mut kept = Box::new(SeasonErrors { errors: Sorted::new(), len: 0, next: 0 });
        errors.for_each(|error| kept.add(error));
        if kept.len < MIN_OUTCOMES {
            return self.no_season();
        }
        for pending in &mut self.pending {
            pending.said = None; // It had nothing to say then.
            pending.season = None;
        }
        let (own, best) = (kept.loss(), self.analogs.loss());
        let first = !self.known[SEASON];
        self.known[SEASON] = true;
        self.season = Some(kept);
        if first {
            // As the inverse fourth power of the losses: twice as good is trusted sixteen times as much.
            let odds = ((best + 1e-9) / (own + 1e-9)).powi(4);
            let share = (odds / (1.0 + odds)).clamp(0.1, 0.97);
            let known = self.known;
            self.mixtures.iter_mut().for_each(|mixture| mixture.join(SEASON, share, &known));
            self.shift = [0.0; 4];
        }
    }
}

/// Of so many forecasts of a lead one is judged.
fn stride(steps: usize) -> usize {
    steps.div_ceil(MAX_PENDING)
}

fn evidence(seen: u64, needed: u64, p95_coverage: f64) -> Evidence {
    if seen < needed || seen == 0 {
        Evidence::TooLittle { seen, needed }
    } else {
        Evidence::Enough { seen, p95_coverage }
    }
}

/// How many forecasts of a lead have met their outcome after so many windows in which nothing was used: one is only made when outcomes are known.
fn met_of_nothing(steps: u64, windows: u64) -> u64 {
    let steps = steps.clamp(1, MAX_STEPS);
    let stride = stride(steps as usize) as u64;
    windows.saturating_sub(2 * steps + (MIN_OUTCOMES as u64 + 1) * stride) / stride
}

/// The evidence for a lead of so many windows, after `windows` in which nothing was used.
pub(super) fn evidence_of_nothing(steps: u64, windows: u64, needed: u64) -> Evidence {
    let stride = stride(steps.clamp(1, MAX_STEPS) as usize) as u64;
    evidence(met_of_nothing(steps, windows) * stride, needed, 1.0)
}

/// What steered spreads are around, as distances from the present position.
fn centres(predicted: f32, features: &Features) -> [f32; CENTRES] {
    [predicted, -features[ABOVE], features[BACK]]
}

impl SeasonErrors {
    fn add(&mut self, error: f32) {
        self.errors.put(self.next, self.len, error);
        self.len = (self.len + 1).min(KEPT);
        self.next = (self.next + 1) % KEPT;
    }

    fn quantiles(&self) -> [f32; 4] {
        self.errors.quantiles(self.len, &analogs::ages(self.len, self.next))
    }

    fn loss(&self) -> f32 {
        analogs::spread_loss(&self.errors, self.len, self.next)
    }
}
