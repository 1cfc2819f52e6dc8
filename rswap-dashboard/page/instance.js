// One instance: what it is, what it does and is expected to do, how long it waits, and why it is where it is.

import { Windows, get, of } from "./api.js";
import {
  bytes,
  bytesPerSecond,
  cores,
  duration,
  isKnown,
  moment,
  nanoseconds,
  microseconds,
  perSecond,
} from "./format.js";
import { empty, facts, html, nothing, section } from "./parts.js";
import { decisionsNow, movesOf } from "./explain.js";
import { forecastFigure } from "./forecast-figure.js";
import { heatFigure } from "./heat-figure.js";

async function load(state, name, before) {
  const series = before?.series ?? new Windows(name);
  const [[view], explained] = await Promise.all([get(of("v1/profiles", name)), get(of("v1/explain", name))]);
  // It may have been moved away: its moves are still known then.
  if (view) await series.refresh();
  return { view, explained, series, now: state.status.at };
}

const RESOURCES = [
  ["cpu", "CPU, in reference cores", cores],
  ["memory", "Memory", bytes],
  ["io_bytes_per_s", "Disk", bytesPerSecond],
  ["io_latency_ns", "Disk latency, P99", nanoseconds],
  ["net_in_bytes_per_s", "Network in", bytesPerSecond],
  ["net_out_bytes_per_s", "Network out", bytesPerSecond],
  ["written_bytes_per_s", "Memory written", bytesPerSecond],
  ["volume_operations_per_s", "Volumes, requests", perSecond],
  ["volume_bytes_per_s", "Volumes, bytes", bytesPerSecond],
  ["port_bytes_per_s", "Network port", bytesPerSecond],
];

const LATENCIES = [
  ["run_queue_ns", "Waiting for a core", nanoseconds],
  ["block_ns", "Disk requests", nanoseconds],
  ["rtt_us", "TCP round trips", microseconds],
  ["on_cpu_ns", "Time on a core", nanoseconds],
  ["major_fault_ns", "Page faults that waited", nanoseconds],
];

const labels = (view) =>
  Object.entries(view.labels ?? {}).map(([key, value]) => html`<code class="label">${key}=${value}</code> `);

function about(view) {
  const volumes = (view.volume_use ?? []).map(
    (volume) => html`<li>${volume.name}: ${volume.pool ?? "no pool"}, ${bytes(volume.size_bytes)}</li>`,
  );
  const swap = view.in_swap;
  return facts(
    [
      ["Runs on", view.pool ?? "any cores"],
      ["Command", html`<code>${view.command.join(" ")}</code>`],
      ["Class", view.kin?.class ? html`${view.kin.class}` : "not known yet"],
      ["Since", moment(view.since)],
      ["Process", view.init_pid ? `init ${view.init_pid}` : "adopted"],
      ["Cgroup", html`<code>${view.cgroup}</code>`],
      view.network && ["Address", html`${view.network.address}${view.uplink ? ` via ${view.uplink}` : nothing}`],
      volumes.length && [
        "Volumes",
        html`<ul class="plain">
          ${volumes}
        </ul>`,
      ],
      swap && [
        "Cold memory",
        `${bytes(swap.swapped_bytes)} on ${swap.pool}, ${bytes(swap.present_bytes)} in memory: ${swap.doing}`,
      ],
      Object.keys(view.labels ?? {}).length && ["Labels", labels(view)],
    ],
    "about",
  );
}

/** Whether anything of a resource was used, or is expected to be. */
const isUsed =
  (series) =>
  ([resource]) =>
    series.windows.some((window) => window.used[resource] > 0 || window.forecast[resource]?.p95 > 0);

/** What is not shown, since there was nothing of it. */
const without = (all, shown) => {
  const none = all.filter((one) => !shown.includes(one)).map(([, title]) => title);
  return none.length
    ? html`<p class="hint">Nothing of these in the windows that are kept: ${none.join("; ")}.</p>`
    : nothing;
};

function forecasts(view, series) {
  const known = RESOURCES.filter(([resource]) => series.windows.some((window) => isKnown(window.used[resource])));
  if (known.length === 0) return empty("No window has been measured yet.");
  const shown = known.filter(isUsed(series));
  return html`<div class="figures">
      ${shown.map(([resource, title, format]) => forecastFigure(resource, title, format, view, series))}
    </div>
    ${without(known, shown)}`;
}

function heats(series) {
  if (series.windows.length === 0) return empty("No window has been measured yet.");
  const shown = LATENCIES.filter(([key]) => series.windows.some((window) => window[key]?.count > 0));
  return html`<div class="figures">${shown.map(([key, title, format]) => heatFigure(key, title, format, series))}</div>
    ${without(LATENCIES, shown)}`;
}

function view({ view, explained, series }, _, name) {
  if (!view) {
    return html`${empty(`${name} is not on this host any more.`)}
    ${section("its-moves", "Its moves", movesOf(explained.moved))}`;
  }
  const doubt = view.in_doubt
    ? html`<p class="lost">
        <strong>In doubt.</strong> It was committed to ${view.in_doubt}, which has not answered: it is frozen here. If
        that host is gone for good, decide with rswap recover ${name} --here or --there.
      </p>`
    : nothing;
  const stands = view.stands_for
    ? html`<p class="lost">
        <strong>It stands still.</strong> A swap of its volume ${view.stands_for} failed, and so did the way back. It is
        whole: rswap swap ${name} POOL --volume ${view.stands_for} tries to bring it to an end, and so does an agent
        that is started anew.
      </p>`
    : nothing;
  const kept = series.windows.length > 1 ? series.windows.at(-1).at - series.windows[0].at : null;
  return html`
    ${doubt} ${stands} ${about(view)} ${section("why", "Why it is where it is", decisionsNow(explained.now))}
    ${section(
      "forecast",
      "Forecast and what came",
      forecasts(view, series),
      kept ? html`<p class="muted">the last ${duration(kept)}</p>` : nothing,
    )}
    ${section("latency", "Latency over time", heats(series), html`<p class="muted">each row reaches to twice what it begins at; the lowest holds all below</p>`)}
    ${section("its-moves", "Its moves", movesOf(explained.moved))}
  `;
}

export const instance = { path: "instances", within: "instances", needs: true, title: (name) => name, load, view };
