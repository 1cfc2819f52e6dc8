//! An instance's own network: a veth pair between its namespace and the host's bridge.

mod listed;
mod rate;
pub mod settings;
mod uplink;

use std::{
    fs::File,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    sync::mpsc,
    time::{Duration, Instant},
};

use futures_util::TryStreamExt;
use nix::{
    net::if_::InterfaceFlags,
    sched::{CloneFlags, setns},
};
use rtnetlink::{
    Handle, IpVersion, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{address::AddressHeaderFlags, neighbour::NeighbourState},
};

use super::{InstanceError, InstanceName, NetworkIdentity, net_tables::Limits};
use crate::sys::{neighbour, packet::Holder};
pub use uplink::Attachment;
pub(crate) use uplink::{Bridge, Replugged};

/// What the interface is called inside.
const INNER: &str = "eth0";
/// How long the kernel may take to notice that an interface is up.
const UP_LIMIT: Duration = Duration::from_millis(500);

/// The host's end of an instance's veth pair.
#[derive(Clone, Debug)]
pub struct Port {
    interface: String,
    bridge: String,
    identity: NetworkIdentity,
    init_pid: i32,
}

impl Port {
    /// The port of instance `name`, whose init is `init_pid`, on `bridge`. Nothing is made yet.
    pub fn new(name: &InstanceName, bridge: &str, identity: &NetworkIdentity, init_pid: i32) -> Self {
        Self {
            interface: interface_of(name),
            bridge: bridge.to_owned(),
            identity: identity.clone(),
            init_pid,
        }
    }

    /// Makes the pair and configures the inner end. The port is on the bridge, but down: nothing passes.
    pub fn create(&self) -> Result<(), InstanceError> {
        self.make().inspect_err(|_| self.remove())
    }

    /// Removes the pair, if it is there: after a failure, when it may still be in the host's namespace.
    fn remove(&self) {
        let removed = run(|handle| async move {
            let index = index_of(&handle, &self.interface).await?;
            handle.link().del(index).execute().await
        });
        if let Err(error) = removed {
            tracing::debug!(interface = self.interface, %error, "no interface to remove");
        }
    }

    fn make(&self) -> Result<(), InstanceError> {
        let name = format!("{}i", self.interface);
        let inner = name.as_str();
        run(|handle| async move {
            handle.link().add(LinkVeth::new(&self.interface, inner).build()).execute().await?;
            let index = index_of(&handle, inner).await?;
            let message = LinkUnspec::new_with_index(index).setns_by_pid(self.init_pid as u32).build();
            handle.link().change(message).execute().await?;
            // Done here and not in `attach`: joining a bridge takes the kernel milliseconds.
            let bridge = index_of(&handle, &self.bridge).await?;
            let port = index_of(&handle, &self.interface).await?;
            handle.link().change(LinkUnspec::new_with_index(port).controller(bridge).build()).execute().await
        })
        .map_err(self.failed("making the veth pair"))?;
        let limits = Limits::read();
        self.inside(|| configure(&self.identity, inner, &limits))
    }

    /// Lets traffic through and tells the neighbours where the address is now.
    pub fn attach(&self) -> Result<(), InstanceError> {
        let began = Instant::now();
        self.set_up(true).map_err(self.failed("opening the port"))?;
        let opened = began.elapsed();
        self.announce()?;
        tracing::debug!(?opened, announced = ?began.elapsed(), "attached");
        Ok(())
    }

    /// Lets nothing through: nothing reaches the instance, and nothing leaves it.
    pub fn detach(&self) -> Result<(), InstanceError> {
        self.set_up(false).map_err(self.failed("closing the port"))
    }

    /// Begins to hold what comes to the bridge for the instance.
    pub fn hold(&self) -> Result<Holder, InstanceError> {
        let what = || format!("holding frames on {}", self.bridge);
        let index = nix::net::if_::if_nametoindex(self.bridge.as_str()).map_err(InstanceError::io(what()))?;
        let ipv6 = self.identity.ipv6.as_ref().map(|ipv6| ipv6.address);
        Holder::start(index, self.identity.mac, ipv6).map_err(InstanceError::io(what()))
    }

    fn set_up(&self, up: bool) -> Result<(), rtnetlink::Error> {
        run(|handle| async move {
            let port = LinkUnspec::new_with_name(&self.interface);
            let port = if up { port.up() } else { port.down() };
            handle.link().change(port.build()).execute().await
        })
    }

