//! Names and roles, as certificates say them.
//!
//! An identity is a SPIFFE ID (SPIFFE-ID standard, section 2) of two path segments, `spiffe://DOMAIN/ROLE/NAME`, in the one
//! subject alternative name of type URI of the certificate (X509-SVID standard, section 2).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

const SCHEME: &str = "spiffe://";
/// A DNS name has no more.
const NAME_BYTES: usize = 253;
/// SPIFFE-ID standard, section 2.1.
const DOMAIN_BYTES: usize = 255;

/// What somebody is in a fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The agent of a host.
    Agent,
    /// Whoever directs agents.
    Controller,
    /// A person with tools.
    Operator,
}

impl Role {
    const ALL: [Self; 3] = [Self::Agent, Self::Controller, Self::Operator];

    /// As it stands in an identity.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Controller => "controller",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| IdentityError::Role(text.to_owned()))
    }
}

/// Why something is no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is no certificate.
    #[error("this is no X.509 certificate: {0}")]
    Certificate(String),
    /// It names nobody, or several.
    #[error("the certificate has {0} names of type URI, and one is needed, spiffe://DOMAIN/ROLE/NAME")]
    Uris(usize),
    /// It is of another form.
    #[error("{0:?} is not of the form spiffe://DOMAIN/ROLE/NAME")]
    Form(String),
    /// There is no such role.
    #[error("{0:?} is no role: agent, controller or operator")]
    Role(String),
    /// It can't be a name.
    #[error(
        "{0:?} can't be a name: 1 to 253 letters, digits, dots, hyphens and underscores, and not only dots"
    )]
    Name(String),
    /// It can't be a trust domain.
    #[error(
        "{0:?} can't be a trust domain: 1 to 255 lower-case letters, digits, dots, hyphens and underscores"
    )]
    Domain(String),
}

/// What one of a fleet is called: of a host, what the others know it by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let usual = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        let fits = (1..=NAME_BYTES).contains(&text.len())
            && text.bytes().all(usual)
            && text.bytes().any(|byte| byte != b'.');
        match fits {
            true => Ok(Self(text.to_owned())),
            false => Err(IdentityError::Name(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Name {
    type Error = IdentityError;

    fn try_from(text: String) -> Result<Self, IdentityError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

/// Who somebody is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The fleet: certificates of one authority say the same.
    pub domain: String,
    /// What it is.
    pub role: Role,
    /// What it is called.
    pub name: Name,
}

/// Whether `text` can be a trust domain (SPIFFE-ID standard, section 2.1).
pub(crate) fn domain(text: &str) -> Result<&str, IdentityError> {
    let usual = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
    match (1..=DOMAIN_BYTES).contains(&text.len()) && text.bytes().all(usual) {
        true => Ok(text),
        false => Err(IdentityError::Domain(text.to_owned())),
    }
}

impl Identity {
    /// Who the certificate `der` speaks of. Whether it is to be believed is another question.
    ///
    /// # Errors
    /// It is no certificate, or does not name exactly one identity.
    pub fn of_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        match uris(der)?.as_slice() {
            [one] => one.parse(),
            uris => Err(IdentityError::Uris(uris.len())),
        }
    }
}

/// The names of type URI in the certificate `der`.
pub(crate) fn uris(der: &[u8]) -> Result<Vec<String>, IdentityError> {
    let failed = |error: &dyn fmt::Display| IdentityError::Certificate(error.to_string());
    let (_, certificate) =
        x509_parser::certificate::X509Certificate::from_der(der).map_err(|error| failed(&error))?;
    let names = certificate.subject_alternative_name().map_err(|error| failed(&error))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    Ok(names.iter().filter_map(uri).collect())
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.domain, self.role, self.name)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(text.to_owned());
        let mut parts = text.strip_prefix(SCHEME).ok_or_else(form)?.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(of), Some(role), Some(name), None) => {
                Ok(Self { domain: domain(of)?.to_owned(), role: role.parse()?, name: name.parse()? })
            }
            _ => Err(form()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_identity_is_refused() {
        for text in [
            "spiffe://fleet/agent/a",
            "spiffe://fleet.example.org/controller/rack-1.example.org",
            "spiffe://fleet/operator/Some_Body",
        ] {
            assert_eq!(text.parse::<Identity>().expect(text).to_string(), text);
        }
        for text in [
            "",
            "https://fleet/agent/a",
            "spiffe://fleet/agent",
            "spiffe://fleet/agent/",
            "spiffe://fleet/agent/a/b",
            "spiffe://fleet/agent/..",
            "spiffe://fleet/agent/a%2fb",
            "spiffe://fleet/agent/a?b",
            "spiffe://fleet/agent/a\0",
            "spiffe://fleet/root/a",
            "spiffe:///agent/a",
            "spiffe://FLEET/agent/a",
            "spiffe://user@fleet/agent/a",
            "spiffe://fleet:1/agent/a",
            "SPIFFE://fleet/agent/a",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_no_certificate(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(Identity::of_certificate(&bytes).is_err());
        }

        #[test]
        fn what_is_taken_comes_back_as_it_was(text in "spiffe://[a-zA-Z./-]{0,9}/?(agent|operator|x)/?[a-z./%-]{0,9}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
