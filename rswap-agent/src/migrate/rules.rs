//! Who may run, and who decides it: the rules of the commit.
//!
//! Pure functions of what is written down and what is known for certain. Both agents, the guardian and the
//! model that explores every interleaving (`model.rs`) go by them; `docs/migration.md` has the argument.

use serde::{Deserialize, Serialize};

/// What the source's journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// Not committed: the instance runs here, whatever happens.
    Begun,
    /// Committed: the instance must not run here until the destination says that it never will there.
    Committed,
    /// Nothing is in doubt any more; the destination has still to be told so.
    Ended,
}

/// What the destination's journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationState {
    /// Something of it may be here, standing still; no commit has been taken.
    Prepared,
    /// The commit was taken: the copy here is the instance.
    Activated,
    /// It never will run here: a commit that comes late is refused.
    Never,
}

/// The destination's answer to "what became of it?".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Fate {
    /// It took the commit: the instance runs there, or has ended there by itself.
    Running = 1,
    /// It never will run there.
    Never = 2,
    /// The destination knows nothing of it: another host, or one that has lost its journal.
    Unknown = 3,
    /// It took the commit, and the host was started anew since: what ran there is gone.
    Lost = 4,
}

impl Fate {
    /// The fate that has this number on the wire.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Running, Self::Never, Self::Unknown, Self::Lost].into_iter().find(|fate| *fate as u8 == number)
    }
}

/// What the source does with its frozen copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the instance no longer.
    Remove,
    /// It is the instance, and goes on.
    Thaw,
    /// It stays frozen until a person names the copy that counts.
    AskAPerson,
}

/// What the destination's word means for the copy that the source has committed.
pub fn on_fate(fate: Fate) -> Verdict {
    match fate {
        Fate::Running => Verdict::Remove,
        Fate::Never => Verdict::Thaw,
        // It may run on a host that this one can't see, or have taken writes before it was lost.
        Fate::Unknown | Fate::Lost => Verdict::AskAPerson,
    }
}

/// What an agent at the source owes to a journal that it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Let the instance go on, then tell the destination that nothing is in doubt.
    Thaw,
    /// Ask the destination until it answers.
    Ask,
    /// Tell the destination until it answers.
    Tell,
}

/// What follows from the source's journal after a crash.
pub fn source_duty(state: SourceState) -> Duty {
    match state {
        SourceState::Begun => Duty::Thaw,
        SourceState::Committed => Duty::Ask,
        SourceState::Ended => Duty::Tell,
    }
}

/// Whether the destination may take a commit that arrives; without a journal there is nothing to commit.
pub fn may_activate(state: Option<DestinationState>) -> bool {
    state == Some(DestinationState::Prepared)
}

/// What the destination answers, and what it has to write down before it does.
pub fn on_inquiry(state: Option<DestinationState>, started_anew: bool) -> (Option<DestinationState>, Fate) {
    match state {
        None => (None, Fate::Unknown),
        Some(DestinationState::Prepared | DestinationState::Never) => {
            (Some(DestinationState::Never), Fate::Never)
        }
        Some(DestinationState::Activated) if started_anew => (state, Fate::Lost),
        Some(DestinationState::Activated) => (state, Fate::Running),
    }
}

/// What an agent at the destination owes to a journal that it finds when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrears {
    /// Write that it never will run, then remove what is there of it.
    Discard,
    /// Do again what activation does, as far as it wasn't done.
    Activate,
    /// Nothing: the entry only waits for the source's word.
    Keep,
}

/// What follows from the destination's journal after a crash.
pub fn destination_arrears(state: DestinationState, started_anew: bool) -> Arrears {
    match state {
        DestinationState::Prepared | DestinationState::Never => Arrears::Discard,
        DestinationState::Activated if started_anew => Arrears::Keep,
        DestinationState::Activated => Arrears::Activate,
    }
}

/// Who holds a freeze: the word that agent and guard share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Guarded {
    /// Nothing has been done to the instance.
    Idle = 0,
    /// The agent has frozen it, or is about to.
    Frozen = 1,
    /// The agent commits: from here on its journal counts.
    Sealed = 2,
    /// The guard lets the instance go on.
    Taken = 3,
}

impl Guarded {
    /// The state with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Idle, Self::Frozen, Self::Sealed, Self::Taken]
            .into_iter()
            .find(|state| *state as u32 == number)
    }
}

/// What a guard does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardAction {
    /// It goes on watching.
    Watch,
    /// It ends, and leaves the instance as it is.
    Leave,
    /// It changes the word from what it is to [`Guarded::Taken`], and if that succeeds lets the instance go on.
    Take,
}

/// What follows from the word, from whether the agent is gone, from whether the freeze takes too long, and from what the
/// source's journal says then.
pub fn guard(
    word: Guarded,
    gone: bool,
    too_long: bool,
    journal: impl FnOnce() -> Option<SourceState>,
) -> GuardAction {
    match (word, gone) {
        (Guarded::Frozen, true) => GuardAction::Take,
        (Guarded::Frozen, false) if too_long => GuardAction::Take,
        (Guarded::Frozen | Guarded::Idle | Guarded::Sealed, false) => GuardAction::Watch,
        // It was about to write the commit, and can't any more: what it wrote counts.
        (Guarded::Sealed, true) if journal() == Some(SourceState::Begun) => GuardAction::Take,
        (Guarded::Idle | Guarded::Sealed, true) | (Guarded::Taken, _) => GuardAction::Leave,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_never_leads_to_two_copies() {
        let states = [
            None,
            Some(DestinationState::Prepared),
            Some(DestinationState::Activated),
            Some(DestinationState::Never),
        ];
        for (state, started_anew) in states.into_iter().flat_map(|state| [(state, false), (state, true)]) {
            let (after, fate) = on_inquiry(state, started_anew);
            let thaws = on_fate(fate) == Verdict::Thaw;
            assert!(
                !thaws || !may_activate(after),
                "{state:?}: the source goes on, and a late commit is taken"
            );
            assert!(!thaws || state != Some(DestinationState::Activated));
            let removes = on_fate(fate) == Verdict::Remove;
            assert!(!removes || after == Some(DestinationState::Activated), "{state:?}: no copy is left");
        }
    }
}
