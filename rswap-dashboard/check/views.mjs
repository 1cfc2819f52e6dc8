// Every view next to what the routes answer at that time.

import { bytes, clock, coresUnit, milliseconds, money, moneyPerHour } from "../page/format.js";
import { expect, text, until } from "./browser.mjs";

/** What a row of a table says, by column, and below it; the table is that with this caption. */
export async function rows(page, caption) {
  return page.evaluate((caption) => {
    const words = (cell) => cell.textContent.replace(/\s+/g, " ").trim();
    const found = [...document.querySelectorAll("table")].find((table) =>
      table.caption?.textContent.trim().startsWith(caption),
    );
    if (!found) return [];
    const heads = [...found.tHead.rows[0].cells].map(words);
    return [...found.tBodies].map((body) => {
      const [row, below] = body.rows;
      const cells = [...row.cells].map((cell, i) => [heads[i], words(cell)]);
      return { ...Object.fromEntries(cells), below: below ? words(below) : "" };
    });
  }, caption);
}

export const starts = (row, name) => Object.values(row)[0].startsWith(name);

export async function agree(what, look) {
  // What is shown is a second older than what is asked for here.
  let last = null;
  await until(what, async () => (last = await look()) === null, 15_000);
  expect(last === null, `${what}: ${last}`);
}

export async function overview(page, get) {
  await agree("the overview's numbers are those of the agent", async () => {
    const status = await get("v1/status");
    const tile = async (name) =>
      page.evaluate((name) => {
        const found = [...document.querySelectorAll(".tiles > div")].find(
          (tile) => tile.querySelector("dt").textContent === name,
        );
        return found?.querySelector(".big").textContent;
      }, name);
    const wanted = status.probes.filter((probe) => probe.state !== "off");
    const expected = {
      Instances: `${status.instances}`,
      Moves: `${status.swaps_done + status.migrations_done}`,
      Probes: `${wanted.filter((probe) => probe.state === "active").length}/${wanted.length}`,
    };
    for (const [name, value] of Object.entries(expected)) {
      const shown = await tile(name);
      if (shown !== value) return `${name}: ${shown} is shown, ${value} is so`;
    }
    return (await text(page, ".host")) === status.host ? null : "the host's name is another";
  });
  await agree("attention is called to what does not work, and not to what is switched off", async () => {
    const { probes } = await get("v1/status");
    const called = await page.locator("section[aria-labelledby=attention] strong").allInnerTexts();
    for (const { name, state } of probes) {
      const isCalled = called.some((what) => what.includes(`The probe ${name} is`));
      if (isCalled !== (state === "unavailable")) return `${name} is ${state}, and called are ${called}`;
    }
    return probes.some((probe) => probe.state === "off") ? null : "none is switched off";
  });
  await agree("the hosts are those of the agent", async () => {
    const hosts = (await get("v1/pools")).filter((pool) => ["host", "this_host"].includes(pool.kind.kind));
    const shown = await rows(page, "Hosts with");
    if (shown.length !== hosts.length || hosts.length < 2) return `${shown.length} shown, ${hosts.length} there`;
    for (const host of hosts) {
      const row = shown.find((row) => starts(row, host.name));
      if (!row) return `${host.name} is missing`;
      if (row["Cost of a core"] !== moneyPerHour(host.cost_per_core_hour))
        return `the cost of ${host.name}: ${row["Cost of a core"]}`;
      if (!row["Cores in use"].endsWith(coresUnit(host.capacity.cores))) return `${host.name}: ${row["Cores in use"]}`;
    }
    return null;
  });
}

export async function instances(page, get) {
  await agree("the instances are those of the agent", async () => {
    const views = await get("v1/profiles");
    const shown = await rows(page, "Instances");
    if (shown.length !== views.length || views.length === 0) return `${shown.length} shown, ${views.length} there`;
    for (const view of views) {
      const row = shown.find((row) => starts(row, view.name));
      if (!row) return `${view.name} is missing`;
      if (row.On !== (view.pool ?? "any cores")) return `${view.name} on ${row.On}`;
      if (row.Memory !== bytes(view.profile.memory.resident_bytes)) return `${view.name}: ${row.Memory}`;
    }
    return null;
  });
}

