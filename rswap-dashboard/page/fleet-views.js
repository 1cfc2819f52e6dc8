// Hosts, instances and orders of a fleet.

import { get } from "./api.js";
import { ago, bytes, clock, cores, coresUnit, count, duration, moment, moneyPerHour } from "./format.js";
import { badge, empty, facts, figure, html, meter, nothing, section, table } from "./parts.js";

const stateOf = (host) => {
  if (host.away) return badge("bad", "away");
  if (host.drained) return badge("plain", "being emptied");
  return host.acts ? badge("good", "acts") : badge("plain", "observes");
};

const load = (whole, kind) => {
  if (!whole) return "–";
  const [used, all] = [whole.used[kind], whole.capacity[kind]];
  if (!(all > 0)) return "–";
  return meter(
    used / all,
    kind === "cores" ? `${cores(used)} of ${coresUnit(all)}` : `${bytes(used)} of ${bytes(all)}`,
  );
};

const reports = ({ taken, skipped, repeated }) => {
  const odd = [skipped && `${count(skipped)} skipped`, repeated && `${count(repeated)} repeated`].filter(Boolean);
  return html`${count(taken)}${odd.length ? html`<span class="muted reason">${odd.join(", ")}</span>` : nothing}`;
};

const tile = (value, detail) => html`<span class="big">${value}</span><span class="muted">${detail}</span>`;

export const hosts = {
  path: "",
  title: "Hosts",
  load: async () => ({ hosts: await get("v1/hosts") }),
  view: ({ hosts }, { status }) => html`
    ${facts(
      [
        [
          "Hosts",
          tile(count(status.members), status.hosts_away ? `${count(status.hosts_away)} away` : "all are heard"),
        ],
        ["Instances", tile(count(status.instances), html`<a href="#/instances">where they are</a>`)],
        ["Orders", tile(count(status.orders_waiting), html`wait for an outcome`)],
        [
          "Reports",
          tile(count(status.counts.reports_taken), `taken, every ${duration(status.interval_ms)} of each host`),
        ],
        ["Lessons", tile(count(status.counts.lessons_taken), `taken, ${count(status.counts.lessons_refused)} refused`)],
        ["Up", tile(duration(status.uptime_ms), `start ${count(status.life)} on its store`)],
      ],
      "tiles",
    )}
    ${section(
      "fleet-hosts",
      "Hosts",
      hosts.length
        ? table(
            "Hosts of the fleet",
            [
              [
                "Host",
                (host) =>
                  html`${host.host} ${host.address ? html`<span class="muted">${host.address}</span>` : nothing}`,
              ],
              ["Cores in use", ({ whole }) => load(whole, "cores")],
              ["Memory in use", ({ whole }) => load(whole, "memory_bytes")],
              ["Cost of a core", ({ whole }) => moneyPerHour(whole?.cost_per_core_hour), "number"],
              ["Instances", (host) => count(host.instances), "number"],
              ["Heard", (host) => ago(host.heard, status.at)],
              ["Reports", (host) => reports(host.reports), "number"],
              ["State", stateOf],
            ],
            hosts,
          )
        : empty("No host has reported yet.", "controller.address in an agent's configuration makes it a member."),
    )}
  `,
};

const p95 = (instance) => {
  const points = (instance.demand?.points ?? []).filter((point) => point.resource === "cpu");
  const point = points.sort((a, b) => a.horizon_ms - b.horizon_ms)[0];
  return point?.evidence.state === "enough" ? cores(point.need.p95) : html`<span class="muted">learning</span>`;
};

const link = ({ instance }) => html`<a href="#/instances/${encodeURIComponent(instance)}">${instance}</a>`;
const named = (instance) =>
  html`${link(instance)}${instance.local === instance.instance ? nothing : html` <span class="muted">there ${instance.local}</span>`}`;

