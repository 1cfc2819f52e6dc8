//! Swaps on this host: which pool is meant, and whether it may begin.

use axum::http::StatusCode;
use rswap_pools::{LocalKind, LocalPool, Source, State, cpu_list};
use tokio::sync::mpsc;

use super::{
    cold::OnSwap,
    moves::{Order, Stake, Uplink},
    wiring::{CORES_EVERY_WINDOWS, Wiring, refused},
};
use crate::{
    config,
    control::{Reply, SwapDone, SwapRequest, SwapVolumeEvent, SwapVolumeRequest},
    instance::{
        Instance, InstanceError, InstanceName,
        launch::Place,
        network::{Attachment, Bridge},
    },
    migrate::linux,
    plan::InstanceView,
    pool::{CpuSet, Pool, PoolState},
    status::ApiError,
    swap::{
        cpu::{self, Seat},
        memory::{Area, MemoryError, Target, Wish},
    },
};

/// How long the cores of an instance are left alone at most when they can't be what the registry says.
const LONGEST_PAUSE_WINDOWS: u64 = 1024;

impl Wiring {
    pub(super) fn start_swap(
        &mut self,
        request: SwapRequest,
        reply: Option<Reply<SwapDone>>,
    ) -> Result<(), (ApiError, Stake)> {
        let stake = Stake::Swap { reply, asked: true };
        let found = self.seat_on(&request.pool);
        let ready = self.free_instance(&request.instance).and_then(|instance| {
            found.map(|seat| (instance, seat)).ok_or_else(|| {
                let error = format!(
                    "there is no set of cores, no memory, swap or link {:?} on this host",
                    request.pool
                );
                ApiError::new(
                    StatusCode::NOT_FOUND,
                    error,
                    "see `rswap pools`; for hosts use `rswap migrate`",
                )
            })
        });
        match ready {
            Ok((instance, to)) => {
                let from = self.seat_of(&instance);
                self.begin(Order::Swap { instance, from, to }, request.pool, stake);
                Ok(())
            }
            Err(error) => Err((error, stake)),
        }
    }

    pub(super) fn start_volume_swap(
        &mut self,
        request: &SwapVolumeRequest,
        events: Option<mpsc::Sender<SwapVolumeEvent>>,
    ) -> Result<(), ApiError> {
        let missing = |text: String, hint| ApiError::new(StatusCode::NOT_FOUND, text, hint);
        let instance = self.free_instance(&request.instance)?;
        let volume = instance.volumes.iter().find(|volume| volume.name == request.volume).cloned();
        let volume = volume.ok_or_else(|| {
            let text = format!("{} has no volume {}", request.instance, request.volume);
            missing(text, "see `rswap ps --json` for its volumes")
        })?;
        let pool = config::volume_pool(&self.config, &request.pool);
        let pool = pool.map_err(|error| missing(error, "see docs/pools.md, Volumes in storage pools"))?;
        self.leave_alone(&instance.name)?;
        let stake = Stake::Volume { volume: volume.name.clone(), events: events.clone() };
        self.begin(Order::Volume { instance, volume, pool, events }, request.pool.clone(), stake);
        Ok(())
    }

    /// What a pool of this host is besides a core set.
    pub(super) fn local_of(&self, pool: &str) -> Option<Local> {
        let found = self.watch.latest();
        let found = found.pool(pool)?;
        match &found.kind {
            LocalKind::Swap { .. } | LocalKind::Memory { .. } => Some(Local::Memory(Box::new(found.clone()))),
            _ => self.link_of(pool).map(Local::Link),
        }
    }