    /// Returns when the announcement is on its way; the thread that sent it lives on until its socket is closed.
    fn announce(&self) -> Result<(), InstanceError> {
        wait_until_running(&self.interface);
        let namespace = self.namespace()?;
        let NetworkIdentity { address, mac, ipv6, .. } = self.identity.clone();
        let (sender, sent) = mpsc::sync_channel(1);
        let forgetting = format!("forgetting neighbours that did not answer ({})", self.interface);
        let forgetting = move |source| InstanceError::Network { what: forgetting, source: Box::new(source) };
        std::thread::spawn(move || {
            let what = || format!("announcing {address}");
            let socket = enter(&namespace).and_then(|()| {
                wait_until_running(INNER);
                // What the instance's kernel sent while the port was down found nobody, and for a second it would not
                // ask for the neighbour again.
                if ipv6.is_some() || has_unanswered_questions() {
                    let of_ipv6 = ipv6.is_some();
                    run(move |handle| forget_neighbours(handle, of_ipv6)).map_err(forgetting)?;
                }
                let index = nix::net::if_::if_nametoindex(INNER).map_err(InstanceError::io(what()))?;
                let ipv6 = ipv6.map(|ipv6| IpAddr::from(ipv6.address));
                let addresses: Vec<IpAddr> = std::iter::once(address.into()).chain(ipv6).collect();
                neighbour::announce(index, mac, &addresses).map_err(InstanceError::io(what()))
            });
            // The receiver waits for it; only then is the socket closed.
            let (socket, result) = match socket {
                Ok(socket) => (Some(socket), Ok(())),
                Err(error) => (None, Err(error)),
            };
            drop(sender.send(result));
            drop(socket);
        });
        let panicked =
            |_| Err(InstanceError::Invalid(format!("the thread that announces {address} panicked")));
        sent.recv().unwrap_or_else(panicked)
    }

    /// Runs `work` on a thread of its own inside the instance's network namespace.
    fn inside<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, InstanceError> + Send,
    ) -> Result<T, InstanceError> {
        let namespace = self.namespace()?;
        std::thread::scope(|scope| {
            let ended = scope.spawn(|| enter(&namespace).and_then(|()| work())).join();
            let panicked =
                |_| Err(InstanceError::Invalid("the thread in a network namespace panicked".into()));
            ended.unwrap_or_else(panicked)
        })
    }

    fn namespace(&self) -> Result<File, InstanceError> {
        let path = format!("/proc/{}/ns/net", self.init_pid);
        File::open(&path).map_err(InstanceError::io(format!("opening {path}")))
    }

    fn failed(&self, what: &str) -> impl FnOnce(rtnetlink::Error) -> InstanceError {
        let what = format!("{what} ({} on {})", self.interface, self.bridge);
        move |source| InstanceError::Network { what, source: Box::new(source) }
    }
}

