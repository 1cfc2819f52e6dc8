//! What the demo claims of moves: that a plan made them, of a forecast, and that they were there before what needs them.

use std::time::Duration;

use anyhow::{Context, ensure};
use rswap_agent::units::UnixMillis;
use serde_json::Value;

use crate::load::Pattern;

/// A need of every day, and the move that has to come before it.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// What is said of it.
    pub what: &'static str,
    /// The kind of move, as `/v1/moves` has it.
    pub kind: &'static str,
    /// The pool that it leads to.
    pub to: &'static str,
    /// What is needed,
    pub pattern: Pattern,
    /// and how much of that is more than the pool gives where the instance is before.
    pub more_than: f64,
}

/// A move that a plan has made.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// When it began, after the beginning of the first day.
    pub began: Duration,
    /// How long it took.
    pub took: Duration,
    /// How long before the need it began, in seconds; less than nothing where it was late.
    pub ahead_s: f64,
    /// The same of its end.
    pub done_ahead_s: f64,
    /// The decision in words.
    pub why: Vec<String>,
}

impl Claim {
    /// The move, of those of `/v1/moves`; the first day began at `load_began`. An error says what is not as it is claimed.
    pub fn check(&self, moves: &[Value], load_began: UnixMillis) -> anyhow::Result<Made> {
        let made = self.find(moves, load_began)?;
        let (what, ahead_s) = (self.what, made.ahead_s);
        ensure!(ahead_s > 0.0, "the {what} began {:.1} s after it was needed", -ahead_s);
        ensure!(
            made.done_ahead_s > 0.0,
            "the {what} was done {:.1} s after it was needed",
            -made.done_ahead_s
        );
        Ok(made)
    }

    /// The same, however late it was.
    pub fn find(&self, moves: &[Value], load_began: UnixMillis) -> anyhow::Result<Made> {
        let what = self.what;
        let is_it = |one: &&Value| {
            one["kind"] == self.kind
                && one["to"] == self.to
                && one["asked_by"] == "plan"
                && one["state"] == "done"
        };
        let one =
            moves.iter().find(is_it).with_context(|| format!("no plan made a {what} to {}", self.to))?;
        ensure!(one["forced"] == true, "the {what} was not made for a need, but to save");
        let at = |key: &str| {
            let at = one[key].as_u64().with_context(|| format!("the {what} has no time {key:?}"))?;
            Ok::<_, anyhow::Error>(Duration::from_millis(UnixMillis(at).since(load_began)))
        };
        let (began, ended) = (at("started")?, at("ended")?);
        let need = self.pattern.first_above(self.more_than, self.pattern.day_at(began));
        let need = need.with_context(|| format!("nothing needs the {what}"))?;
        // Of another pool, too, and whoever asked for it.
        let goes_on = |one: &&Value| {
            let began =
                one["started"].as_u64().map(|at| Duration::from_millis(UnixMillis(at).since(load_began)));
            one["kind"] == self.kind && began.is_some_and(|began| began >= ended && began < need)
        };
        ensure!(
            !moves.iter().any(|one| goes_on(&one)),
            "after the {what} there was another one before the need"
        );
        let why = one["why"].as_array().into_iter().flatten();
        Ok(Made {
            began,
            took: ended.saturating_sub(began),
            ahead_s: need.as_secs_f64() - began.as_secs_f64(),
            done_ahead_s: need.as_secs_f64() - ended.as_secs_f64(),
            why: why.filter_map(|line| line.as_str().map(str::to_owned)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// More than 0.5 from 8 s of a day of 10 s on.
    const CLAIM: Claim = Claim {
        what: "storage swap",
        kind: "storage",
        to: "ssd",
        pattern: Pattern {
            day: Duration::from_secs(10),
            cores: &[(0.0, 0.0), (0.7, 0.0), (0.9, 1.0), (0.95, 0.0)],
            peak_from: 0.9,
            peak_to: 0.95,
        },
        more_than: 0.5,
    };
    const BEGAN: UnixMillis = UnixMillis(1_000_000);

    fn one(started_ms: u64, ended_ms: u64) -> Value {
        json!({
            "kind": "storage", "to": "ssd", "asked_by": "plan", "state": "done", "forced": true,
            "started": BEGAN.0 + started_ms, "ended": BEGAN.0 + ended_ms, "why": ["because"],
        })
    }

    #[test]
    fn a_move_before_its_need_is_as_claimed() {
        let made = CLAIM.check(&[one(25_000, 27_500)], BEGAN).unwrap();
        assert!((made.ahead_s - 3.0).abs() < 1e-9 && (made.done_ahead_s - 0.5).abs() < 1e-9, "{made:?}");
        assert_eq!((made.took, made.why), (Duration::from_millis(2_500), vec!["because".to_owned()]));
    }

    #[test]
    fn what_is_late_or_not_of_a_forecast_is_not() {
        let broken = |moves: &[Value]| CLAIM.check(moves, BEGAN).unwrap_err().to_string();
        assert_eq!(broken(&[one(28_200, 28_300)]), "the storage swap began 0.2 s after it was needed");
        assert_eq!(broken(&[one(27_000, 28_300)]), "the storage swap was done 0.3 s after it was needed");
        let with = |key: &str, value: Value| {
            let mut changed = one(25_000, 27_500);
            changed[key] = value;
            broken(&[changed])
        };
        let none = "no plan made a storage swap to ssd";
        for (key, value) in [("kind", "cpu"), ("to", "disk"), ("asked_by", "request"), ("state", "failed")] {
            assert_eq!(with(key, value.into()), none);
        }
        assert_eq!(broken(&[]), none);
        assert!(with("forced", false.into()).contains("but to save"));
        assert!(with("ended", Value::Null).contains("no time \"ended\""));
        let mut back = one(27_600, 27_700);
        back["to"] = "disk".into();
        let again = "after the storage swap there was another one before the need";
        assert_eq!(broken(&[one(25_000, 27_500), back]), again);
        // The first one counts, not a later one that was in time.
        assert!(broken(&[one(8_500, 8_600), one(15_000, 15_100)]).contains("began 0.5 s after"));
    }
}
