// The dashboard in a real browser: node check.mjs URL CHROMIUM INSTANCE ONE_THAT_LEAVES [SCREENSHOTS]
//
// Says "MIGRATE" when a migration is to be under way, and "DONE" when all was looked at. What is wrong is said as it is found, and
// makes the exit code 1.

import { expect, go, looks, open, text, until, wrong } from "./browser.mjs";
import * as views from "./views.mjs";

const [url, chromium, name, leaves, screenshots] = process.argv.slice(2);
const get = async (route) => (await fetch(new URL(route, url))).json();
const PATHS = ["#/", "#/instances", `#/instances/${name}`, "#/pools", "#/moves"];
const at = (path) => new URL(path, url).href;

/** The switch overrides the system's choice, and is remembered. */
async function themes(browser) {
  const page = await browser.page({ scheme: "light" });
  const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await go(page, at("#/"));
  const light = await back();
  await page.getByLabel("Colours").selectOption("dark");
  const dark = await back();
  expect(light !== dark, `both schemes have the background ${light}`);
  await page.reload();
  await until("the view", () => page.locator("h1").count());
  expect((await back()) === dark, "the choice is forgotten");
  await page.getByLabel("Colours").selectOption("auto");
  await page.emulateMedia({ colorScheme: "dark" });
  expect((await back()) === dark, "the system's choice is not followed");
  await page.context().close();
}

/** All views are reached by the keyboard alone, and one sees where one is. */
async function keyboard(browser) {
  const page = await browser.page();
  await go(page, at("#/"));
  // Whatever else happens on the host is said, too.
  await page.evaluate(() => {
    const announcer = document.getElementById("announcer");
    window.said = [];
    new MutationObserver(() => window.said.push(announcer.textContent)).observe(announcer, { childList: true });
  });
  const focused = () =>
    page.evaluate(() => {
      const element = document.activeElement;
      return {
        text: element.textContent.trim(),
        outline: getComputedStyle(element).outlineStyle,
        tag: element.tagName,
      };
    });
  async function tabTo(wanted) {
    for (let i = 0; i < 80; i++) {
      await page.keyboard.press("Tab");
      const at = await focused();
      if (at.tag === "BODY") continue;
      expect(at.outline !== "none", `the focus on ${at.tag} ${at.text.slice(0, 40)} can't be seen`);
      if (wanted(at)) return true;
    }
    return false;
  }
  expect(await tabTo((at) => at.text === "Skip to the content"), "there is no way past the header");
  for (const title of ["Instances", "Pools", "Moves", "Overview"]) {
    await page.evaluate(() => document.activeElement.blur());
    expect(await tabTo((at) => at.tag === "A" && at.text === title), `${title} is not reached by Tab`);
    await page.keyboard.press("Enter");
    await until("the view", () => page.locator("h1").count());
    await until(`the view ${title}`, async () => (await text(page, "h1")) === title);
    await until(`word of ${title}`, () => page.evaluate((title) => window.said.includes(title), title));
  }
  await go(page, at("#/instances"));
  await until("the instances", () => page.locator("tbody a").count());
  expect(await tabTo((at) => at.text === name), `${name} is not reached by Tab`);
  await page.keyboard.press("Enter");
  await until(`the view of ${name}`, async () => (await text(page, "h1")) === name);
  await until("its plots", () => page.locator("canvas").count());
  expect(await tabTo((at) => at.tag === "DIV"), "no plot is reached by Tab");
  const readout = () => page.evaluate(() => document.activeElement.nextElementSibling.textContent);
  await page.keyboard.press("Home");
  const first = await readout();
  await page.keyboard.press("End");
  expect(
    first !== (await readout()) && /^\d\d:\d\d:\d\d: /.test(first),
    `the keys do not read single values: ${first}`,
  );
  await page.context().close();
}

/** The policy is in force: what is not the page's own is not run. */
async function policy(browser) {
  const page = await browser.strict();
  await go(page, at("#/"));
  await until("the overview", () => page.locator(".tiles").count());
  page.removeAllListeners("console");
  await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "window.wasRun = true";
    document.head.append(script);
  });
  expect(!(await page.evaluate(() => window.wasRun)), "a script that is not the page's own was run");
  await page.context().close();
}

const browser = await open(url, chromium);
try {
  const page = await browser.page();
  await go(page, at("#/"));
  await views.overview(page, get);
  await go(page, at("#/instances"));
  await views.instances(page, get);
  await views.filter(page, get);
  await go(page, at(`#/instances/${name}`));
  await views.instance(page, get, name);
  await go(page, at("#/pools"));
  await views.pools(page, get);
  await go(page, at("#/moves"));
  await views.history(page, get);
  console.log("MIGRATE");
  await views.running(page, get, screenshots);
  await until("word of the migration", async () => (await text(page, "#announcer")) !== "");
  await until("the migration's end", async () => (await get("v1/status")).migrations_running === 0, 60_000);
  await views.history(page, get);
  await go(page, at(`#/instances/${leaves}`));
  await views.gone(page, get, leaves);
  await looks(browser, url, PATHS, { wanted: "canvas", screenshots });
  await themes(browser);
  await keyboard(browser);
  await policy(browser);
} finally {
  await browser.close();
}
console.log(wrong.length ? `${wrong.length} things are wrong` : "DONE");
process.exit(wrong.length ? 1 : 0);