/** What the filter and the order leave. */
export async function filter(page, get) {
  const names = async () => (await rows(page, "Instances")).map((row) => Object.values(row)[0].split(/[\s/]/)[0]);
  const views = await get("v1/profiles");
  const [first] = views;
  await page.getByLabel("Filter").fill(first.name);
  const left = await until("the filter", async () => {
    const left = await names();
    return left.length < views.length && left;
  });
  expect(
    left?.every((name) => name.startsWith(first.name)),
    `the filter ${first.name} leaves ${left}`,
  );
  await page.getByLabel("Filter").fill("nothing is called so");
  await until("word of nothing", async () => (await text(page, "main .empty")).includes("No instance matches"));
  await page.getByLabel("Filter").fill("");
  await page.getByLabel("Order").selectOption("memory");
  const memory = (view) => view.profile.memory.resident_bytes;
  const most = [...views].sort((a, b) => memory(b) - memory(a))[0].name;
  await until(`${most} to be first by memory`, async () => (await names())[0]?.startsWith(most));
}

/** One that was moved away: that is said, and why. */
export async function gone(page, get, name) {
  const { moved } = await get(`v1/explain?instance=${name}`);
  await until(`word that ${name} is gone`, async () =>
    (await text(page, "main")).includes("is not on this host any more"),
  );
  const shown = await page.locator("section[aria-labelledby=its-moves] details").count();
  expect(shown === moved.length && shown > 0, `${shown} of ${moved.length} moves of ${name} are shown`);
}

/** The rows of a figure's numbers, which its `details` shows when it is open. */
async function numbers(page, id) {
  await page.locator(`#${id} summary`).click();
  const found = await until(`the numbers of ${id}`, async () => {
    const cells = await page
      .locator(`#${id} tbody tr`)
      .evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
    return cells.length > 5 ? cells : null;
  });
  await page.locator(`#${id} summary`).click();
  return found ?? [];
}

/** How many of the rows are those of a window, and that the others are none of another. */
function compare(what, shown, windows, row) {
  const expected = new Set(windows.map((window) => row(window).join("|")));
  const same = shown.filter((cells) => expected.has(cells.join("|"))).length;
  expect(
    same > 5 && same >= shown.length - 8,
    `${what}: ${same} of ${shown.length} rows are windows of the agent's: ${shown[3]}`,
  );
}

export async function instance(page, get, name) {
  await until(`the plots of ${name}`, () => page.locator("#forecast-cpu canvas").count());
  const read = async (id) => ({
    shown: await numbers(page, id),
    windows: (await get(`v1/windows?instance=${name}`)).windows,
  });
  const memory = await read("forecast-memory");
  const amount = (band, q) => (band ? bytes(band[q]) : "–");
  compare("memory and its forecast", memory.shown, memory.windows, (window) => [
    clock(window.at),
    bytes(window.used.memory),
    amount(window.forecast.memory, "p50"),
    amount(window.forecast.memory, "p95"),
  ]);
  expect(
    memory.shown.some((cells) => cells[1] !== "–" && cells[3] !== "–"),
    "no window is shown with what had been forecast for it",
  );
  const ns = (value) => (value === null ? "–" : milliseconds(value / 1e6));
  for (const [id, key, format] of [
    ["heat-run_queue_ns", "run_queue_ns", ns],
    ["heat-block_ns", "block_ns", ns],
    ["heat-rtt_us", "rtt_us", (us) => ns(us === null ? null : us * 1000)],
  ]) {
    const { shown, windows } = await read(id);
    expect(
      shown.some((cells) => cells[1] !== "0"),
      `${id}: no window has samples`,
    );
    compare(id, shown, windows, ({ at, [key]: spread }) => [
      clock(at),
      spread.count.toLocaleString("en"),
      format(spread.p50),
      format(spread.p99),
    ]);
    // Where there are few samples, as of round trips one per connection, all cells may be alike.
    const most = Math.max(...windows.flatMap((window) => window[key].octaves.map(([, samples]) => samples)));
    expect(await painted(page, id, most > 8 ? 2 : 1), `${id}: nothing is drawn`);
  }
  await agree("the decisions are those of the agent", async () => {
    const { now } = await get(`v1/explain?instance=${name}`);
    const shown = await page.locator("section[aria-labelledby=why] article > p").allInnerTexts();
    const stable = (words) => words.replace(/[\d.]+/g, "#");
    const missing = now.find(({ words }) => !shown.some((text) => stable(text) === stable(words[0])));
    if (now.length === 0) return "nothing was decided";
    if (missing) return `${missing.words[0]} is not among ${shown}`;
    const pools = await rows(page, "Pools compared");
    return pools.length > 1 && pools.every((row) => /^−?-?\d/.test(row.Score))
      ? null
      : `candidates: ${JSON.stringify(pools)}`;
  });
}

