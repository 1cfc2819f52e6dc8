// Moves in words, and the plots of a migration.

import { badge, figure, html, instanceLink, nothing } from "./parts.js";
import { bytes, bytesPerSecond, count, duration, milliseconds, money, moment, plural, words } from "./format.js";

const KINDS = { cpu: "cores", host: "host", storage: "storage", link: "link", memory: "memory" };
const WANTED = { plan: "the plan", request: "a request", controller: "the controller" };

export const kindOf = (move) => (move.volume ? `${KINDS[move.kind]}, volume ${move.volume}` : KINDS[move.kind]);
export const wantedBy = (move) => WANTED[move.asked_by] ?? words(move.asked_by);

export const stateOf = (move) =>
  ({
    running: () => badge("busy", "under way"),
    done: () => badge("good", "done"),
    failed: () => badge("bad", "failed"),
    in_doubt: () => badge("bad", "in doubt"),
  })[move.state]();

/** Where from and to; the arrow is said as a word. */
export const wayOf = (move) =>
  html`<span class="way"
    >${move.from ?? "no pool"} <span aria-hidden="true">→</span><span class="unseen">to</span> ${move.to}</span
  >`;

export const pauseOf = (move) =>
  move.state !== "done" ? "–" : move.pause_ms === null ? "none" : milliseconds(move.pause_ms);

/** What the plan expected; less than nothing where the need forced it. */
export const savingOf = (move) => {
  if (move.gain_per_hour === null) return "–";
  return move.gain_per_hour >= 0 ? `${money(move.gain_per_hour)}/h` : `−${money(-move.gain_per_hour)}/h`;
};

export const tookOf = (move) => (move.ended ? duration(move.ended - move.started) : "–");

export const reasonsOf = (move) =>
  html`${move.error ? html`<p class="bad-text">${move.error}</p>` : nothing}
  ${
    move.why.length
      ? html`<ul class="words">
          ${move.why.map((line) => html`<li>${line}</li>`)}
        </ul>`
      : html`<p class="hint">No plan of this host decided it: ${wantedBy(move)} did.</p>`
  }`;

export const titleOf = (move) => html`${instanceLink(move.instance)} <span class="muted">${kindOf(move)}</span>`;

export const whenOf = (move) => moment(move.started);

const PHASES = ["offer", "transfer", "snapshot", "verify", "activate", "deactivate"];

/** The steps of a migration, the present one marked. */
export const phases = (now) =>
  html`<ol class="phases" aria-label="Steps">
    ${PHASES.map((phase) => {
      const at = PHASES.indexOf(phase) - PHASES.indexOf(now);
      return html`<li class=${at < 0 ? "past" : at === 0 ? "now" : "next"} aria-current=${at === 0 ? "step" : nothing}>
        ${phase}
      </li>`;
    })}
  </ol>`;

/** Rates of a migration, round by round: what is sent, and what is written meanwhile. */
export function ratePlot(migration) {
  const rounds = migration.rounds.filter((round) => round.bytes_per_s > 0 || round.dirty_bytes_per_s !== null);
  const seconds = rounds.map((round) => (round.at - migration.started) / 1000);
  const sent = rounds.map((round) => (round.bytes_per_s > 0 ? round.bytes_per_s : null));
  const written = rounds.map((round) => round.dirty_bytes_per_s);
  const id = `rates-${migration.id}`;
  if (rounds.length < 2) return html`<p class="hint">The rates are plotted from the second round on.</p>`;
  return figure(id, "Written and sent", {
    legend: [
      ["line-a", "memory sent per second"],
      ["line-b", "memory written per second meanwhile"],
    ],
    plot: html`<line-plot
      .spec=${{
        label: `Rates of the migration of ${migration.instance}: ${bytesPerSecond(sent.at(-1))} sent, ${bytesPerSecond(written.at(-1))} written.`,
        data: [seconds, sent, written],
        lines: [
          { label: "sent", colour: "line-a", points: true, spanGaps: true },
          { label: "written", colour: "line-b", points: true, spanGaps: true },
        ],
        format: bytesPerSecond,
        elapsed: true,
        read: (i) =>
          `Round ${rounds[i].round}, after ${duration(rounds[i].at - migration.started)}: ${bytesPerSecond(sent[i])} sent, ${bytesPerSecond(written[i])} written`,
      }}
    ></line-plot>`,
    columns: ["Round", "After", "Pages", "Sent", "Rate", "Written", "Pause if frozen then"],
    rows: () =>
      migration.rounds.map((round) => [
        round.round,
        duration(round.at - migration.started),
        `${count(round.round_pages_sent)} of ${count(round.round_pages)}`,
        bytes(round.bytes_sent),
        bytesPerSecond(round.bytes_per_s || null),
        bytesPerSecond(round.dirty_bytes_per_s),
        milliseconds(round.expected_unavailability_ms),
      ]),
  });
}

export const roundsOf = (migration) => plural(migration.report?.rounds ?? migration.rounds.length, "round");