/// Configures interface `name` of the calling thread's network namespace, which is a new one, as an instance's.
fn configure(identity: &NetworkIdentity, name: &str, limits: &Limits) -> Result<(), InstanceError> {
    limits.set().map_err(InstanceError::io("setting the limits of TCP"))?;
    if identity.ipv6.is_some() {
        have_no_other_ipv6_addresses(name).map_err(InstanceError::io("configuring IPv6"))?;
    }
    let configured = run(|handle| async move {
        let lo = index_of(&handle, "lo").await?;
        handle.link().change(LinkUnspec::new_with_index(lo).up().build()).execute().await?;
        let index = index_of(&handle, name).await?;
        let message = LinkUnspec::new_with_index(index).name(INNER.into()).address(identity.mac.to_vec());
        handle.link().change(message.build()).execute().await?;
        handle.address().add(index, identity.address.into(), identity.prefix_len).execute().await?;
        handle.link().change(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        if let Some(gateway) = identity.gateway {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
            handle.route().add(route).execute().await?;
        }
        if let Some(ipv6) = &identity.ipv6 {
            // Without a search for others that have it: it is used before it could end, and while the other host
            // has it still.
            let mut add = handle.address().add(index, ipv6.address.into(), ipv6.prefix_len);
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            add.execute().await?;
            if let Some(gateway) = ipv6.gateway {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(index);
                handle.route().add(route.build()).execute().await?;
            }
        }
        Ok(())
    });
    configured.map_err(|source| InstanceError::Network {
        what: format!("configuring the interface of {}", identity.address),
        source: Box::new(source),
    })
}

/// Takes the calling thread into a network namespace.
fn enter(namespace: &File) -> Result<(), InstanceError> {
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
        .map_err(InstanceError::io("entering the instance's network namespace"))
}

/// Removes the port of instance `name`, whose processes are dead; one that is gone already is no error.
///
/// It would go with its namespace, but that can live on for minutes: connections whose last packets nobody
/// acknowledges keep it, and answer for the address.
pub fn remove_port(name: &InstanceName) -> Result<(), InstanceError> {
    remove_interface(&interface_of(name))
}

/// Interface names have 15 bytes; instance names don't fit.
/// What an instance's port has received and sent, in bytes, as the host sees it; `None` where there is none.
pub fn counters(name: &InstanceName) -> Option<(u64, u64)> {
    let directory = std::path::Path::new("/sys/class/net").join(interface_of(name)).join("statistics");
    let count = |file: &str| std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok();
    Some((count("rx_bytes")?, count("tx_bytes")?))
}

fn interface_of(name: &InstanceName) -> String {
    let hash = xxhash_rust::xxh3::xxh3_64(name.as_str().as_bytes()) & 0xff_ffff_ffff;
    format!("rsw{hash:010x}")
}

fn remove_interface(interface: &str) -> Result<(), InstanceError> {
    let Ok(index) = nix::net::if_::if_nametoindex(interface) else { return Ok(()) };
    let removed = run(|handle| async move { handle.link().del(index).execute().await });
    // It may have gone with its namespace meanwhile.
    if removed.is_err() && nix::net::if_::if_nametoindex(interface).is_err() {
        return Ok(());
    }
    removed.map_err(|source| InstanceError::Network {
        what: format!("removing the port {interface}"),
        source: Box::new(source),
    })
}

/// An address for an instance whose MAC the user didn't choose: locally administered, from the IP address.
pub fn mac_for(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [0x02, 0x72, a, b, c, d]
}

/// Waits until the kernel has noticed that an interface is up: it passes nothing before, and says nothing of it.
fn wait_until_running(interface: &str) {
    let running = || {
        // As long as it can't be asked there is nothing to wait for.
        nix::ifaddrs::getifaddrs().map_or(true, |mut all| {
            all.any(|one| one.interface_name == interface && one.flags.contains(InterfaceFlags::IFF_RUNNING))
        })
    };
    let deadline = Instant::now() + UP_LIMIT;
    while !running() {
        if Instant::now() > deadline {
            tracing::warn!(interface, "it does not come up");
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether the calling thread's network namespace has asked for neighbours without an answer yet.
fn has_unanswered_questions() -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/net/arp").unwrap_or_default();
    table.lines().skip(1).any(|line| line.split_whitespace().nth(2) == Some("0x0"))
}

/// Lets interface `name` of the calling thread's network namespace have no IPv6 addresses but those that it is given, and the
/// link-local one, all usable at once: the same are used at the other host a moment before and after.
fn have_no_other_ipv6_addresses(name: &str) -> io::Result<()> {
    for (setting, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("dad_transmits", "0")] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), value)?;
    }
    Ok(())
}

/// Forgets the neighbours that did not answer; with `ipv6`, also those of that family.
async fn forget_neighbours(handle: Handle, ipv6: bool) -> Result<(), rtnetlink::Error> {
    let mut silent = Vec::new();
    for family in [Some(IpVersion::V4), ipv6.then_some(IpVersion::V6)].into_iter().flatten() {
        let mut neighbours = handle.neighbours().get().set_family(family).execute();
        while let Some(neighbour) = neighbours.try_next().await? {
            if matches!(neighbour.header.state, NeighbourState::Incomplete | NeighbourState::Failed) {
                silent.push(neighbour);
            }
        }
    }
    for neighbour in silent {
        // It may have answered just now, or be forgotten already.
        if let Err(error) = handle.neighbours().del(neighbour).execute().await {
            tracing::debug!(%error, "a neighbour stays");
        }
    }
    Ok(())
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await? {
        Some(link) => Ok(link.header.index),
        None => Err(rtnetlink::Error::RequestFailed),
    }
}

/// Runs netlink requests in the calling thread's network namespace, on a runtime of their own: the
/// namespace is the thread's, and a shared runtime's threads have others.
fn run<T, F, W>(work: W) -> Result<T, rtnetlink::Error>
where
    W: FnOnce(Handle) -> F,
    F: Future<Output = Result<T, rtnetlink::Error>>,
{
    let failed = |error: io::Error| rtnetlink::Error::NamespaceError(error.to_string());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
        tokio::spawn(connection);
        work(handle).await
    })
}
