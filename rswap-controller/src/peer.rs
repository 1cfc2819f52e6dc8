//! Who is at the other end of a connection, and what that one may.

use std::fmt;

use rswap_fleet::HostName;
use rswap_http::serving::Caller;
use rswap_trust::{Identity, Name, Role};

/// The other end, as far as the transport vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// For people.
    pub from: String,
    /// Who it is.
    pub who: Who,
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// Root, or the own user, of this host: over the unix socket.
    Own,
    /// The agent of a host, by its certificate.
    Agent(HostName),
    /// A person with tools, by the certificate.
    Operator {
        /// Who.
        name: Name,
        /// Whether it may say what is wanted of the fleet, or only look.
        operates: bool,
    },
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("the controller's own host"),
            Self::Agent(host) => write!(f, "the agent of {host}"),
            Self::Operator { name, .. } => write!(f, "the operator {name}"),
        }
    }
}

impl Peer {
    /// Another process of this host, of root or the own user.
    pub fn own(from: String) -> Self {
        Self { from, who: Who::Own }
    }

    /// Who has shown a certificate. `None` if a fleet has no such name, or nothing is taken from that role.
    pub fn shown(identity: &Identity, from: &str, operates: impl Fn(&Name) -> bool) -> Option<Self> {
        let name = &identity.name;
        let who = match identity.role {
            Role::Agent => Who::Agent(name.as_str().parse().ok()?),
            Role::Operator => Who::Operator { name: name.clone(), operates: operates(name) },
            Role::Controller => return None,
        };
        Some(Self { from: format!("{identity} ({from})"), who })
    }

    /// Whether it may report as `host`: an agent as itself, and who is not vouched for as any.
    pub fn may_report(&self, host: &HostName) -> bool {
        match &self.who {
            Who::Own => true,
            Who::Agent(own) => own == host,
            Who::Operator { .. } => false,
        }
    }

    /// Whether it may look at the fleet.
    pub fn may_look(&self) -> bool {
        !matches!(self.who, Who::Agent(_))
    }

    /// Whether it may say what is wanted of the fleet.
    pub fn may_operate(&self) -> bool {
        match self.who {
            Who::Own => true,
            Who::Agent(_) => false,
            Who::Operator { operates, .. } => operates,
        }
    }
}

impl Caller for Peer {
    fn from(&self) -> String {
        self.from.clone()
    }

    fn counted_as(&self) -> Option<String> {
        match &self.who {
            Who::Own => None,
            Who::Agent(name) => Some(format!("agent {name}")),
            Who::Operator { name, .. } => Some(format!("operator {name}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_may_what_its_role_is_for() {
        let peer = |identity: &str| {
            let identity = identity.parse().expect("an identity");
            Peer::shown(&identity, "10.0.0.1:9", |name| name.as_str() != "watcher")
        };
        let host = |name: &str| name.parse::<HostName>().expect("a name");
        let may = |peer: &Peer| (peer.may_report(&host("a")), peer.may_look(), peer.may_operate());
        assert_eq!(may(&Peer::own("here".to_owned())), (true, true, true));
        assert_eq!(peer("spiffe://fleet/agent/a").as_ref().map(may), Some((true, false, false)));
        assert_eq!(peer("spiffe://fleet/agent/b").as_ref().map(may), Some((false, false, false)));
        assert_eq!(peer("spiffe://fleet/operator/a").as_ref().map(may), Some((false, true, true)));
        assert_eq!(peer("spiffe://fleet/operator/watcher").as_ref().map(may), Some((false, true, false)));
        assert_eq!(peer("spiffe://fleet/controller/a"), None);
    }
}
