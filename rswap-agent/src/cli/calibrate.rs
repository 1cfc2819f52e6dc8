//! `calibrate`: measures a pool of this host, if it may be loaded, and keeps the result for the agent.

use std::{
    io::{IsTerminal, Write},
    net::{IpAddr, SocketAddr, TcpListener},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use rswap_pools::{
    calibrate::{self, CalibrateError, Calibration, Stop},
    room_of,
};
use tokio::signal::unix::{SignalKind, signal};

use super::{CalibrateArguments, Session, print_json, runtime, table::table};
use crate::{
    pool::{self, Inventory, LocalKind, LocalPool, State},
    sys::mempolicy,
    units::UnixMillis,
};

/// How long the load of the pool is looked at before it is measured.
const LOAD_FOR: Duration = Duration::from_millis(500);
/// A pool that is busier than this (0 to 1) is not loaded without being asked.
const BUSY_ABOVE: f64 = 0.2;

pub(super) fn calibrate(session: &Session, arguments: &CalibrateArguments) -> anyhow::Result<ExitCode> {
    if let Some(address) = arguments.serve {
        return serve(address);
    }
    let config = &session.config;
    let first = pool::look(config, None);
    std::thread::sleep(LOAD_FOR);
    let found = pool::look(config, Some(&first));
    let name = arguments.pool.as_deref().context("name a pool")?;
    let pool = found.pool(name).ok_or_else(|| {
        let known: Vec<_> = found.pools.iter().map(|pool| pool.name.as_str()).collect();
        anyhow!("there is no pool {name:?} on this host: the pools are {}", known.join(", "))
    })?;
    if let State::Gone { reason, .. } | State::Full { reason } = &pool.state {
        bail!("{name} can't be measured: it is {}: {reason}", pool.state.word());
    }
    let work = work(pool, &found, arguments.peer)?;
    if !may_load(pool, arguments.yes)? {
        bail!("nothing was measured");
    }
    let results =
        runtime()?.block_on(until_stopped(work)).with_context(|| format!("cannot calibrate {name}"))?;
    let kernel = pool::kernel_release();
    let calibration = Calibration::new(pool, &found, UnixMillis::now(), &config.agent.host, &kernel, results);
    let path = calibrate::keep(&pool::calibrations(config), &calibration)?;
    if arguments.output.json {
        print_json(&calibration)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = table(&["MEASURE", "VALUE"]);
    for (what, value) in &calibration.measures {
        rows.add_row([what.clone(), super::pools::rounded(*value)]);
    }
    println!("{rows}\nkept in {}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// What is to run, on a thread of its own.
type Work = Box<dyn FnOnce(&Stop) -> Result<Vec<calibrate::Result>, CalibrateError> + Send>;

/// The benchmark for this kind of pool; an error says why there is none.
fn work(pool: &LocalPool, found: &Inventory, peer: Option<SocketAddr>) -> anyhow::Result<Work> {
    if peer.is_some() && !matches!(pool.kind, LocalKind::Link { .. }) {
        bail!("{} is no link: --peer is for links", pool.name);
    }
    match &pool.kind {
        LocalKind::Cores { cores, .. } => {
            let online = cores.iter().filter(|core| core.online).map(|core| core.cpu).collect();
            Ok(Box::new(move |stop: &Stop| calibrate::cores(&online, stop)))
        }
        LocalKind::Memory { nodes, cpus, .. } => {
            let caches = found.pools.iter().filter_map(|pool| match &pool.kind {
                LocalKind::Cores { cores, .. } => Some(cores),
                _ => None,
            });
            let largest =
                caches.flatten().flat_map(|core| &core.caches).filter_map(|cache| cache.bytes).max();
            let free = pool.free.as_ref().context("how much memory is free is not known")?.value as u64;
            let bytes = calibrate::memory_bytes(largest.unwrap_or(0), free)
                .with_context(|| format!("{} has too little free memory to be measured", pool.name))?;
            let (nodes, cpu) = (nodes.clone(), cpus.intersection(&found.online).next().copied());
            let bind = move || if nodes.is_empty() { Ok(()) } else { mempolicy::bind_to_nodes(&nodes) };
            Ok(Box::new(move |stop: &Stop| calibrate::memory(cpu, bytes, &bind, stop)))
        }
        LocalKind::Storage { mount_points, remote, .. } => {
            if *remote {
                bail!("{} is another host's: it is measured there", pool.name);
            }
            let directory = mount_points.first().context("it is mounted nowhere")?.clone();
            let available =
                room_of(&directory).with_context(|| format!("cannot ask {}", directory.display()))?;
            let bytes = calibrate::storage_bytes(available.available_bytes)
                .with_context(|| format!("{} has too little room left to be measured", pool.name))?;
            Ok(Box::new(move |stop: &Stop| calibrate::storage(&directory, bytes, stop)))
        }
        LocalKind::Swap { .. } => bail!(
            "{} is swap: measuring it would push out what is in memory; measure the file system or memory that it is on",
            pool.name
        ),
        LocalKind::Link { interface, .. } => {
            let peer = peer.with_context(|| {
                format!(
                    "a link is measured to a peer only: start `rswap calibrate --serve ADDRESS:PORT` on another host, and \
                     give that address here: `rswap calibrate {} --peer ADDRESS:PORT`",
                    pool.name
                )
            })?;
            let all = addresses()?;
            if all.iter().any(|(_, address)| *address == peer.ip()) {
                bail!("{peer} is this host: what is sent there does not leave it");
            }
            let own: Vec<IpAddr> =
                all.into_iter().filter(|(name, _)| name == interface).map(|(_, address)| address).collect();
            Ok(Box::new(move |stop: &Stop| calibrate::link(peer, &own, stop)))
        }
    }
}

/// The addresses of this host's interfaces, each with the interface's name.
fn addresses() -> anyhow::Result<Vec<(String, IpAddr)>> {
    let all = nix::ifaddrs::getifaddrs().context("cannot list the interfaces' addresses")?;
    let known = all.filter_map(|entry| {
        let address = entry.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = || address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        Some((entry.interface_name, v4.or_else(v6)?))
    });
    Ok(known.collect())
}

/// Whether the pool may be loaded: it is idle, or somebody says so.
fn may_load(pool: &LocalPool, yes: bool) -> anyhow::Result<bool> {
    let load = match &pool.busy {
        Some(busy) if busy.value <= BUSY_ABOVE => return Ok(true),
        Some(busy) => format!("it is {:.0} % busy", busy.value * 100.0),
        // Links mostly don't know their speed, but what goes over them.
        None => match (&pool.kind, &pool.used) {
            (LocalKind::Link { .. }, Some(used)) if used.value < 1e6 => return Ok(true),
            _ => "how busy it is is not known".to_owned(),
        },
    };
    if yes {
        return Ok(true);
    }
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        bail!(
            "{}: {load}: a benchmark would disturb what uses it. Nobody is here to be asked: give --yes to measure it all \
             the same",
            pool.name
        );
    }
    print!(
        "{}: {load}: a benchmark of some seconds would disturb what uses it. Measure it? [y/N] ",
        pool.name
    );
    std::io::stdout().flush()?;
    let mut answer = String::new();
    stdin.read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

/// Runs it; SIGINT, SIGTERM and SIGHUP end it in an orderly way.
async fn until_stopped(work: Work) -> anyhow::Result<Vec<calibrate::Result>> {
    let stop = Arc::new(Stop::default());
    let mut signals = Vec::new();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        signals.push(signal(kind).context("cannot watch for signals")?);
    }
    let told = stop.clone();
    let running = tokio::task::spawn_blocking(move || work(&told));
    let mut watching = Vec::new();
    for mut signal in signals {
        let stop = stop.clone();
        watching.push(tokio::spawn(async move {
            if signal.recv().await.is_some() {
                stop.set();
            }
        }));
    }
    let done = running.await.context("the benchmark panicked")?;
    watching.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(done?)
}

/// The other end of a link's benchmark, until it is killed.
fn serve(address: SocketAddr) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    println!("counting at {} until Ctrl-C", listener.local_addr()?);
    loop {
        match calibrate::serve(&listener) {
            Ok((from, bytes)) => println!("{bytes} bytes from {from}"),
            Err(error) => eprintln!("rswap: a measurement failed: {error}"),
        }
    }
}
