// A fleet's dashboard: its controller's answers.

import { get } from "./api.js";
import { plural } from "./format.js";
import { badge, html, nothing } from "./parts.js";
import { run } from "./shell.js";
import { hosts, instance, instances, orders } from "./fleet-views.js";

const refresh = async () => ({ status: await get("v1/status") });

const identity = ({ status }) =>
  status
    ? html`<span class="host">fleet of ${plural(status.members, "host")}</span>
        ${status.mode === "act" ? badge("good", "gives orders") : badge("plain", "observes only")}
        ${status.hosts_away ? badge("bad", `${plural(status.hosts_away, "host")} away`) : nothing}`
    : nothing;

const CHANGES = [
  ["members", "host"],
  ["hosts_away", "host away", "hosts away"],
  ["instances", "instance"],
  ["orders_waiting", "order that waits", "orders that wait"],
];

const changes = (before, now) =>
  CHANGES.filter(([field]) => before.status[field] !== now.status[field])
    .map(([field, ...names]) => `${plural(now.status[field], ...names)} now.`)
    .join(" ");

run({ views: [hosts, instances, instance, orders], refresh, identity, changes });
