//! How it looks.

use std::collections::{BTreeMap, VecDeque};

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Style, Stylize as _},
    symbols::bar,
    text::{Line, Span},
    widgets::{Block, Paragraph, Row, Table},
};
use rswap_common::histogram::bounds_of;

use super::{
    super::table::{bytes, nanoseconds, or_dash},
    model::{Model, Order, SPAN_KEY, cores_forecast},
};
use crate::{
    forecast::{Evidence, Resource},
    profile::{BlockProfile, OffCpuReason, Operation, Profile, UsedWithin, Who, histogram::Histogram},
    status::InstanceView,
};

/// Windows of a curve in the list.
const CURVE: usize = 16;
/// Longest bar of a histogram, in characters.
const BAR: u64 = 40;
const HEADER: [&str; 13] = [
    "NAME",
    "POOL",
    "CORES",
    "P95 AHEAD",
    "",
    "WAIT P50",
    "P99",
    "",
    "I/O P99",
    "I/O/S",
    "NET/S",
    "MEMORY",
    "IN SWAP",
];

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model) {
    let [top, middle, bottom] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(title(model), top);
    match model.opened() {
        Some(view) => {
            let lines = closely(model, view);
            frame.render_widget(
                Paragraph::new(lines).scroll((model.scrolled, 0)).block(Block::bordered()),
                middle,
            );
        }
        None => list(frame, model, middle),
    }
    frame.render_widget(Line::from(help(model)).dim(), bottom);
}

fn title(model: &Model) -> Line<'static> {
    if let Some(why) = &model.lost {
        return Line::from(format!("the agent does not answer; this is old: {why}")).red();
    }
    let order = Order::ALL.iter().find(|(order, ..)| *order == model.order).map_or("", |(.., name)| name);
    let mut words = vec![
        Span::from(format!("rswap: {} instances by {order}", model.count())).bold(),
        Span::from(format!("  times of the last {}", model.shown.name())),
    ];
    if model.typing || !model.filter.is_empty() {
        words.push(Span::from(format!("  filter: {}{}", model.filter, if model.typing { "_" } else { "" })));
    }
    Line::from(words)
}

fn help(model: &Model) -> String {
    if model.opened().is_some() {
        return format!("up/down: scroll  esc: back  {}", span_help(model));
    }
    if model.typing {
        return "a part of a name, pool or label  enter: done  esc: all".to_owned();
    }
    let orders: Vec<String> = Order::ALL.iter().map(|(_, key, name)| format!("{key}: {name}")).collect();
    format!("q: end  up/down, enter: look closely  /: filter  {}  by {}", span_help(model), orders.join(" "))
}

fn span_help(model: &Model) -> String {
    format!("{SPAN_KEY}: last {}", model.shown.next().name())
}

fn list(frame: &mut Frame<'_>, model: &mut Model, area: Rect) {
    let widths = [20, 10, 6, 9, CURVE as u16, 9, 9, CURVE as u16, 9, 10, 10, 10, 10].map(Constraint::Length);
    let rows: Vec<Row<'_>> = model.listed().into_iter().map(|view| Row::new(row(model, view))).collect();
    let table = Table::new(rows, widths)
        .header(Row::new(HEADER).style(Style::new().bold()))
        .row_highlight_style(Style::new().reversed());
    let chosen = model.chosen_at();
    model.table.select(chosen);
    frame.render_stateful_widget(table, area, &mut model.table);
}

