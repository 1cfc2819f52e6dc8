//! The process: what it is made of, and where it listens.

use std::{
    convert::Infallible,
    fmt,
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use axum::serve::Listener;
use rswap_audit::Audit;
use rswap_fleet::{Inventory, Model, orders::Book, report::Limits};
use rswap_http::serving::{self, Entrance, Limits as ServingLimits};
use rswap_plan::PlanConfig;
use rswap_store::{History, Knowledge, Maintenance, Membership, Ownership, Store, StoreError};
use rswap_types::UnixMillis;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    Peer,
    door::{self, Door},
    rate::Rates,
    rounds, routes,
    state::{Counts, State},
    taught::Words,
    writer::{self, Writer},
};

/// What is served: an agent that reports has one connection at a time.
const SERVED: ServingLimits = ServingLimits {
    connections: 256,
    of_one: 8,
    connection_within: Some(Duration::from_secs(120)),
    end_within: Duration::from_secs(35),
};

/// A unix socket of this host, at both ends of which the kernel says who is there. Not loopback: any user of the host can call and
/// listen there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(
    /// The socket, mode 0600.
    pub PathBuf,
);

/// The text names no place for a controller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no socket of a controller: use unix:/PATH")]
pub struct AddressError(pub String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = text.strip_prefix("unix:").filter(|path| path.starts_with('/'));
        path.map(|path| Self(path.into())).ok_or_else(|| AddressError(text.to_owned()))
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unix:{}", self.0.display())
    }
}

/// How a controller works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether plans and wishes become orders, or are only shown.
    pub acts: bool,
    /// How often agents report, in milliseconds.
    pub interval_ms: u64,
    /// How often it plans, in milliseconds.
    pub plan_every_ms: u64,
    /// The planner's.
    pub plan: PlanConfig,
    /// What is taken of a host.
    pub limits: Limits,
}

/// What it keeps, and where.
#[derive(Clone)]
pub struct Stores {
    /// What instances used.
    pub history: Arc<dyn History>,
    /// Who belongs to the fleet.
    pub membership: Arc<dyn Membership>,
    /// Who is where.
    pub ownership: Arc<dyn Ownership>,
    /// What was taught.
    pub knowledge: Arc<dyn Knowledge>,
    /// The roll that is under way.
    pub maintenance: Arc<dyn Maintenance>,
}

impl From<Store> for Stores {
    fn from(store: Store) -> Self {
        let store = Arc::new(store);
        Self {
            history: store.clone(),
            membership: store.clone(),
            ownership: store.clone(),
            knowledge: store.clone(),
            maintenance: store,
        }
    }
}

/// Why a controller could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The place.
    #[error("cannot listen on {address}: choose another fleet.socket")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// One of its threads.
    #[error("a thread of the controller has panicked: see its log, and start it again")]
    Panicked,
}

/// Held by each thread without which a controller is none: it must not go on answering when nobody plans or stores any more.
pub(crate) type Alive = mpsc::Sender<Infallible>;

/// A controller.
pub struct Controller {
    pub(crate) life: u64,
    pub(crate) started: UnixMillis,
    pub(crate) settings: Settings,
    pub(crate) stores: Stores,
    pub(crate) audit: Audit,
    /// What people want is followed one after the other.
    pub(crate) wishes: Mutex<()>,
    state: Mutex<State>,
    /// How often each member may report. Not in `state`: who comes too often does not wait for it.
    rates: Mutex<Rates>,
    /// What was taught, in words. Not in `state` either.
    words: Mutex<Words>,
    stopping: AtomicBool,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("life", &self.life).finish_non_exhaustive()
    }
}

