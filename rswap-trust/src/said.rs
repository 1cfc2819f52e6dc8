//! What TLS says when something is wrong, in words, with what to do.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

use crate::{channel::Side, verify::Found};

/// An error of a connection; of a certificate that is not taken, more than an alert can say.
pub(crate) fn of(error: &Error, found: &Found, side: Side) -> io::Error {
    let text = match (found.get(), error) {
        (Some(Err(reason)), Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
            format!("the other is not taken: {reason}")
        }
        _ => explained(error, side),
    };
    let kind = match error {
        Error::AlertReceived(_) | Error::InvalidCertificate(_) | Error::NoCertificatesPresented => {
            io::ErrorKind::PermissionDenied
        }
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, text)
}

/// A handshake that has no end.
pub(crate) fn broken_off(side: Side, error: &io::Error) -> io::Error {
    let text = format!(
        "{} broke off the TLS handshake ({error}): perhaps it speaks no TLS, or has too many callers; see its log",
        other(side)
    );
    io::Error::new(error.kind(), text)
}

/// This end's own certificate is of no use.
pub(crate) fn unusable(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("this host's certificate can't be used: {error}"))
}

/// The other is gone.
pub(crate) fn is_cut(error: &io::Error) -> bool {
    [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&error.kind())
}

fn other(side: Side) -> &'static str {
    match side {
        Side::Dialled => "the host that was dialled",
        Side::Accepted => "the caller",
    }
}

/// In words, with what to do.
fn explained(error: &Error, side: Side) -> String {
    let other = other(side);
    match error {
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => {
            format!("{other} speaks no TLS, or garbage ({error}): is [tls] set there?")
        }
        Error::NoCertificatesPresented => format!("{other} shows no certificate"),
        Error::DecryptError => {
            format!("what {other} sent can't be decrypted: it is damaged, or of another session")
        }
        Error::InvalidCertificate(reason) => {
            let why = match reason {
                // The second: by another key of the same name.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    "was not issued by an authority that this host trusts (tls.ca)".to_owned()
                }
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    format!("has expired ({reason}): issue it anew")
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    format!("is not valid yet ({reason}): compare both hosts' clocks")
                }
                _ => format!("is not valid: {reason}"),
            };
            format!("the certificate of {other} {why}")
        }
        Error::AlertReceived(alert) => {
            let why = match alert {
                AlertDescription::AccessDenied => {
                    "its role or its name is not allowed there (tls.allow, or a host pool of another name)"
                }
                AlertDescription::UnknownCA => {
                    "it was not issued by an authority that is trusted there (tls.ca)"
                }
                AlertDescription::CertificateExpired => {
                    "it has expired there, or is not valid yet: compare the clocks"
                }
                AlertDescription::CertificateRequired => "none was shown",
                AlertDescription::DecryptError | AlertDescription::BadRecordMac => {
                    return format!(
                        "{other} could not decrypt what was sent: it was damaged, or of another session"
                    );
                }
                _ => return format!("{other} broke off: {error}"),
            };
            format!("{other} refuses this host's certificate: {why}")
        }
        _ => format!("TLS with {other}: {error}"),
    }
}
