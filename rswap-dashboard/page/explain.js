// Why an instance moves or stays: the decision in words, and every pool with its numbers.

import { bytes, bytesPerSecond, cores, coresUnit, digits, milliseconds, money, moment } from "./format.js";
import { badge, empty, html, nothing, table } from "./parts.js";
import { kindOf, reasonsOf, savingOf, stateOf, wantedBy, wayOf } from "./moving.js";

const KINDS = { cpu: "Cores", host: "Host", storage: "Storage", link: "Uplink" };

const title = (decision) => `${KINDS[decision.kind]}${decision.volume ? ` of the volume ${decision.volume}` : ""}`;

const needOf = ({ terms, flow }) => {
  if (!flow) return `${cores(terms.limit_cores)} / ${coresUnit(terms.available_cores)}`;
  const { limit, available } = flow;
  return `${bytesPerSecond(limit.bytes_per_s)} / ${bytesPerSecond(available.bytes_per_s)}`;
};

const price = ({ move_price: price }) =>
  price ? `${digits(price.seconds)} s, ${bytes(price.bytes)}, ${milliseconds(price.unavailability_ms)} still` : "–";

const COLUMNS = [
  [
    "Pool",
    (row) =>
      html`${row.pool} ${row.here ? badge("plain", "here") : row.chosen ? badge("good", "chosen") : nothing}
      ${row.dropped ? html`<span class="muted reason">out: ${row.dropped}</span>` : nothing}`,
  ],
  ["Needs / has", needOf, "number"],
  ["Demand × cost", (row) => money(row.terms.cost_per_hour), "number"],
  ["Performance × weight", (row) => money(row.terms.performance * row.terms.weight), "number"],
  ["Violations", (row) => money(row.terms.violation_per_hour), "number"],
  ["Score", (row) => html`<strong>${money(row.score)}</strong>`, "number"],
  ["The move", price],
  ["Total", (row) => html`<strong>${money(row.total)}</strong>`, "number"],
];

function candidates({ decision, dropped }) {
  const to = decision.outcome.outcome === "move" ? decision.outcome.to : null;
  const here = decision.current ? [{ ...decision.current, here: true }] : [];
  const others = decision.candidates.map((row) => ({ ...row, chosen: row.pool === to }));
  const rows = [...here, ...others].map((row) => ({ ...row, dropped: dropped[row.pool] }));
  if (rows.length === 0) return nothing;
  return html`${table(`Pools compared: ${title(decision)}`, COLUMNS, rows, { className: "dense" })}
    <p class="hint">
      Money per hour, lower is better. Score = demand × cost − performance × weight + expected violations; total = score
      and the price of the move. Alternatives are looked for above ${money(decision.threshold)}; a move that nothing
      forces must gain more than ${money(decision.hysteresis)}.
    </p>`;
}

const verdict = (decision) => (decision.outcome.outcome === "move" ? badge("busy", "moves") : badge("plain", "stays"));

function explained(explained) {
  const { words, decision } = explained;
  const [first, ...others] = words;
  return html`<article class="card">
    <h3>${title(decision)} ${verdict(decision)}</h3>
    <p>${first}</p>
    ${
      others.length
        ? html`<ul class="words">
            ${others.map((line) => html`<li>${line}</li>`)}
          </ul>`
        : nothing
    }
    ${candidates(explained)}
  </article>`;
}

export const decisionsNow = (now) =>
  now.length
    ? html`<div class="stack">${now.map(explained)}</div>`
    : empty("Nothing was decided yet.", "Plans need a forecast first: some windows have to meet their outcome.");

export const movesOf = (moved) =>
  moved.length
    ? html`<div class="stack">
        ${moved.map((explained) => {
          const { move, decision } = explained;
          return html`<details class="card">
            <summary>
              <span class="summary-line"
                ><span>${wayOf(move)} <span class="muted">${kindOf(move)}</span></span>
                <span class="muted">${moment(move.started)} · ${wantedBy(move)} ${stateOf(move)}</span></span
              >
            </summary>
            ${reasonsOf(move)}
            ${move.gain_per_hour === null ? nothing : html`<p>Expected saving: ${savingOf(move)}</p>`}
            ${decision ? candidates(explained) : nothing}
          </details>`;
        })}
      </div>`
    : empty("It has not been moved since the agent's start.");
