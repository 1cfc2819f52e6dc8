// Amounts over time as lines, bands between two of them, and where the present ends.

import { Plot, amounts, colour, elapsed, times } from "./plot.js";

/** Steps of an axis of bytes. */
const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);

/** The room above the highest value; nothing is below 0. */
const fromZero = (_, least, most) => [Math.min(0, least ?? 0), most > 0 ? most * 1.12 : 1];

/**
 * Besides a plot's: `lines` ({ label, colour, width, dash, points }), `bands` ({ between: [upper, lower] columns, colour }),
 * `format` of an amount, `elapsed` (the times are seconds since a beginning), `now` (a second at which a line separates what was from what is expected).
 */
class LinePlot extends Plot {
  shape(spec) {
    return JSON.stringify([spec.lines, spec.bands, spec.elapsed]);
  }

  options() {
    const { lines, bands = [], format } = this.spec;
    return {
      scales: { x: { time: !this.spec.elapsed }, y: { range: fromZero } },
      axes: [this.spec.elapsed ? elapsed() : times(), amounts(format, format.binary ? { incrs: BINARY } : {})],
      series: [
        {},
        ...lines.map((line) => ({
          label: line.label,
          stroke: () => colour(line.colour),
          width: line.width ?? 2,
          dash: line.dash,
          spanGaps: line.spanGaps ?? false,
          points: { show: line.points ?? false, size: 6, fill: () => colour(line.colour) },
        })),
      ],
      bands: bands.map((band) => ({ series: band.between, fill: () => colour(band.colour) })),
      hooks: { draw: [(u) => this.#present(u)] },
    };
  }

  #present(u) {
    const { now } = this.spec;
    if (!now || now <= u.scales.x.min || now >= u.scales.x.max) return;
    const x = Math.round(u.valToPos(now, "x", true));
    u.ctx.save();
    u.ctx.strokeStyle = colour("muted");
    u.ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    u.ctx.lineWidth = devicePixelRatio;
    u.ctx.beginPath();
    u.ctx.moveTo(x, u.bbox.top);
    u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
    u.ctx.stroke();
    u.ctx.restore();
  }
}

customElements.define("line-plot", LinePlot);
