/**
 * The live view's numbers as text.
 *
 * @module
 */

export const DASH = "–";

/** @param {number | null} seconds @returns {[string, string]} value and unit */
export function duration(seconds) {
  if (seconds === null) return [DASH, ""];
  if (seconds < 1) return [(seconds * 1000).toFixed(0), "ms"];
  if (seconds < 99.5) return [seconds.toFixed(seconds < 9.95 ? 1 : 0), "s"];
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return [`${minutes}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`, "min"];
  return [`${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}`, "h"];
}

/** @param {number | null} bytes @returns {[string, string]} */
export function size(bytes) {
  if (bytes === null) return [DASH, ""];
  let value = bytes;
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 999.5) return [value.toFixed(unit === "B" || value >= 99.5 ? 0 : 1), unit];
    value /= 1000;
  }
  return [value.toFixed(1), "GB"];
}

/** @param {number | null} speed @returns {[string, string]} */
export function perSecond(speed) {
  const [value, unit] = size(speed);
  return [value, unit && `${unit}/s`];
}

/** @param {number} value */
export const count = (value) => value.toLocaleString("en");

/** To the cent where there are some, else to the first two digits that are not zero. @param {string} usd exact */
export function dollars(usd) {
  const value = Number(usd);
  if (value === 0) return "$0.00";
  if (value < 0.095) return `$${value.toFixed(1 - Math.floor(Math.log10(value)))}`;
  return `$${value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

/** Of an age in seconds, for a sentence. @param {number} seconds */
export function ago(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}

/** @param {number} number @param {string} one @param {string} [many] */
export const some = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** @type {Record<string, string>} */
const PHASES = {
  body: "Reading the request",
  queue: "Waiting",
  first_byte: "Before first byte",
  stream: "Streaming",
  answer: "Answering",
  drain_for_usage: "Reader left",
};

/** @param {string} phase @param {number | null} place in the queue */
export function phaseName(phase, place) {
  const name = PHASES[phase] ?? phase;
  return place === null ? name : `${name}, no. ${place}`;
}

/** Results of attempts, as `headrace_upstream_attempts_total` has them. @type {Record<string, string>} */
const RESULTS = { connect_error: "No connection", timeout: "Timeout", reset: "Cut off", status: "Error status" };

/** @param {string} result */
export const resultName = (result) => RESULTS[result] ?? result;

/** @type {Record<string, string>} */
const SCOPES = {
  ip: "Per address",
  key: "Per key",
  plan: "Per plan",
  model: "Per model",
  tokens: "Tokens",
  in_flight: "At once",
  budget: "Budget",
  global: "Machine",
};

/** @param {string} scope */
export const scopeName = (scope) => SCOPES[scope] ?? scope;

/** Pixels from one bar to the next, and how high the highest is. */
const STEP = 6;
const HEIGHT = 48;

/**
 * Bars that end at the right edge, the newest there.
 * @param {number[]} values
 * @param {number} width pixels
 * @returns {string} path data
 */
export function bars(values, width) {
  const shown = values.slice(-Math.max(1, Math.floor(width / STEP)));
  const whole = Math.max(1, ...shown);
  const left = width - shown.length * STEP + STEP / 2;
  return shown
    .map((value, at) => [left + at * STEP, (value / whole) * (HEIGHT - 2)])
    .map(([x, height]) => `M${x} ${HEIGHT}v${-Math.max(height ? 1.5 : 0, height ?? 0).toFixed(1)}`)
    .join("");
}
