// A resource's use, next to what had been forecast for the same time, and what is expected next.

import { clock, duration, isKnown } from "./format.js";
import { figure, html, nothing } from "./parts.js";

/** Windows first, then horizons to come: columns of time, use, P50 and P95. */
function columns(resource, view, series) {
  const data = [[], [], [], []];
  const add = (at, used, band) => {
    [at / 1000, used ?? null, band?.p50 ?? null, band?.p95 ?? null].forEach((value, i) => data[i].push(value));
  };
  for (const window of series.windows) add(window.at, window.used[resource], window.forecast[resource]);
  const last = series.windows.at(-1).at;
  const coming = (view.demand?.points ?? [])
    .filter((point) => point.resource === resource && point.evidence.state === "enough")
    .map((point) => ({ at: view.demand.at + point.horizon_ms, need: point.need }))
    .filter((point) => point.at > last)
    .sort((a, b) => a.at - b.at);
  for (const { at, need } of coming) add(at, null, need);
  return { data, last, coming };
}

/** How many of the windows that had a forecast stayed at or under its P95. */
function outcome(resource, series) {
  const met = series.windows.filter((window) => window.forecast[resource] && isKnown(window.used[resource]));
  const within = met.filter((window) => window.used[resource] <= window.forecast[resource].p95);
  return { met: met.length, within: within.length };
}

function evidenceNote(resource, view, series) {
  const points = (view.demand?.points ?? []).filter((point) => point.resource === resource);
  const { met, within } = outcome(resource, series);
  if (met > 0) {
    const ahead = duration(series.horizon_ms);
    return `Of ${met} windows that a forecast was made for ${ahead} before, ${within} stayed at or under its P95.`;
  }
  const learning = points.find((point) => point.evidence.state === "too_little");
  if (learning) {
    const { seen, needed } = learning.evidence;
    return `No forecast yet that plans rest on: ${seen} of ${needed} outcomes are known.`;
  }
  return points.length ? nothing : "No forecast yet.";
}

export function forecastFigure(resource, title, format, view, series) {
  const { data, last, coming } = columns(resource, view, series);
  const lastIndex = series.windows.length - 1;
  const now = data[1][lastIndex];
  const next = coming[0];
  const said = next ? `, at most ${format(next.need.p95)} expected in ${duration(next.at - last)} (P95)` : "";
  const hasBand = data[2].some(isKnown);
  const read = (i) => {
    const used = data[1][i] === null ? (i > lastIndex ? "expected" : "not measured") : `used ${format(data[1][i])}`;
    const band = data[2][i] === null ? "" : `, forecast P50 ${format(data[2][i])}, P95 ${format(data[3][i])}`;
    return `${clock(data[0][i] * 1000)}: ${used}${band}`;
  };
  return figure(`forecast-${resource}`, title, {
    legend: [["line-a", "used"], ...(hasBand ? [["band", "forecast, P50 to P95"]] : [])],
    note: evidenceNote(resource, view, series),
    plot: html`<line-plot
      .spec=${{
        label: `${title}: ${format(now)} in the last window${said}.`,
        data,
        lines: [
          { label: "used", colour: "line-a", width: 2 },
          { label: "P50", colour: "band-edge", width: 1, dash: [4, 3] },
          { label: "P95", colour: "band-edge", width: 1 },
        ],
        bands: [{ between: [3, 2], colour: "band" }],
        format,
        now: last / 1000,
        rest: lastIndex,
        read,
      }}
    ></line-plot>`,
    columns: ["At", "Used", "Forecast P50", "Forecast P95"],
    rows: () =>
      data[0].map((second, i) => [clock(second * 1000), ...[1, 2, 3].map((column) => format(data[column][i] ?? null))]),
  });
}
