// All instances with what they use, and what was decided about them.

import { get } from "./api.js";
import { bytes, bytesPerSecond, cores, isKnown, nanoseconds } from "./format.js";
import { badge, empty, html, instanceLink, table } from "./parts.js";
import { quantile } from "./histogram.js";

async function load() {
  const [views, plan] = await Promise.all([get("v1/profiles"), get("v1/plan")]);
  return { views, plan };
}

const rate = (bytes, profile) => (bytes * 1000) / Math.max(1, profile.window_ms);

const movesData = (block) => block.operation === "read" || block.operation === "write";

export const ioRate = (profile) =>
  profile?.block_counted
    ? rate(
        profile.block.filter(movesData).reduce((sum, block) => sum + block.bytes, 0),
        profile,
      )
    : null;
export const netRates = (profile) =>
  profile?.tcp_counted ? [rate(profile.tcp.bytes_in, profile), rate(profile.tcp.bytes_out, profile)] : [null, null];

/** The shortest horizon's, if it can be believed. */
export function forecastOf(view, resource) {
  const points = (view.demand?.points ?? []).filter((point) => point.resource === resource);
  const point = points.sort((a, b) => a.horizon_ms - b.horizon_ms)[0];
  return point?.evidence.state === "enough" ? point : null;
}

const sitsOn = (view) => view.pool ?? html`<span class="muted">any cores</span>`;

function decided(plan) {
  const moving = new Set(plan.decisions.filter((d) => d.outcome.outcome === "move").map((d) => d.instance));
  const known = new Set(plan.decisions.map((d) => d.instance));
  return (view, underWay) => {
    if (view.in_doubt) return badge("bad", "in doubt");
    if (view.stands_for) return badge("bad", "stands still");
    if (underWay.has(view.name)) return badge("busy", "on its way");
    if (moving.has(view.name)) return badge("warn", "is to move");
    return known.has(view.name) ? badge("plain", "stays") : html`<span class="muted">not yet</span>`;
  };
}

const ORDERS = {
  name: ["Name", (a, b) => a.name.localeCompare(b.name)],
  cores: ["Cores", (a, b) => (b.profile?.cpu.cores ?? 0) - (a.profile?.cpu.cores ?? 0)],
  memory: ["Memory", (a, b) => (b.profile?.memory.resident_bytes ?? 0) - (a.profile?.memory.resident_bytes ?? 0)],
  wait: ["Wait", (a, b) => (waitOf(b) ?? 0) - (waitOf(a) ?? 0)],
};
const waitOf = (view) => quantile(view.profile?.cpu.run_queue_ns, 0.99);

const chosen = { text: "", order: "name" };

/** Whether all words are somewhere in what an instance is called, runs, or is on. */
function matches(view) {
  const labels = Object.entries(view.labels).map(([key, value]) => `${key}=${value}`);
  const all = [view.name, view.pool ?? "", ...view.command, ...labels].join(" ").toLowerCase();
  return chosen.text
    .toLowerCase()
    .split(/\s+/)
    .every((word) => all.includes(word));
}

const choices = () => {
  const choose = (what) => (event) => {
    chosen[what] = event.target.value;
    event.target.dispatchEvent(new CustomEvent("wanted", { bubbles: true }));
  };
  return html`<form class="choices" role="search" aria-label="Instances" @submit=${(event) => event.preventDefault()}>
    <label>Filter <input type="search" .value=${chosen.text} @input=${choose("text")} /></label>
    <label
      >Order
      <select @change=${choose("order")}>
        ${Object.entries(ORDERS).map(
          ([value, [text]]) => html`<option value=${value} ?selected=${value === chosen.order}>${text}</option>`,
        )}
      </select></label
    >
  </form>`;
};

function view({ views, plan }, { moves }) {
  if (views.length === 0) {
    return empty(
      "No instance is here.",
      "rswap run starts one, rswap adopt takes over a cgroup, and others arrive by migration.",
    );
  }
  const underWay = new Set(moves.filter((move) => move.state === "running").map((move) => move.instance));
  const verdict = decided(plan);
  const shown = views.filter(matches).sort(ORDERS[chosen.order][1]);
  const p95 = (view) => forecastOf(view, "cpu")?.need.p95;
  const found = table(
    "Instances",
    [
      [
        "Instance",
        (view) => html`${instanceLink(view.name)}<span class="muted reason command">${view.command.join(" ")}</span>`,
      ],
      ["On", sitsOn],
      ["Cores", (view) => cores(view.profile?.cpu.cores), "number"],
      [
        "Forecast P95",
        (view) => (isKnown(p95(view)) ? cores(p95(view)) : html`<span class="muted">learning</span>`),
        "number",
      ],
      ["Memory", (view) => bytes(view.profile?.memory.resident_bytes), "number"],
      ["Wait P99", (view) => nanoseconds(waitOf(view)), "number"],
      ["Disk", (view) => bytesPerSecond(ioRate(view.profile)), "number"],
      ["Net in", (view) => bytesPerSecond(netRates(view.profile)[0]), "number"],
      ["Net out", (view) => bytesPerSecond(netRates(view.profile)[1]), "number"],
      ["Decision", (view) => verdict(view, underWay)],
    ],
    shown,
  );
  return html`${choices()} ${shown.length ? found : empty("No instance matches the filter.")}`;
}

export const instances = { path: "instances", title: "Instances", load, view };
