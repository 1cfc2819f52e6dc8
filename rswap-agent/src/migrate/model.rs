//! Every interleaving of a commit: two agents, a guard, crashes of each, new starts of either host, lost and late
//! messages. The decisions are those of [`rules`], the ones that run in production; what is modelled here is the world
//! around them.
//!
//! One step of [`World::next`] is what can't be interrupted: a message sent or taken, a word in a journal, a copy that
//! is frozen, let go or removed. Any message may be lost, any wait may end without one, whoever is modelled may stand
//! still for ever or crash before any step.

use std::collections::{HashMap, VecDeque};

use super::rules::{
    self, Arrears, DestinationState as D, Duty, Fate, GuardAction, Guarded, SourceState as S, Verdict,
};

/// The rules, to be replaced by broken ones.
#[derive(Clone, Copy)]
struct Rules {
    on_fate: fn(Fate) -> Verdict,
    source_duty: fn(S) -> Duty,
    may_activate: fn(Option<D>) -> bool,
    on_inquiry: fn(Option<D>, bool) -> (Option<D>, Fate),
    arrears: fn(D, bool) -> Arrears,
    guard: fn(Guarded, bool, bool, Option<S>) -> GuardAction,
    /// Whether the agent takes the word before it journals the commit.
    seals: bool,
    /// Whether the agent journals the commit before it sends it.
    journals_first: bool,
    /// Whether a destination that gives up after Verified keeps that in its journal.
    keeps_never: bool,
    /// Whether a destination keeps its journal until the copy runs, whatever the source says.
    keeps_pending: bool,
}

