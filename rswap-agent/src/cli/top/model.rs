//! What is shown, and what keys do to it.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, VecDeque},
};

use ratatui::{
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    widgets::TableState,
};

use super::span::Shown;
use crate::{
    forecast::{Evidence, Resource},
    instance::InstanceName,
    profile::Profile,
    status::{Distribution, DistributionsOf, InstanceView},
    units::UnixMillis,
};

/// How many windows are remembered.
const REMEMBERED: usize = 60;

/// The key that changes over how long the times are that are shown.
pub(super) const SPAN_KEY: char = 's';

/// By what instances are ordered, the largest first; by name the first first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    Name,
    Cores,
    Wait,
    Io,
    Net,
    Memory,
}

impl Order {
    /// Each with its key and what it is called.
    pub(super) const ALL: [(Self, char, &'static str); 6] = [
        (Self::Name, 'n', "name"),
        (Self::Cores, 'c', "cores"),
        (Self::Wait, 'w', "wait"),
        (Self::Io, 'i', "I/O"),
        (Self::Net, 't', "net"),
        (Self::Memory, 'm', "memory"),
    ];

    fn measure(self, view: &InstanceView) -> f64 {
        let Some(profile) = &view.profile else { return -1.0 };
        match self {
            Self::Name => 0.0,
            Self::Cores => profile.cpu.cores,
            Self::Wait => profile.cpu.run_queue_ns.quantile(0.99).unwrap_or(0) as f64,
            Self::Io => profile.io_bytes_per_s().unwrap_or(0.0),
            Self::Net => profile.net_bytes_per_s().map_or(0.0, |(inwards, outwards)| inwards + outwards),
            Self::Memory => profile.memory.resident_bytes as f64,
        }
    }
}

/// What was seen of an instance, oldest first; nothing where nothing was told.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct History {
    /// Cores in use.
    pub(super) cores: VecDeque<Option<f64>>,
    /// What 99 in 100 waits for a core did not exceed, in nanoseconds.
    pub(super) wait_p99_ns: VecDeque<Option<f64>>,
    /// The same of block I/O.
    pub(super) io_p99_ns: VecDeque<Option<f64>>,
    /// End of the last window that is in it.
    at: UnixMillis,
}

impl History {
    fn add(&mut self, profile: &Profile) {
        // The agent may be asked more often than it looks.
        if profile.at == self.at {
            return;
        }
        self.at = profile.at;
        let quantile = |value: Option<u64>| value.map(|ns| ns as f64);
        for (values, value) in [
            (&mut self.cores, Some(profile.cpu.cores)),
            (&mut self.wait_p99_ns, quantile(profile.cpu.run_queue_ns.quantile(0.99))),
            (&mut self.io_p99_ns, quantile(profile.io_latency_ns().quantile(0.99))),
        ] {
            values.push_back(value);
            if values.len() > REMEMBERED {
                values.pop_front();
            }
        }
    }
}

/// What a key leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    GoOn,
    /// What is to be shown now has to be asked for.
    Ask,
    End,
}

/// All that is known and chosen.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// As the agent told of them.
    told: Vec<InstanceView>,
    /// The same with the times of what is shown.
    views: Vec<InstanceView>,
    distributions: BTreeMap<InstanceName, Vec<Distribution>>,
    pub(super) shown: Shown,
    histories: BTreeMap<InstanceName, History>,
    pub(super) at: UnixMillis,
    /// Why the last answer is missing.
    pub(super) lost: Option<String>,
    pub(super) order: Order,
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) typing: bool,
    /// Which instance is looked at closely.
    opened: Option<InstanceName>,
    /// How far that is scrolled down, in lines.
    pub(super) scrolled: u16,
    /// Which instance is chosen. It stays so wherever it comes to stand.
    chosen: Option<InstanceName>,
    pub(super) table: TableState,
}

impl Model {
    /// Takes in an answer of the agent: its instances, and the distributions that were asked for.
    pub(super) fn take(
        &mut self,
        views: Vec<InstanceView>,
        distributions: Vec<DistributionsOf>,
        at: UnixMillis,
    ) {
        let is_there = |name: &InstanceName| views.iter().any(|view| view.instance.name == *name);
        self.histories.retain(|name, _| is_there(name));
        self.distributions.extend(distributions.into_iter().map(|of| (of.name, of.distributions)));
        self.distributions.retain(|name, _| is_there(name));
        for view in &views {
            if let Some(profile) = &view.profile {
                self.histories.entry(view.instance.name.clone()).or_default().add(profile);
            }
        }
        (self.told, self.at, self.lost) = (views, at, None);
        self.put_times();
    }

