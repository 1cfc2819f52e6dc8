//! Who may be at the other end. Pure.

use std::collections::BTreeSet;

use crate::identity::{Identity, Name, Role};

/// Who is taken at the other end of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The fleet.
    pub domain: String,
    /// The role that the other must have.
    pub role: Role,
    /// The names that it may have; `None` is any.
    pub names: Option<BTreeSet<Name>>,
}

/// Why somebody is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is of another fleet.
    #[error("it is {found}, and not of the trust domain {domain}")]
    Domain {
        /// Who it is.
        found: Identity,
        /// The one asked for.
        domain: String,
    },
    /// It is something else.
    #[error("it is {found}: its role is {}, and {role} is needed here", found.role)]
    Role {
        /// Who it is.
        found: Identity,
        /// The one asked for.
        role: Role,
    },
    /// It is somebody else.
    #[error("it is {found}, and not {}", named(names))]
    Name {
        /// Who it is.
        found: Identity,
        /// Those that would be taken.
        names: BTreeSet<Name>,
    },
}

fn named(names: &BTreeSet<Name>) -> String {
    match names.len() {
        0 => "allowed: nobody is".to_owned(),
        1 => names.iter().map(Name::to_string).collect(),
        _ => format!("one of {}", names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")),
    }
}

impl Rule {
    /// Whether `peer` is taken. The domain comes first: names of another fleet mean nothing here.
    ///
    /// # Errors
    /// It is not, and why.
    pub fn admit(&self, peer: &Identity) -> Result<(), Refused> {
        let found = || peer.clone();
        if peer.domain != self.domain {
            return Err(Refused::Domain { found: found(), domain: self.domain.clone() });
        }
        if peer.role != self.role {
            return Err(Refused::Role { found: found(), role: self.role });
        }
        match &self.names {
            Some(names) if !names.contains(&peer.name) => {
                Err(Refused::Name { found: found(), names: names.clone() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(text: &str) -> Identity {
        text.parse().expect("an identity")
    }

    fn rule(names: Option<&[&str]>) -> Rule {
        let names = names.map(|names| names.iter().map(|name| name.parse().expect("a name")).collect());
        Rule { domain: "fleet".to_owned(), role: Role::Agent, names }
    }

    #[test]
    fn domain_role_and_name_must_all_be_right() {
        let (a, b) = (who("spiffe://fleet/agent/a"), who("spiffe://fleet/agent/b"));
        assert_eq!(rule(None).admit(&a), Ok(()));
        assert_eq!(rule(Some(&["a", "c"])).admit(&a), Ok(()));
        let named = rule(Some(&["a", "c"])).admit(&b).expect_err("another name");
        assert_eq!(named.to_string(), "it is spiffe://fleet/agent/b, and not one of a, c");
        let one = rule(Some(&["a"])).admit(&b).expect_err("another name");
        assert_eq!(one.to_string(), "it is spiffe://fleet/agent/b, and not a");
        let nobody = rule(Some(&[])).admit(&a).expect_err("nobody is allowed");
        assert_eq!(nobody.to_string(), "it is spiffe://fleet/agent/a, and not allowed: nobody is");
        for role in ["controller", "operator"] {
            let other = who(&format!("spiffe://fleet/{role}/a"));
            assert!(matches!(rule(Some(&["a"])).admit(&other), Err(Refused::Role { .. })));
        }
        let foreign = who("spiffe://other/agent/a");
        assert!(matches!(rule(None).admit(&foreign), Err(Refused::Domain { .. })));
        // Names are compared as a whole, and as they are.
        for near in ["A", "a.", "aa", "a.example.org"] {
            let near = who(&format!("spiffe://fleet/agent/{near}"));
            assert!(matches!(rule(Some(&["a"])).admit(&near), Err(Refused::Name { .. })), "{near}");
        }
    }
}
