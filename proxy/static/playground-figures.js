/**
 * The figures of one answer: how soon, how fast, how even.
 *
 * @module
 */

/** Pixels from one bar to the next. */
const STEP = 4;
/** An even stream is a low band: the whole height is for a gap of so many times the median. */
const ROOM = 6;
const HEIGHT = 48;
const DASH = "–";

/** Times are milliseconds of performance.now(). */
export class Figures {
  /** @param {number} startedAt */
  constructor(startedAt) {
    this.startedAt = startedAt;
    /** @type {number | null} */
    this.firstAt = null;
    this.lastAt = startedAt;
    this.pieces = 0;
    /** Between pieces that said something. @type {number[]} */
    this.gaps = [];
    /** @type {import("./stream-client.js").Usage | null} */
    this.usage = null;
  }

  /**
   * @param {import("./stream-client.js").Delta} delta
   * @param {number} now
   */
  add(delta, now) {
    this.usage = delta.usage ?? this.usage; // the last one counts: some providers send it with every chunk
    if (!saysSomething(delta)) return;
    if (this.firstAt === null) this.firstAt = now;
    else this.gaps.push(now - this.lastAt);
    this.lastAt = now;
    this.pieces += 1;
  }

  /** Tokens a second after the first, and whether the pieces had to be counted for want of a report. */
  speed() {
    const seconds = (this.lastAt - (this.firstAt ?? this.lastAt)) / 1000;
    const reported = this.usage?.completion_tokens;
    const tokens = (reported ?? this.pieces) - 1;
    return seconds > 0.001 && tokens > 0 ? { value: tokens / seconds, counted: reported === undefined } : null;
  }

  /** US dollars, where a provider reports them (OpenRouter does); the page knows no prices. */
  cost() {
    const cost = this.usage?.cost;
    return typeof cost === "number" ? cost : null;
  }
}

/** The same question as Headrace's own time to first token asks. @param {import("./stream-client.js").Delta} delta */
function saysSomething(delta) {
  const said = delta.chunk.choices?.[0]?.delta ?? {};
  return delta.content !== "" || Boolean(said.reasoning_content || said.reasoning || said.tool_calls);
}

/* ── numbers as text ── */

/** @param {number | null} ms @returns {[string, string]} value and unit */
export function duration(ms) {
  if (ms === null) return [DASH, ""];
  if (ms < 1000) return [ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0), "ms"];
  return [(ms / 1000).toFixed(ms < 99_950 ? 2 : 0), "s"];
}

/** @param {ReturnType<Figures["speed"]>} speed @returns {[string, string]} */
export function rate(speed) {
  if (!speed) return [DASH, ""];
  return [(speed.counted ? "≈ " : "") + speed.value.toFixed(speed.value < 99.5 ? 1 : 0), ""];
}

/** @param {number | undefined} value @returns {[string, string]} */
export const count = (value) => [value === undefined ? DASH : value.toLocaleString("en"), ""];

/** @param {number | null} value @returns {[string, string]} */
export const dollars = (value) => [value === null ? DASH : `$${value.toFixed(value < 0.1 ? 6 : 2)}`, ""];

/** @param {number[]} gaps @returns {string} */
export function spread(gaps) {
  if (!gaps.length) return "";
  const sorted = [...gaps].sort((a, b) => a - b);
  const at = (/** @type {number} */ share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  const text = (/** @type {number | undefined} */ ms) => duration(ms ?? null).join(" ");
  return `median ${text(at(0.5))} · p95 ${text(at(0.95))} · longest ${text(sorted.at(-1))}`;
}

/* ── the picture ── */

/**
 * Bars from the left, a bar a gap; where there are more than fit, a bar is the longest of several. Heights go
 * with the square root, so that a pause is seen and the rest is not flattened by it.
 * @param {number[]} gaps
 * @param {number} width pixels
 * @returns {string} path data
 */
export function bars(gaps, width) {
  const room = Math.max(1, Math.floor(width / STEP));
  const each = Math.ceil(gaps.length / room) || 1;
  const tops = [];
  for (let at = 0; at < gaps.length; at += each) tops.push(Math.max(...gaps.slice(at, at + each)));
  const median = [...tops].sort((a, b) => a - b)[tops.length >> 1] ?? 0;
  const whole = Math.max(1, median * ROOM, ...tops);
  return tops
    .map((gap, index) => `M${index * STEP + 1} ${HEIGHT}v${-Math.max(1.5, Math.sqrt(gap / whole) * (HEIGHT - 2)).toFixed(1)}`)
    .join("");
}
