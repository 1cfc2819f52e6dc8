//! `rswap controller`: the controller of a fleet, until SIGTERM or SIGINT.

use std::process::ExitCode;

use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, Signal};
use rswap_audit::Audit;
use rswap_controller::{Address, Controller, Settings, Stores, door::Door, serve_at};
use rswap_store::Store;
use tokio::signal::unix::{SignalKind, signal};

use super::local;
use crate::{
    config::{Config, Mode},
    privilege,
};

pub(super) fn run(config: &Config) -> anyhow::Result<ExitCode> {
    local::log();
    // Whoever started us may have blocked them for itself, and a blocked signal would never stop us.
    let mut stops = SigSet::empty();
    stops.add(Signal::SIGTERM);
    stops.add(Signal::SIGINT);
    stops.thread_unblock().context("cannot unblock SIGTERM and SIGINT")?;
    let fleet = &config.fleet;
    let listens = match (fleet.listen, &fleet.tls) {
        (None, _) => None,
        (Some(address), _) if (1..1024).contains(&address.port()) => bail!(
            "cannot listen on fleet.listen = {address}: the controller gives up the right to ports below 1024; choose another"
        ),
        (Some(address), Some(tls)) => Some((address, tls)),
        (Some(address), None) => bail!(
            "cannot listen on fleet.listen = {address} without a certificate: everybody on the way could read, and be any host. \
             Set ca, certificate and key in [fleet.tls] (`rswap pki issue --role controller` makes them)"
        ),
    };
    // Or every agent that reports as often as it is to would be told to wait.
    let (per_s, every_ms) = (fleet.limits.reports_per_s, fleet.report_every_ms);
    if u64::from(per_s).saturating_mul(every_ms) < 1000 {
        bail!(
            "fleet.limits.reports_per_s = {per_s} is less than one report in fleet.report_every_ms = {every_ms}: raise either"
        );
    }
    if let Some(directory) = fleet.file.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {} (fleet.file)", directory.display()))?;
    }
    let store = Store::open(&fleet.file, &fleet.tiers())?;
    let settings = Settings {
        acts: fleet.mode == Mode::Act,
        interval_ms: fleet.report_every_ms,
        plan_every_ms: fleet.plan_every_ms,
        plan: config.plan.clone(),
        limits: fleet.limits.limits(),
    };
    let audit = Audit::open(fleet.audit_log(), fleet.audit_kib << 10).with_context(|| {
        format!("cannot open the audit log {} (fleet.audit_log)", fleet.audit_log().display())
    })?;
    // Its files are open, and its threads are not there yet: from here on it needs nothing that only root may.
    privilege::keep_nothing().context("cannot give up the controller's capabilities")?;
    let controller = Controller::new(Stores::from(store), settings, audit)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let door = match listens {
            Some((address, tls)) => Some(Door::open(address, tls.files(), tls.guests()).await?),
            None => None,
        };
        let listen = door.as_ref().map(|door| door.address().to_string());
        tracing::info!(socket = %fleet.socket.display(), listen, mode = ?fleet.mode, file = %fleet.file.display(), "rswap controls");
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        serve_at(controller, &Address(fleet.socket.clone()), door, stop).await?;
        Ok(ExitCode::SUCCESS)
    })
}