export const instances = {
  path: "instances",
  title: "Instances",
  load: async () => ({ instances: await get("v1/instances"), plan: await get("v1/plan") }),
  view: ({ instances, plan }) => {
    const moving = new Map(
      plan.decisions.filter((d) => d.outcome.outcome === "move").map((d) => [d.instance, d.outcome.to]),
    );
    return instances.length
      ? table(
          "Instances of the fleet",
          [
            ["Instance", named],
            ["Host", (instance) => instance.host],
            ["Class", (instance) => instance.kin?.class || "–"],
            ["Cores", (instance) => cores(instance.cores), "number"],
            ["Forecast P95", p95, "number"],
            ["Memory", (instance) => bytes(instance.resident_bytes), "number"],
            ["There since", (instance) => moment(instance.since)],
            [
              "Plan",
              (instance) =>
                moving.has(instance.instance) ? badge("warn", `to ${moving.get(instance.instance)}`) : "stays",
            ],
          ],
          instances,
        )
      : empty("No instance has been reported.");
  },
};

const AMOUNTS = { cpu: ["CPU, in reference cores", cores], memory: ["Memory", bytes] };

/** What it used on all hosts that it was on. */
export const instance = {
  path: "instances",
  within: "instances",
  needs: true,
  title: (name) => name,
  load: async (_, name) => ({
    rows: await get(`v1/history?instance=${encodeURIComponent(name)}&from=${Date.now() - 900_000}`),
  }),
  view: ({ rows }) =>
    rows.length
      ? html`<p class="muted above">
            On ${[...new Set(rows.map((row) => row.host))].join(", ")}, in the last quarter of an hour.
          </p>
          <div class="figures">${Object.keys(AMOUNTS).map((resource) => used(resource, rows))}</div>`
      : empty("Nothing is known of its last quarter of an hour."),
};

function used(resource, rows) {
  const [title, format] = AMOUNTS[resource];
  const column = (field) => rows.map((row) => row.used[resource]?.[field] ?? null);
  const [mean, most] = [column("mean"), column("most")];
  const read = (i) => `${clock(rows[i].at)} on ${rows[i].host}: mean ${format(mean[i])}, at most ${format(most[i])}`;
  return figure(`used-${resource}`, title, {
    legend: [
      ["line-a", "mean of a report's windows"],
      ["line-b", "the highest of them"],
    ],
    plot: html`<line-plot
      .spec=${{
        label: `${title}: ${read(rows.length - 1)}.`,
        data: [rows.map((row) => row.at / 1000), mean, most],
        lines: [
          { label: "mean", colour: "line-a" },
          { label: "most", colour: "line-b", width: 1 },
        ],
        format,
        read,
      }}
    ></line-plot>`,
    columns: ["At", "Host", "Mean", "At most"],
    rows: () => rows.map((row, i) => [clock(row.at), row.host, format(mean[i]), format(most[i])]),
  });
}

const what = ({ action }) =>
  action.action === "migrate"
    ? `${action.instance} to ${action.to}`
    : `${action.undo ? "use again" : "empty"} ${action.pool}`;

const result = ({ outcome }) => {
  if (!outcome) return badge("warn", "not begun in time");
  const kind = { done: "good", failed: "bad" }[outcome.result] ?? "warn";
  return html`${badge(kind, outcome.result.replaceAll("_", " "))}
  ${outcome.error ? html`<span class="muted reason">${outcome.error}</span>` : nothing}`;
};

const number = ({ token }) => `${token.life}.${token.number}`;

export const orders = {
  path: "orders",
  title: "Orders",
  load: () => get("v1/orders"),
  view: ({ waiting, ended }, { status }) => html`
    ${section(
      "waiting",
      "Waiting for an outcome",
      waiting.length
        ? table(
            "Orders that wait for an outcome",
            [
              ["Order", number],
              ["What", what],
              ["At host", (order) => order.host],
              ["Begins before", (order) => moment(order.deadline)],
            ],
            waiting,
          )
        : empty("No order waits.", status.mode === "act" ? nothing : "In this mode the controller gives none."),
    )}
    ${section(
      "ended",
      "Ended",
      ended.length
        ? table(
            "Orders that have ended",
            [
              ["Order", ({ order }) => number(order)],
              ["What", ({ order }) => what(order)],
              ["At host", ({ order }) => order.host],
              ["Ended", ({ at }) => moment(at)],
              ["Outcome", result],
            ],
            [...ended].reverse(),
          )
        : empty("No order has ended since the controller's start."),
    )}
  `,
};