impl Controller {
    /// Goes on with what is stored.
    ///
    /// # Errors
    ///
    /// If the store fails.
    pub fn new(stores: Stores, settings: Settings, audit: Audit) -> Result<Arc<Self>, ControllerError> {
        let now = UnixMillis::now();
        let life = stores.membership.new_life()?;
        let owners = stores.ownership.owners()?;
        let places =
            owners.iter().map(|(name, owner)| (name.clone(), owner.host.clone(), owner.local.clone()));
        let inventory = Inventory::with_owners(places, now);
        let mut model = Model::new(life);
        for (host, part, lessons) in stores.knowledge.lessons()? {
            if let Err(error) = model.teach(&host, &part, &lessons, now) {
                tracing::warn!(%host, ?part, %error, "what was taught before is of no use");
            }
        }
        stores.knowledge.drop_lessons(&model.dropped())?;
        let state = State {
            inventory,
            model,
            book: Book::new(life),
            members: stores.membership.members()?,
            owners,
            plan: Default::default(),
            coming: Default::default(),
            ended: Vec::new(),
            outcomes: Default::default(),
            counts: Counts::default(),
            order_counts: Default::default(),
            roll: stores.maintenance.roll()?,
        };
        let rates = Rates::new(settings.limits.reports_per_s, settings.limits.reports_at_once);
        let (state, wishes, rates) = (Mutex::new(state), Mutex::new(()), Mutex::new(rates));
        let (words, stopping) = (Mutex::default(), AtomicBool::new(false));
        let started = now;
        Ok(Arc::new(Self { life, started, settings, stores, audit, wishes, state, rates, words, stopping }))
    }

    /// What members may still report.
    pub(crate) fn with_rates<T>(&self, look: impl FnOnce(&mut Rates) -> T) -> T {
        look(&mut self.rates.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What was taught, in words.
    pub(crate) fn with_words<T>(&self, look: impl FnOnce(&mut Words) -> T) -> T {
        look(&mut self.words.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether its threads are to end.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Looks at the state, or changes it. Briefly, of one host or a few, and in no thread that gives way to others: everybody else waits.
    pub(crate) fn with_state<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        // A request that panics must not take the controller with it: every change leaves a state that can be gone on with.
        look(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Serves a controller on whatever a listener accepts, until `stop` resolves: what was acknowledged is stored then. Once: it has ended then.
pub async fn serve<L>(
    controller: Arc<Controller>,
    listener: L,
    stop: impl Future<Output = ()> + Send + 'static,
) where
    L: Listener,
    L::Addr: Into<Peer>,
{
    serve_through(controller, vec![Box::new(listener)], stop).await;
}

/// [`serve`] on a socket of this host, and at a door for others, if there is one.
///
/// # Errors
///
/// If the socket can't be listened to.
pub async fn serve_at(
    controller: Arc<Controller>,
    address: &Address,
    door: Option<Door>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ControllerError> {
    let listen = |source| ControllerError::Listen { address: address.to_string(), source };
    let socket = door::bind(&address.0).await.map_err(listen)?;
    let mut doors: Vec<Box<dyn Entrance<Peer>>> = vec![Box::new(socket)];
    doors.extend(door.map(|door| -> Box<dyn Entrance<Peer>> { Box::new(door) }));
    if serve_through(controller, doors, stop).await { Ok(()) } else { Err(ControllerError::Panicked) }
}

/// Whether it ended because it was to.
async fn serve_through(
    controller: Arc<Controller>,
    doors: Vec<Box<dyn Entrance<Peer>>>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> bool {
    let (writer, handed): (Writer, _) = writer::channel();
    // Each by itself: one that has ended must not be outlived by the other.
    let [(writes, mut no_writer), (plans, mut no_planner), (old, mut no_trims)] =
        [mpsc::channel(1), mpsc::channel(1), mpsc::channel(1)];
    let writing = writer::start(controller.clone(), handed, writes);
    let rounds = rounds::start(&controller, [plans, old]);
    let stop = async move {
        tokio::select! {
            () = stop => {}
            _ = no_writer.recv() => {}
            _ = no_planner.recv() => {}
            _ = no_trims.recv() => {}
        }
    };
    serving::serve(routes::router(controller.clone(), writer), doors, SERVED, stop).await;
    controller.stopping.store(true, Ordering::Release);
    // All end by themselves now; a plan may take a while.
    let threads = rounds.into_iter().chain([writing]);
    let join = || {
        // Each, whatever became of the others.
        let ended: Vec<_> = threads.map(JoinHandle::join).collect();
        ended.iter().all(Result::is_ok)
    };
    let well = matches!(tokio::task::spawn_blocking(join).await, Ok(true));
    if !well {
        tracing::error!("a thread of the controller panicked");
    }
    well
}
