// An instance that stands still, as the page of its agent says it: node standing.mjs URL CHROMIUM INSTANCE VOLUME [SCREENSHOTS]
//
// What is wrong is said as it is found, and makes the exit code 1.

import { go, looks, open, text, until, wrong } from "./browser.mjs";

const [url, chromium, name, volume, screenshots] = process.argv.slice(2);
const SAID = [
  ["#/", `${name} stands still`],
  ["#/instances", "stands still"],
  [`#/instances/${name}`, `A swap of its volume ${volume} failed, and so did the way back.`],
];

const browser = await open(url, chromium);
try {
  const page = await browser.page();
  for (const [path, words] of SAID) {
    await go(page, new URL(path, url).href);
    await until(`${path} to say "${words}"`, async () => (await text(page, "#main")).includes(words));
  }
  const paths = SAID.map(([path]) => path);
  await looks(browser, url, paths, { start: "standing", screenshots });
} finally {
  await browser.close();
}
console.log(wrong.length ? `${wrong.length} things are wrong` : "DONE");
process.exit(wrong.length ? 1 : 0);