    /// A volume's move that a plan decided.
    pub(super) fn start_planned_volume_swap(
        &mut self,
        instance: InstanceName,
        volume: Option<&str>,
        pool: &str,
    ) -> Result<(), ApiError> {
        let volume = volume.and_then(|name| name.parse().ok()).ok_or_else(|| {
            ApiError::new(StatusCode::NOT_FOUND, "the plan names no volume".to_owned(), "see the agent's log")
        })?;
        self.start_volume_swap(&SwapVolumeRequest { instance, volume, pool: pool.to_owned() }, None)
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

    /// The link pool that an instance is on: that which it was moved to, else one of the bridge that ports are put on, without a
    /// limit of its own.
    pub(super) fn link_under(&self, instance: &Instance) -> Option<String> {
        instance.network.as_ref()?;
        if let Some(pool) = &instance.uplink {
            return Some(pool.clone());
        }
        let bridge = self.config.network.bridge.as_ref()?;
        let inventory = self.watch.latest();
        let of_bridge = |name: &&String| match inventory.pool(name).map(|pool| &pool.kind) {
            Some(LocalKind::Link { interface, master, instance_rate: None, .. }) => {
                interface == bridge || master.as_ref() == Some(bridge)
            }
            _ => false,
        };
        self.pools.iter().map(|pool| &pool.name).find(of_bridge).cloned()
    }

    /// A move to another link that a plan decided.
    pub(super) fn start_planned_uplink_swap(
        &mut self,
        instance: InstanceName,
        pool: &str,
    ) -> Result<(), ApiError> {
        let request = SwapRequest { instance, pool: pool.to_owned() };
        let uplink = self.link_of(pool).ok_or_else(|| {
            let text = format!("{pool} is no link of this host any more");
            ApiError::new(StatusCode::NOT_FOUND, text, "see `rswap pools`")
        })?;
        let instance = self.ready_for_uplink(&request)?;
        self.begin(
            Order::Uplink { instance, uplink },
            request.pool,
            Stake::Uplink { reply: None, asked: true },
        );
        Ok(())
    }

    fn ready_for_uplink(&mut self, request: &SwapRequest) -> Result<Instance, ApiError> {
        self.free_instance(&request.instance).and_then(|instance| {
            let state = self.watch.latest().pool(&request.pool).map(|pool| pool.state.clone());
            match state.as_ref().and_then(State::reason) {
                None => Ok(instance),
                Some(reason) => {
                    let text = format!("cannot move {} to {}: {reason}", request.instance, request.pool);
                    Err(ApiError::new(StatusCode::CONFLICT, text, "see `rswap pools`"))
                }
            }
        })
    }

    pub(super) fn start_uplink_swap(&mut self, request: SwapRequest, uplink: Uplink, reply: Reply<SwapDone>) {
        match self.ready_for_uplink(&request) {
            Ok(instance) => {
                self.begin(
                    Order::Uplink { instance, uplink },
                    request.pool,
                    Stake::Uplink { reply: Some(reply), asked: true },
                );
            }
            // A caller that went away doesn't need its answer.
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    pub(super) fn start_memory_swap(
        &mut self,
        request: SwapRequest,
        pool: &LocalPool,
        reply: Reply<SwapDone>,
    ) {
        let ready = self.free_instance(&request.instance).and_then(|instance| {
            let refused = |text: &dyn std::fmt::Display| {
                let text = format!("cannot move the memory of {} to {}: {text}", request.instance, pool.name);
                Err(ApiError::new(
                    StatusCode::CONFLICT,
                    text,
                    "see `rswap pools`, and docs/pools.md, Cold pages",
                ))
            };
            if let Some(reason) = pool.state.reason() {
                return refused(&reason);
            }
            let elsewhere =
                instance.memory.clone().filter(|on| *on != pool.name && self.area_of(on).is_some());
            let to = match &pool.kind {
                LocalKind::Memory { nodes, .. } => {
                    let all = self.memory_nodes();
                    if all.len() > 1 && *nodes != all {
                        return refused(&MemoryError::Nodes {
                            nodes: all.len(),
                            all: cpu_list::format(&all),
                        });
                    }
                    let is_in_swap_pool =
                        instance.memory.as_ref().is_some_and(|name| self.area_of(name).is_some());
                    Target::Memory { nodes: all.len(), is_in_swap_pool }
                }
                _ => match (elsewhere, area(pool)) {
                    (Some(other), _) => {
                        return refused(&format!("it is on {other}: bring it back into memory first"));
                    }
                    (None, Some(area)) => Target::Swap(area),
                    (None, None) => return refused(&"it is neither memory nor swap"),
                },
            };
            Ok((instance, to))
        });
        match ready {
            Ok((instance, to)) => {
                let stopping = self.stopping.clone();
                self.begin(Order::Memory { instance, to, stopping }, request.pool, Stake::Memory(reply));
            }
            // A caller that went away doesn't need its answer.
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    fn memory_nodes(&self) -> CpuSet {
        let found = self.watch.latest();
        let nodes = found.pools.iter().filter_map(|pool| match &pool.kind {
            LocalKind::Memory { nodes, .. } => Some(nodes),
            _ => None,
        });
        nodes.flatten().copied().collect()
    }

    fn area_of(&self, pool: &str) -> Option<Area> {
        area(self.watch.latest().pool(pool)?)
    }

    /// Has the instances that are on swap pools looked at.
    pub(super) fn follow_cold(&self, views: &[InstanceView]) {
        let found = self.watch.latest();
        let is_memory =
            |name: &str| found.pool(name).is_some_and(|pool| matches!(pool.kind, LocalKind::Memory { .. }));
        let stays = |name| !self.moving.contains_key(name) && !self.in_doubt.contains_key(name);
        let on_swap = self.known.values().filter(|instance| stays(&instance.name)).filter_map(|instance| {
            let pool = instance.memory.clone().filter(|pool| !is_memory(pool))?;
            let area = found.pool(&pool).and_then(area);
            let on = OnSwap { instance: instance.clone(), pool, area, wish: Wish::Out };
            Some((instance.name.clone(), on))
        });
        let outlook = views.iter().map(|view| {
            let cores = view.cores * self.performance_under(&view.instance);
            (&view.instance, (cores, &view.demand))
        });
        self.cold.want(on_swap.collect(), &outlook.collect());
    }

    /// What an instance has on a set of cores.
    fn seat_on(&self, pool: &str) -> Option<Seat> {
        let cpus = self.pools.iter().find(|found| found.name == pool)?.cpus()?.clone();
        Some(Seat { cpus: Some(cpus), share: config::core_share(&self.config, pool) })
    }

    /// What it has on the pool that the registry names.
    fn seat_of(&self, instance: &Instance) -> Seat {
        instance.pool.as_ref().and_then(|pool| self.seat_on(pool)).unwrap_or_default()
    }

    fn core_pool_of(&self, instance: &Instance) -> Option<&Pool> {
        let name = instance.pool.as_ref()?;
        self.pools.iter().find(|pool| pool.name == *name)
    }

    /// Brings instances to the cores that the registry names: an agent that was killed within a swap has left threads on others, and
    /// a program may have chosen others for its threads.
    pub(super) fn settle_cores(&mut self) {
        let is_free = |name| {
            let waits = self.unsettled.get(name).is_some_and(|(again, _)| *again > self.windows);
            !waits && !self.moving.contains_key(name) && !self.in_doubt.contains_key(name)
        };
        // What is no pool of this host any more, or has lost cores, can't be brought about.
        let can_be = |instance: &&Instance| {
            let pool = self.core_pool_of(instance);
            instance.pool.is_none()
                || pool.is_some_and(|pool| !matches!(pool.state, PoolState::Unavailable { .. }))
        };
        let all = self.known.values().filter(|instance| is_free(&instance.name)).filter(can_be);
        let place = &self.recovery.place;
        let astray: Vec<(Instance, Seat)> = all
            .filter_map(|instance| {
                let to = self.seat_of(instance);
                let astray = cpu::is_astray(place, instance, &to).unwrap_or_else(|error| {
                    let error = refused("look at its threads", &error);
                    tracing::debug!(instance = %instance.name, %error, "its cores are unknown");
                    false
                });
                astray.then(|| (instance.clone(), to))
            })
            .collect();
        for (instance, to) in astray {
            let pool = instance.pool.clone().unwrap_or_else(|| "all cores".to_owned());
            tracing::info!(instance = %instance.name, pool, "threads are on other cores than the registry says: they go back");
            let order = Order::Swap { instance, from: to.clone(), to };
            self.begin(order, pool, Stake::Swap { reply: None, asked: false });
        }
    }

    /// What could not be brought about is tried again after longer and longer pauses.
    pub(super) fn cores_settled(&mut self, name: &InstanceName, settled: bool) {
        if settled {
            self.unsettled.remove(name);
            return;
        }
        let (_, pause) = self.unsettled.get(name).copied().unwrap_or((0, CORES_EVERY_WINDOWS));
        let pause = (2 * pause).min(LONGEST_PAUSE_WINDOWS);
        self.unsettled.insert(name.clone(), (self.windows + pause, pause));
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
                self.begin(
                    Order::Uplink { instance, uplink },
                    to,
                    Stake::Uplink { reply: None, asked: false },
                );
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

/// What a pool of this host is.
pub(super) enum Local {
    Link(Uplink),
    /// Memory or swap.
    Memory(Box<LocalPool>),
}

/// The swap area that a pool is.
fn area(pool: &LocalPool) -> Option<Area> {
    let LocalKind::Swap { path, .. } = &pool.kind else { return None };
    let limit = pool.capacity.as_ref().filter(|known| matches!(known.source, Source::Configured { .. }));
    Some(Area { path: path.clone(), limit_bytes: limit.map(|known| known.value as u64) })
}

/// Whether an instance's port is on a bridge, and not on that of `wanted`, or has another rate at either end.
fn is_astray(place: &Place, instance: &Instance, wanted: &Uplink) -> Result<bool, InstanceError> {
    let Some(port) = linux::port(place, instance) else { return Ok(false) };
    let Some(found) = port.attachment()? else { return Ok(false) };
    let Some(bridge) = Bridge::of(&wanted.link)? else { return Ok(false) };
    Ok(found != Attachment { bridge: bridge.name, bytes_per_s: wanted.bytes_per_s }
        || port.outgoing()? != wanted.bytes_per_s)
}
