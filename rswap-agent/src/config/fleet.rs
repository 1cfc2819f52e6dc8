//! `[controller]`: where an agent reports; `[fleet]`: what a controller is.

use std::{net::SocketAddr, path::PathBuf};

use rswap_controller::link::Whereabouts;
use rswap_fleet::{amounts::Tier, report::Limits};
use rswap_trust::Name;
use rswap_types::bounds::{positive_integer, positive_u32};
use serde::{Deserialize, Serialize};

use super::{Mode, tls::ControllerTls};

/// `[controller]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ControllerConfig {
    /// Where the fleet's controller is: `HOST:PORT`, or `unix:/PATH` on its own host. Not set: this agent is in no fleet.
    pub address: Option<Whereabouts>,
    /// What its certificate names [default: the HOST of `address`, if that is no number].
    pub certificate_name: Option<Name>,
    /// How often it is reported to, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub report_every_ms: u64,
    /// Directory of what is kept for it: reports that it does not have yet, orders that were taken, what others have taught.
    pub spool: PathBuf,
    /// Reports take so much room at most, in MiB: past that, the oldest go.
    #[serde(deserialize_with = "positive_integer")]
    pub spool_mib: u64,
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            address: None,
            certificate_name: None,
            report_every_ms: 10_000,
            spool: "/var/lib/rswap/spool".into(),
            spool_mib: 64,
        }
    }
}

/// Who has to be at `at`, a controller on the network: `named`, or what it is called there. `None`: a number is no name.
pub fn controller_name(at: &str, named: Option<&Name>) -> Option<Name> {
    let called = || at.parse().ok().filter(|_| at.parse::<std::net::IpAddr>().is_err());
    named.cloned().or_else(called)
}

/// `[fleet]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FleetConfig {
    /// The socket for whoever is root on the controller's host, and for that host's agent.
    pub socket: PathBuf,
    /// Where agents of other hosts come, and operators; it needs `tls`. Not set: nobody comes over the network.
    pub listen: Option<SocketAddr>,
    /// What is shown there, and who is let in.
    pub tls: Option<ControllerTls>,
    /// What is kept.
    pub file: PathBuf,
    /// Where each call that says what is wanted is written down [default: beside `file`, with `.audit.jsonl` at its end].
    pub audit_log: Option<PathBuf>,
    /// A longer one is begun anew, and the one before is kept, in KiB.
    #[serde(deserialize_with = "positive_integer")]
    pub audit_kib: u64,
    /// Plan only, or give orders.
    pub mode: Mode,
    /// How often agents report, in milliseconds: who has not for three times as long is away.
    #[serde(deserialize_with = "positive_integer")]
    pub report_every_ms: u64,
    /// How often it is planned, in milliseconds.
    #[serde(deserialize_with = "positive_integer")]
    pub plan_every_ms: u64,
    /// How long history is kept with a row per report, in hours.
    #[serde(deserialize_with = "positive_integer")]
    pub reports_kept_h: u64,
    /// How long with a row per minute, in hours.
    #[serde(deserialize_with = "positive_integer")]
    pub minutes_kept_h: u64,
    /// How long with a row per hour, in hours.
    #[serde(deserialize_with = "positive_integer")]
    pub hours_kept_h: u64,
    /// What is taken of a host.
    pub limits: LimitsConfig,
}

/// `[fleet.limits]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// The body of a call, in MiB. What is kept while the controller is away comes in bodies of 4 MiB, or of one report.
    #[serde(deserialize_with = "positive_integer")]
    pub body_mib: u64,
    /// Instances in one report; a report with more is refused, and set aside by its agent.
    #[serde(deserialize_with = "positive_integer")]
    pub instances: u64,
    /// Links in one report that were measured since the one before.
    #[serde(deserialize_with = "positive_integer")]
    pub links: u64,
    /// Classes in one call of which something was taught.
    #[serde(deserialize_with = "positive_integer")]
    pub lessons: u64,
    /// Reports in a second, over time. Who brings more has to wait (429); agents keep theirs meanwhile.
    #[serde(deserialize_with = "positive_u32")]
    pub reports_per_s: u32,
    /// Reports that may come at once, of what was saved by reporting less often: what was kept while the controller was away.
    #[serde(deserialize_with = "positive_u32")]
    pub reports_at_once: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let Limits { body_bytes, instances, links, lessons, reports_per_s, reports_at_once } =
            Limits::default();
        let [body_mib, instances, links, lessons] =
            [body_bytes >> 20, instances, links, lessons].map(|most| most as u64);
        Self { body_mib, instances, links, lessons, reports_per_s, reports_at_once }
    }
}

impl LimitsConfig {
    /// The same, as the controller has it.
    pub fn limits(&self) -> Limits {
        let most = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Limits {
            body_bytes: most(self.body_mib.saturating_mul(1 << 20)),
            instances: most(self.instances),
            links: most(self.links),
            lessons: most(self.lessons),
            reports_per_s: self.reports_per_s,
            reports_at_once: self.reports_at_once,
        }
    }
}

impl Default for FleetConfig {
    fn default() -> Self {
        let [reports, minutes, hours] = rswap_store::TIERS.map(|tier| tier.kept_ms / HOUR_MS);
        Self {
            socket: "/run/rswap/controller.sock".into(),
            listen: None,
            tls: None,
            file: "/var/lib/rswap/fleet".into(),
            audit_log: None,
            audit_kib: 16 << 10,
            mode: Mode::default(),
            report_every_ms: 10_000,
            plan_every_ms: 30_000,
            reports_kept_h: reports,
            minutes_kept_h: minutes,
            hours_kept_h: hours,
            limits: LimitsConfig::default(),
        }
    }
}

const HOUR_MS: u64 = 3_600_000;

impl FleetConfig {
    /// Where the audit log is.
    pub fn audit_log(&self) -> PathBuf {
        self.audit_log.clone().unwrap_or_else(|| {
            let mut beside = self.file.clone().into_os_string();
            beside.push(".audit.jsonl");
            beside.into()
        })
    }

    /// The history's tiers, the finest first.
    pub fn tiers(&self) -> [Tier; 3] {
        let kept = [self.reports_kept_h, self.minutes_kept_h, self.hours_kept_h];
        let mut tiers = rswap_store::TIERS;
        for (tier, hours) in tiers.iter_mut().zip(kept) {
            tier.kept_ms = hours.saturating_mul(HOUR_MS);
        }
        tiers
    }
}
