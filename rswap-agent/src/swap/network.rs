//! Moving an instance to another uplink of this host, or to another rate there, without losing a connection.
//!
//! Its port leaves one bridge and joins another in one request; what is on its way meanwhile is held and passed on.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::instance::{
    InstanceError,
    network::{Attachment, Bridge, Port, Replugged},
};

/// How long a neighbour may take to answer, before anything is changed.
const ANSWER_WITHIN: Duration = Duration::from_millis(900);
/// The same afterwards, when who answered once must do so again: until the way back, the instance may be cut off.
const ANSWER_AGAIN_WITHIN: Duration = Duration::from_millis(300);

/// Why an instance stayed on its uplink. Unless it says so, all is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The pool's interface leads to no bridge.
    #[error(
        "{link} is neither a bridge nor a port of one: instances are plugged into bridges; make one, and {link} its port"
    )]
    NoBridge {
        /// The interface.
        link: String,
    },
    /// The port is on no bridge.
    #[error(
        "its port is on no bridge: was it unplugged by hand? plug it into one with `ip link set dev ... master BRIDGE`"
    )]
    Unplugged,
    /// The bridge passes nothing.
    #[error(
        "the bridge {bridge} is down: bring it up with `ip link set {bridge} up`, and see that a port of it has a carrier"
    )]
    Down {
        /// Which.
        bridge: String,
    },
    /// A port would pass nothing for seconds.
    #[error(
        "the bridge {bridge} speaks the spanning tree protocol: a new port of it passes nothing for seconds; turn that off \
         there (`ip link set {bridge} type bridge stp_state 0`)"
    )]
    SpanningTree {
        /// Which.
        bridge: String,
    },
    /// Large packets would not get through.
    #[error(
        "packets of up to {needed} bytes leave the instance, and the bridge {bridge} takes {offered}: raise its mtu"
    )]
    Mtu {
        /// Which.
        bridge: String,
        /// The instance's, in bytes.
        needed: u32,
        /// The bridge's, in bytes.
        offered: u32,
    },
    /// It is another network.
    #[error(
        "{} on {from}, and not on {to}: the bridges lead to different networks, and its connections would be lost",
        answers(.silent)
    )]
    AnotherNetwork {
        /// Where it is.
        from: String,
        /// Where it was to go.
        to: String,
        /// Who is not there.
        silent: BTreeSet<IpAddr>,
    },
    /// What was set is not what is there.
    #[error("its port is as {found:?} and not as {wanted:?}: did somebody change it meanwhile?")]
    Misplaced {
        /// As it is.
        found: Option<Attachment>,
        /// As it should be.
        wanted: Attachment,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] InstanceError),
    /// It failed, and so did the way back.
    #[error("the swap failed ({cause}), and the old uplink could not be restored: try `rswap swap` again")]
    NotRestored {
        /// Why the swap failed.
        cause: Box<UplinkError>,
        /// Why the way back failed.
        #[source]
        source: Box<UplinkError>,
    },
}

fn answers(who: &BTreeSet<IpAddr>) -> String {
    let all: Vec<String> = who.iter().map(IpAddr::to_string).collect();
    format!("{} {}", all.join(", "), if all.len() == 1 { "answers" } else { "answer" })
}

/// What a swap of the uplink did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UplinkReport {
    /// Where the instance was.
    pub from: Attachment,
    /// Where it is.
    pub to: Attachment,
    /// Neighbours that answered before, and after.
    pub neighbours: usize,
    /// Frames that were held while the port was on no bridge. Some of them may have arrived twice.
    pub frames_held: usize,
    /// How long they waited at most, in microseconds.
    pub pause_us: u64,
    /// How long all of it took, in microseconds.
    pub duration_us: u64,
}

/// Moves the instance of `port` to the bridge of `link`, which may be a port of it, and to a rate.
pub fn move_to(port: &Port, link: &str, bytes_per_s: Option<u64>) -> Result<UplinkReport, UplinkError> {
    let started = Instant::now();
    let mut swap = UplinkSwap::snapshot(port, link, bytes_per_s)?;
    swap.transfer()?;
    match swap.activate().and_then(|()| swap.verify()) {
        Ok(()) => Ok(swap.deactivate(started)),
        Err(cause) => match swap.roll_back() {
            Ok(()) => Err(cause),
            Err(source) => Err(UplinkError::NotRestored { cause: Box::new(cause), source: Box::new(source) }),
        },
    }
}

