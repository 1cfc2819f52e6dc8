//! Processes are rebuilt side by side, by a thread for each processor.
//!
//! ptrace binds a stub to the thread that traces it, and one thread has made all of them. So it hands part of them over to
//! others, which hold them until they are let go. What several processes have in common (connections, pipes, what waits in
//! queues) is made in turns, in the image's order, as if one thread did it all.

use std::{
    num::NonZero,
    panic::resume_unwind,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, ScopedJoinHandle},
};

use super::TaskError;
use crate::tracee::{
    TraceeError,
    descriptors::{Finals, Restorer},
    image::{ProcessImage, TaskImage},
    rebuild::{self, Parked, Parts, Rebuilt},
    space::Space,
    tables::{self, Tables},
    turns::Turns,
};

/// A process that is to be rebuilt.
pub(super) struct Job<'a> {
    /// Its place in the image.
    pub number: usize,
    pub space: &'a mut Space,
    pub task: &'a TaskImage,
    pub parts: Parts,
}

/// A thread that has its share of the processes.
struct Worker<'scope> {
    thread: ScopedJoinHandle<'scope, Result<Parked, TraceeError>>,
    /// Whether its share is rebuilt.
    rebuilt: Receiver<Result<(), TraceeError>>,
    /// Has it let its share go. Closed without a word, the share ends.
    go: Sender<()>,
}

/// Rebuilds the processes of `image`, one job for each, and lets them go by ptrace. When all of them are rebuilt, `finish`
/// completes them, and has them held still by other means.
pub(super) fn rebuild<'a>(
    image: &[ProcessImage],
    jobs: Vec<Job<'a>>,
    restorer: Restorer<'a>,
    finish: impl FnOnce(Restorer<'a>) -> Result<Finals, TaskError>,
) -> Result<Parked, TaskError> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let mut shares: Vec<Vec<Job<'_>>> = (0..threads).map(|_| Vec::new()).collect();
    let tables: Vec<_> =
        image.iter().map(|process| (process.tables, process.task.stopped.is_some())).collect();
    for (share, job) in shares_of(&tables, threads).into_iter().zip(jobs) {
        shares[share].push(job);
    }
    let turns = Arc::new(Turns::new(restorer));
    thread::scope(|scope| {
        let mut shares = shares.into_iter();
        let own = shares.next().unwrap_or_default();
        let mut workers = Vec::new();
        for mut share in shares.filter(|share| !share.is_empty()) {
            share.iter_mut().try_for_each(|job| job.space.hand_over())?;
            let ((report, rebuilt), (go, wait)) = (mpsc::channel(), mpsc::channel());
            let turns = Arc::clone(&turns);
            let thread = scope.spawn(move || work(share, turns, &report, &wait));
            workers.push(Worker { thread, rebuilt, go });
        }
        let mut results = Vec::new();
        let rebuilt = share_rebuilt(own, &turns).unwrap_or_else(|error| {
            results.push(error);
            Rebuilt::default()
        });
        // One that has panicked says nothing.
        let reports = workers.iter().map(|worker| worker.rebuilt.recv().unwrap_or(Err(TraceeError::Beside)));
        results.extend(reports.filter_map(Result::err));
        results.sort_by_key(|error| matches!(error, TraceeError::Beside));
        if let Some(error) = results.into_iter().next() {
            return Err(error.into());
        }
        let restorer =
            Arc::into_inner(turns).ok_or("a thread that rebuilds processes has ended")?.into_inner();
        let finals = finish(restorer)?;
        for worker in &workers {
            // One that does not listen has panicked.
            let _ = worker.go.send(());
        }
        let mut parked = rebuilt.park()?;
        for worker in workers {
            parked.add(worker.thread.join().unwrap_or_else(|panic| resume_unwind(panic))?);
        }
        parked.leave(finals);
        Ok(parked)
    })
}

/// What such a thread does. The processes end with it, if it has not let them go.
fn work(
    mut share: Vec<Job<'_>>,
    turns: Arc<Turns<Restorer<'_>>>,
    report: &Sender<Result<(), TraceeError>>,
    wait: &Receiver<()>,
) -> Result<Parked, TraceeError> {
    let taken = share.iter_mut().try_for_each(|job| job.space.take_up());
    let rebuilt = match taken {
        Ok(()) => share_rebuilt(share, &turns),
        Err(error) => {
            turns.stop();
            Err(error)
        }
    };
    drop(turns);
    let (rebuilt, result) = match rebuilt {
        Ok(rebuilt) => (Some(rebuilt), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let _ = report.send(result);
    match (rebuilt, wait.recv()) {
        (Some(rebuilt), Ok(())) => rebuilt.park(),
        // All is given up.
        _ => Ok(Parked::default()),
    }
}

/// Rebuilds the processes of a share, one after the other.
fn share_rebuilt(share: Vec<Job<'_>>, turns: &Turns<Restorer<'_>>) -> Result<Rebuilt, TraceeError> {
    let mut all = Rebuilt::default();
    for Job { number, space, task, parts } in share {
        match rebuild::rebuild(space, task, parts, (turns, number)) {
            Ok(rebuilt) => all.add(rebuilt),
            Err(error) => {
                turns.stop();
                return Err(error);
            }
        }
    }
    Ok(all)
}

/// Which of `threads` rebuilds each of `processes`, of which their tables are given and whether a signal has stopped them. The
/// first one, which has all of them, keeps those that have tables in common, as one may not open files while another's are put
/// into their places, and those that are stopped, which would have to be stopped once more.
fn shares_of(processes: &[(Tables, bool)], threads: usize) -> Vec<usize> {
    let stays = |at: usize| {
        let (tables, stopped) = processes[at];
        let mut others = (0..processes.len()).filter(|other| *other != at).map(|other| processes[other].0);
        let alike = |other: Tables| tables::ALL.into_iter().any(|what| other.of(what) == tables.of(what));
        stopped || others.any(alike)
    };
    let stay: Vec<bool> = (0..processes.len()).map(stays).collect();
    let mut loads = vec![0; threads.max(1)];
    loads[0] = stay.iter().filter(|stays| **stays).count();
    let mut share_of = |stays: &bool| {
        if *stays {
            return 0;
        }
        let least = (0..loads.len()).min_by_key(|share| loads[*share]).unwrap_or_default();
        loads[least] += 1;
        least
    };
    stay.iter().map(&mut share_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apart(number: u32) -> (Tables, bool) {
        (Tables { descriptors: number, directories: number }, false)
    }

    #[test]
    fn processes_are_dealt_out_evenly() {
        let processes: Vec<_> = (0..7).map(apart).collect();
        assert_eq!(shares_of(&processes, 2), [0, 1, 0, 1, 0, 1, 0]);
        assert_eq!(shares_of(&processes, 1), [0; 7]);
        assert_eq!(shares_of(&processes[..1], 4), [0]);
    }

    #[test]
    fn what_has_something_in_common_or_is_stopped_stays() {
        let mut processes: Vec<_> = (0..6).map(apart).collect();
        processes[3].0.directories = 1;
        processes[4].1 = true;
        // 1 and 3 share their directories, and 4 is stopped: the others go where there is less to do.
        assert_eq!(shares_of(&processes, 2), [1, 0, 1, 0, 0, 1]);
    }
}
