// Histograms over time as a heat map: a column per window, a row per power of two, darker where more samples are.

import { Plot, amounts, colour, times } from "./plot.js";

/** Shares of black and white that a cell's colour is mixed with, least samples first. */
const STEPS = 8;
/** What a label of the axis takes. */
const LABEL_PX = 22;

/**
 * Besides a plot's: `columns` (per window, `[[octave, samples], ..]`), `format` of a value. The data are the time, log2 of the
 * median, and log2 of what 99 in 100 did not exceed.
 */
class HeatPlot extends Plot {
  options() {
    const rows = () => this.#rows();
    return {
      scales: { x: { time: true }, y: { range: () => rows() } },
      axes: [
        times(),
        amounts((octave) => this.spec.format(Math.round(2 ** octave)), {
          splits: (u, _, least, most) => marks(u, least, most),
        }),
      ],
      series: [
        {},
        { stroke: () => colour("heat-median"), width: 1.5, dash: [5, 4], points: { show: false } },
        { stroke: () => colour("heat-p99"), width: 1.5, points: { show: false } },
      ],
      hooks: { drawAxes: [(u) => this.#cells(u)] },
    };
  }

  /** Without the row of zeros, which may be far from all others: they are drawn in the lowest one. */
  #rows() {
    const octaves = this.spec.columns
      .flatMap((column) => column.map(([octave]) => octave))
      .filter((octave) => octave > 0);
    if (octaves.length === 0) return [0, 1];
    const [least, most] = [Math.min(...octaves), Math.max(...octaves) + 1];
    return most - least < 4 ? [Math.max(0, least - 1), Math.max(0, least - 1) + 5] : [least, most];
  }

  #cells(u) {
    const [seconds] = this.spec.data;
    const most = Math.max(1, ...this.spec.columns.flatMap((column) => column.map(([, samples]) => samples)));
    const fills = Array.from({ length: STEPS }, (_, step) => colour(`heat-${step}`));
    const usual = usualStep(seconds);
    u.ctx.save();
    u.ctx.beginPath();
    u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    u.ctx.clip();
    this.spec.columns.forEach((column, i) => {
      const from = Math.max(seconds[i - 1] ?? -Infinity, seconds[i] - 1.5 * usual);
      const left = Math.round(u.valToPos(Number.isFinite(from) ? from : seconds[i] - usual, "x", true));
      const right = Math.round(u.valToPos(seconds[i], "x", true));
      for (const [octave, samples] of column) {
        const row = Math.max(octave, u.scales.y.min);
        const top = Math.round(u.valToPos(row + 1, "y", true));
        const bottom = Math.round(u.valToPos(row, "y", true));
        // Counts differ by orders of magnitude.
        const share = Math.log1p(samples) / Math.log1p(most);
        u.ctx.fillStyle = fills[Math.min(STEPS - 1, Math.floor(share * STEPS))];
        u.ctx.fillRect(left, top, Math.max(1, right - left), bottom - top);
      }
    });
    u.ctx.restore();
  }
}

/** Where round values are, as close as labels can be. */
function marks(u, least, most) {
  const perOctave = u.bbox.height / devicePixelRatio / (most - least);
  const steps = [[1, 2, 5], [1, 3], [1]].find((steps) => perOctave * Math.log2(10 / steps.at(-1)) >= LABEL_PX) ?? [1];
  const found = [];
  for (let decade = 1; decade <= 2 ** most; decade *= 10) {
    found.push(...steps.map((step) => Math.log2(step * decade)).filter((mark) => mark >= least && mark <= most));
  }
  return found;
}

/** How far windows are apart, mostly. */
function usualStep(seconds) {
  const steps = seconds.slice(1).map((second, i) => second - seconds[i]);
  return steps.sort((a, b) => a - b)[Math.floor(steps.length / 2)] ?? 1;
}

customElements.define("heat-plot", HeatPlot);
