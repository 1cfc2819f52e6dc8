//! `[tls]`: how links to other hosts are secured.

use std::{collections::BTreeSet, path::PathBuf};

use rswap_trust::Name;
use serde::{Deserialize, Serialize};

/// How links to other hosts are secured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawTls", untagged)]
pub enum TlsConfig {
    /// Nothing is set: no other host is spoken to.
    #[default]
    None,
    /// Both ends show certificates.
    Files {
        /// Certificates of the authorities that are trusted (PEM).
        ca: PathBuf,
        /// This host's certificate (PEM).
        certificate: PathBuf,
        /// Its key (PEM).
        key: PathBuf,
        /// The agents that may send instances here, and that may be called where no host pool says who has to be there.
        /// `None` is any agent with a certificate.
        #[serde(skip_serializing_if = "Option::is_none")]
        allow: Option<BTreeSet<Name>>,
    },
    /// `insecure_clear_text`, for development: everybody on the way can read and write.
    ClearText,
}

/// `[tls]` as it stands in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    allow: Option<BTreeSet<Name>>,
    #[serde(default)]
    insecure_clear_text: bool,
}

impl TryFrom<RawTls> for TlsConfig {
    type Error = String;

    fn try_from(raw: RawTls) -> Result<Self, String> {
        match raw {
            RawTls {
                ca: Some(ca),
                certificate: Some(certificate),
                key: Some(key),
                allow,
                insecure_clear_text: false,
            } => Ok(Self::Files { ca, certificate, key, allow }),
            RawTls { ca: None, certificate: None, key: None, allow: None, insecure_clear_text } => {
                Ok(if insecure_clear_text { Self::ClearText } else { Self::None })
            }
            RawTls { insecure_clear_text: true, .. } => {
                Err("`insecure_clear_text` goes with no other key: links are in the clear, or they are not"
                    .to_owned())
            }
            _ => Err("`ca`, `certificate` and `key` are needed, all three".to_owned()),
        }
    }
}

/// `[fleet.tls]`: what a controller shows, and whom it lets in. There is no clear text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControllerTls {
    /// Certificates of the authorities that are trusted (PEM).
    pub ca: PathBuf,
    /// The controller's certificate (PEM), of the role `controller`.
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// The agents that may report. `None` is any with a certificate of the fleet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<BTreeSet<Name>>,
    /// The operators that may say what is wanted. `None` is any with a certificate of the fleet that is no reader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<BTreeSet<Name>>,
    /// Certificates of operators that may only look: of what watches the controller.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub readers: BTreeSet<Name>,
}

impl ControllerTls {
    /// Where its files are.
    pub fn files(&self) -> rswap_trust::Files {
        let Self { ca, certificate, key, .. } = self.clone();
        rswap_trust::Files { ca, certificate, key }
    }

    /// Who may come in.
    pub fn guests(&self) -> rswap_controller::door::Guests {
        let Self { allow, operators, readers, .. } = self.clone();
        rswap_controller::door::Guests { agents: allow, operators, readers }
    }
}

impl TlsConfig {
    /// The files of this host's certificate, if links are secured with one.
    pub fn files(&self) -> Option<rswap_trust::Files> {
        match self {
            Self::Files { ca, certificate, key, .. } => Some(rswap_trust::Files {
                ca: ca.clone(),
                certificate: certificate.clone(),
                key: key.clone(),
            }),
            Self::ClearText | Self::None => None,
        }
    }
}
