/**
 * The live view: draws what `GET /admin/live` sends each second.
 *
 * @module
 */

import { el, figure, make, write } from "./live-dom.js";
import { drawStreams } from "./live-streams.js";
import { DASH, ago, bars, count, dollars, duration, perSecond, resultName, scopeName, some } from "./live-text.js";

/**
 * @typedef {import("./live-streams.js").Stream} Stream
 * @typedef {{name: string, state: "closed" | "half_open" | "open", available: boolean, in_flight: number,
 *   limit: number | null, attempts: number, failed: number,
 *   last_failure: {result: string, ago_s: number} | null}} Upstream
 * @typedef {{slots: number, max_slots: number, queued: Record<string, number>, max_queued: number,
 *   oldest_s: number | null, max_wait_s: number, refused: Record<string, number>}} Limits
 * @typedef {{cost_usd: string, requests: number, tokens: number, left_out: number,
 *   models: [string, string][]}} Spend
 * @typedef {{version: string, draining: boolean, workers: number, running: Record<string, number>,
 *   streams: Stream[], upstreams: Upstream[], limits: Limits, spend: Spend | null}} Look
 */

/** A browser gives up on some answers for good (a 503): the page does not. */
const AGAIN_MS = 5000;
/** Looks that the picture holds: some minutes, on any screen. */
const HISTORY = 400;

/** Bytes a second, a look each. @type {number[]} */
const history = [];

/* ── the rest ────────────────────────────────────────────────────────────────────────────────────────────── */

/** @param {Look} look */
function drawNow({ running, spend }) {
  const sum = (/** @type {string[]} */ ...phases) => phases.reduce((all, phase) => all + (running[phase] ?? 0), 0);
  figure(el("f-streaming"), [count(sum("stream", "answer", "drain_for_usage")), ""]);
  figure(el("f-before"), [count(sum("body", "first_byte")), ""]);
  figure(el("f-waiting"), [count(sum("queue")), ""]);
  figure(el("f-speed"), perSecond(history.at(-1) ?? 0));
  figure(el("f-spend"), [spend ? dollars(spend.cost_usd) : DASH, ""]);
  drawRhythm();
}

function drawRhythm() {
  el("rhythm-bars").setAttribute("d", bars(history, el("rhythm").clientWidth));
  const [most, unit] = perSecond(Math.max(0, ...history));
  write(el("rhythm-note"), `peak ${most} ${unit}`);
  el("rhythm").setAttribute("aria-label", `Bytes a second, the last ${some(history.length, "second")}: most ${most} ${unit}`);
}

const STATES = { closed: ["good", "Healthy"], half_open: ["fair", "On trial"], open: ["bad", "Ejected"] };

/** @param {Upstream[]} upstreams */
function drawUpstreams(upstreams) {
  const body = el("upstreams-rows");
  while (body.children.length > upstreams.length) body.lastElementChild?.remove();
  for (const [at, upstream] of upstreams.entries()) {
    const row = body.children[at] ?? body.appendChild(upstreamRow());
    const [name, state, busy, failed, last] = /** @type {Element[]} */ ([...row.children]);
    const full = upstream.limit !== null && upstream.in_flight >= upstream.limit;
    const [level, word] = upstream.state !== "closed" || upstream.available ? STATES[upstream.state] : full ? ["fair", "Full"] : ["bad", "Unhealthy"];
    write(/** @type {Element} */ (name), upstream.name);
    const dot = /** @type {HTMLElement} */ (state?.firstElementChild);
    dot.dataset.level = level;
    write(/** @type {Element} */ (state?.lastElementChild), word ?? "");
    write(/** @type {Element} */ (busy), upstream.limit === null ? count(upstream.in_flight) : `${count(upstream.in_flight)} of ${count(upstream.limit)}`);
    write(/** @type {Element} */ (failed), `${count(upstream.failed)} of ${count(upstream.attempts)}`);
    write(/** @type {Element} */ (last), lastFailure(upstream));
  }
  const ill = upstreams.filter(({ state, available }) => state !== "closed" || !available).length;
  write(el("upstreams-note"), ill ? `${ill} of ${upstreams.length} not fully available` : "All available");
}

/** The counters have no times: a failure that nobody saw has none. @param {Upstream} upstream */
function lastFailure({ last_failure: last, failed }) {
  if (last) return `${resultName(last.result)}, ${ago(last.ago_s)}`;
  return failed ? "Before this view" : DASH;
}

