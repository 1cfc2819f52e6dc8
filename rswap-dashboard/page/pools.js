// What there is to sit on: hosts, cores, storage, links, memory and swap, with load and cost.

import { get } from "./api.js";
import {
  bitsPerSecond,
  bytes,
  capital,
  cores,
  coresUnit,
  digits,
  isKnown,
  microseconds,
  moneyPerHour,
  percent,
  words,
} from "./format.js";
import { badge, empty, html, meter, nothing, section, table } from "./parts.js";

async function load() {
  const [planned, inventory] = await Promise.all([get("v1/pools"), get("v1/inventory")]);
  return { planned, inventory };
}

const stateBadge = ({ state, reason }) => {
  const kind = { ready: "good", online: "good", draining: "plain", degraded: "warn", full: "warn" }[state] ?? "bad";
  const word = state === "draining" ? "being emptied" : state;
  return html`${badge(kind, word)}${reason ? html`<span class="muted reason">${reason}</span>` : nothing}`;
};

const isHost = (pool) => pool.kind.kind === "host" || pool.kind.kind === "this_host";

const hostLoad = (pool) =>
  pool.capacity.cores > 0
    ? meter(pool.used.cores / pool.capacity.cores, `${cores(pool.used.cores)} of ${coresUnit(pool.capacity.cores)}`)
    : "–";
const hostMemory = (pool) =>
  pool.capacity.memory_bytes > 0
    ? meter(
        pool.used.memory_bytes / pool.capacity.memory_bytes,
        `${bytes(pool.used.memory_bytes)} of ${bytes(pool.capacity.memory_bytes)}`,
      )
    : "–";

export const hostsTable = (pools, here) =>
  table(
    "Hosts with their load and cost",
    [
      ["Host", (pool) => html`${pool.name} <span class="muted">${pool.kind.address ?? here}</span>`],
      ["Cores in use", hostLoad],
      ["Memory in use", hostMemory],
      ["Cost of a core", (pool) => moneyPerHour(pool.cost_per_core_hour), "number"],
      ["Cost of a GiB", (pool) => moneyPerHour(pool.cost_per_gib_hour), "number"],
      ["Speed", (pool) => `${digits(pool.performance)}×`, "number"],
      ["State", (pool) => stateBadge(pool.state)],
    ],
    pools.filter(isHost),
  );

/** What amounts of a kind are called. */
const UNITS = { cores: coresUnit, memory: bytes, swap: bytes, storage: bytes, link: bitsPerSecond };
const COST_OF = { cores: "a core", memory: "a GiB", swap: "a GiB", storage: "a GiB", link: "a Gbit/s" };

const SOURCES = {
  found: (source) => `found in ${source.file}`,
  configured: (source) => `configured by ${source.key}`,
  measured: () => "measured by rswap calibrate",
  experienced: (source) => `experienced in ${digits(source.requests)} requests`,
  default: () => "the default",
};
const sourceOf = (source) => (SOURCES[source.from] ?? (() => words(source.from)))(source);

const used = (pool) => {
  const format = UNITS[pool.kind];
  const [capacity, amount] = [pool.capacity?.value, pool.used?.value];
  if (!isKnown(amount) || !(capacity > 0)) return isKnown(capacity) ? `${format(capacity)} in all` : "not known";
  return meter(amount / capacity, `${pool.kind === "cores" ? cores(amount) : format(amount)} of ${format(capacity)}`);
};

const madeOf = (pool) => {
  switch (pool.kind) {
    case "cores":
      return `CPUs ${ranges(pool.cpus)}`;
    case "memory":
      return pool.nodes.length ? `node ${ranges(pool.nodes)}` : "all of it";
    case "swap":
      return `${pool.what} ${pool.path}`;
    case "storage":
      return `${pool.fs_type} at ${pool.mount_points[0] ?? "no place"}`;
    default:
      return `${pool.what} ${pool.interface}`;
  }
};

function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    const last = found.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else found.push([number, number]);
  }
  return found.map(([from, to]) => (from === to ? from : `${from}–${to}`)).join(", ");
}

/** A measure's unit is at the end of its name. */
function measure({ what, value, source }) {
  const [, name, unit] = /^(.*?)_(us|ns|bytes_per_s|bits_per_s|iops|per_s)$/.exec(what) ?? [null, what, ""];
  const format = {
    us: microseconds,
    ns: (ns) => microseconds(ns / 1e3),
    bytes_per_s: (rate) => `${bytes(rate)}/s`,
    bits_per_s: bitsPerSecond,
  };
  const text = (format[unit] ?? ((amount) => `${digits(amount)}${unit === "per_s" ? "/s" : ""}`))(value);
  return html`<li>
    ${capital(words(format[unit] ? name : what))}: <strong>${text}</strong>
    <span class="muted">${sourceOf(source)}</span>
  </li>`;
}

const performance = (pool) =>
  pool.performance.length
    ? html`<details>
        <summary>${digits(pool.performance.length)} measured<span class="unseen"> of ${pool.name}</span></summary>
        <ul class="words">
          ${pool.performance.map(measure)}
        </ul>
      </details>`
    : "–";

const KINDS = [
  ["cores", "Cores", "No set of cores was found or configured."],
  ["memory", "Memory", "No memory pool was found."],
  ["swap", "Swap", "No swap area is on."],
  ["storage", "Storage", "No file system is a pool."],
  ["link", "Links", "No link is a pool."],
];

const localTable = (kind, title, pools) =>
  table(
    `${title} of this host with load and cost`,
    [
      ["Pool", (pool) => html`${pool.name} <span class="muted">${madeOf(pool)}</span>`],
      ["In use", used],
      ["Busy", (pool) => (pool.busy ? percent(pool.busy.value) : "–"), "number"],
      [`Cost of ${COST_OF[kind]}`, (pool) => moneyPerHour(pool.cost_per_hour?.value), "number"],
      ["Performance", performance],
      ["State", stateBadge],
    ],
    pools,
  );

function view({ planned, inventory }, { status }) {
  return html`
    ${section("pool-hosts", "Hosts", hostsTable(planned, status.host))}
    ${KINDS.map(([kind, title, none]) => {
      const found = inventory.pools.filter((pool) => pool.kind === kind);
      return section(`pool-${kind}`, title, found.length ? localTable(kind, title, found) : empty(none));
    })}
  `;
}

export const pools = { path: "pools", title: "Pools", load, view };
