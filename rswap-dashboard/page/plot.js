// What all plots have in common: they follow their width, the colours and the keys, and say the values under the cursor.
/* global uPlot */

import { clock, digits } from "./format.js";

const HEIGHT = 190;
const probe = document.createElement("span");
probe.hidden = true;

/** A custom property of the style sheet as the colour that it is now. */
export function colour(name) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

const redrawn = new Set();
/** When the colours have changed. */
export const redrawAll = () => redrawn.forEach((plot) => plot.redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

const font = () => `12px ${getComputedStyle(document.body).fontFamily}`;

/** An axis with the page's colours. */
export const axis = (more) => ({
  stroke: () => colour("muted"),
  grid: { stroke: () => colour("grid"), width: 1 },
  ticks: { stroke: () => colour("grid"), width: 1, size: 5 },
  font: font(),
  ...more,
});

/** Wide enough for the longest label. */
const labelled = (u, values, index, cycle) => {
  if (cycle > 1) return u.axes[index]._size;
  u.ctx.font = font();
  const widths = (values ?? []).map((label) => u.ctx.measureText(label ?? "").width);
  return Math.ceil(Math.max(34, ...widths)) + 14;
};

/** Labels say whole seconds. */
const WHOLE = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 86_400];

export const times = () =>
  axis({ space: 64, size: 30, incrs: WHOLE, values: (_, splits) => splits.map((second) => clock(second * 1000)) });

/** Seconds since a beginning. */
export const elapsed = () =>
  axis({ space: 64, size: 30, values: (_, splits) => splits.map((second) => `${digits(second)} s`) });

export const amounts = (format, more) =>
  axis({ space: 34, size: labelled, values: (_, splits) => splits.map(format), ...more });

/**
 * A plot is `shown` with a specification: `label` (what it says to whom can't see it), `data` (columns, first the time in
 * seconds), `read` (what is said of the column at an index).
 */
export class Plot extends HTMLElement {
  #spec = null;
  #plot = null;
  #size = null;
  #readout = null;

  set spec(spec) {
    const before = this.#spec;
    this.#spec = spec;
    if (!this.isConnected) return;
    if (this.#plot && before && this.shape(before) === this.shape(spec)) this.#refresh();
    else this.#build();
  }

  get spec() {
    return this.#spec;
  }

  /** What can't be changed without a new plot. */
  shape() {
    return "";
  }

  connectedCallback() {
    if (this.#spec) this.#build();
    this.#size ??= new ResizeObserver(() => this.#fit());
    this.#size.observe(this);
    redrawn.add(this);
  }

  disconnectedCallback() {
    this.#size.disconnect();
    redrawn.delete(this);
    this.#plot?.destroy();
    this.#plot = null;
  }

  redraw() {
    this.#plot?.redraw(false, true);
  }

  #fit() {
    const width = Math.floor(this.clientWidth);
    if (this.#plot && width > 0 && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT });
  }

  #build() {
    this.#plot?.destroy();
    if (!this.#readout) {
      const area = document.createElement("div");
      Object.assign(area, { className: "plot-area", tabIndex: 0 });
      area.setAttribute("role", "img");
      area.addEventListener("keydown", (event) => this.#key(event));
      area.addEventListener("blur", () => this.#plot?.setCursor({ left: -10, top: -10 }));
      this.#readout = document.createElement("p");
      this.#readout.className = "readout";
      this.append(area, this.#readout);
    }
    const options = this.options();
    const area = this.firstElementChild;
    this.#plot = new uPlot(
      {
        width: Math.max(200, Math.floor(this.clientWidth)),
        height: HEIGHT,
        legend: { show: false },
        padding: [8, 30, 0, 0],
        ...options,
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 }, ...options.cursor },
        hooks: { ...options.hooks, setCursor: [(u) => this.#read(u)] },
      },
      this.#spec.data,
      area,
    );
    this.#refresh();
  }

  #refresh() {
    this.firstElementChild.setAttribute("aria-label", `${this.#spec.label} Arrow keys read single values.`);
    this.#plot.setData(this.#spec.data);
    this.#read(this.#plot);
  }

  #read(u) {
    const index = u.cursor.idx;
    const last = this.#spec.data[0].length - 1;
    const inside = u.cursor.left >= 0 && index !== null && index !== undefined;
    this.#readout.textContent =
      last < 0 ? "" : this.#spec.read(inside ? Math.min(index, last) : (this.#spec.rest ?? last));
  }

  #key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const last = this.#spec.data[0].length - 1;
    const at = this.#plot.cursor.left >= 0 ? (this.#plot.cursor.idx ?? last) : last;
    const index = Math.max(0, Math.min(last, at + step));
    this.#plot.setCursor({ left: this.#plot.valToPos(this.#spec.data[0][index], "x"), top: 10 });
  }
}
