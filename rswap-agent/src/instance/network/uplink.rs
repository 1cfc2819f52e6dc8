//! What an instance's port is plugged into, and how fast it is.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use futures_util::TryStreamExt;
use rtnetlink::{
    Error, Handle, LinkUnspec,
    packet_route::{
        link::{
            BridgeStpState, InfoBridge, InfoData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
    },
};

use super::{INNER, InstanceError, Port, index_of, rate, run};
use crate::sys::{
    neighbour::{self, Asker},
    packet::Holder,
};

/// How often a bridge that was left is looked at for frames that still come, every 5 ms.
const LINGERING: u32 = 6;

/// What a port is plugged into, and how fast it is.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attachment {
    /// The bridge.
    pub bridge: String,
    /// How much may go in, and out, in bytes per second. Nothing: as much as comes.
    pub bytes_per_s: Option<u64>,
}

/// A bridge that ports can be plugged into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bridge {
    pub(crate) name: String,
    index: u32,
    mac: [u8; 6],
    /// In bytes.
    pub(crate) mtu: u32,
    pub(crate) is_up: bool,
    /// Whether a port has to wait (spanning tree) before anything passes.
    pub(crate) ports_wait: bool,
}

impl Bridge {
    /// The bridge of interface `link`: itself, or the one that it is a port of. `None`: neither.
    pub(crate) fn of(link: &str) -> Result<Option<Self>, InstanceError> {
        let found = run(|handle| async move {
            let Some(first) = named(&handle, link).await? else { return Ok(None) };
            match (bridge(&first), controller(&first)) {
                (Some(bridge), _) => Ok(Some(bridge)),
                (None, Some(index)) => Ok(by_index(&handle, index).await?.as_ref().and_then(bridge)),
                (None, None) => Ok(None),
            }
        });
        found.map_err(|source| InstanceError::Network {
            what: format!("looking for the bridge of {link}"),
            source: Box::new(source),
        })
    }

    /// Who of `neighbours` is there, as far as can be said without telling anybody anything.
    pub(crate) fn answering(
        &self,
        neighbours: &BTreeSet<IpAddr>,
        within: Duration,
    ) -> Result<BTreeSet<IpAddr>, InstanceError> {
        neighbour::answering(self.index, &Asker::nobody(self.mac), neighbours, within)
            .map_err(InstanceError::io(format!("asking for neighbours on {}", self.name)))
    }
}

/// What changing bridges came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replugged {
    /// Frames that waited. Some of them may have arrived twice.
    pub(crate) frames_held: usize,
    /// How long they waited at most.
    pub(crate) pause: Duration,
}

impl Port {
    /// What it is plugged into. Nothing: it is on no bridge.
    pub fn attachment(&self) -> Result<Option<Attachment>, InstanceError> {
        let found = run(|handle| async move {
            let Some(port) = named(&handle, &self.interface).await? else { return Ok(None) };
            let Some(index) = controller(&port) else { return Ok(None) };
            let Some(bridge) = by_index(&handle, index).await? else { return Ok(None) };
            let limit = rate::get(&handle, port.header.index).await?;
            Ok(name(&bridge)
                .map(|bridge| Attachment { bridge, bytes_per_s: limit.map(|limit| limit.bytes_per_s) }))
        });
        found.map_err(self.failed("looking at the port"))
    }