/** Whether a canvas has cells in at least so many colours of the heat map. */
const painted = (page, id, colours) =>
  page.evaluate(
    ([id, colours]) => {
      const probe = document.body.appendChild(document.createElement("i"));
      const cells = Array.from({ length: 8 }, (_, step) => {
        probe.style.color = `var(--heat-${step})`;
        return getComputedStyle(probe).color.match(/\d+/g).join();
      });
      probe.remove();
      const canvas = document.querySelector(`#${id} canvas`);
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const found = new Map(cells.map((colour) => [colour, 0]));
      for (let i = 0; i < data.length; i += 4) {
        const colour = `${data[i]},${data[i + 1]},${data[i + 2]}`;
        if (found.has(colour)) found.set(colour, found.get(colour) + 1);
      }
      return [...found.values()].filter((pixels) => pixels > 20).length >= colours;
    },
    [id, colours],
  );

export async function pools(page, get) {
  await agree("the pools are those of the agent", async () => {
    const { pools } = await get("v1/inventory");
    const titles = { cores: "Cores", memory: "Memory", storage: "Storage", link: "Links", swap: "Swap" };
    for (const pool of pools) {
      const shown = await rows(page, `${titles[pool.kind]} of this host`);
      const row = shown.find((row) => starts(row, pool.name));
      if (!row) return `${pool.name} is missing`;
      if (pool.state === "online" && row.State !== "online") return `${pool.name} is ${row.State}`;
      if (pool.kind === "cores" && !row["In use"].endsWith(`of ${coresUnit(pool.capacity.value)}`))
        return row["In use"];
    }
    return pools.length > 3 ? null : "too few pools";
  });
}

export async function history(page, get) {
  await agree("the history is the agent's", async () => {
    const moves = (await get("v1/moves")).filter((move) => move.state !== "running").reverse();
    const shown = await rows(page, "Moves that have ended");
    if (shown.length !== moves.length || moves.length === 0) return `${shown.length} shown, ${moves.length} there`;
    for (const [i, move] of moves.entries()) {
      const row = shown[i];
      if (!starts(row, move.instance)) return `row ${i}: ${JSON.stringify(row)}`;
      if (!row.Way.endsWith(move.to)) return `${move.instance} to ${row.Way}`;
      if (move.pause_ms && row.Pause !== milliseconds(move.pause_ms)) return `a pause of ${row.Pause}`;
      const saving = move.gain_per_hour;
      const said = saving === null ? "–" : `${saving < 0 ? "−" : ""}${money(Math.abs(saving))}/h`;
      if (row["Expected saving"] !== said) return `a saving of ${row["Expected saving"]}, not ${said}`;
      if (!move.why.every((line) => row.below.includes(line))) return `why: ${row.below}`;
    }
    return null;
  });
}

/** A migration that is under way: its rounds grow, and its rates are drawn. */
export async function running(page, get, screenshots) {
  const going = async () => (await get("v1/migrations")).find((migration) => migration.state === "running");
  await until("a migration in its third round", async () => ((await going())?.rounds.length ?? 0) >= 3, 60_000);
  const shown = await until("the running migration to be shown with its rates", async () => {
    const article = page.locator("article.card").first();
    return (await article.locator("canvas").count()) > 0 && (await article.innerText());
  });
  if (screenshots) await page.screenshot({ path: `${screenshots}/desktop-light-running.png`, fullPage: true });
  const migration = await going();
  expect(Boolean(migration), "the migration was over before it could be compared");
  if (!shown || !migration) return;
  expect(shown.includes(migration.instance), `another instance is shown: ${shown}`);
  const id = `rates-${migration.id}`;
  await page.locator(`#${id} summary`).click();
  const cells = await until("the rounds' numbers", async () => {
    const found = await page
      .locator(`#${id} tbody tr`)
      .evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
    return found.length >= 3 ? found : null;
  });
  // The oldest rounds are over: their numbers stay.
  for (const round of migration.rounds.slice(0, 2)) {
    const row = (cells ?? []).find(([number]) => number === `${round.progress?.round ?? round.round}`);
    expect(
      row?.[3] === bytes(round.bytes_sent),
      `round ${round.round}: ${row}, and ${bytes(round.bytes_sent)} were sent`,
    );
  }
  const rates = migration.rounds.filter((round) => round.dirty_bytes_per_s > 0);
  expect(rates.length > 0, "no dirty rate was measured");
}
