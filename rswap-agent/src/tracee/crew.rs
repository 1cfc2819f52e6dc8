//! Threads that hold the processes of an instance still, each its share: ptrace binds a tracee to the thread that has stopped it.
//!
//! Whatever needs ptrace is brought to the thread that holds the process. When such a thread ends, the kernel lets its tracees go.

use std::{
    num::NonZero,
    panic::resume_unwind,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
};

type Order = Box<dyn FnOnce() + Send>;

/// Which thread of a [`Crew`] holds a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hand(usize);

/// The threads. Dropping it waits until they have ended.
#[derive(Debug)]
pub struct Crew {
    orders: Vec<Sender<Order>>,
    threads: Vec<JoinHandle<()>>,
}

/// Work that is under way.
#[derive(Debug)]
pub struct Work<T, R> {
    number: usize,
    done: Receiver<(usize, T, R)>,
}

impl Crew {
    /// A thread for each processor.
    pub fn start() -> Self {
        let number = thread::available_parallelism().map_or(1, NonZero::get);
        let (mut orders, mut threads) = (Vec::new(), Vec::new());
        for _ in 0..number {
            let (sender, receiver) = mpsc::channel::<Order>();
            orders.push(sender);
            threads.push(thread::spawn(move || receiver.into_iter().for_each(|order| order())));
        }
        Self { orders, threads }
    }

    /// The thread for the process that comes as number `at`.
    pub fn hand(&self, at: usize) -> Hand {
        Hand(at % self.orders.len())
    }

    /// Begins `work` on each of `items`, by its thread, all threads at once.
    pub fn begin<T: Send + 'static, R: Send + 'static>(
        &self,
        items: Vec<(Hand, T)>,
        work: impl Fn(&mut T) -> R + Send + Sync + 'static,
    ) -> Work<T, R> {
        let number = items.len();
        let mut shares: Vec<Vec<(usize, T)>> = self.orders.iter().map(|_| Vec::new()).collect();
        for (at, (hand, item)) in items.into_iter().enumerate() {
            shares[hand.0].push((at, item));
        }
        let (results, done) = mpsc::channel();
        let work = Arc::new(work);
        for (orders, share) in self.orders.iter().zip(shares).filter(|(_, share)| !share.is_empty()) {
            let (results, work) = (results.clone(), Arc::clone(&work));
            // One whose thread has panicked is found missing at the end.
            let _ = orders.send(Box::new(move || {
                for (at, mut item) in share {
                    let result = work(&mut item);
                    let _ = results.send((at, item, result));
                }
            }));
        }
        Work { number, done }
    }

    /// Waits for `work`: all items, in the order in which they were given, and what came of each.
    ///
    /// # Panics
    /// If the work did.
    pub fn finish<T, R>(&mut self, work: Work<T, R>) -> (Vec<T>, Vec<R>) {
        let mut done: Vec<(usize, T, R)> = work.done.into_iter().collect();
        if done.len() < work.number {
            self.join();
        }
        done.sort_by_key(|(at, ..)| *at);
        done.into_iter().map(|(_, item, result)| (item, result)).unzip()
    }

    /// [`Self::begin`] and [`Self::finish`].
    pub fn each<T: Send + 'static, R: Send + 'static>(
        &mut self,
        items: Vec<(Hand, T)>,
        work: impl Fn(&mut T) -> R + Send + Sync + 'static,
    ) -> (Vec<T>, Vec<R>) {
        let work = self.begin(items, work);
        self.finish(work)
    }

    fn join(&mut self) {
        self.orders.clear();
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !thread::panicking()
            {
                resume_unwind(panic);
            }
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_item_stays_with_its_thread_and_results_come_in_order() {
        let mut crew = Crew::start();
        let items: Vec<_> = (0..100).map(|at| (crew.hand(at), (at, None))).collect();
        let hands: Vec<Hand> = items.iter().map(|(hand, _)| *hand).collect();
        let (items, first) = crew.each(items, |(at, by)| {
            *by = Some(thread::current().id());
            *at * 2
        });
        assert_eq!(first, (0..100).map(|at| at * 2).collect::<Vec<_>>());
        let again = hands.into_iter().zip(items).collect();
        let (items, same) = crew.each(again, |(_, by)| *by == Some(thread::current().id()));
        assert!(same.into_iter().all(|same| same));
        assert!(items.into_iter().map(|(at, _)| at).eq(0..100));
    }

    #[test]
    #[should_panic(expected = "item 3")]
    fn a_panic_is_not_swallowed() {
        let mut crew = Crew::start();
        let items = (0..5).map(|at| (crew.hand(at), at)).collect();
        crew.each(items, |at| assert!(*at != 3, "item 3"));
    }
}
