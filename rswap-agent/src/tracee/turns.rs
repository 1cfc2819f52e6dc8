//! What several threads do one after the other, in an order that was fixed before.

use std::sync::{Condvar, Mutex, PoisonError};

use super::TraceeError;

/// Something that each has in its turn.
#[derive(Debug)]
pub struct Turns<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    /// Whose turn it is; `None` when nobody gets one any more.
    next: Option<usize>,
    thing: T,
}

impl<T> Turns<T> {
    /// The first turn is number 0.
    pub fn new(thing: T) -> Self {
        Self { state: Mutex::new(State { next: Some(0), thing }), changed: Condvar::new() }
    }

    /// Waits for turn `number`, and does `work` in it.
    ///
    /// # Errors
    /// The work failed, or that of a turn before: then no other one gets its turn.
    pub fn take<R>(
        &self,
        number: usize,
        work: impl FnOnce(&mut T) -> Result<R, TraceeError>,
    ) -> Result<R, TraceeError> {
        let poisoned = PoisonError::into_inner;
        let state = self.state.lock().unwrap_or_else(poisoned);
        let mut state = self
            .changed
            .wait_while(state, |state| state.next.is_some_and(|next| next != number))
            .unwrap_or_else(poisoned);
        if state.next.is_none() {
            return Err(TraceeError::Beside);
        }
        // Whatever happens in it, panics too: nobody waits for ever.
        state.next = None;
        let done = Ending(&self.changed);
        let result = work(&mut state.thing);
        state.next = result.is_ok().then_some(number + 1);
        drop(state);
        drop(done);
        result
    }

    /// Nobody gets a turn any more.
    pub fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).next = None;
        self.changed.notify_all();
    }

    /// What all had.
    pub fn into_inner(self) -> T {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).thing
    }
}

/// Wakes the others up when it is dropped.
struct Ending<'a>(&'a Condvar);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Three threads take twenty turns, of which number `fails` fails; what was done.
    fn twenty(fails: Option<usize>) -> (Vec<usize>, usize) {
        let turns = Turns::new(Vec::new());
        let errors = thread::scope(|scope| {
            let share = |first: usize| {
                let turns = &turns;
                scope.spawn(move || {
                    let one = |number| {
                        turns.take(number, |done: &mut Vec<usize>| {
                            done.push(number);
                            match Some(number) == fails {
                                true => Err(TraceeError::Gone(number as i32)),
                                false => Ok(()),
                            }
                        })
                    };
                    (first..20).step_by(3).filter(|number| one(*number).is_err()).count()
                })
            };
            let threads: Vec<_> = (0..3).map(share).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        (turns.into_inner(), errors)
    }

    #[test]
    fn turns_come_in_their_order() {
        assert_eq!(twenty(None), ((0..20).collect(), 0));
    }

    #[test]
    fn after_a_failure_nobody_waits_and_nobody_goes_on() {
        assert_eq!(twenty(Some(7)), ((0..=7).collect(), 13));
    }
}