    fn put_times(&mut self) {
        self.views.clone_from(&self.told);
        for view in &mut self.views {
            let distributions = self.distributions.get(&view.instance.name);
            if let Some(profile) = &mut view.profile {
                self.shown.put(profile, distributions.map_or(&[], Vec::as_slice));
            }
        }
    }

    /// Where the agent tells the times that are shown, if not with its instances.
    pub(super) fn distributions_wanted(&self) -> Option<String> {
        let route = "/v1/distributions";
        match (self.shown, &self.opened) {
            (Shown::Window, _) => None,
            (_, Some(one)) => Some(format!("{route}?instance={one}")),
            (_, None) => Some(route.to_owned()),
        }
    }

    /// The agent did not answer.
    pub(super) fn lose(&mut self, why: String) {
        self.lost = Some(why);
    }

    /// How many instances there are.
    pub(super) fn count(&self) -> usize {
        self.views.len()
    }

    /// Those that are listed, in order.
    pub(super) fn listed(&self) -> Vec<&InstanceView> {
        let wanted = self.filter.to_lowercase();
        let mut listed: Vec<&InstanceView> =
            self.views.iter().filter(|view| matches(view, &wanted)).collect();
        listed.sort_by(|a, b| {
            let measure = |view: &InstanceView| self.order.measure(view);
            let by_measure = measure(b).partial_cmp(&measure(a)).unwrap_or(Ordering::Equal);
            by_measure.then_with(|| a.instance.name.cmp(&b.instance.name))
        });
        listed
    }

    /// Where the chosen one is listed.
    pub(super) fn chosen_at(&self) -> Option<usize> {
        let listed = self.listed();
        let chosen = self.chosen.as_ref()?;
        listed.iter().position(|view| view.instance.name == *chosen)
    }

    /// What was seen of an instance.
    pub(super) fn history(&self, name: &InstanceName) -> History {
        self.histories.get(name).cloned().unwrap_or_default()
    }

    /// The one that is looked at closely, if it is there.
    pub(super) fn opened(&self) -> Option<&InstanceView> {
        let opened = self.opened.as_ref()?;
        self.views.iter().find(|view| view.instance.name == *opened)
    }

    /// Does what a key asks for.
    pub(super) fn press(&mut self, key: KeyEvent) -> Then {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Then::End;
        }
        match key.code {
            _ if self.typing => self.type_filter(key.code),
            KeyCode::Char('q') | KeyCode::Esc if self.opened.is_some() => self.opened = None,
            KeyCode::Char('q') => return Then::End,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::PageDown => self.go(10),
            KeyCode::PageUp => self.go(-10),
            KeyCode::Char(SPAN_KEY) => {
                self.shown = self.shown.next();
                self.put_times();
                return Then::Ask;
            }
            _ if self.opened.is_some() => {}
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Enter => {
                self.opened =
                    self.chosen.clone().or_else(|| Some(self.listed().first()?.instance.name.clone()));
                self.scrolled = 0;
            }
            KeyCode::Char(pressed) => {
                let order = Order::ALL.iter().find(|(_, key, _)| *key == pressed);
                self.order = order.map_or(self.order, |(order, ..)| *order);
            }
            _ => {}
        }
        Then::GoOn
    }

    fn type_filter(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => (self.typing, self.filter) = (false, String::new()),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(typed) => self.filter.push(typed),
            _ => {}
        }
    }

    fn go(&mut self, by: i16) {
        if self.opened.is_some() {
            self.scrolled = self.scrolled.saturating_add_signed(by);
            return;
        }
        let last = self.listed().len().saturating_sub(1);
        let to = match self.chosen_at() {
            Some(at) => at.saturating_add_signed(by.into()).min(last),
            None if by < 0 => last,
            None => 0,
        };
        self.chosen = self.listed().get(to).map(|view| view.instance.name.clone());
    }
}

/// Whether an instance's name, pool or labels have `wanted` in them.
fn matches(view: &InstanceView, wanted: &str) -> bool {
    let labels = view.instance.labels.iter().map(|(key, value)| format!("{key}={value}"));
    let words = [view.instance.name.to_string()].into_iter().chain(view.instance.pool.clone()).chain(labels);
    words.into_iter().any(|word| word.to_lowercase().contains(wanted))
}

/// What is forecast of an instance's cores at the nearest horizon: the p95, and whether it may be relied on.
pub(super) fn cores_forecast(view: &InstanceView) -> Option<(f64, bool)> {
    let points = view.demand.as_ref()?.points.iter().filter(|point| point.resource == Resource::Cpu);
    let nearest = points.min_by_key(|point| point.horizon_ms)?;
    Some((nearest.need.p95, matches!(nearest.evidence, Evidence::Enough { .. })))
}
