//! Swaps on this host: which pool is meant, and whether it may begin.

use axum::http::StatusCode;
use rswap_pools::{LocalKind, State};
use tokio::sync::mpsc;

use super::{
    moves::{Order, Stake, Uplink},
    wiring::{Wiring, refused},
};
use crate::{
    config,
    control::{Reply, SwapDone, SwapRequest, SwapVolumeEvent, SwapVolumeRequest},
    instance::{
        Instance, InstanceError,
        launch::Place,
        network::{Attachment, Bridge},
    },
    migrate::linux,
    pool::Pool,
    status::ApiError,
};

impl Wiring {
    pub(super) fn start_swap(
        &mut self,
        request: SwapRequest,
        reply: Option<Reply<SwapDone>>,
    ) -> Result<(), (ApiError, Stake)> {
        let stake = Stake::Swap(reply);
        let found = self.pools.iter().find(|pool| pool.name == request.pool).and_then(Pool::cpus).cloned();
        let ready = self.free_instance(&request.instance).and_then(|instance| {
            found.map(|cpus| (instance, cpus)).ok_or_else(|| {
                let error = format!("there is no set of cores and no link {:?} on this host", request.pool);
                ApiError::new(
                    StatusCode::NOT_FOUND,
                    error,
                    "see `rswap pools`; for hosts use `rswap migrate`",
                )
            })
        });
        match ready {
            Ok((instance, cpus)) => {
                self.begin(Order::Swap { instance, cpus }, request.pool, stake);
                Ok(())
            }
            Err(error) => Err((error, stake)),
        }
    }

    pub(super) fn start_volume_swap(
        &mut self,
        request: &SwapVolumeRequest,
        events: &mpsc::Sender<SwapVolumeEvent>,
    ) -> Result<(), ApiError> {
        let missing = |text: String, hint| ApiError::new(StatusCode::NOT_FOUND, text, hint);
        let instance = self.free_instance(&request.instance)?;
        let volume = instance.volumes.iter().find(|volume| volume.name == request.volume).cloned();
        let volume = volume.ok_or_else(|| {
            let text = format!("{} has no volume {}", request.instance, request.volume);
            missing(text, "see `rswap ps --json` for its volumes")
        })?;
        let pool = config::volume_directory(&self.config, &request.pool);
        let pool = pool.map_err(|error| missing(error, "see docs/pools.md, Volumes in storage pools"))?;
        let order = Order::Volume { instance, volume, pool, events: events.clone() };
        self.begin(order, request.pool.clone(), Stake::Volume(events.clone()));
        Ok(())
    }

    /// The link that a pool of this host is, if it is one.
    pub(super) fn link_of(&self, pool: &str) -> Option<Uplink> {
        match &self.watch.latest().pool(pool)?.kind {
            LocalKind::Link { interface, instance_rate, .. } => Some(Uplink {
                link: interface.clone(),
                bytes_per_s: instance_rate.as_ref().map(|rate| (rate.value / 8.0) as u64),
            }),
            _ => None,
        }
    }

    pub(super) fn start_uplink_swap(&mut self, request: SwapRequest, uplink: Uplink, reply: Reply<SwapDone>) {
        let ready = self.free_instance(&request.instance).and_then(|instance| {
            let state = self.watch.latest().pool(&request.pool).map(|pool| pool.state.clone());
            match state.as_ref().and_then(State::reason) {
                None => Ok(instance),
                Some(reason) => {
                    let text = format!("cannot move {} to {}: {reason}", request.instance, request.pool);
                    Err(ApiError::new(StatusCode::CONFLICT, text, "see `rswap pools`"))
                }
            }
        });
        match ready {
            Ok(instance) => {
                self.begin(Order::Uplink { instance, uplink }, request.pool, Stake::Uplink(Some(reply)));
            }
            // A caller that went away doesn't need its answer.
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Brings an instance that is seen for the first time to the uplink that the registry names: an agent that was killed
    /// within a swap has left it on the other one.
    pub(super) fn settle_uplink(&mut self, instance: Instance) {
        if self.moving.contains_key(&instance.name) || self.in_doubt.contains_key(&instance.name) {
            return;
        }
        if instance.network.is_none() {
            return;
        }
        let (to, uplink) = match (&instance.uplink, &self.config.network.bridge) {
            (Some(pool), _) => (pool.clone(), self.link_of(pool)),
            (None, Some(bridge)) => {
                (bridge.clone(), Some(Uplink { link: bridge.clone(), bytes_per_s: None }))
            }
            (None, None) => return,
        };
        let name = &instance.name;
        let Some(uplink) = uplink else {
            tracing::warn!(instance = %name, pool = to, "its uplink is no pool of this host any more: it stays where it is");
            return;
        };
        // On a thread of its own: netlink's requests run on a runtime, and this may be one.
        let place = &self.recovery.place;
        let looked = std::thread::scope(|scope| scope.spawn(|| is_astray(place, &instance, &uplink)).join());
        match looked {
            Ok(Ok(true)) => {
                tracing::warn!(instance = %name, pool = to, "it is on another uplink than the registry says: it goes back");
                self.begin(Order::Uplink { instance, uplink }, to, Stake::Uplink(None));
            }
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                let error = refused("look at its port", &error);
                tracing::warn!(instance = %name, %error, "its uplink is unknown");
            }
            Err(_) => tracing::error!(instance = %name, "looking at its port panicked"),
        }
    }
}

/// Whether an instance's port is on a bridge, and not on that of `wanted`, or has another rate.
fn is_astray(place: &Place, instance: &Instance, wanted: &Uplink) -> Result<bool, InstanceError> {
    let Some(port) = linux::port(place, instance) else { return Ok(false) };
    let Some(found) = port.attachment()? else { return Ok(false) };
    let Some(bridge) = Bridge::of(&wanted.link)? else { return Ok(false) };
    Ok(found != Attachment { bridge: bridge.name, bytes_per_s: wanted.bytes_per_s })
}
