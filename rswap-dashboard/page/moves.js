// What is being moved, and what was.

import { get } from "./api.js";
import { bytes, bytesPerSecond, capital, count, duration, milliseconds, percent, plural } from "./format.js";
import { empty, facts, html, instanceLink, nothing, progress, section, table } from "./parts.js";
import {
  pauseOf,
  phases,
  ratePlot,
  reasonsOf,
  savingOf,
  stateOf,
  titleOf,
  tookOf,
  wantedBy,
  wayOf,
  whenOf,
} from "./moving.js";

async function load(state) {
  return { migrations: await get("v1/migrations"), now: state.status.at };
}

function running(migration, now) {
  const { progress: state } = migration;
  const share = state.round_pages > 0 ? state.round_pages_sent / state.round_pages : 0;
  return html`<article class="card" aria-label="Migration of ${migration.instance}">
    <h3>${instanceLink(migration.instance)} <span class="muted">to host ${migration.host}</span></h3>
    ${phases(state.phase)}
    ${facts([
      ["Round", count(state.round)],
      ["Of this round", progress(share, `${percent(share)} of ${plural(state.round_pages, "page")}`)],
      ["Sent", bytes(state.bytes_sent)],
      ["Rate", bytesPerSecond(state.bytes_per_s || null)],
      ["Written meanwhile", bytesPerSecond(state.dirty_bytes_per_s)],
      ["Pause if frozen now", milliseconds(state.expected_unavailability_ms)],
      ["Running for", duration(Math.max(0, now - migration.started))],
    ])}
    ${ratePlot(migration)}
  </article>`;
}

function ended(migration) {
  const { report } = migration;
  const steps = report?.freeze_steps_ms ?? [];
  return html`<details class="card">
    <summary>
      <span class="summary-line"
        ><span>${migration.instance} to ${migration.host}</span>
        <span class="muted">${whenOf(migration)} · ${stateOf(migration)}</span></span
      >
    </summary>
    ${
      report
        ? facts([
            ["Stood still", milliseconds(report.unavailability_ms)],
            ["In all", milliseconds(report.duration_ms)],
            ["Rounds", count(report.rounds)],
            ["Sent", bytes(report.bytes_sent)],
            ["Pages sent", count(report.pages_sent)],
            ["Written meanwhile", plural(report.pages_dirtied, "page")],
            ["Rate of the first round", bytesPerSecond(report.memory_bytes_per_s)],
          ])
        : html`<p class="bad-text">${migration.error}</p>`
    }
    ${
      steps.length
        ? html`<h4>Where the pause went</h4>
            ${facts(
              steps.map(([step, ms]) => [capital(step), milliseconds(ms)]),
              "small",
            )}`
        : nothing
    }
    ${ratePlot(migration)}
  </details>`;
}

const HISTORY = [
  ["Instance", titleOf],
  ["When", whenOf],
  ["Way", wayOf],
  ["How it ended", stateOf],
  ["Pause", pauseOf, "number"],
  ["Took", tookOf, "number"],
  ["Expected saving", savingOf, "number"],
  ["Wanted by", (move) => html`${wantedBy(move)}${move.forced ? html` <span class="muted">forced</span>` : nothing}`],
];

const why = (move) =>
  html`<details>
    <summary>Why<span class="unseen"> ${move.instance} moved to ${move.to}</span></summary>
    ${reasonsOf(move)}
  </details>`;

function view({ migrations, now }, { moves }) {
  const onTheWay = migrations.filter((migration) => migration.state === "running");
  const others = moves.filter((move) => move.state === "running" && move.kind !== "host");
  const over = migrations.filter((migration) => migration.state !== "running").reverse();
  const history = moves.filter((move) => move.state !== "running").reverse();
  const nothingMoves = onTheWay.length + others.length === 0;
  return html`
    ${section(
      "under-way",
      "Under way",
      nothingMoves
        ? empty(
            "Nothing is being moved.",
            "Plans move instances in mode act; rswap migrate and rswap swap move them now.",
          )
        : html`${onTheWay.map((migration) => running(migration, now))}
          ${
            others.length
              ? table(
                  "Moves on this host that are under way",
                  [
                    ["Instance", titleOf],
                    ["Way", wayOf],
                    ["Since", whenOf],
                    ["Wanted by", wantedBy],
                  ],
                  others,
                )
              : nothing
          }`,
    )}
    ${section(
      "history",
      "History",
      history.length
        ? table("Moves that have ended", HISTORY, history, { below: why })
        : empty("Nothing has been moved since the agent's start."),
      history.length ? html`<p class="muted">${plural(history.length, "move")}, newest first</p>` : nothing,
    )}
    ${
      over.length
        ? section("migrations", "Migrations from here", html`<div class="stack">${over.slice(0, 20).map(ended)}</div>`)
        : nothing
    }
  `;
}

export const moves = { path: "moves", title: "Moves", load, view };
