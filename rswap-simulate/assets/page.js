"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const hours = (window) => (window * report.window_ms) / 3.6e6;
const colours = ["#0b6e4f", "#3b82c4", "#8a8f98", "#d9822b", "#7b2d8b", "#b3412e"];
const width = () => Math.max(320, Math.min(1180, document.body.clientWidth - 32));
const plots = [];

function plot(where, title, height, series, data, extra = {}) {
  const target = document.getElementById(where);
  target.textContent = "";
  const made = new uPlot({
    title,
    width: width(),
    height,
    scales: { x: { time: false } },
    axes: [{ label: "hours" }, { label: extra.unit, size: extra.size || 60, values: extra.values }],
    cursor: { sync: { key: "hours" }, drag: { x: true, y: false } },
    series: [{ label: "hours", value: (_, at) => (at == null ? "" : at.toFixed(2)) }, ...series],
    bands: extra.bands || [],
    hooks: extra.hooks || {},
  }, data, target);
  plots.push(made);
}

const round = (_, value) => (value == null ? "" : value.toFixed(3));
const windows = Array.from({ length: report.windows }, (_, window) => hours(window));

plot("all", "Demand of all instances, and what they got", 260,
  [{ label: "demand", stroke: "#222", width: 1, fill: "#2222220d", value: round },
   ...report.rows.map((row, i) => ({ label: row.policy, stroke: colours[i % colours.length], width: 1.5, value: round }))],
  [windows, report.timelines[0].demand, ...report.timelines.map((line) => line.served)],
  { unit: "reference cores" });

plot("money", "Money for what was in use, summed up", 260,
  report.rows.map((row, i) => ({ label: row.policy, stroke: colours[i % colours.length], width: 2, value: round })),
  [windows, ...report.timelines.map((line) => {
    let sum = 0;
    return line.money_per_hour.map((rate) => (sum += rate * hours(1)));
  })],
  { unit: "money" });

function moves(focus) {
  return {
    draw: [(u) => {
      const { ctx } = u;
      ctx.save();
      for (const move of focus.moves) {
        const x = u.valToPos(hours(move.window + 1), "x", true);
        if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        ctx.strokeStyle = move.done === false ? "#b3412e" : move.forced ? "#d9822b" : "#0b6e4f";
        ctx.setLineDash(move.done === false ? [3, 3] : []);
        ctx.beginPath();
        ctx.moveTo(x, u.bbox.top);
        ctx.lineTo(x, u.bbox.top + u.bbox.height);
        ctx.stroke();
      }
      ctx.restore();
    }],
  };
}

function show(number) {
  const focus = report.focus[number];
  plots.splice(2).forEach((old) => old.destroy());
  const at = focus.windows.map(hours);
  const ahead = (name) => [null, ...focus.forecast.slice(0, -1).map((f) => (f ? f[name] : null))];
  plot("one", `${focus.instance}: demand, and what was forecast for it a window before`, 280,
    [{ label: "p95", stroke: "#3b82c466", width: 1, value: round },
     { label: "p50", stroke: "#3b82c4", width: 1, value: round },
     { label: "demand", stroke: "#222", width: 1.5, value: round },
     { label: "got", stroke: "#0b6e4f", width: 1, dash: [4, 2], value: round }],
    [at, ahead("p95"), ahead("p50"), focus.demand, focus.used],
    { unit: "reference cores", bands: [{ series: [1, 2], fill: "#3b82c433" }], hooks: moves(focus) });
  plot("place", "Where it sat", 150,
    [{ label: "pool", stroke: "#7b2d8b", width: 2, paths: uPlot.paths.stepped({ align: 1 }),
       value: (_, pool) => (pool == null ? "" : report.pools[pool]) }],
    [at, focus.pool],
    { size: 110, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? report.pools[tick] || "" : "")),
      hooks: moves(focus) });
}

const choice = document.getElementById("instance");
report.focus.forEach((focus, number) => {
  const option = document.createElement("option");
  option.value = number;
  option.textContent = `${focus.instance} (${focus.moves.length} moves)`;
  choice.append(option);
});
choice.addEventListener("change", () => show(+choice.value));
if (report.focus.length) show(0);
addEventListener("resize", () => plots.forEach((made) => made.setSize({ width: width(), height: made.height })));
