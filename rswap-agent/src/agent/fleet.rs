//! This host as a member of a fleet: reports go to the controller, what it answers is taken in, and orders are carried out by the calls
//! that a person has, too. Without an answer, the agent goes on alone.

use std::{collections::BTreeMap, fs, io, path::PathBuf, sync::Arc};

use rswap_audit::{Audit, Entry, Outcome, Who};
use rswap_controller::{
    link::{Connect, Secure, Whereabouts},
    reporter::{Answered, Orders, Outgoing, Reporter},
};
use rswap_fleet::{
    Action, HostName, InstanceReport, LinkMeasured, Order, Report, Running,
    inventory::AWAY_INTERVALS,
    model::{Revision, Teaching},
    orders::OrderResult,
    report::{self, Used},
};
use rswap_trust::{Credentials, Name};
use tokio::sync::mpsc::UnboundedSender;

use super::wiring::Wiring;
use crate::{
    config::{Config, Mode, controller_name},
    control::{DrainRequest, MigrateRequest},
    forecast::{Forecaster, Lessons, Part, Usage},
    instance::InstanceName,
    migrate::journal,
    plan::InstanceView,
    pool::{Pool, PoolKind},
    units::UnixMillis,
};

/// Parts of what was taught that are handed in with one report.
const PARTS_AT_ONCE: usize = 8;

/// What this agent is in a fleet.
pub(super) struct Membership {
    host: HostName,
    running: Option<Running>,
    reporter: Reporter,
    orders: Orders,
    used: Used,
    teaching: Teaching,
    learnt: Learnt,
    links: Vec<LinkMeasured>,
    last: UnixMillis,
    /// When the controller last said that it places instances.
    places: Option<UnixMillis>,
    /// Who orders, as the audit log has it.
    orderer: Who,
    audit: Audit,
    /// Of migrations that were ordered and go on.
    noted: BTreeMap<InstanceName, Entry>,
}

/// What other hosts have taught: this host's copy, for when the controller is away.
struct Learnt {
    file: PathBuf,
    knows: Revision,
    parts: BTreeMap<Part, Lessons>,
}

/// The way to the controller, and what that is called in the audit log.
fn connect(config: &Config, address: Whereabouts, host: &HostName) -> io::Result<(Box<dyn Connect>, String)> {
    let (at, port) = match address {
        Whereabouts::Socket(address) => {
            let said = format!("the controller at {address}");
            return Ok((Box::new(address), said));
        }
        Whereabouts::Network { host, port } => (host, port),
    };
    let text = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
    let files = config.tls.files().ok_or_else(|| {
        text(format!(
            "the controller at {at}:{port} is not spoken to without a certificate: set tls.ca, tls.certificate and tls.key"
        ))
    })?;
    let name = controller_name(&at, config.controller.certificate_name.as_ref()).ok_or_else(|| {
        text(format!("no certificate names {at}: set controller.certificate_name to the controller's name"))
    })?;
    let own = Credentials::open(files).map_err(io::Error::other)?;
    let identity = own.current().0.identity.clone();
    if identity.name.as_str() != host.as_str() {
        return Err(text(format!(
            "tls.certificate is {identity}, and this host is {host} (agent.host): the controller takes no report of {host} from it"
        )));
    }
    let said = format!("the controller {name} at {at}:{port}");
    Ok((Box::new(Secure { host: at, port, name, own: Arc::new(own) }), said))
}

impl Membership {
    /// `None` where the configuration names no controller.
    pub(super) fn start(
        config: &Config,
        forecaster: &mut Forecaster,
        answered: UnboundedSender<Answered>,
        audit: Audit,
    ) -> io::Result<Option<Self>> {
        let Some(address) = config.controller.address.clone() else { return Ok(None) };
        let host: HostName = config.agent.host.parse().map_err(io::Error::other)?;
        let (connect, controller) = connect(config, address, &host)?;
        let directory = &config.controller.spool;
        let most_bytes = config.controller.spool_mib.saturating_mul(1 << 20);
        let reporter = Reporter::start(connect, directory, most_bytes, answered)?;
        let mut member = Self {
            host,
            running: Some(Running {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                boot: journal::boot_id()?,
            }),
            reporter,
            orders: Orders::open(&directory.join("orders"))?,
            used: Used::default(),
            teaching: Teaching::default(),
            learnt: Learnt::open(directory.join("learnt")),
            links: Vec::new(),
            last: UnixMillis(0),
            places: None,
            orderer: Who { peer: Some(controller), ..Who::default() },
            audit,
            noted: BTreeMap::new(),
        };
        member.learnt.tell(forecaster);
        Ok(Some(member))
    }

