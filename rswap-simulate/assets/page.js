"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const hours = (window) => (window * report.window_ms) / 3.6e6;
const width = () => Math.max(288, document.body.clientWidth - 32);
const plots = [];
const darkness = matchMedia("(prefers-color-scheme: dark)");
const LIGHT = { ink: "#222222", quiet: "#4a515c", line: "#e3e3de", save: "#0b6e4f", forced: "#d9822b", failed: "#b3412e", blue: "#3b82c4",
  grey: "#8a8f98", purple: "#7b2d8b" };
const DARK = { ink: "#e4e6ea", quiet: "#a7adb7", line: "#33373e", save: "#35b58a", forced: "#e79a4b", failed: "#e5705c", blue: "#6aa9e4",
  grey: "#8a8f98", purple: "#c083d0" };
let colour = LIGHT;
// Names of pools and large numbers have room; what stands below each other has one scale of time.
const LEFT = 76;

function plot(where, title, height, series, data, extra = {}) {
  const target = document.getElementById(where);
  target.textContent = "";
  const axis = { stroke: colour.quiet, grid: { stroke: colour.line, width: 1 }, ticks: { stroke: colour.line, width: 1 } };
  const made = new uPlot({
    title,
    width: width(),
    height,
    scales: { x: { time: false }, y: { range: extra.range } },
    axes: [{ ...axis, label: "hours", size: 34, labelSize: 18, labelGap: 0 },
      { ...axis, label: extra.unit, size: LEFT - (extra.unit ? 22 : 0), labelSize: 22, values: extra.values, splits: extra.splits }],
    cursor: { sync: { key: "hours" }, drag: { x: true, y: false } },
    series: [{ label: "hours", value: (_, at) => (at == null ? "" : at.toFixed(2)) }, ...series],
    bands: extra.bands || [],
    hooks: extra.hooks || {},
  }, data, target);
  plots.push(made);
}

const round = (_, value) => (value == null ? "" : value.toFixed(3));
const windows = Array.from({ length: report.windows }, (_, window) => hours(window));

function whole() {
  const colours = [colour.save, colour.blue, colour.grey, colour.forced, colour.purple, colour.failed];
  const lines = (width, rows) => rows.map(([row, i]) => ({ label: row.policy, stroke: colours[i % colours.length], width, value: round }));
  const all = report.rows.map((row, i) => [row, i]);
  const demand = report.timelines[0].demand;
  plot("all", "Demand of all instances", 200,
    [{ label: "demand", stroke: colour.ink, width: 1, fill: colour.ink + "12", value: round }],
    [windows, demand], { unit: "reference cores" });
  // The oracle always gives what is demanded.
  const real = all.filter(([row]) => row.policy !== "oracle");
  plot("short", "What was demanded and not given", 200, lines(1.5, real),
    [windows, ...real.map(([, i]) => report.timelines[i].served.map((served, at) => Math.max(0, demand[at] - served)))],
    { unit: "reference cores" });
  plot("money", "Money for what was in use, summed up", 260, lines(2, all),
    [windows, ...report.timelines.map((line) => {
      let sum = 0;
      return line.money_per_hour.map((rate) => (sum += rate * hours(1)));
    })],
    { unit: "money" });
}

function moves(focus) {
  return {
    draw: [(u) => {
      const { ctx } = u;
      ctx.save();
      for (const move of focus.moves) {
        const x = u.valToPos(hours(move.window + 1), "x", true);
        if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        ctx.strokeStyle = move.done === false ? colour.failed : move.forced ? colour.forced : colour.save;
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

function one(number) {
  const focus = report.focus[number];
  const at = focus.windows.map(hours);
  const ahead = (name) => [null, ...focus.forecast.slice(0, -1).map((f) => (f ? f[name] : null))];
  plot("one", `${focus.instance}: demand, and what was forecast for it a window before`, 280,
    [{ label: "p99", stroke: colour.blue + "30", width: 1, value: round },
     { label: "p95", stroke: colour.blue + "66", width: 1, value: round },
     { label: "p50", stroke: colour.blue, width: 1, value: round },
     { label: "demand", stroke: colour.ink, width: 1.5, value: round },
     { label: "got", stroke: colour.save, width: 1, dash: [4, 2], value: round }],
    [at, ahead("p99"), ahead("p95"), ahead("p50"), focus.demand, focus.used],
    { unit: "reference cores", hooks: moves(focus),
      bands: [{ series: [1, 2], fill: colour.blue + "18" }, { series: [2, 3], fill: colour.blue + "38" }] });
  // Only the pools that it was on, by their names.
  const on = [...new Set(focus.pool)].sort((a, b) => a - b);
  const name = (place) => report.pools[on[place]] || "";
  plot("place", "Where it sat", 110 + 24 * Math.min(10, on.length),
    [{ label: "pool", stroke: colour.purple, width: 2, paths: uPlot.paths.stepped({ align: 1 }),
       value: (_, place) => (place == null ? "" : name(place)) }],
    [at, focus.pool.map((pool) => on.indexOf(pool))],
    { range: () => [-0.5, on.length - 0.5], hooks: moves(focus),
      splits: () => on.map((_, place) => place).filter((place) => place % Math.ceil(on.length / 10) === 0),
      values: (_, places) => places.map((place) => name(place).slice(0, 11)) });
}

const choice = document.getElementById("instance");
report.focus.forEach((focus, number) => {
  const option = document.createElement("option");
  option.value = number;
  option.textContent = `${focus.instance} (${focus.moves.length} ${focus.moves.length === 1 ? "move" : "moves"})`;
  choice.append(option);
});

function draw() {
  colour = darkness.matches ? DARK : LIGHT;
  plots.splice(0).forEach((old) => old.destroy());
  for (const [kind, name] of [["save", "to save"], ["forced", "forced by need"], ["failed", "failed"]]) {
    const key = document.getElementById(kind);
    key.style.color = colour[kind];
    key.textContent = name;
  }
  whole();
  if (report.focus.length) one(+choice.value);
}

choice.addEventListener("change", draw);
darkness.addEventListener("change", draw);
draw();
addEventListener("resize", () => plots.forEach((made) => made.setSize({ width: width(), height: made.height })));
