//! What others have taught, as it is told. Every host is told the same, and there are thousands of numbers in it: they are put into words once.

use std::{collections::BTreeMap, sync::Arc};

use rswap_fleet::{Order, model::Revision};
use rswap_forecast::{Lessons, Part};
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::server::Controller;

/// Parts whose words are kept.
const KEPT: usize = 256;

/// [`rswap_fleet::report::Answer`], with lessons that are in words already.
#[derive(Serialize)]
pub(crate) struct Told {
    pub(crate) stored: u64,
    pub(crate) lessons: Vec<(Part, Arc<RawValue>)>,
    pub(crate) knows: Revision,
    pub(crate) orders: Vec<Order>,
    pub(crate) places: bool,
}

/// The words of each part, and of which lessons they are.
#[derive(Default)]
pub(crate) struct Words(BTreeMap<Part, (Arc<Lessons>, Arc<RawValue>)>);

/// These in words.
///
/// # Errors
///
/// If they can't be put into words; of checked lessons, all can.
pub(crate) fn words(
    controller: &Controller,
    part: &Part,
    lessons: Arc<Lessons>,
) -> Result<Arc<RawValue>, serde_json::Error> {
    // What was put together for one host alone, as it has taught some of it, nobody else is told.
    if Arc::strong_count(&lessons) == 1 {
        return Ok(to_raw_value(&*lessons)?.into());
    }
    controller.with_words(|words| words.of(part, &lessons))
}

impl Words {
    /// As they were put before, if they are the same ones.
    fn of(&mut self, part: &Part, lessons: &Arc<Lessons>) -> Result<Arc<RawValue>, serde_json::Error> {
        if let Some((known, words)) = self.0.get(part)
            && Arc::ptr_eq(known, lessons)
        {
            return Ok(words.clone());
        }
        let words: Arc<RawValue> = to_raw_value(&**lessons)?.into();
        if self.0.len() >= KEPT {
            self.0.clear();
        }
        self.0.insert(part.clone(), (lessons.clone(), words.clone()));
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use rswap_fleet::report::Answer;
    use rswap_forecast::{ForecastConfig, Forecaster};

    use super::*;

    fn lessons(window_ms: u64) -> Arc<Lessons> {
        Arc::new(Forecaster::new(ForecastConfig::default(), window_ms).lessons())
    }

    #[test]
    fn what_is_told_is_an_answer() {
        let (part, of) = (Part::Class("web".to_owned()), lessons(1_000));
        let knows = Revision { life: 2, number: 3 };
        let answer = Answer {
            stored: 1,
            lessons: vec![(part.clone(), Lessons::clone(&of))],
            knows,
            orders: Vec::new(),
            places: true,
        };
        let words = Words::default().of(&part, &of).expect("words");
        let told = Told { stored: 1, lessons: vec![(part, words)], knows, orders: Vec::new(), places: true };
        let text = serde_json::to_string(&told).expect("words");
        assert_eq!(text, serde_json::to_string(&answer).expect("words"));
    }

    #[test]
    fn the_same_lessons_are_put_into_words_once_and_others_anew() {
        let (part, mut words) = (Part::General, Words::default());
        let (one, other) = (lessons(1_000), lessons(2_000));
        let first = words.of(&part, &one).expect("words");
        assert!(Arc::ptr_eq(&first, &words.of(&part, &one).expect("words")));
        let second = words.of(&part, &other).expect("words");
        assert_ne!(first.get(), second.get());
        for number in 0..2 * KEPT {
            words.of(&Part::Class(number.to_string()), &one).expect("words");
        }
        assert!(words.0.len() <= KEPT);
    }
}