    /// Takes in a window.
    pub(super) fn window(&mut self, instance: &InstanceName, usage: &Usage) {
        self.used.window(instance, usage);
    }

    /// A migration has ended.
    pub(super) fn migrated(
        &mut self,
        instance: &InstanceName,
        error: Option<String>,
        link: Option<LinkMeasured>,
    ) {
        if let Some(entry) = self.noted.remove(instance) {
            entry.end(error.clone().map_or(Outcome::Done, Outcome::Failed));
        }
        self.orders.moved(instance, error);
        self.links.extend(link);
    }

    /// Writes down that an order is about to be carried out.
    fn note(&self, order: &Order) -> io::Result<Entry> {
        let call = match order.action {
            Action::Drain { .. } => "order drain",
            Action::Migrate { .. } => "order migrate",
        };
        self.audit.begin(&self.orderer, call, &serde_json::to_vec(order)?)
    }

    /// Whether the controller places instances at the moment: then this host's own plan does not.
    pub(super) fn is_placed_by_fleet(&self, config: &Config, now: UnixMillis) -> bool {
        let within_ms = config.controller.report_every_ms.saturating_mul(AWAY_INTERVALS);
        self.places.is_some_and(|at| now.since(at) <= within_ms)
    }
}

impl Learnt {
    fn open(file: PathBuf) -> Self {
        let kept = fs::read(&file)
            .ok()
            .and_then(|text| serde_json::from_slice::<(Revision, Vec<(Part, Lessons)>)>(&text).ok());
        // What can't be read is told again.
        let (knows, parts) = kept.unwrap_or_default();
        Self { file, knows, parts: parts.into_iter().collect() }
    }

    fn keep(&self) {
        let parts: Vec<_> = self.parts.iter().collect();
        let kept = serde_json::to_vec(&(self.knows, parts)).map_err(io::Error::other);
        let half = self.file.with_extension("new");
        let kept = kept.and_then(|text| fs::write(&half, text)).and_then(|()| fs::rename(&half, &self.file));
        if let Err(error) = kept {
            tracing::warn!(%error, file = %self.file.display(), "what others have taught could not be kept");
        }
    }

    fn tell(&mut self, forecaster: &mut Forecaster) {
        let mut all = forecaster.no_lessons();
        self.parts.retain(|part, lessons| match all.merge(lessons) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(?part, %error, "what others have taught is of no use here");
                false
            }
        });
        if let Err(error) = forecaster.learn_from_fleet(all) {
            tracing::warn!(%error, "what others have taught is of no use here");
        }
    }
}

