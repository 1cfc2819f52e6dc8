// What there is on this host, what needs attention, and what has just happened.

import { get } from "./api.js";
import { count, digits, duration, plural } from "./format.js";
import { badge, empty, facts, html, nothing, section, table } from "./parts.js";
import { pauseOf, savingOf, stateOf, titleOf, wayOf, whenOf } from "./moving.js";
import { hostsTable } from "./pools.js";

const NEWEST = 6;

async function load() {
  const [pools, instances] = await Promise.all([get("v1/pools"), get("v1/instances")]);
  return { pools, instances };
}

/** Each: how bad, what, and what it means. */
function attention({ status }, { pools, instances }) {
  const found = [];
  for (const { name, in_doubt } of instances.filter((instance) => instance.in_doubt)) {
    found.push([
      "bad",
      `${name} is in doubt`,
      `It was committed to ${in_doubt}, which has not answered: it is frozen here.`,
    ]);
  }
  for (const { name, stands_for } of instances.filter((instance) => instance.stands_for)) {
    found.push([
      "bad",
      `${name} stands still`,
      `A swap of its volume ${stands_for} failed, and so did the way back: rswap swap ${name} POOL --volume ${stands_for} tries again.`,
    ]);
  }
  if (status.links?.problem) found.push(["bad", "Links to other hosts", status.links.problem]);
  for (const probe of status.probes.filter((probe) => probe.state === "unavailable")) {
    found.push(["warn", `The probe ${probe.name} is unavailable`, probe.reason]);
  }
  for (const pool of pools.filter((pool) => pool.state.state === "unavailable")) {
    found.push(["warn", `${pool.name} is unavailable`, pool.state.reason]);
  }
  for (const pool of pools.filter((pool) => pool.state.state === "draining")) {
    found.push(["plain", `${pool.name} is being emptied`, "Instances on it are to leave; none are put there."]);
  }
  return found;
}

const links = (status) => {
  const security = status.links?.security;
  if (security === "tls") return ["TLS", `as ${status.links.identity}`];
  if (security === "clear_text") return ["clear text", "neither encrypted nor authenticated"];
  return ["none", "no other agent is spoken to"];
};

function view(data, state) {
  const { status, moves } = state;
  const probes = (state) => status.probes.filter((probe) => probe.state === state).length;
  const [active, off] = [probes("active"), probes("off")];
  const found = attention(state, data);
  const [security, detail] = links(status);
  const done = status.swaps_done + status.migrations_done;
  const failed = status.swaps_failed + status.migrations_failed;
  const newest = moves.slice(-NEWEST).reverse();
  const tile = (value, detail) => html`<span class="big">${value}</span><span class="muted">${detail}</span>`;
  return html`
    ${facts(
      [
        ["Instances", tile(count(status.instances), html`<a href="#/instances">what they do</a>`)],
        ["Moves", tile(count(done), html`${failed ? plural(failed, "failure") : "none failed"}`)],
        ["Under way", tile(count(status.moves_running), html`<a href="#/moves">details</a>`)],
        [
          "Probes",
          tile(
            `${active}/${status.probes.length - off}`,
            off ? `of the kernel's are read; ${off} not needed` : "of the kernel's are read",
          ),
        ],
        ["Links", tile(security, detail)],
        [
          "The agent's work",
          tile(
            `${digits(status.last_window_work_us / 1000)} ms`,
            `in the last window; up ${duration(status.uptime_ms)}`,
          ),
        ],
      ],
      "tiles",
    )}
    ${
      found.length
        ? section(
            "attention",
            "Needs attention",
            html`<ul class="attention">
              ${found.map(
                ([kind, what, why]) =>
                  html`<li>
                    ${badge(kind, kind === "bad" ? "act" : kind === "warn" ? "look" : "note")}
                    <div>
                      <strong>${what}</strong>
                      <p class="muted">${why}</p>
                    </div>
                  </li>`,
              )}
            </ul>`,
          )
        : nothing
    }
    ${section("hosts", "Hosts", hostsTable(data.pools, status.host), html`<a href="#/pools">all pools</a>`)}
    ${section(
      "latest",
      "Latest moves",
      newest.length
        ? table(
            "The latest moves",
            [
              ["Instance", titleOf],
              ["When", whenOf],
              ["Way", wayOf],
              ["State", stateOf],
              ["Pause", pauseOf, "number"],
              ["Expected saving", savingOf, "number"],
            ],
            newest,
          )
        : empty("Nothing has been moved since the agent's start."),
      newest.length ? html`<a href="#/moves">all moves</a>` : nothing,
    )}
  `;
}

export const overview = { path: "", title: "Overview", load, view };
