//! Who may be at the other end. Pure.

use std::collections::BTreeSet;

use crate::identity::{Identity, Name, Role};

/// Who is taken at the other end of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The fleet.
    pub domain: String,
    /// The roles that the other may have, and with each the names; `None` is any.
    pub takes: Vec<(Role, Option<BTreeSet<Name>>)>,
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
    #[error("it is {found}: its role is {}, and {} is needed here", found.role, either(roles))]
    Role {
        /// Who it is.
        found: Identity,
        /// Those that would be taken.
        roles: Vec<Role>,
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

fn either(roles: &[Role]) -> String {
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ")
}

impl Rule {
    /// For one role.
    pub fn of(domain: &str, role: Role, names: Option<BTreeSet<Name>>) -> Self {
        Self { domain: domain.to_owned(), takes: vec![(role, names)] }
    }

    /// Whether `peer` is taken. The domain comes first: names of another fleet mean nothing here.
    ///
    /// # Errors
    /// It is not, and why.
    pub fn admit(&self, peer: &Identity) -> Result<(), Refused> {
        let found = || peer.clone();
        if peer.domain != self.domain {
            return Err(Refused::Domain { found: found(), domain: self.domain.clone() });
        }
        let Some((_, names)) = self.takes.iter().find(|(role, _)| *role == peer.role) else {
            let roles = self.takes.iter().map(|(role, _)| *role).collect();
            return Err(Refused::Role { found: found(), roles });
        };
        match names {
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
        Rule::of("fleet", Role::Agent, names)
    }

    #[test]
    fn each_role_has_names_of_its_own() {
        let names = |name: &str| Some(BTreeSet::from([name.parse().expect("a name")]));
        let takes = vec![(Role::Agent, names("a")), (Role::Operator, names("o"))];
        let rule = Rule { domain: "fleet".to_owned(), takes };
        for (who_is, taken) in
            [("agent/a", true), ("operator/o", true), ("agent/o", false), ("operator/a", false)]
        {
            assert_eq!(rule.admit(&who(&format!("spiffe://fleet/{who_is}"))).is_ok(), taken, "{who_is}");
        }
        let error = rule.admit(&who("spiffe://fleet/controller/a")).expect_err("another role");
        assert!(error.to_string().ends_with("its role is controller, and agent or operator is needed here"));
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