function upstreamRow() {
  const cell = (/** @type {string} */ kind, /** @type {string} */ label) => make("td", { role: "cell", class: kind, "data-label": label });
  const state = cell("state", "State");
  state.append(make("span", { class: "dot" }), make("span"));
  const row = make("tr", { role: "row" }, cell("name", "Name"), state, cell("n", "In flight"));
  row.append(cell("n", "Failed attempts"), cell("last", "Last failure"));
  return row;
}

/** @param {string} id @param {number} value @param {number} most */
function meter(id, value, most) {
  const share = most ? Math.min(1, value / most) : 0;
  const bar = /** @type {HTMLElement} */ (el(id).firstElementChild);
  bar.style.width = `${share ? Math.max(1, share * 100) : 0}%`;
  el(id).dataset.level = share >= 0.9 ? "bad" : share >= 0.7 ? "fair" : "good";
  el(id).setAttribute("aria-valuenow", String(value));
  el(id).setAttribute("aria-valuemax", String(most));
  const text = `${count(value)} of ${count(most)}`;
  el(id).setAttribute("aria-valuetext", text);
  write(el(`${id}-text`), text);
}

/** @param {HTMLElement} list @param {[string, string][]} pairs */
function drawPairs(list, pairs) {
  if (list.textContent === pairs.flat().join("")) return;
  list.replaceChildren(...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/** @param {Limits} limits */
function drawLimits(limits) {
  const waiting = Object.values(limits.queued).reduce((sum, depth) => sum + depth, 0);
  meter("slots", limits.slots, limits.max_slots);
  meter("queue", waiting, limits.max_queued);
  const plans = Object.entries(limits.queued).map(([plan, depth]) => `${plan} ${count(depth)}`);
  const longest = limits.oldest_s === null ? [] : [`longest ${duration(limits.oldest_s).join(" ")} of ${limits.max_wait_s} s`];
  write(el("queue-note"), [...longest, ...(plans.length > 1 ? plans : [])].join(" · ") || "Nobody is waiting");
  const refused = Object.entries(limits.refused).sort(([, a], [, b]) => b - a);
  drawPairs(el("refused"), refused.map(([scope, number]) => [scopeName(scope), count(number)]));
  write(el("refused-note"), refused.length ? "Refused since the start, by limit" : "Nobody was refused");
}

/** @param {Spend | null} spend */
function drawSpend(spend) {
  const models = spend?.models.map(([model, usd]) => /** @type {[string, string]} */ ([model, dollars(usd)])) ?? [];
  drawPairs(el("spend"), models);
  if (!spend) return write(el("spend-note"), "Not known yet");
  const missing = spend.left_out ? [`${count(spend.left_out)} without a price or usage`] : [];
  write(el("spend-note"), [some(spend.requests, "request"), some(spend.tokens, "token"), ...missing].join(" · "));
}

/* ── the feed ────────────────────────────────────────────────────────────────────────────────────────────── */

/** @type {EventSource | null} */
let source = null;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let again;
let paused = false;

/** @param {string} name @param {string} text */
function phase(name, text) {
  el("status").dataset.phase = name;
  write(el("status"), text);
  document.body.toggleAttribute("data-stale", name === "failed");
}

/** @param {Look} look */
function draw(look) {
  history.push(drawStreams(look));
  if (history.length > HISTORY) history.shift();
  drawNow(look);
  drawUpstreams(look.upstreams);
  drawLimits(look.limits);
  drawSpend(look.spend);
  const workers = look.workers > 1 ? ` · ${look.workers} workers` : "";
  if (look.draining) phase("incomplete", "Draining: no new requests");
  else phase("streaming", `Live${workers}`);
}

function open() {
  close();
  source = new EventSource("/admin/live");
  source.addEventListener("message", (event) => draw(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    phase("failed", "No connection, trying again");
    if (source?.readyState === EventSource.CLOSED) again = setTimeout(open, AGAIN_MS);
  });
}

function close() {
  clearTimeout(again);
  source?.close();
  source = null;
}

/** A tab that nobody sees asks for nothing. */
function attend() {
  if (paused || document.hidden) close();
  else if (!source) open();
}

function togglePause() {
  paused = !paused;
  el("pause").setAttribute("aria-pressed", String(paused));
  write(el("pause"), paused ? "Resume" : "Pause");
  attend();
  if (paused) phase("stopped", "Paused");
}

el("pause").addEventListener("click", togglePause);
document.addEventListener("visibilitychange", attend);
addEventListener("resize", drawRhythm);
attend();