const SOUND: Rules = Rules {
    on_fate: rules::on_fate,
    source_duty: rules::source_duty,
    may_activate: rules::may_activate,
    on_inquiry: rules::on_inquiry,
    arrears: rules::destination_arrears,
    guard: |word, gone, late, journal| rules::guard(word, gone, late, || journal),
    seals: true,
    journals_first: true,
    keeps_never: true,
    keeps_pending: true,
};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Copy {
    Gone,
    Frozen,
    Running,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Source {
    Down,
    Transfers,
    AwaitsVerified,
    Seals,
    Journals,
    SendsCommit,
    AwaitsActivated,
    Asks,
    Answered(Fate),
    Removes,
    Thaws,
    WritesEnded,
    Tells,
    Idle,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Destination {
    Down,
    Builds,
    SendsVerified,
    AwaitsCommit,
    TakesCommit,
    Activates,
    SendsActivated,
    GivesUp,
    Removes,
    Idle,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Guard {
    Watches,
    /// It has taken the word, and not thawed yet.
    Takes,
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct World {
    source: Source,
    source_journal: Option<S>,
    source_copy: Copy,
    /// The agent that began the migration still lives.
    first_agent: bool,
    guard: Guard,
    word: Guarded,
    destination: Destination,
    destination_journal: Option<D>,
    destination_copy: Copy,
    started_anew: bool,
    image: bool,
    verified: bool,
    commit: bool,
    activated: bool,
    /// It ran at the destination: what it has acknowledged there exists nowhere else.
    ran_there: bool,
    /// A host took the only copy along when it went down: no protocol helps.
    died_with_its_host: bool,
    crashes: [u8; 2],
    new_starts: [u8; 2],
}

const BEGIN: World = World {
    source: Source::Transfers,
    source_journal: Some(S::Begun),
    source_copy: Copy::Running,
    first_agent: true,
    guard: Guard::Watches,
    word: Guarded::Idle,
    destination: Destination::Builds,
    destination_journal: Some(D::Prepared),
    destination_copy: Copy::Gone,
    started_anew: false,
    image: false,
    verified: false,
    commit: false,
    activated: false,
    ran_there: false,
    died_with_its_host: false,
    crashes: [2, 2],
    new_starts: [1, 1],
};

/// Takes one thing that can happen: what it is called, and what it changes.
type Step<'a> = dyn FnMut(&'static str, &dyn Fn(&mut World)) + 'a;

impl World {
    /// What is wrong with it.
    fn violation(&self) -> Option<&'static str> {
        if self.source_copy == Copy::Running && self.destination_copy == Copy::Running {
            return Some("two copies run");
        }
        if self.source_copy == Copy::Running && self.ran_there {
            return Some("the source goes on after the destination ran: acknowledged writes are lost");
        }
        let there = self.destination_copy == Copy::Running
            || self.destination_copy == Copy::Frozen && self.destination_journal == Some(D::Activated);
        if self.source_copy == Copy::Gone && !there && !self.died_with_its_host {
            return Some("no copy is left");
        }
        if self.source == Source::Answered(Fate::Unknown) {
            return Some("the destination forgot what the source still has to know");
        }
        None
    }

    /// What is wrong if nothing can happen any more.
    fn stuck(&self) -> Option<&'static str> {
        let open = self.source_journal.is_some() || self.destination_journal.is_some();
        let lost = self.destination_journal == Some(D::Activated) && self.started_anew;
        let running = [self.source_copy, self.destination_copy].contains(&Copy::Running);
        match (running, open) {
            (true, false) => None,
            _ if self.died_with_its_host => None,
            // A person is asked.
            (false, true) if lost && self.source_copy == Copy::Frozen => None,
            (true, true) => Some("a journal is never closed"),
            (false, _) => Some("it stays frozen for ever"),
        }
    }

    fn thaw_source(&mut self) {
        if self.source_copy == Copy::Frozen {
            self.source_copy = Copy::Running;
        }
    }

    /// Everything that can happen next.
    fn next(&self, rules: &Rules, faults: bool) -> Vec<(&'static str, World)> {
        let mut found = Vec::new();
        let mut to = |what, change: &dyn Fn(&mut World)| {
            let mut world = *self;
            change(&mut world);
            if world != *self {
                found.push((what, world));
            }
        };
        self.source_steps(rules, &mut to);
        self.destination_steps(rules, &mut to);
        self.guard_steps(rules, &mut to);
        if faults {
            self.faults(&mut to);
        }
        found
    }

    fn source_steps(&self, rules: &Rules, to: &mut Step<'_>) {
        match self.source {
            Source::Down => to("the source's agent starts", &|w| {
                w.guard = Guard::Ended;
                w.source = match w.source_journal.map(rules.source_duty) {
                    None => Source::Idle,
                    Some(Duty::Thaw) => Source::Thaws,
                    Some(Duty::Ask) => Source::Asks,
                    Some(Duty::Tell) => Source::Tells,
                };
            }),
            Source::Transfers => {
                to("the source freezes", &|w| {
                    if w.word == Guarded::Idle {
                        (w.word, w.source_copy, w.image) = (Guarded::Frozen, Copy::Frozen, true);
                        w.source = Source::AwaitsVerified;
                    }
                });
                to("the source gives up", &|w| w.source = Source::Thaws);
            }
            Source::AwaitsVerified => {
                if self.verified {
                    to("Verified comes", &|w| (w.verified, w.source) = (false, Source::Seals));
                }
                to("the source gives up", &|w| w.source = Source::Thaws);
            }
            Source::Seals => to("the source takes the word", &|w| {
                let wins = !rules.seals || w.word == Guarded::Frozen;
                if rules.seals && wins {
                    w.word = Guarded::Sealed;
                }
                w.source = match (wins, rules.journals_first) {
                    (false, _) => Source::Thaws,
                    (true, true) => Source::Journals,
                    (true, false) => Source::SendsCommit,
                };
            }),
            Source::Journals => to("the source journals the commit", &|w| {
                w.source_journal = Some(S::Committed);
                w.source = if rules.journals_first { Source::SendsCommit } else { Source::AwaitsActivated };
            }),
            Source::SendsCommit => to("the source sends the commit", &|w| {
                w.commit = true;
                w.source = if rules.journals_first { Source::AwaitsActivated } else { Source::Journals };
            }),
            Source::AwaitsActivated => {
                if self.activated {
                    to("Activated comes", &|w| (w.activated, w.source) = (false, Source::Removes));
                }
                to("no Activated comes", &|w| w.source = Source::Asks);
            }
            Source::Asks if self.destination != Destination::Down => {
                let (after, fate) = (rules.on_inquiry)(self.destination_journal, self.started_anew);
                to("the destination answers", &|w| {
                    (w.destination_journal, w.source) = (after, Source::Answered(fate));
                });
                to("the destination's answer is lost", &|w| w.destination_journal = after);
            }
            Source::Asks => {}
            Source::Answered(fate) => to("the source hears its fate", &|w| {
                w.source = match (rules.on_fate)(fate) {
                    Verdict::Remove => Source::Removes,
                    Verdict::Thaw => Source::Thaws,
                    Verdict::AskAPerson => Source::Asks,
                };
            }),
            Source::Removes => to("the source is removed", &|w| {
                (w.source_copy, w.source) = (Copy::Gone, Source::WritesEnded);
            }),
            Source::Thaws => to("the source goes on", &|w| {
                w.thaw_source();
                w.source = Source::WritesEnded;
            }),
            Source::WritesEnded => to("the source writes its end", &|w| {
                (w.source_journal, w.source) = (Some(S::Ended), Source::Tells);
            }),
            // While it is being let run, its journal is kept.
            Source::Tells
                if self.destination != Destination::Down
                    && (self.destination != Destination::Activates || !rules.keeps_pending) =>
            {
                to("the destination forgets", &|w| {
                    (w.destination_journal, w.source_journal, w.source) = (None, None, Source::Idle);
                });
                to("the destination forgets, unheard", &|w| w.destination_journal = None);
            }
            Source::Tells | Source::Idle => {}
        }
    }

    fn destination_steps(&self, rules: &Rules, to: &mut Step<'_>) {
        match self.destination {
            Destination::Down => to("the destination's agent starts", &|w| {
                w.destination =
                    match w.destination_journal.map(|state| (rules.arrears)(state, w.started_anew)) {
                        None | Some(Arrears::Keep) => Destination::Idle,
                        Some(Arrears::Discard) => {
                            w.destination_journal =
                                (rules.on_inquiry)(w.destination_journal, w.started_anew).0;
                            Destination::Removes
                        }
                        Some(Arrears::Activate) => {
                            if w.destination_copy == Copy::Frozen {
                                (w.destination_copy, w.ran_there) = (Copy::Running, true);
                            }
                            Destination::Idle
                        }
                    };
            }),
            Destination::Builds => {
                if self.image {
                    to("the destination restores", &|w| {
                        (w.image, w.destination_copy) = (false, Copy::Frozen);
                        w.destination = Destination::SendsVerified;
                    });
                }
                to("the destination fails", &|w| {
                    (w.destination_journal, w.destination) = (None, Destination::Removes);
                });
            }
            Destination::SendsVerified => to("the destination says Verified", &|w| {
                (w.verified, w.destination) = (true, Destination::AwaitsCommit);
            }),
            Destination::AwaitsCommit => {
                if self.commit {
                    to("the commit comes", &|w| {
                        (w.commit, w.destination) = (false, Destination::TakesCommit)
                    });
                }
                to("no commit comes", &|w| w.destination = Destination::GivesUp);
            }
            Destination::TakesCommit => to("the destination looks into its journal", &|w| {
                if (rules.may_activate)(w.destination_journal) {
                    (w.destination_journal, w.destination) = (Some(D::Activated), Destination::Activates);
                } else {
                    w.destination = Destination::GivesUp;
                }
            }),
            Destination::Activates => to("the destination runs", &|w| {
                (w.destination_copy, w.ran_there) = (Copy::Running, true);
                w.destination = Destination::SendsActivated;
            }),
            Destination::SendsActivated => to("the destination says Activated", &|w| {
                (w.activated, w.destination) = (true, Destination::Idle);
            }),
            Destination::GivesUp => to("the destination writes that it never will", &|w| {
                w.destination_journal = match rules.keeps_never {
                    true => (rules.on_inquiry)(w.destination_journal, w.started_anew).0,
                    false => None,
                };
                w.destination = Destination::Removes;
            }),
            Destination::Removes => to("the destination removes its copy", &|w| {
                (w.destination_copy, w.destination) = (Copy::Gone, Destination::Idle);
            }),
            Destination::Idle => {}
        }
    }

    fn guard_steps(&self, rules: &Rules, to: &mut Step<'_>) {
        match self.guard {
            Guard::Watches => {
                for late in [false, true] {
                    match (rules.guard)(self.word, !self.first_agent, late, self.source_journal) {
                        GuardAction::Watch => {}
                        GuardAction::Leave => to("the guard ends", &|w| w.guard = Guard::Ended),
                        GuardAction::Take => to("the guard takes the word", &|w| {
                            (w.word, w.guard) = (Guarded::Taken, Guard::Takes);
                        }),
                    }
                }
            }
            Guard::Takes => to("the guard thaws", &|w| {
                w.thaw_source();
                w.guard = Guard::Ended;
            }),
            Guard::Ended => {}
        }
    }

    fn faults(&self, to: &mut Step<'_>) {
        if self.crashes[0] > 0 && self.source != Source::Down {
            to("the source's agent is killed", &|w| {
                (w.source, w.first_agent) = (Source::Down, false);
                w.crashes[0] -= 1;
            });
        }
        if self.crashes[1] > 0 && self.destination != Destination::Down {
            to("the destination's agent is killed", &|w| {
                // What is not parked yet is traced, and dies with it.
                if w.destination == Destination::Builds {
                    w.destination_copy = Copy::Gone;
                }
                (w.destination, w.image, w.commit) = (Destination::Down, false, false);
                w.crashes[1] -= 1;
            });
        }
        if self.new_starts[0] > 0 {
            to("the source's host goes down", &|w| {
                let owner = !w.ran_there && w.destination_journal != Some(D::Activated);
                w.died_with_its_host |= owner && w.source_copy != Copy::Gone;
                (w.source, w.first_agent, w.guard) = (Source::Down, false, Guard::Ended);
                w.source_copy = Copy::Gone;
                w.new_starts[0] -= 1;
            });
        }
        if self.new_starts[1] > 0 {
            to("the destination's host goes down", &|w| {
                let owner = w.destination_journal == Some(D::Activated) || w.ran_there;
                w.died_with_its_host |= owner && w.destination_copy != Copy::Gone;
                (w.destination, w.destination_copy) = (Destination::Down, Copy::Gone);
                (w.image, w.commit, w.started_anew) = (false, false, true);
                w.new_starts[1] -= 1;
            });
        }
        for (message, lost) in [(self.verified, "Verified is lost"), (self.activated, "Activated is lost")] {
            if message {
                to(lost, &|w| match lost {
                    "Verified is lost" => w.verified = false,
                    _ => w.activated = false,
                });
            }
        }
        if self.commit {
            to("the commit is lost", &|w| w.commit = false);
        }
        if self.image {
            to("the image is lost", &|w| w.image = false);
        }
    }
}

/// Visits every world that can come about; answers with how many there are, or the way to what is wrong.
fn explore(rules: &Rules) -> Result<usize, String> {
    let mut from: HashMap<World, Option<(World, &'static str)>> = HashMap::from([(BEGIN, None)]);
    let mut queue = VecDeque::from([BEGIN]);
    let way = |from: &HashMap<World, Option<(World, &'static str)>>, wrong: &str, mut at: World| {
        let mut steps = Vec::new();
        while let Some(Some((before, what))) = from.get(&at) {
            steps.push(*what);
            at = *before;
        }
        steps.reverse();
        format!("{wrong}, after: {}", steps.join("; "))
    };
    while let Some(world) = queue.pop_front() {
        if let Some(wrong) = world.violation() {
            return Err(way(&from, wrong, world));
        }
        // With no further fault it must come to an end, whatever happened before.
        if !can_end(world, rules) {
            return Err(way(&from, world.stuck().unwrap_or("it comes to no end"), world));
        }
        for (what, next) in world.next(rules, true) {
            from.entry(next).or_insert_with(|| {
                queue.push_back(next);
                Some((world, what))
            });
        }
    }
    Ok(from.len())
}

/// Whether an orderly end can be reached without further faults.
fn can_end(world: World, rules: &Rules) -> bool {
    let mut seen = std::collections::HashSet::from([world]);
    let mut stack = vec![world];
    while let Some(world) = stack.pop() {
        if world.stuck().is_none() {
            return true;
        }
        for (_, next) in world.next(rules, false) {
            if seen.insert(next) {
                stack.push(next);
            }
        }
    }
    false
}

#[test]
fn no_interleaving_loses_or_doubles_it() {
    match explore(&SOUND) {
        Ok(worlds) => {
            println!("{worlds} worlds");
            assert!(worlds > 10_000, "{worlds} worlds are too few: the model does not move");
        }
        Err(wrong) => panic!("{wrong}"),
    }
}

/// Each of these is a mistake that could be made; the model must notice it.
#[test]
fn broken_rules_are_found_out() {
    let broken: [(&str, Rules); 13] = [
        ("a copy that does not run yet is forgotten", Rules { keeps_pending: false, ..SOUND }),
        ("the commit is sent before it is journalled", Rules { journals_first: false, ..SOUND }),
        ("a doubt is thawed", Rules { source_duty: |_| Duty::Thaw, ..SOUND }),
        ("a late commit is taken", Rules { may_activate: |_| true, ..SOUND }),
        (
            "a commit is taken after the answer that it never will be",
            Rules { may_activate: |state| matches!(state, Some(D::Prepared | D::Never)), ..SOUND },
        ),
        (
            "the answer Never is not written down",
            Rules { on_inquiry: |state, anew| (state, rules::on_inquiry(state, anew).1), ..SOUND },
        ),
        (
            "a fate that nobody knows thaws",
            Rules {
                on_fate: |fate| match fate {
                    Fate::Running => Verdict::Remove,
                    _ => Verdict::Thaw,
                },
                ..SOUND
            },
        ),
        (
            "a copy is removed without the word that another runs",
            Rules { on_fate: |_| Verdict::Remove, ..SOUND },
        ),
        (
            "the destination lets run what was not committed",
            Rules { arrears: |_, _| Arrears::Activate, ..SOUND },
        ),
        ("the destination removes what was committed", Rules { arrears: |_, _| Arrears::Discard, ..SOUND }),
        ("the agent commits what the guard has let go", Rules { seals: false, ..SOUND }),
        (
            "the guard lets go what is committed",
            Rules {
                guard: |word, gone, late, journal| match (word, gone) {
                    (Guarded::Sealed, true) => GuardAction::Take,
                    _ => rules::guard(word, gone, late, || journal),
                },
                ..SOUND
            },
        ),
        ("a destination that gave up forgets it", Rules { keeps_never: false, ..SOUND }),
    ];
    for (mistake, rules) in broken {
        match explore(&rules) {
            Ok(worlds) => panic!("nobody noticed in {worlds} worlds that {mistake}"),
            Err(wrong) => println!("{mistake}: {wrong}"),
        }
    }
}
