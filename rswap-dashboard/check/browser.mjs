// A headless Chromium that notes whatever a page must not do.

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const SIZES = { desktop: { width: 1280, height: 900 }, phone: { width: 360, height: 740 } };

/** Every size in every scheme. */
export const LOOKS = [
  ["desktop", "light"],
  ["desktop", "dark"],
  ["phone", "light"],
  ["phone", "dark"],
];

/** All that went wrong, in words. */
export const wrong = [];

export function expect(holds, what) {
  if (!holds) {
    wrong.push(what);
    console.log(`WRONG: ${what}`);
  }
}

export async function open(url, executablePath) {
  // The browser's own sandbox needs another user than root; it is shown nothing but our own page.
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const origin = new URL(url).origin;
  async function page({ size = "desktop", scheme = "light" } = {}) {
    // axe is injected as a script, which the page's own policy forbids: the policy is looked at by itself.
    const context = await browser.newContext({
      viewport: SIZES[size],
      colorScheme: scheme,
      reducedMotion: "reduce",
      bypassCSP: true,
    });
    return watched(await context.newPage(), origin);
  }
  /** With the policy in force. */
  async function strict() {
    const context = await browser.newContext({ viewport: SIZES.desktop });
    return watched(await context.newPage(), origin);
  }
  return { page, strict, close: () => browser.close() };
}

function watched(page, origin) {
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) expect(false, `the console says: ${message.text()}`);
  });
  page.on("pageerror", (error) => expect(false, `an error in the page: ${error.stack ?? error}`));
  page.on("request", (request) => {
    const url = request.url();
    expect(url.startsWith(`${origin}/`) || url.startsWith("data:"), `a request elsewhere: ${url}`);
  });
  return page;
}

/** Serious violations of accessibility, as axe finds them. */
export async function accessible(page, where) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  for (const { id, impact, help, nodes } of violations.filter(({ impact }) =>
    ["serious", "critical"].includes(impact),
  )) {
    const [first] = nodes;
    expect(false, `${where}: axe: ${impact} ${id}: ${help}: ${first.html.slice(0, 160)} ${first.failureSummary}`);
  }
}

/** Nothing is wider than the window. */
export async function fits(page, where) {
  const wide = await page.evaluate(() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return null;
    const all = [...document.querySelectorAll("body *")];
    const beyond = all.filter((element) => element.getBoundingClientRect().right > width + 1);
    return beyond.slice(0, 3).map((element) => element.outerHTML.slice(0, 120));
  });
  expect(wide === null, `${where}: wider than the window: ${wide}`);
}

export async function go(page, url) {
  await page.goto(url);
  await until("the view", () =>
    page.evaluate(() => document.getElementById("main").getAttribute("aria-busy") === "false"),
  );
}

/** Each path in both schemes and on a phone: nothing sticks out, and nobody is left out. */
export async function looks(browser, url, paths, { wanted = "h1", start = "overview", screenshots } = {}) {
  for (const [size, scheme] of LOOKS) {
    const page = await browser.page({ size, scheme });
    for (const path of paths) {
      const where = `${path} (${size}, ${scheme})`;
      await go(page, new URL(path, url).href);
      if (/\/.*\//.test(path)) await until(`what ${where} shows`, () => page.locator(wanted).count());
      await fits(page, where);
      await accessible(page, where);
      if (screenshots) {
        const name = path.replace(/\W+/g, "-").replace(/^-|-$/g, "") || start;
        await page.screenshot({ path: `${screenshots}/${size}-${scheme}-${name}.png`, fullPage: true });
      }
    }
    await page.context().close();
  }
}

export async function until(what, look, limit_ms = 30_000) {
  const deadline = Date.now() + limit_ms;
  for (;;) {
    const found = await look();
    if (found) return found;
    if (Date.now() > deadline) {
      expect(false, `waited ${limit_ms / 1000} s for ${what}`);
      return null;
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

export const text = (page, selector) => page.locator(selector).first().innerText();
