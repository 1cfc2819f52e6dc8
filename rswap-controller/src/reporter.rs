//! The agent's side: reports go out from a thread of their own, and what is answered comes back.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rswap_fleet::{
    Action, HostName, Order, OrderOutcome, Report, Token,
    model::Revision,
    orders::{Ledger, OrderResult, Refusal},
    report::{self, Answer, Envelope},
};
use rswap_forecast::{Lessons, Part};
use rswap_types::{InstanceName, UnixMillis};
use tokio::sync::mpsc;

use crate::{
    link::{self, Connect, LinkError},
    spool::{self, Spool},
};

/// Reports that are sent at once.
const BATCH: usize = 32;
/// Bytes of them.
const BATCH_BYTES: u64 = 4 << 20;
/// What a controller answers to a report that it can never take.
const NEVER: u16 = 422;
/// What it answers to more than it takes at once.
const TOO_MUCH: u16 = 413;
/// What it answers to a report of another version than its own.
const OTHER_VERSION: u16 = 409;
/// What it answers to a host that reports more often than it may.
const TOO_OFTEN: u16 = 429;
/// A controller that does not say how long to wait is left alone for so long, in seconds.
const WAIT_S: u64 = 1;
/// It is never left alone for longer, whatever it says, in seconds.
const LONGEST_WAIT_S: u64 = 300;

/// What is to be told.
#[derive(Debug)]
pub struct Outgoing {
    /// The report; its epoch and its numbers are the spool's to give.
    pub report: Report,
    /// What was taught, of parts that are due.
    pub lessons: Vec<(Part, Lessons)>,
    /// Up to where it is known what others have taught.
    pub knows: Revision,
    /// Windows and horizons of lessons that can be used.
    pub leads: (u64, Vec<u64>),
}

/// What came back.
#[derive(Debug)]
pub struct Answered {
    /// The controller's answer.
    pub answer: Answer,
    /// What it has of what was taught.
    pub told: Vec<(Part, Lessons)>,
}

/// The way to the thread that reports. It ends when this is dropped.
#[derive(Debug)]
pub struct Reporter {
    outgoing: std::sync::mpsc::Sender<Outgoing>,
}

impl Reporter {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// If the spool can't be opened.
    pub fn start(
        connect: Box<dyn Connect>,
        directory: &Path,
        most_bytes: u64,
        answered: mpsc::UnboundedSender<Answered>,
    ) -> io::Result<Self> {
        let mut sender = Sender {
            connect,
            spool: Spool::open(directory, most_bytes)?,
            answered,
            unreached: None,
            not_before: None,
        };
        let (outgoing, incoming) = std::sync::mpsc::channel::<Outgoing>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::spawn(move || {
            while let Ok(mut next) = incoming.recv() {
                // What came while a call took its time is kept before anything is sent.
                sender.keep(next.report.clone());
                while let Ok(later) = incoming.try_recv() {
                    sender.keep(later.report.clone());
                    next = later;
                }
                runtime.block_on(sender.send(next));
            }
        });
        Ok(Self { outgoing })
    }

    /// Hands over a report; it is kept as soon as the thread gets to it.
    pub fn report(&self, next: Outgoing) {
        if self.outgoing.send(next).is_err() {
            tracing::error!("the thread that reports has ended: see above");
        }
    }
}

struct Sender {
    connect: Box<dyn Connect>,
    spool: Spool,
    answered: mpsc::UnboundedSender<Answered>,
    /// Why the last call had no answer, if it had none.
    unreached: Option<String>,
    /// The controller has said that it takes nothing before; it has not got everything since.
    not_before: Option<Instant>,
}

impl Sender {
    fn keep(&mut self, report: Report) {
        if let Err(error) = self.spool.push(report) {
            tracing::error!(%error, "a report could not be kept (controller.spool): it is lost");
        }
    }