    /// The same port, on the bridge that it is on.
    pub(crate) fn where_it_is(mut self) -> Self {
        match self.attachment() {
            Ok(Some(found)) => self.bridge = found.bridge,
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, bridge = self.bridge, "taken to be on this bridge"),
        }
        self
    }

    /// Its largest packet, in bytes.
    pub(crate) fn mtu(&self) -> Result<Option<u32>, InstanceError> {
        let found =
            run(|handle| async move { Ok(named(&handle, &self.interface).await?.as_ref().and_then(mtu)) });
        found.map_err(self.failed("looking at the port"))
    }

    /// Plugs it into `bridge`, and tells the neighbours. What the instance sends meanwhile, and what comes for it to the bridge
    /// that it leaves, is held and passed on.
    /// Opening and closing what holds them takes tens of milliseconds, in which everything passes.
    pub(crate) fn replug(&self, bridge: &Bridge) -> Result<Replugged, InstanceError> {
        let port = nix::net::if_::if_nametoindex(self.interface.as_str())
            .map_err(InstanceError::io(format!("looking for {}", self.interface)))?;
        let holding = |what: &str| InstanceError::io(format!("holding what {what} {}", self.interface));
        // Straight to the instance: a switch that has not heard of its new place yet would send it back.
        let coming = self.clone().where_it_is().hold()?.towards(port);
        let going = Holder::start_from(port, self.identity.mac, bridge.index).map_err(holding("leaves"))?;
        let began = Instant::now();
        // What came so far has reached it.
        coming.forget().map_err(holding("comes to"))?;
        going.forget().map_err(holding("leaves"))?;
        let message = LinkUnspec::new_with_index(port).controller(bridge.index).build();
        run(|handle| async move { handle.link().change(message).execute().await })
            .map_err(self.failed("plugging the port into another bridge"))?;
        let changed = began.elapsed();
        // First, or the bridge takes the instance to be behind its uplink, where it saw it last, and sends nothing to the port:
        // what is passed on does not teach it.
        self.announce()?;
        let announced = began.elapsed();
        going.stop().map_err(holding("leaves"))?;
        let mut held = going.pass_on().map_err(holding("leaves"))?;
        held += coming.pass_on().map_err(holding("comes to"))?;
        let pause = began.elapsed();
        // On a busy machine what was sent before may still be on its way, for each veth has a queue: to the old bridge, and from
        // there, so that a switch believes once more that the instance is there.
        for _ in 0..LINGERING {
            std::thread::sleep(Duration::from_millis(5));
            held += coming.pass_on().map_err(holding("comes to"))?;
        }
        tracing::debug!(?changed, ?announced, ?pause, held, "changed bridges");
        Ok(Replugged { frames_held: held, pause })
    }

    /// Lets so much in, and out; nothing: as much as comes.
    pub(crate) fn limit(&self, bytes_per_s: Option<u64>) -> Result<(), InstanceError> {
        let set = |interface: &str, what: &str| {
            run(|handle| async move {
                let index = index_of(&handle, interface).await?;
                set_rate(&handle, index, bytes_per_s).await
            })
            .map_err(self.failed(what))
        };
        set(&self.interface, "setting the rate of what comes in")?;
        self.inside(|| set(INNER, "setting the rate of what goes out"))
    }

    /// The rate of what goes out, in bytes per second.
    pub(crate) fn outgoing(&self) -> Result<Option<u64>, InstanceError> {
        let look = || {
            run(|handle| async move {
                let index = index_of(&handle, INNER).await?;
                Ok(rate::get(&handle, index).await?.map(|limit| limit.bytes_per_s))
            })
        };
        self.inside(|| look().map_err(self.failed("looking at the rate of what goes out")))
    }

    /// The neighbours that the instance has talked to of late.
    pub(crate) fn neighbours(&self) -> Result<BTreeSet<IpAddr>, InstanceError> {
        self.inside(|| run(known_neighbours).map_err(self.failed("listing the instance's neighbours")))
    }

    /// Who of `neighbours` answers the instance.
    pub(crate) fn answering(
        &self,
        neighbours: &BTreeSet<IpAddr>,
        within: Duration,
    ) -> Result<BTreeSet<IpAddr>, InstanceError> {
        let ipv6 = self.identity.ipv6.as_ref().map_or(Ipv6Addr::UNSPECIFIED, |ipv6| ipv6.address);
        let asker = Asker { mac: self.identity.mac, addresses: (self.identity.address, ipv6) };
        let what = || format!("asking for the neighbours of {}", self.identity.address);
        self.inside(|| {
            let index = nix::net::if_::if_nametoindex(INNER).map_err(InstanceError::io(what()))?;
            neighbour::answering(index, &asker, neighbours, within).map_err(InstanceError::io(what()))
        })
    }
}

async fn set_rate(handle: &Handle, index: u32, bytes_per_s: Option<u64>) -> Result<(), Error> {
    match bytes_per_s {
        Some(bytes_per_s) => rate::set(handle, index, bytes_per_s).await,
        None => rate::lift(handle, index).await,
    }
}

/// Those of the calling thread's network namespace whose place is known: not those that did not answer, nor groups.
async fn known_neighbours(handle: Handle) -> Result<BTreeSet<IpAddr>, Error> {
    let index = index_of(&handle, INNER).await?;
    let mut all = handle.neighbours().get().execute();
    let mut found = BTreeSet::new();
    while let Some(message) = all.try_next().await? {
        let is_known = matches!(
            message.header.state,
            NeighbourState::Reachable | NeighbourState::Stale | NeighbourState::Delay | NeighbourState::Probe
        );
        if message.header.ifindex != index || !is_known {
            continue;
        }
        found.extend(message.attributes.iter().filter_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(IpAddr::from(*address)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(IpAddr::from(*address)),
            _ => None,
        }));
    }
    Ok(found)
}

async fn named(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, Error> {
    there(handle.link().get().match_name(name.to_owned()).execute().try_next().await)
}

async fn by_index(handle: &Handle, index: u32) -> Result<Option<LinkMessage>, Error> {
    there(handle.link().get().match_index(index).execute().try_next().await)
}

/// That an interface is not there is no error.
fn there(found: Result<Option<LinkMessage>, Error>) -> Result<Option<LinkMessage>, Error> {
    match found {
        Err(Error::NetlinkError(error)) if error.raw_code().abs() == libc::ENODEV => Ok(None),
        found => found,
    }
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

fn mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// The link, if it is a bridge.
fn bridge(link: &LinkMessage) -> Option<Bridge> {
    let settings = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(all) => all.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Bridge(settings)) => Some(settings),
            _ => None,
        }),
        _ => None,
    })?;
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.first_chunk().copied(),
        _ => None,
    })?;
    let state = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::OperState(state) => Some(*state),
        _ => None,
    });
    Some(Bridge {
        name: name(link)?,
        index: link.header.index,
        mac,
        mtu: mtu(link)?,
        is_up: link.header.flags.contains(LinkFlags::Up) && state != Some(State::Down),
        ports_wait: settings.iter().any(
            |setting| matches!(setting, InfoBridge::StpState(state) if *state != BridgeStpState::Disabled),
        ),
    })
}
