//! The controller of a fleet, and an agent's end of it.
//!
//! ```text
//! agent:      window -> Reporter -> Spool (files) --POST /v1/report--> controller: check -> Writer -> store
//!                          ^                                                           |  (acknowledged from here on)
//!                          |                                                           v
//!             orders, what others taught  <--------- answer --------- inventory, model, book <- plan
//! ```
//!
//! Deciding is `rswap-fleet`'s; what is kept is `rswap-store`'s; this crate connects. Streams come from a [`axum::serve::Listener`] and
//! go to a [`link::Connect`]: who is at the other end is a [`Peer`], which the transport vouches for. Without a transport that
//! does, the controller listens where only this host's processes reach it.

pub mod link;
mod peer;
pub mod reporter;
mod routes;
mod server;
pub mod spool;
mod state;
mod writer;

pub use peer::Peer;
pub use server::{Address, AddressError, Controller, ControllerError, Settings, Stores, serve, serve_at};