impl Wiring {
    /// Reports, if it is time.
    pub(super) fn report(&mut self, views: &[InstanceView], pools: &[Pool], now: UnixMillis) {
        let Some(member) = &mut self.member else { return };
        if now.since(member.last) < self.config.controller.report_every_ms {
            return;
        }
        member.last = now;
        // Those that ended in doubt, when that is over.
        let over =
            |name: &&InstanceName| !self.moving.contains_key(*name) && !self.in_doubt.contains_key(*name);
        let over: Vec<InstanceName> = member.orders.under_way().filter(over).cloned().collect();
        for name in over {
            let is_here = self.known.contains_key(&name);
            let error = is_here.then(|| "it was in doubt, and has stayed".to_owned());
            member.migrated(&name, error, None);
        }
        let instances = views.iter().map(|view| InstanceReport {
            view: report::view_for_fleet(view),
            kin: self.forecaster.kin(&view.instance).cloned().unwrap_or_default(),
            used: member.used.take(&view.instance),
        });
        let report = Report {
            version: report::VERSION,
            host: member.host.clone(),
            // The spool's to give.
            epoch: 0,
            sequence: 0,
            dropped: 0,
            at: now,
            acts: self.config.agent.mode == Mode::Act,
            address: self.config.migrate.listen.filter(|address| !address.ip().is_unspecified()),
            running: member.running.clone(),
            pools: report::pools_for_fleet(pools),
            instances: instances.collect(),
            gone: member.used.take_rest(),
            links: std::mem::take(&mut member.links),
            outcomes: member.orders.outcomes(),
        };
        let lessons = member.teaching.due(&self.forecaster.lessons(), now, PARTS_AT_ONCE);
        let leads = (self.config.agent.window_ms, self.config.forecast.horizons_ms.clone());
        member.reporter.report(Outgoing { report, lessons, knows: member.learnt.knows, leads });
    }

    /// Takes in what the controller has answered.
    pub(super) fn answered(&mut self, answered: Answered) {
        let now = UnixMillis::now();
        let Some(member) = &mut self.member else { return };
        let Answered { answer, told } = answered;
        if answer.knows.life != member.learnt.knows.life {
            // Another life may have lost what was taught.
            member.teaching.forget();
        }
        member.teaching.told(&told, now);
        let changed = member.learnt.knows != answer.knows;
        member.learnt.knows = answer.knows;
        if !answer.lessons.is_empty() {
            member.learnt.parts.extend(answer.lessons);
            member.learnt.tell(&mut self.forecaster);
        }
        if changed {
            member.learnt.keep();
        }
        member.places = answer.places.then_some(now);
        for order in answer.orders {
            self.order(order, now);
        }
    }

    fn order(&mut self, order: Order, now: UnixMillis) {
        let acts = self.config.agent.mode == Mode::Act;
        let Some(member) = &mut self.member else { return };
        let Some((token, action)) = member.orders.take(order.clone(), &member.host, acts, now) else {
            return;
        };
        let entry = match member.note(&order) {
            Ok(entry) => entry,
            Err(error) => {
                let error = format!("the audit log can't be written: {error}");
                tracing::error!(?order, error, "an order is not carried out");
                member.orders.ended(token, OrderResult::Refused { error });
                return;
            }
        };
        let result = match action {
            Action::Drain { pool, undo } => match self.drain(DrainRequest { pool, undo }) {
                Ok(_) => OrderResult::Done,
                Err(error) => OrderResult::Failed { error: error.to_string() },
            },
            Action::Migrate { instance, to, address } => {
                let is_it = |pool: &&Pool| pool.kind == PoolKind::Host { address };
                let known = self.pools.iter().find(is_it).map(|pool| pool.name.clone());
                tracing::info!(%instance, %to, %address, "ordered to migrate");
                // Whom the order means has to be there, unless the configuration says who is.
                let whose = if known.is_none() && self.recovery.links.are_secure() {
                    to.as_str().parse::<Name>().map(Some)
                } else {
                    Ok(None)
                };
                let host = known.unwrap_or_else(|| address.to_string());
                let request = MigrateRequest { instance: instance.clone(), host, stop_and_copy: false };
                let started = whose.map_err(|error| format!("{to} is in no certificate: {error}"));
                let started = started.and_then(|whose| {
                    self.start_migration(request, whose, None).map_err(|(error, _)| error.to_string())
                });
                match started {
                    Ok(()) => {
                        if let Some(member) = &mut self.member {
                            member.noted.insert(instance.clone(), entry);
                            member.orders.going(instance, token);
                        }
                        return;
                    }
                    Err(error) => OrderResult::Failed { error },
                }
            }
        };
        entry.end(match &result {
            OrderResult::Done => Outcome::Done,
            OrderResult::Failed { error } | OrderResult::Refused { error } => Outcome::Failed(error.clone()),
        });
        if let Some(member) = &mut self.member {
            member.orders.ended(token, result);
        }
    }
}