    async fn send(&mut self, next: Outgoing) {
        let Outgoing { report: _, mut lessons, knows, leads } = next;
        if self.not_before.is_some_and(|moment| Instant::now() < moment) {
            return;
        }
        let mut batch = BATCH;
        while !self.spool.is_empty() {
            let reports = self.spool.oldest(batch, BATCH_BYTES);
            // What is not kept goes with the latest.
            let last = reports.len() == self.spool.len();
            let told = if last { lessons.clone() } else { Vec::new() };
            let envelope = Envelope { reports, lessons: told, knows, leads: leads.clone() };
            let body = match serde_json::to_vec(&envelope) {
                Ok(body) => body,
                Err(error) => {
                    tracing::error!(%error, "a report could not be written as JSON");
                    return;
                }
            };
            match link::call::<Answer>(&*self.connect, "/v1/report", Some(body)).await {
                Ok(answer) => {
                    if self.unreached.take().is_some() {
                        tracing::info!(
                            to = self.connect.to(),
                            waiting = self.spool.len(),
                            "the controller answers again"
                        );
                    }
                    if let Err(error) = self.spool.acknowledge(&envelope.reports, answer.stored) {
                        tracing::warn!(%error, "a report that the controller has could not be removed");
                        return;
                    }
                    // Nobody asks any more when the agent ends.
                    drop(self.answered.send(Answered { answer, told: envelope.lessons }));
                }
                // What is kept is handed in as fast as the controller takes it.
                Err(LinkError::Refused { status: TOO_OFTEN, error, retry_after_s, .. }) => {
                    let wait_s = retry_after_s.unwrap_or(WAIT_S).min(LONGEST_WAIT_S);
                    if self.not_before.is_none() {
                        tracing::info!(error, wait_s, waiting = self.spool.len(), "reports wait");
                    }
                    self.not_before = Some(Instant::now() + Duration::from_secs(wait_s));
                    return;
                }
                // One of them is it: which is known when each is sent alone.
                Err(LinkError::Refused { status: NEVER | OTHER_VERSION | TOO_MUCH, .. })
                    if envelope.reports.len() > 1 =>
                {
                    batch = 1;
                }
                // Or what was taught is too much beside it: that can wait.
                Err(LinkError::Refused { status: NEVER | TOO_MUCH, error, .. })
                    if !envelope.lessons.is_empty() =>
                {
                    tracing::warn!(error, "a report goes without what was taught");
                    lessons.clear();
                }
                // A controller of this version will take it; what another agent has left behind, none that this one can speak to.
                Err(LinkError::Refused { status, error, .. })
                    if status == NEVER
                        || status == TOO_MUCH
                        || (status == OTHER_VERSION
                            && envelope.reports.iter().all(|report| report.version != report::VERSION)) =>
                {
                    tracing::error!(error, "the controller does not take a report");
                    match envelope.reports.first() {
                        Some(report) => self.spool.set_aside(report.sequence),
                        None => return,
                    }
                }
                Err(error) => {
                    // Said once, and again when it is another reason.
                    let error = crate::writer::chain(&error);
                    if self.unreached.as_ref() != Some(&error) {
                        tracing::warn!(error, "going on alone; reports are kept");
                    }
                    self.unreached = Some(error);
                    return;
                }
            }
        }
        self.not_before = None;
    }
}

/// Orders on the agent's side: which are taken, and what became of them.
#[derive(Debug)]
pub struct Orders {
    ledger: Ledger,
    path: PathBuf,
    /// Migrations that were ordered and go on.
    going: BTreeMap<InstanceName, Token>,
    outcomes: Vec<OrderOutcome>,
}

impl Orders {
    /// Goes on with what was taken before, as kept in this file.
    ///
    /// # Errors
    ///
    /// If it is there and can't be read: an order might be carried out twice.
    pub fn open(path: &Path) -> io::Result<Self> {
        let ledger = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ledger::default(),
            Err(error) => return Err(error),
        };
        let (going, outcomes) = Default::default();
        Ok(Self { ledger, path: path.to_owned(), going, outcomes })
    }

    /// What is to be done for an order: nothing if it came before, too late, or was overtaken, or where the agent only observes.
    pub fn take(
        &mut self,
        order: Order,
        host: &HostName,
        acts: bool,
        now: UnixMillis,
    ) -> Option<(Token, Action)> {
        let refused = |error: String| Some(OrderResult::Refused { error });
        let result = if !acts {
            refused("this agent observes only (agent.mode)".to_owned())
        } else {
            match self.ledger.take(&order, host, now) {
                // What was taken is known before it is begun: else it might be begun again.
                Ok(()) => {
                    match serde_json::to_vec(&self.ledger).map(|text| spool::write(&self.path, &text)) {
                        Ok(Ok(())) => None,
                        Ok(Err(error)) => {
                            refused(format!("it can't be noted in {}: {error}", self.path.display()))
                        }
                        Err(error) => refused(format!("it can't be noted: {error}")),
                    }
                }
                // Its outcome is on its way already.
                Err(Refusal::Repeated) => return None,
                Err(refusal) => refused(refusal.to_string()),
            }
        };
        match result {
            Some(result) => {
                tracing::info!(?order, ?result, "an order is not carried out");
                self.outcomes.push(OrderOutcome { token: order.token, result });
                None
            }
            None => {
                tracing::info!(?order, "an order is taken");
                Some((order.token, order.action))
            }
        }
    }

    /// A migration was begun for an order: [`Orders::moved`] says how it ended.
    pub fn going(&mut self, instance: InstanceName, token: Token) {
        self.going.insert(instance, token);
    }

    /// Whose migrations were begun for an order, and have not ended as far as [`Orders::moved`] was told.
    pub fn under_way(&self) -> impl Iterator<Item = &InstanceName> {
        self.going.keys()
    }

    /// A migration has ended, whoever wanted it.
    pub fn moved(&mut self, instance: &InstanceName, error: Option<String>) {
        if let Some(token) = self.going.remove(instance) {
            self.ended(token, error.map_or(OrderResult::Done, |error| OrderResult::Failed { error }));
        }
    }

    /// What became of an order.
    pub fn ended(&mut self, token: Token, result: OrderResult) {
        self.outcomes.push(OrderOutcome { token, result });
    }

    /// Takes out what the next report has to say.
    pub fn outcomes(&mut self) -> Vec<OrderOutcome> {
        std::mem::take(&mut self.outcomes)
    }
}