fn row(model: &Model, view: &InstanceView) -> [String; HEADER.len()] {
    let profile = view.profile.as_ref();
    let history = model.history(&view.instance.name);
    let wait = |q| profile.and_then(|p| p.cpu.run_queue_ns.quantile(q)).map(|ns| nanoseconds(ns as f64));
    let ahead =
        cores_forecast(view).map(|(cores, sure)| format!("{cores:.2}{}", if sure { "" } else { "?" }));
    [
        view.instance.name.to_string(),
        or_dash(view.instance.pool.clone()),
        or_dash(profile.map(|p| format!("{:.2}", p.cpu.cores))),
        or_dash(ahead),
        curve(&history.cores, CURVE),
        or_dash(wait(0.5)),
        or_dash(wait(0.99)),
        curve(&history.wait_p99_ns, CURVE),
        or_dash(profile.and_then(|p| p.io_latency_ns().quantile(0.99)).map(|ns| nanoseconds(ns as f64))),
        or_dash(profile.and_then(Profile::io_bytes_per_s).map(bytes)),
        or_dash(
            profile.and_then(Profile::net_bytes_per_s).map(|(inwards, outwards)| bytes(inwards + outwards)),
        ),
        or_dash(profile.map(|p| bytes(p.memory.resident_bytes as f64))),
        or_dash(view.in_swap.as_ref().map(|seen| bytes(seen.swapped_bytes as f64))),
    ]
}

/// What is known of its memory's use.
fn memory_lines(lines: &mut Vec<Line<'static>>, profile: &Profile) {
    if let Some(faults) = profile.memory.faults {
        let refaults = or_dash(profile.memory.refaults.map(|pages| pages.to_string()));
        let (minor, major) = (faults.minor, faults.major);
        lines.push(Line::from(format!("  faults: {minor} minor  {major} major  fetched again: {refaults}")));
    }
    if let Some(of) = &profile.memory.fault_latency {
        let none = VecDeque::new();
        distribution(lines, "page faults that waited", &of.major_ns, nanoseconds, &none);
        if let Some(minor) = &of.minor_ns {
            distribution(lines, "page faults served from memory", minor, nanoseconds, &none);
        }
    }
    for (what, ages) in [("used", &profile.memory.ages), ("written", &profile.memory.written_ages)] {
        let Some(ages) = ages else { continue };
        let within = |of: &UsedWithin| format!("{} s {}", of.span_s, bytes(of.bytes as f64));
        let spans: Vec<String> = ages.used.iter().map(within).collect();
        lines.push(Line::from(format!("  {what} within {}", spans.join("  "))));
    }
}

/// The last `width` values as a line of bars, the largest of them as high as can be; a space where nothing was told.
fn curve(values: &VecDeque<Option<f64>>, width: usize) -> String {
    let last = values.iter().skip(values.len().saturating_sub(width));
    let largest = last.clone().flatten().copied().fold(0.0, f64::max);
    let bars = bar::NINE_LEVELS;
    let levels = [
        bars.one_eighth,
        bars.one_quarter,
        bars.three_eighths,
        bars.half,
        bars.five_eighths,
        bars.three_quarters,
        bars.seven_eighths,
        bars.full,
    ];
    let level = |value: f64| match largest > 0.0 {
        true => (value / largest * (levels.len() - 1) as f64).round() as usize,
        false => 0,
    };
    last.map(|value| value.map_or(" ", |value| levels[level(value).min(levels.len() - 1)])).collect()
}

