// How long something took, window by window.

import { clock, count } from "./format.js";
import { figure, html } from "./parts.js";

const log2 = (value) => (value === null ? null : Math.log2(Math.max(1, value)));

export function heatFigure(key, title, format, series) {
  const spreads = series.windows.map((window) => window[key]);
  const seconds = series.windows.map((window) => window.at / 1000);
  const newest = spreads.findLastIndex((spread) => spread.count > 0);
  const read = (i) => {
    const { count: samples, p50, p99 } = spreads[i];
    const said = samples
      ? `${count(samples)} samples, half within ${format(p50)}, 99 in 100 within ${format(p99)}`
      : "none";
    return `${clock(seconds[i] * 1000)}: ${said}`;
  };
  return figure(`heat-${key}`, title, {
    legend: [
      ["heat", "few to many samples"],
      ["median", "half are below"],
      ["p99", "99 in 100 are below"],
    ],
    plot: html`<heat-plot
      .spec=${{
        label: `${title}, over time: ${newest < 0 ? "none" : read(newest)}.`,
        data: [seconds, spreads.map((spread) => log2(spread.p50)), spreads.map((spread) => log2(spread.p99))],
        columns: spreads.map((spread) => spread.octaves),
        format,
        read,
      }}
    ></heat-plot>`,
    columns: ["At", "Samples", "Half within", "99 in 100 within"],
    rows: () =>
      spreads.map(({ count: samples, p50, p99 }, i) => [
        clock(seconds[i] * 1000),
        count(samples),
        format(p50),
        format(p99),
      ]),
  });
}
