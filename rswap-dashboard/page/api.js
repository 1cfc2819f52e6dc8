// The server that the page came from, and nobody else.

const LIMIT_MS = 10_000;

/** What a route answers; an error says what the server said. */
export async function get(route) {
  const response = await fetch(route, { signal: AbortSignal.timeout(LIMIT_MS), cache: "no-store" });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(body.detail ?? `${route}: ${response.status}`);
    throw Object.assign(error, { status: response.status, hint: body.hint });
  }
  return body;
}

export const of = (route, instance) => `${route}?instance=${encodeURIComponent(instance)}`;

/** The last windows of an instance: only those that are new are asked for. */
export class Windows {
  constructor(instance) {
    this.instance = instance;
    this.horizon_ms = null;
    this.windows = [];
    this.most = 300;
  }

  async refresh() {
    const since = this.windows.at(-1)?.at ?? 0;
    const answer = await get(`${of("v1/windows", this.instance)}&since=${since}`);
    this.horizon_ms = answer.horizon_ms;
    this.windows = [...this.windows, ...answer.windows].slice(-this.most);
    return this;
  }
}