/// Everything about one instance.
fn closely(model: &Model, view: &InstanceView) -> Vec<Line<'static>> {
    let instance = &view.instance;
    let history = model.history(&instance.name);
    let mut lines = vec![
        Line::from(format!("{}  {}", instance.name, instance.command.join(" "))).bold(),
        Line::from(format!(
            "pool {}  uplink {}",
            or_dash(instance.pool.clone()),
            or_dash(instance.uplink.clone()),
        )),
    ];
    let Some(profile) = &view.profile else {
        lines.push(Line::from("not measured yet"));
        return lines;
    };
    lines.push(Line::from(format!("cores {:.2} {}", profile.cpu.cores, curve(&history.cores, usize::MAX))));
    lines.push(pressures(profile));
    distribution(
        &mut lines,
        "waiting for a core",
        &profile.cpu.run_queue_ns,
        nanoseconds,
        &history.wait_p99_ns,
    );
    distribution(&mut lines, "on a core", &profile.cpu.on_cpu_ns, nanoseconds, &VecDeque::new());
    let on_class = profile.cpu.by_class.iter().map(|on| {
        let cores = on.ran_ns as f64 / (profile.window_ms.max(1) as f64 * 1e6);
        format!("  {} {cores:.2}", on.class)
    });
    lines.push(Line::from(format!(
        "  went to another core {} times{}",
        or_dash(profile.cpu.migrations.map(|times| times.to_string())),
        on_class.collect::<String>()
    )));
    if let Some(off) = &profile.cpu.off_cpu {
        lines.push(Line::from("off the CPU, over all threads").bold());
        for (reason, times) in off.by_reason().into_iter().filter(|(_, times)| times.count > 0) {
            let what = match reason {
                OffCpuReason::Sleep => "asleep",
                OffCpuReason::IoWait => "waiting for I/O",
                OffCpuReason::Blocked => "blocked",
                OffCpuReason::Stopped => "stopped",
            };
            distribution(&mut lines, what, times, nanoseconds, &VecDeque::new());
        }
    }
    waited_for(&mut lines, profile);
    for block in &profile.block {
        block_lines(&mut lines, block, profile.window_ms, &history.io_p99_ns);
    }
    disks_used_by(&mut lines, profile);
    let microseconds = |us: f64| nanoseconds(us * 1e3);
    distribution(&mut lines, "TCP round trips", &profile.tcp.rtt_us, microseconds, &VecDeque::new());
    let count = |count: Option<u64>| or_dash(count.map(|count| count.to_string()));
    lines.push(Line::from(format!(
        "  sent again {}  dropped at sockets that listen {}",
        count(profile.tcp.retransmits),
        count(profile.tcp.listen_drops)
    )));
    if let Some(of) = &profile.tcp.connections {
        distribution(&mut lines, "TCP connections that ended", &of.life_us, microseconds, &VecDeque::new());
        lines.push(Line::from(format!(
            "  connections {}  opened {}  accepted {}  closed {}  failed {}",
            of.open, of.opened, of.accepted, of.closed, of.failed
        )));
    }
    lines.push(Line::from("memory").bold());
    lines.push(Line::from(format!(
        "  resident {}  written {}/s",
        bytes(profile.memory.resident_bytes as f64),
        or_dash(profile.memory.dirty_bytes_per_s.map(bytes)),
    )));
    memory_lines(&mut lines, profile);
    if let Some(seen) = &view.in_swap {
        let size = |size: u64| bytes(size as f64);
        lines.push(Line::from(format!(
            "  on {}: {} cold, in swap; {} in use; {} went, {} came back by use",
            seen.pool,
            size(seen.swapped_bytes),
            size(seen.present_bytes),
            size(seen.out_bytes),
            size(seen.returned_bytes),
        )));
    }
    lines.push(Line::from("forecast: p50 p90 p95 p99").bold());
    for point in view.demand.iter().flat_map(|demand| &demand.points) {
        let shown = |value: f64| match point.resource {
            Resource::Cpu | Resource::VolumeOperations => format!("{value:.2}"),
            Resource::IoLatency => nanoseconds(value),
            _ => bytes(value),
        };
        let need = point.need;
        lines.push(Line::from(format!(
            "  {:?} in {} s: {} {} {} {}{}",
            point.resource,
            point.horizon_ms as f64 / 1e3,
            shown(need.p50),
            shown(need.p90),
            shown(need.p95),
            shown(need.p99),
            if matches!(point.evidence, Evidence::TooLittle { .. }) { "  (seen too little)" } else { "" },
        )));
    }
    lines
}

/// For how much of the time a thread waited, and all that had something to do.
fn pressures(profile: &Profile) -> Line<'static> {
    let share = |share: Option<f64>| or_dash(share.map(|share| format!("{:.1}", share * 100.0)));
    let Profile { cpu, memory, io, .. } = profile;
    let of = [
        ("cores", cpu.pressure_some, cpu.pressure_full),
        ("memory", memory.pressure_some, memory.pressure_full),
        ("I/O", io.pressure_some, io.pressure_full),
    ];
    let words = of.map(|(what, some, full)| format!("{what} {} (all {}) %", share(some), share(full)));
    Line::from(format!("  pressure: {}", words.join("  ")))
}

