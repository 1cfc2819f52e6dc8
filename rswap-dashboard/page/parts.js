// Pieces that several views are made of.

import { html, nothing } from "./lit-html.js";
import { plural } from "./format.js";
import "./line-plot.js";
import "./heat-plot.js";

export { html, nothing };

/** How full something is, with a colour where that is much; `text` says it in words. */
export const meter = (share, text) => progress(share, text, share >= 0.9 ? "full" : share >= 0.7 ? "high" : "usual");

/** How far something is. */
export const progress = (share, text, how = "usual") => {
  const part = Math.max(0, Math.min(1, Number.isFinite(share) ? share : 0));
  return html`<span class="meter">
    <svg class="bar ${how}" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
      <rect class="track" width="100" height="8" />
      <rect class="fill" width=${100 * part} height="8" />
    </svg>
    <span class="meter-text">${text}</span>
  </span>`;
};

/** `kind`: good, warn, bad, busy, or plain. */
export const badge = (kind, text) => html`<span class="badge ${kind}">${text}</span>`;

export const empty = (text, hint = nothing) =>
  html`<div class="empty">
    <p>${text}</p>
    ${hint === nothing ? nothing : html`<p class="hint">${hint}</p>`}
  </div>`;

export const section = (id, title, content, aside = nothing) =>
  html`<section aria-labelledby=${id}>
    <div class="section-head">
      <h2 id=${id}>${title}</h2>
      ${aside}
    </div>
    ${content}
  </section>`;

/**
 * A table that becomes a list of cards where there is little room. Columns: `[title, cell(row), class]`; the first one is each
 * row's header. `below(row)` stands under a row, in all its width. Roles are said, since the cards' display would take them from
 * the table.
 */
export const table = (caption, columns, rows, { className = "", below = null } = {}) =>
  html`<table class="cards ${className}" role="table">
    <caption class="unseen">
      ${caption}
    </caption>
    <thead role="rowgroup">
      <tr role="row">
        ${columns.map(([title, , kind]) => html`<th role="columnheader" scope="col" class=${kind ?? ""}>${title}</th>`)}
      </tr>
    </thead>
    ${rows.map(
      (row) =>
        html`<tbody role="rowgroup">
          <tr role="row">
            ${columns.map(([title, cell, kind], i) =>
              i === 0
                ? html`<th role="rowheader" scope="row" class=${kind ?? ""}>${cell(row)}</th>`
                : html`<td role="cell" class=${kind ?? ""} data-title=${title}><div>${cell(row)}</div></td>`,
            )}
          </tr>
          ${
            below
              ? html`<tr role="row" class="below">
                  <td role="cell" colspan=${columns.length}>${below(row)}</td>
                </tr>`
              : nothing
          }
        </tbody>`,
    )}
  </table>`;

/** Names and values. */
export const facts = (pairs, className = "") =>
  html`<dl class="facts ${className}">
    ${pairs
      .filter((pair) => pair)
      .map(
        ([name, value, kind]) =>
          html`<div class=${kind ?? ""}>
            <dt>${name}</dt>
            <dd>${value}</dd>
          </div>`,
      )}
  </dl>`;

export const instanceLink = (name) => html`<a href="#/instances/${encodeURIComponent(name)}">${name}</a>`;

const opened = new Set();

/**
 * A plot with its title, its legend, and its numbers as a table for whoever asks for that. `rows()` is called only then.
 */
export function figure(id, title, { legend = [], note = nothing, plot, columns, rows }) {
  const toggled = (event) => {
    if (event.target.open) opened.add(id);
    else opened.delete(id);
    event.target.dispatchEvent(new CustomEvent("wanted", { bubbles: true }));
  };
  const isOpen = opened.has(id);
  return html`<figure class="plot" id=${id}>
    <figcaption>
      <h3>${title}</h3>
      ${
        legend.length
          ? html`<ul class="legend">
              ${legend.map(([kind, text]) => html`<li><span class="key ${kind}" aria-hidden="true"></span>${text}</li>`)}
            </ul>`
          : nothing
      }
    </figcaption>
    ${plot} ${note === nothing ? nothing : html`<p class="hint">${note}</p>`}
    <details @toggle=${toggled} ?open=${isOpen}>
      <summary>The numbers<span class="unseen"> of ${title}</span></summary>
      ${isOpen ? numbers(title, columns, rows()) : nothing}
    </details>
  </figure>`;
}

const SHOWN = 60;

/** Newest first. */
function numbers(title, columns, rows) {
  const shown = rows.slice(-SHOWN).reverse();
  if (shown.length === 0) return empty("None yet.");
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Numbers of ${title}">
      <table>
        <caption class="unseen">
          ${title}
        </caption>
        <thead>
          <tr>
            ${columns.map((column) => html`<th scope="col">${column}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${shown.map(
            ([first, ...others]) =>
              html`<tr>
                <th scope="row">${first}</th>
                ${others.map((value) => html`<td>${value}</td>`)}
              </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${rows.length > SHOWN ? html`<p class="hint">The newest ${SHOWN} of ${plural(rows.length, "row")}.</p>` : nothing}`;
}
