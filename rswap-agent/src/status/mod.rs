//! Read-only HTTP on loopback: JSON, metrics, and the page that shows them in a browser.
//!
//! The wiring writes what it knows to the [`Board`]; the routes read it. Nothing here changes an instance,
//! which is why it needs no authentication, and why it is served on loopback only.
//! The routes and their JSON are documented in `docs/api.md` and stay stable.

mod board;
mod counts;
mod decisions;
mod distributions;
mod metrics;
mod moves;
mod neighbour_names;
mod packed;
mod router;
mod series;
mod spans;
mod views;

use std::{future::Future, net::SocketAddr, time::Duration};

use axum::{
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use rswap_http::serving::{self, Entrance, Limits};
use tokio::net::TcpListener;

pub use board::{
    Board, BoardState, InstanceView, MIGRATIONS_KEPT, MigrationProgress, MigrationReport, MigrationRound,
    MigrationState, MigrationView, ShownPlan,
};
pub use counts::{BlockBytes, Counts, CountsOver};
pub use decisions::{DECISIONS_KEPT, Decisions};
pub use distributions::{Distribution, Distributions, Metric};
pub use moves::{AskedBy, MOVES_KEPT, MoveState, MoveView, MovedKind, Moves, NewMove};
pub use neighbour_names::NeighbourNames;
pub use router::{ApiError, router};
pub(crate) use router::{answering, described, no_instance};
pub use series::{Series, WINDOWS_KEPT, Window};
pub(crate) use views::DistributionsOf;

/// Why the status could not be served.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The configured address can be reached from other hosts.
    #[error(
        "cannot serve the status on {0}: it has no authentication, so it is served on loopback only; \
         set agent.status_address to 127.0.0.1:PORT or [::1]:PORT"
    )]
    NotLoopback(SocketAddr),
    /// The address could not be bound.
    #[error("cannot listen on {address} for the status: choose another agent.status_address")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Binds the status server's address, if it is a loopback one.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, StatusError> {
    if !address.ip().is_loopback() {
        return Err(StatusError::NotLoopback(address));
    }
    TcpListener::bind(address).await.map_err(|source| StatusError::Listen { address, source })
}

/// How long those may take who are being served when the agent ends; then they are cut.
pub(crate) const CALLERS_WITHIN: Duration = Duration::from_secs(2);
/// What is served at a time: browsers and scrapers, who come again.
const LIMITS: Limits = Limits {
    connections: 64,
    of_one: 64,
    connection_within: Some(Duration::from_secs(120)),
    end_within: CALLERS_WITHIN,
};

/// Somebody on this host.
#[derive(Clone, Debug)]
struct Visitor(SocketAddr);

impl From<SocketAddr> for Visitor {
    fn from(from: SocketAddr) -> Self {
        Self(from)
    }
}

impl serving::Caller for Visitor {
    fn from(&self) -> String {
        self.0.to_string()
    }

    fn counted_as(&self) -> Option<String> {
        None
    }
}

/// Serves the read-only routes until `stop` resolves.
pub async fn serve(listener: TcpListener, board: Board, stop: impl Future<Output = ()> + Send + 'static) {
    let door: Box<dyn Entrance<Visitor>> = Box::new(listener);
    serving::serve(router(board).layer(middleware::from_fn(only_local)), vec![door], LIMITS, stop).await;
}

/// A stranger's page, open in a browser on this host, may have its own name point here: it is not answered.
async fn only_local(request: Request, next: Next) -> Response {
    if rswap_dashboard::is_local(request.headers()) {
        return next.run(request).await;
    }
    let error = "this is answered only to who asks for localhost or a loopback address";
    let hint = "from elsewhere, use `ssh -L` and ask for localhost";
    ApiError::new(StatusCode::FORBIDDEN, error, hint).into_response()
}

#[cfg(test)]
mod tests;
