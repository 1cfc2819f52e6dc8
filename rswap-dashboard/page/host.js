// One host's dashboard: its agent's answers.

import { get } from "./api.js";
import { plural } from "./format.js";
import { badge, html, nothing } from "./parts.js";
import { run } from "./shell.js";
import { overview } from "./overview.js";
import { instances } from "./instances.js";
import { instance } from "./instance.js";
import { pools } from "./pools.js";
import { moves } from "./moves.js";

async function refresh(before) {
  const status = await get("v1/status");
  // Long, and the same until a move begins or ends.
  const same =
    before.status?.moves_started === status.moves_started &&
    before.status?.moves_running === status.moves_running &&
    before.status?.started === status.started;
  return { status, moves: same ? before.moves : await get("v1/moves") };
}

const identity = ({ status }) =>
  status
    ? html`<span class="host">${status.host}</span>
        ${status.mode === "act" ? badge("good", "acts on plans") : badge("plain", "observes only")}
        ${status.moves_running ? badge("busy", `${plural(status.moves_running, "move")} under way`) : nothing}`
    : nothing;

/** What has changed, in a sentence. */
function changes(before, now) {
  const said = [];
  const running = new Set(before.moves.filter((move) => move.state === "running").map((move) => move.id));
  const last = before.moves.at(-1)?.id ?? 0;
  for (const move of now.moves) {
    if (move.id > last) said.push(`${move.instance} moves to ${move.to}.`);
    if ((running.has(move.id) || move.id > last) && move.state !== "running") {
      const how = { done: "is there", failed: "stayed: the move failed", in_doubt: "is in doubt" }[move.state];
      said.push(`${move.instance}, on its way to ${move.to}, ${how}.`);
    }
  }
  if (before.status.instances !== now.status.instances) said.push(`${plural(now.status.instances, "instance")} now.`);
  return said.slice(-4).join(" ");
}

run({ views: [overview, instances, instance, pools, moves], refresh, identity, changes });
