//! The pools that plans see, as they change, and those that somebody wants to be empty: kept in a file of the state directory,
//! so that the next agent knows them.

use std::{collections::BTreeSet, io, path::PathBuf};

use axum::http::StatusCode;

use super::wiring::Wiring;
use crate::{
    config::{Config, Mode},
    control::{DrainDone, DrainRequest},
    pool::{self, Pool, PoolState, Watch},
    status::{ApiError, Board},
    units::UnixMillis,
};

/// The pools of the first look, which the board shows from then on.
pub(super) fn first(config: &Config, watch: &Watch, board: &Board) -> Vec<Pool> {
    let inventory = watch.latest();
    let pools = remembered(config, pool::planned(config, &inventory));
    board.write(|board| (board.pools, board.inventory) = (pools.clone(), inventory));
    pools
}

/// `pools`, with those that were being drained when the last agent ended.
fn remembered(config: &Config, mut pools: Vec<Pool>) -> Vec<Pool> {
    let drained: BTreeSet<String> = match std::fs::read(path(config)) {
        Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!(%error, path = %path(config).display(), "which pools are drained is not known");
            BTreeSet::new()
        }),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, path = %path(config).display(), "which pools are drained is not known");
            }
            BTreeSet::new()
        }
    };
    for pool in pools.iter_mut().filter(|pool| drained.contains(&pool.name)) {
        set(pool, true);
    }
    pools
}

fn path(config: &Config) -> PathBuf {
    config.agent.state_dir.join("drained.json")
}

/// What is unavailable for another reason stays so.
fn set(pool: &mut Pool, draining: bool) {
    match (&pool.state, draining) {
        (PoolState::Ready, true) => pool.state = PoolState::Draining,
        (PoolState::Draining, false) => pool.state = PoolState::Ready,
        _ => {}
    }
}

impl Wiring {
    /// Takes over what the latest look at this host found.
    pub(super) fn look_at_pools(&mut self, now: UnixMillis) {
        let inventory = self.watch.latest();
        if inventory.at == self.board.read().inventory.at {
            return;
        }
        self.pools = remembered(&self.config, pool::planned(&self.config, &inventory));
        let shown = self.shown(now, &inventory);
        self.board.write(|board| board.inventory = shown);
    }

    pub(super) fn drain(&mut self, request: DrainRequest) -> Result<DrainDone, ApiError> {
        let DrainRequest { pool: name, undo } = request;
        let Some(pool) = self.pools.iter_mut().find(|pool| pool.name == name) else {
            let error = format!("there is no pool {name:?} on this host");
            return Err(ApiError::new(StatusCode::NOT_FOUND, error, "see `rswap pools`"));
        };
        if let PoolState::Unavailable { reason } = &pool.state {
            let error = format!("{name} takes nobody as it is: {reason}");
            return Err(ApiError::new(StatusCode::CONFLICT, error, "see `rswap pools`"));
        }
        set(pool, !undo);
        let drained: BTreeSet<&str> = self
            .pools
            .iter()
            .filter(|pool| pool.state == PoolState::Draining)
            .map(|pool| pool.name.as_str())
            .collect();
        let text = serde_json::to_vec(&drained).expect("names are text");
        std::fs::write(path(&self.config), text)
            .map_err(|error| super::wiring::refused("keep which pools are drained", &error))?;
        tracing::info!(pool = name, draining = !undo, "drain");
        Ok(DrainDone { pool: name, draining: !undo, acts: self.config.agent.mode == Mode::Act })
    }
}
