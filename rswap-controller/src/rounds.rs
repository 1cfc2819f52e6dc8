//! What the controller does by itself: plans, the roll, and the end of old history.
//!
//! A plan of a large fleet takes seconds of a core, and nobody waits for it: its thread gives way to reports. A lock that such a thread holds
//! is held for as long as there are reports to give way to, and they may be what waits for it. So it takes none: what it looks at is handed to
//! it, and what it decides is taken from it, by a thread that gives way to nobody.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rswap_fleet::plan::{self, FleetPlanner, Scene};
use rswap_plan::{Plan, PlanConfig};
use rswap_types::UnixMillis;

use crate::{
    server::{Alive, Controller},
    writer,
};

/// Hosts that a decision names at most.
const MOST_CANDIDATES: u32 = 4;
/// How often old history is dropped.
const TRIM_EVERY: Duration = Duration::from_secs(60);
/// How much the plan's thread gives way (setpriority(2), which is of a thread on Linux).
const PLAN_NICE: i32 = 15;
/// How often a roll is looked at.
const ROLL_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether there is something to do, or the end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What is older than this a plan should not rest on.
const FOLLOWED_WITHIN_MS: u64 = plan::BEGIN_WITHIN_MS / 2;

/// What the plan's thread is to do.
enum Work {
    /// Decide about what was looked at.
    Decide(Box<FleetPlanner>, Scene),
    /// Let a plan go that another one has taken the place of: of a hundred thousand decisions, that takes a while.
    LetGo(Arc<Plan>),
}

/// What it has decided.
type Decided = (Box<FleetPlanner>, Arc<Plan>);

/// Starts the threads. They end when the controller is stopping; one that can't go on before lets go of what says that it is alive.
pub(crate) fn start(controller: &Arc<Controller>, [plans, old]: [Alive; 2]) -> Vec<JoinHandle<()>> {
    let (work, to_do) = channel();
    let (done, decided) = channel();
    let (rounds, trims) = (controller.clone(), controller.clone());
    vec![
        thread::spawn(move || decide(&to_do, &done)),
        thread::spawn(move || {
            rounds.rounds(&work, &decided);
            drop(plans);
        }),
        thread::spawn(move || {
            trims.trims();
            drop(old);
        }),
    ]
}

/// The plan's thread.
fn decide(to_do: &Receiver<Work>, done: &Sender<Decided>) {
    if let Err(error) = rustix::process::setpriority_process(None, PLAN_NICE) {
        tracing::warn!(%error, "plans are not made behind reports");
    }
    while let Ok(work) = to_do.recv() {
        match work {
            Work::Decide(mut planner, scene) => {
                let plan = Arc::new(planner.decide(scene));
                if done.send((planner, plan)).is_err() {
                    return;
                }
            }
            Work::LetGo(plan) => drop(plan),
        }
    }
}

impl Controller {
    fn rounds(&self, work: &Sender<Work>, decided: &Receiver<Decided>) {
        let candidates_kept = self.settings.plan.candidates_kept.min(MOST_CANDIDATES);
        let plan = PlanConfig { candidates_kept, ..self.settings.plan.clone() };
        let mut planner = Some(Box::new(FleetPlanner::new(plan, self.settings.interval_ms)));
        let (mut planned, mut rolled) = (Instant::now(), Instant::now());
        let every = Duration::from_millis(self.settings.plan_every_ms);
        let mut was_late = false;
        while !self.is_stopping() {
            match decided.recv_timeout(LOOK_EVERY.min(every)) {
                Ok((mut decider, plan)) => {
                    let before = self.follow(&mut decider, plan, &mut was_late);
                    planner = Some(decider);
                    if work.send(Work::LetGo(before)).is_err() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    tracing::error!("the plan's thread has panicked");
                    return;
                }
            }
            if planned.elapsed() >= every
                && let Some(mut planner) = planner.take()
            {
                planned = Instant::now();
                let scene = self.look(&mut planner, UnixMillis::now());
                if work.send(Work::Decide(planner, scene)).is_err() {
                    return;
                }
            }
            if rolled.elapsed() >= ROLL_EVERY.min(every) {
                rolled = Instant::now();
                if let Err(error) = self.roll_on(UnixMillis::now()) {
                    tracing::error!(error = writer::chain(&error), "the roll does not go on");
                }
            }
        }
    }

    /// What a plan is to be made of.
    fn look(&self, planner: &mut FleetPlanner, now: UnixMillis) -> Scene {
        self.with_state(|state| {
            for order in state.book.expired(now) {
                state.end(order, None, now);
            }
            for ended in std::mem::take(&mut state.ended) {
                planner.ended(&ended.order, ended.outcome.as_ref(), now);
            }
            let drained = state.drained();
            planner.look(&state.inventory, &drained, now)
        })
    }

    /// Orders what a plan has decided, and shows it from now on; the one before is handed back.
    fn follow(&self, planner: &mut FleetPlanner, plan: Arc<Plan>, was_late: &mut bool) -> Arc<Plan> {
        let now = UnixMillis::now();
        let age_ms = now.since(plan.at);
        let mut moves = plan::moves(&plan);
        let is_late = age_ms > FOLLOWED_WITHIN_MS;
        // Where each takes so long, an old plan is better than none: what is not true any more of a move is found before it is ordered.
        if is_late && !*was_late && !moves.is_empty() {
            tracing::warn!(age_ms, moves = moves.len(), "a plan took too long: the next one decides");
            moves.clear();
        }
        *was_late = is_late;
        self.with_state(|state| {
            if self.settings.acts {
                // Somebody may have wanted something else of a host meanwhile.
                let drained = state.drained();
                planner.order_moves(&moves, &state.inventory, &drained, &mut state.book, now);
                state.coming = planner.coming(&state.inventory);
            }
            std::mem::replace(&mut state.plan, plan.clone())
        })
    }

    /// Drops old history.
    fn trims(&self) {
        let mut trimmed = Instant::now();
        while !self.is_stopping() {
            thread::sleep(LOOK_EVERY);
            if trimmed.elapsed() >= TRIM_EVERY {
                trimmed = Instant::now();
                match self.stores.history.trim(UnixMillis::now()) {
                    Ok(rows) => tracing::debug!(rows, "old history is dropped"),
                    Err(error) => tracing::warn!(error = writer::chain(&error), "old history stays"),
                }
            }
        }
    }
}
