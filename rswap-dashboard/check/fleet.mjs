// A controller's dashboard in a real browser: node fleet.mjs SOCKET CHROMIUM INSTANCE [SCREENSHOTS]
//
// Browsers don't open unix sockets: a port of loopback is forwarded to it here, as `ssh -L` would.

import { connect, createServer } from "node:net";
import { bytes, coresUnit, moneyPerHour } from "../page/format.js";
import { go, looks, open, until, wrong } from "./browser.mjs";
import { agree, rows, starts } from "./views.mjs";

const [socket, chromium, name, screenshots] = process.argv.slice(2);

const forward = createServer((near) => {
  const far = connect(socket);
  const end = () => [near, far].forEach((stream) => stream.destroy());
  [near, far].forEach((stream) => stream.on("error", end).on("close", end));
  near.pipe(far).pipe(near);
});
await new Promise((resolve) => forward.listen(0, "127.0.0.1", resolve));
const url = `http://127.0.0.1:${forward.address().port}/`;
const at = (path) => new URL(path, url).href;
const get = async (route) => (await fetch(at(route))).json();

async function hosts(page) {
  await go(page, at("#/"));
  await agree("the hosts are the controller's", async () => {
    const hosts = await get("v1/hosts");
    const shown = await rows(page, "Hosts of the fleet");
    if (shown.length !== hosts.length || hosts.length < 2) return `${shown.length} shown, ${hosts.length} there`;
    for (const host of hosts) {
      const row = shown.find((row) => starts(row, host.host));
      if (!row?.["Cores in use"].endsWith(coresUnit(host.whole?.capacity.cores)))
        return `${host.host}: ${JSON.stringify(row)}`;
      if (row["Cost of a core"] !== moneyPerHour(host.whole.cost_per_core_hour)) return row["Cost of a core"];
      if (row.Instances !== `${host.instances}`) return `${host.host} has ${row.Instances}`;
    }
    return null;
  });
}

async function instances(page) {
  await go(page, at("#/instances"));
  await agree("the instances are the controller's", async () => {
    const instances = await get("v1/instances");
    const shown = await rows(page, "Instances of the fleet");
    if (shown.length !== instances.length || instances.length === 0)
      return `${shown.length} shown, ${instances.length} there`;
    for (const instance of instances) {
      const row = shown.find((row) => starts(row, instance.instance));
      if (row?.Host !== instance.host) return `${instance.instance} on ${row?.Host}`;
      if (row.Memory !== bytes(instance.resident_bytes)) return `${instance.instance}: ${row.Memory}`;
    }
    return null;
  });
  await go(page, at(`#/instances/${name}`));
  await until("its history", () => page.locator("canvas").count());
}

/** An order that is given while it is looked at. */
async function orders(page) {
  await go(page, at("#/orders"));
  console.log("DRAIN");
  await agree("the orders are the controller's", async () => {
    const { ended } = await get("v1/orders");
    const shown = await rows(page, "Orders that have ended");
    if (ended.length === 0 || shown.length !== ended.length) return `${shown.length} shown, ${ended.length} there`;
    const [newest] = [...ended].reverse();
    const [row] = shown;
    return row.Order === `${newest.order.token.life}.${newest.order.token.number}` &&
      row["At host"] === newest.order.host
      ? null
      : JSON.stringify(row);
  });
}

const browser = await open(url, chromium);
try {
  const page = await browser.page();
  await hosts(page);
  await instances(page);
  await orders(page);
  await looks(browser, url, ["#/", "#/instances", `#/instances/${name}`, "#/orders"], {
    wanted: "canvas",
    start: "fleet",
    screenshots,
  });
} finally {
  await browser.close();
  forward.close();
}
console.log(wrong.length ? `${wrong.length} things are wrong` : "DONE");
process.exit(wrong.length ? 1 : 0);