/// Who ran while it waited for a core.
fn waited_for(lines: &mut Vec<Line<'static>>, profile: &Profile) {
    if profile.cpu.neighbours.is_empty() {
        return;
    }
    lines.push(Line::from("a core was taken by").bold());
    for of in &profile.cpu.neighbours {
        let share = of.waited_ns as f64 / (profile.window_ms.max(1) as f64 * 1e4);
        lines.push(Line::from(format!("  {share:>5.1} %  {}", who(&of.who))));
    }
}

/// Who used the devices that it waited for.
fn disks_used_by(lines: &mut Vec<Line<'static>>, profile: &Profile) {
    for device in &profile.disk_neighbours {
        lines.push(Line::from(format!("{} was used by", device.device)).bold());
        for of in &device.others {
            let under_way = of.device_ns as f64 / (profile.window_ms.max(1) as f64 * 1e6);
            let share = of.waited_ns as f64 / device.own_ns.max(1) as f64 * 100.0;
            lines.push(Line::from(format!(
                "  {under_way:>5.2} under way  about {share:.0} % of its time  {}",
                who(&of.who)
            )));
        }
    }
}

fn who(who: &Who) -> String {
    match who {
        Who::Instance(name) => name.to_string(),
        Who::Cgroup(path) => format!("cgroup {path}"),
        Who::KernelThreads => "kernel threads".to_owned(),
        Who::Removed => "cgroups that have gone".to_owned(),
        Who::Others => "others".to_owned(),
        Who::Unknown => "unknown".to_owned(),
    }
}

/// How long requests of one kind took, on the device and before.
fn block_lines(
    lines: &mut Vec<Line<'static>>,
    block: &BlockProfile,
    window_ms: u64,
    p99: &VecDeque<Option<f64>>,
) {
    let operations = match block.operation {
        Operation::Read => "reads",
        Operation::Write => "writes",
        Operation::Flush => "flushes",
        Operation::Discard => "discards",
    };
    let name = format!("{operations} of {}", block.device);
    let none = VecDeque::new();
    let curve = if block.operation.moves_data() { p99 } else { &none };
    distribution(lines, &name, &block.latency_ns, nanoseconds, curve);
    if block.queue_ns.count > 0 {
        distribution(lines, &format!("{name}, in the queue before"), &block.queue_ns, nanoseconds, &none);
    }
    let per_s = block.bytes as f64 * 1e3 / window_ms.max(1) as f64;
    let not_split = match block.not_split {
        0 => String::new(),
        count => format!("  {count} of them with the time in the queue"),
    };
    lines.push(Line::from(format!("  {}/s  {:.2} under way{not_split}", bytes(per_s), block.in_flight)));
}

/// A histogram by powers of two, with its quantiles and how its p99 went.
fn distribution(
    lines: &mut Vec<Line<'static>>,
    name: &str,
    of: &Histogram,
    unit: impl Fn(f64) -> String,
    p99: &VecDeque<Option<f64>>,
) {
    let quantile = |q| or_dash(of.quantile(q).map(|value| unit(value as f64)));
    let said = format!(
        "{name}: {} times, p50 {}, p90 {}, p99 {} ",
        of.count,
        quantile(0.5),
        quantile(0.9),
        quantile(0.99)
    );
    lines.push(Line::from(vec![Span::from(said).bold(), Span::from(curve(p99, usize::MAX))]));
    let mut powers: BTreeMap<u32, u64> = BTreeMap::new();
    for &(index, count) in &of.buckets {
        let low = bounds_of(usize::from(index)).low;
        *powers.entry(low.max(1).ilog2()).or_default() += count;
    }
    let most = powers.values().copied().max().unwrap_or(1);
    let mut before: Option<u32> = None;
    for (power, count) in powers {
        if before.is_some_and(|before| before + 1 < power) {
            lines.push(Line::from("        ..."));
        }
        before = Some(power);
        let length = (count * BAR).div_ceil(most) as usize;
        let from = if power == 0 { 0.0 } else { (1_u64 << power) as f64 };
        lines.push(Line::from(format!("  {:>9} {:<40} {count}", unit(from), bar::FULL.repeat(length))));
    }
}

#[cfg(test)]
mod tests;
