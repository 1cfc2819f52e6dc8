//! Who is at the other end of a link between agents, and whether it may be there.
//!
//! ```text
//! files of a host (CA, certificate, key)            [credentials]  read again when they change
//!        |
//!  a place for a stranger                           [strangers]    few per network
//!        |
//!  TLS 1.3, both sides show a certificate           [channel]      over any blocking stream, within its time limits
//!        |                                          [asynchronous] over any other
//!  role and name, as the certificate says them      [identity]
//!        |
//!  may it?                                          [rule]         pure
//! ```
//!
//! [`authority`] makes such files, for those who have no authority of their own.

pub mod asynchronous;
pub mod authority;
pub mod channel;
pub mod credentials;
pub mod identity;
pub mod rule;
mod said;
pub mod strangers;
mod verify;

pub use authority::{Authority, AuthorityError, Validity};
pub use channel::{Channel, Side};
pub use credentials::{Credentials, CredentialsError, Files, Loaded};
pub use identity::{Identity, IdentityError, Name, Role};
pub use rule::{Refused, Rule};

#[cfg(test)]
mod tests;
