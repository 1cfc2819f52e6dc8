// What every page of the dashboard has: header, routes, the rhythm of asking, and word of what has changed.

import { render } from "./lit-html.js";
import { html, nothing } from "./parts.js";
import { redrawAll } from "./plot.js";

const EVERY_MS = 1000;
/** Between two turns there is so many times as long as one takes, at least. */
const AGAIN_AFTER = 2;

const main = document.getElementById("main");
const header = document.getElementById("header");
const announcer = document.getElementById("announcer");

/** Tells those who can't see it, once nothing else is being said. */
export function announce(text) {
  if (!text) return;
  announcer.textContent = "";
  setTimeout(() => (announcer.textContent = text), 50);
}

function themeChoice() {
  const chosen = document.documentElement.dataset.theme ?? "auto";
  const choose = (event) => {
    const choice = event.target.value;
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    try {
      if (choice === "auto") localStorage.removeItem("rswap-theme");
      else localStorage.setItem("rswap-theme", choice);
    } catch {
      // Then it holds as long as the page does.
    }
    redrawAll();
  };
  return html`<label class="theme">
    <span class="unseen">Colours</span>
    <select @change=${choose}>
      ${[
        ["auto", "System colours"],
        ["light", "Light"],
        ["dark", "Dark"],
      ].map(([value, text]) => html`<option value=${value} ?selected=${value === chosen}>${text}</option>`)}
    </select>
  </label>`;
}

/**
 * Runs a dashboard. `views`: `{ path, title, load(state, parameter) -> data, view(data, state) }`, the first of which is shown at
 * `#/`; `refresh()` asks for what all need; `identity(state)` is what stands in the header.
 */
export function run({ views, refresh, identity, changes }) {
  let state = { lost: null };
  let shown = { key: null, data: null, error: null };
  let timer = 0;
  let turn = 0;

  const route = () => {
    const [path = "", parameter] = location.hash.replace(/^#\/?/, "").split("/");
    const view = views.find((view) => view.path === path && Boolean(view.needs) === Boolean(parameter)) ?? views[0];
    return { view, parameter: parameter && decodeURIComponent(parameter), key: location.hash };
  };

  const draw = () => {
    const { view, parameter } = route();
    const here = view.within ?? view.path;
    const links = views.filter((view) => !view.needs);
    render(
      html`<div class="bar-top">
          <a class="brand" href="#/" aria-label="rswap, overview">
            <img src="page/icon.svg" alt="" width="24" height="24" /><span>rswap</span>
          </a>
          <div class="identity">${identity(state)}</div>
          ${themeChoice()}
        </div>
        <nav aria-label="Views">
          <ul>
            ${links.map(
              (link) =>
                html`<li>
                  <a href="#/${link.path}" aria-current=${link.path === here ? "page" : nothing}>${link.title}</a>
                </li>`,
            )}
          </ul>
        </nav>
        ${
          state.lost
            ? html`<p class="lost">
                <strong>No answer.</strong> ${state.lost} What is shown is from before; it goes on by itself.
              </p>`
            : nothing
        }`,
      header,
    );
    const title = typeof view.title === "function" ? view.title(parameter) : view.title;
    document.title = `${title} · ${state.status?.host ?? "rswap"}`;
    const content = shown.error
      ? html`<div class="empty">
          <p>${shown.error.message}</p>
          ${shown.error.hint ? html`<p class="hint">${shown.error.hint}</p>` : nothing}
        </div>`
      : shown.data
        ? view.view(shown.data, state, parameter)
        : html`<p class="empty">Asking…</p>`;
    render(
      html`<h1>${title}</h1>
        ${content}`,
      main,
    );
    main.setAttribute("aria-busy", shown.data || shown.error ? "false" : "true");
  };

  const ask = async () => {
    clearTimeout(timer);
    const mine = ++turn;
    const { view, parameter, key } = route();
    const began = performance.now();
    try {
      const before = state;
      const next = { ...(await refresh(state)), lost: null };
      const data = shown.key === key ? shown.data : null;
      const loaded = await view.load(next, parameter, data).then(
        (data) => ({ key, data, error: null }),
        (error) => {
          if (error.status === undefined) throw error;
          return { key, data: null, error };
        },
      );
      if (mine !== turn) return;
      announce(before.lost ? "The server answers again." : before.status ? changes(before, next) : "");
      [state, shown] = [next, loaded];
    } catch (error) {
      if (mine !== turn) return;
      const lost = error.name === "TimeoutError" ? "It took too long." : `${error.message}.`.replace(/\.\.$/, ".");
      if (!state.lost) announce("The server does not answer.");
      state = { ...state, lost };
    }
    draw();
    const took = performance.now() - began;
    // A server with much to say is asked less often.
    if (!document.hidden) timer = setTimeout(ask, Math.max(EVERY_MS - took, AGAIN_AFTER * took));
  };

  addEventListener("hashchange", () => {
    shown = { key: null, data: null, error: null };
    draw();
    // Where a reader goes on.
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
    const { view, parameter } = route();
    announce(typeof view.title === "function" ? view.title(parameter) : view.title);
    ask();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : ask()));
  addEventListener("wanted", draw);
  draw();
  ask();
}
