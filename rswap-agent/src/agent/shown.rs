//! How moves are shown: what is written to the board when they begin and end.

use super::{
    moves::{Moved, Order, Stake, Stayed},
    wiring::Wiring,
};
use crate::{
    instance::InstanceName,
    pool::THIS_HOST,
    status::{AskedBy, BoardState, MoveState, MovedKind, NewMove},
    units::UnixMillis,
};

impl Wiring {
    /// A move begins. What only brings about what the registry says is not shown.
    pub(super) fn show_begin(&mut self, order: &Order, to: &str, stake: &Stake) {
        let decision = self.acting.take();
        let kind = match (stake, stake.kind()) {
            (Stake::Memory(_), _) => MovedKind::Memory,
            (_, Some(kind)) => kind.into(),
            (_, None) => return,
        };
        let ordered = matches!(order, Order::Migration { whose: Some(_), .. });
        let asked_by = match &decision {
            Some(_) => AskedBy::Plan,
            None if ordered => AskedBy::Controller,
            None => AskedBy::Request,
        };
        let (volume, migration) = match stake {
            Stake::Volume { volume, .. } => (Some(volume.clone()), None),
            Stake::Migration { id, .. } => (None, Some(*id)),
            _ => (None, None),
        };
        self.board.write(|board| {
            let what = NewMove {
                instance: order.instance().name.clone(),
                kind,
                from: from(board, order, volume.as_ref()),
                volume,
                to: to.to_owned(),
                asked_by,
                started: UnixMillis::now(),
                migration,
            };
            board.moves.begin(what, decision);
        });
    }

    /// A move ends.
    pub(super) fn show_end(
        &self,
        instance: &InstanceName,
        result: &Result<Moved, Stayed>,
        ended: UnixMillis,
    ) {
        let state = match result {
            Ok(moved) => MoveState::Done { ended, pause_ms: moved.pause_ms() },
            Err(Stayed::Here(error) | Stayed::Still(error)) => {
                MoveState::Failed { ended, error: error.to_string() }
            }
            Err(Stayed::InDoubt(error)) => MoveState::InDoubt { ended, error: error.to_string() },
        };
        self.board.write(|board| board.moves.end(instance, state));
    }
}

/// The pool that it leaves.
fn from(board: &BoardState, order: &Order, volume: Option<&InstanceName>) -> Option<String> {
    let instance = order.instance();
    match order {
        Order::Swap { .. } => instance.pool.clone(),
        Order::Uplink { .. } => instance.uplink.clone(),
        Order::Memory { .. } => instance.memory.clone(),
        Order::Migration { .. } => Some(THIS_HOST.to_owned()),
        Order::Volume { .. } => {
            let seen = &board.instances.get(&instance.name)?.volume_use;
            seen.iter()
                .find(|seen| Some(seen.name.as_str()) == volume.map(InstanceName::as_str))?
                .pool
                .clone()
        }
    }
}
