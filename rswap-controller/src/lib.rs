//! The controller of a fleet, and an agent's end of it.
//!
//! ```text
//! agent:      window -> Reporter -> Spool (files) --POST /v1/report--> controller: check -> Writer -> store
//!                          ^                                                           |  (acknowledged from here on)
//!                          |                                                           v
//!             orders, what others taught  <--------- answer --------- inventory, model, book <- plan
//! ```
//!
//! Deciding is `rswap-fleet`'s; what is kept is `rswap-store`'s; this crate connects. Callers come in by a [`door`] of this host or of the
//! network, and who each is is a [`Peer`], which the transport vouches for; agents go to it by a [`link::Connect`].

pub mod door;
mod gate;
pub mod link;
mod metrics;
mod peer;
mod rate;
pub mod reporter;
mod roll_routes;
mod rolling;
mod rounds;
mod routes;
mod server;
pub mod spool;
mod state;
mod taught;
mod told;
mod views;
mod writer;

pub use peer::{Peer, Who};
pub use routes::document;
pub use server::{Address, AddressError, Controller, ControllerError, Settings, Stores, serve, serve_at};
