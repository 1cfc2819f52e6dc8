// Amounts in words: a few significant digits, and the unit that suits them.

const BINARY = ["B", "KiB", "MiB", "GiB", "TiB"];
const DASH = "–";

export const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, without an exponent. */
export function digits(value, most = 3) {
  if (!isKnown(value)) return DASH;
  const size = Math.abs(value);
  if (size === 0) return "0";
  const places = Math.max(0, most - 1 - Math.floor(Math.log10(size)));
  return value
    .toFixed(Math.min(places, 6))
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
}

export function bytes(value) {
  if (!isKnown(value)) return DASH;
  let [amount, unit] = [value, 0];
  while (Math.abs(amount) >= 1024 && unit < BINARY.length - 1) [amount, unit] = [amount / 1024, unit + 1];
  return `${unit === 0 ? Math.round(amount) : digits(amount)} ${BINARY[unit]}`;
}

export const bytesPerSecond = (value) => (isKnown(value) ? `${bytes(value)}/s` : DASH);

/** Axes of these have round numbers where powers of two are. */
bytes.binary = bytesPerSecond.binary = true;

export function bitsPerSecond(value) {
  if (!isKnown(value)) return DASH;
  if (value >= 1e9) return `${digits(value / 1e9)} Gbit/s`;
  return value >= 1e6 ? `${digits(value / 1e6)} Mbit/s` : `${digits(value / 1e3)} kbit/s`;
}

export function nanoseconds(value) {
  if (!isKnown(value)) return DASH;
  if (value >= 1e9) return `${digits(value / 1e9)} s`;
  if (value >= 1e6) return `${digits(value / 1e6)} ms`;
  return value >= 1e3 ? `${digits(value / 1e3)} µs` : `${digits(value)} ns`;
}

export const microseconds = (value) => (isKnown(value) ? nanoseconds(value * 1e3) : DASH);
export const milliseconds = (value) => (isKnown(value) ? nanoseconds(value * 1e6) : DASH);

/** Of minutes and more. */
export function duration(ms) {
  if (!isKnown(ms)) return DASH;
  if (ms < 60_000) return milliseconds(ms);
  const minutes = Math.floor(ms / 60_000);
  if (minutes < 60) return `${minutes} min ${Math.floor(ms / 1000) % 60} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const cores = (value) => (isKnown(value) ? `${digits(value, 2 + (value >= 10))}` : DASH);
export const coresUnit = (value) => (isKnown(value) ? `${cores(value)} ${value === 1 ? "core" : "cores"}` : DASH);
export const perSecond = (value) => (isKnown(value) ? `${digits(value)}/s` : DASH);
export const percent = (share) => (isKnown(share) ? `${digits(share * 100, 2)} %` : DASH);
export const count = (value) => (isKnown(value) ? value.toLocaleString("en") : DASH);

/** In the configuration's currency, which has no name here. */
export const money = (value) => {
  if (!isKnown(value)) return DASH;
  const size = Math.abs(value);
  return size >= 1 ? value.toFixed(2) : value.toFixed(size >= 0.0001 || size === 0 ? 4 : 6);
};
export const moneyPerHour = (value) => (isKnown(value) ? `${money(value)}/h` : DASH);

const CLOCK = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
export const clock = (ms) => (isKnown(ms) ? new Date(ms).toLocaleTimeString("en", CLOCK) : DASH);

export function moment(ms, now = Date.now()) {
  if (!isKnown(ms)) return DASH;
  const day = new Date(ms).toDateString() === new Date(now).toDateString();
  return day ? clock(ms) : `${new Date(ms).toLocaleDateString("en", { month: "short", day: "numeric" })}, ${clock(ms)}`;
}

export function ago(ms, now = Date.now()) {
  if (!isKnown(ms)) return DASH;
  const past = now - ms;
  return past < 2000 ? "just now" : `${duration(Math.floor(past / 1000) * 1000)} ago`;
}

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
export const words = (text) => text.replaceAll("_", " ");