struct UplinkSwap<'a> {
    port: &'a Port,
    before: Attachment,
    from: Bridge,
    to: Bridge,
    wanted: Attachment,
    /// Who has to answer afterwards.
    neighbours: BTreeSet<IpAddr>,
    replugged: Replugged,
}

impl<'a> UplinkSwap<'a> {
    /// Checks the target, and keeps what is there now. Nothing is changed.
    fn snapshot(port: &'a Port, link: &str, bytes_per_s: Option<u64>) -> Result<Self, UplinkError> {
        let before = port.attachment()?.ok_or(UplinkError::Unplugged)?;
        let to = Bridge::of(link)?.ok_or_else(|| UplinkError::NoBridge { link: link.to_owned() })?;
        let from = Bridge::of(&before.bridge)?.ok_or(UplinkError::Unplugged)?;
        if from != to {
            let bridge = to.name.clone();
            if !to.is_up {
                return Err(UplinkError::Down { bridge });
            }
            if to.ports_wait {
                return Err(UplinkError::SpanningTree { bridge });
            }
            if let Some(needed) = port.mtu()?.filter(|&needed| needed > to.mtu) {
                return Err(UplinkError::Mtu { bridge, needed, offered: to.mtu });
            }
        }
        let wanted = Attachment { bridge: to.name.clone(), bytes_per_s };
        let (neighbours, replugged) = Default::default();
        Ok(Self { port, before, from, to, wanted, neighbours, replugged })
    }

    /// Nothing has to be copied, but whoever the instance talks to has to be there, too.
    fn transfer(&mut self) -> Result<(), UplinkError> {
        if self.from == self.to {
            return Ok(());
        }
        let known = self.port.neighbours()?;
        self.neighbours = self.port.answering(&known, ANSWER_WITHIN)?;
        let there = self.to.answering(&self.neighbours, ANSWER_WITHIN)?;
        self.all_answer(&there)
    }

    /// Sets the rate and changes bridges.
    fn activate(&mut self) -> Result<(), UplinkError> {
        self.port.limit(self.wanted.bytes_per_s)?;
        if self.from != self.to {
            self.replugged = self.port.replug(&self.to)?;
        }
        Ok(())
    }

    /// Asks the kernel what is there, and the neighbours whether they still answer.
    fn verify(&mut self) -> Result<(), UplinkError> {
        let found = self.port.attachment()?;
        let as_wanted = found.as_ref() == Some(&self.wanted);
        if !as_wanted || self.port.outgoing()? != self.wanted.bytes_per_s {
            return Err(UplinkError::Misplaced { found, wanted: self.wanted.clone() });
        }
        let answered = self.port.answering(&self.neighbours, ANSWER_AGAIN_WITHIN)?;
        self.all_answer(&answered)
    }

    fn all_answer(&self, answered: &BTreeSet<IpAddr>) -> Result<(), UplinkError> {
        let silent: BTreeSet<IpAddr> = self.neighbours.difference(answered).copied().collect();
        match silent.is_empty() {
            true => Ok(()),
            false => Err(UplinkError::AnotherNetwork {
                from: self.from.name.clone(),
                to: self.to.name.clone(),
                silent,
            }),
        }
    }

    /// Gives up the old uplink: nothing of it is left but this report.
    fn deactivate(self, started: Instant) -> UplinkReport {
        let micros = |duration: Duration| duration.as_micros() as u64;
        UplinkReport {
            from: self.before,
            to: self.wanted,
            neighbours: self.neighbours.len(),
            frames_held: self.replugged.frames_held,
            pause_us: micros(self.replugged.pause),
            duration_us: micros(started.elapsed()),
        }
    }

    fn roll_back(&mut self) -> Result<(), UplinkError> {
        self.port.limit(self.before.bytes_per_s)?;
        if self.port.attachment()?.is_none_or(|now| now.bridge != self.before.bridge) {
            self.port.replug(&self.from)?;
        }
        Ok(())
    }
}
