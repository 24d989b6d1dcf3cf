/**
 * The live view: draws what `GET /admin/live` sends each second. Rows stay the same elements while their streams
 * run, so that neither the focus nor a finger on a button is lost by a redraw.
 *
 * @module
 */

import { DASH, ago, bars, count, dollars, duration, phaseName, resultName, scopeName, size, some } from "./live-text.js";

/**
 * @typedef {{id: string, request_id: string, key_id: string | null, route: string, model: string | null,
 *   upstream: string | null, phase: string, age_s: number, ttft_s: number | null, client_ip: string,
 *   bytes_out: number | null, idle_s: number | null, buffered_bytes: number | null,
 *   queue_place: number | null}} Stream
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

/** A button that was pressed once asks so long whether it was meant. */
const SURE_MS = 4000;
/** A browser gives up on some answers for good (a 503): the page does not. */
const AGAIN_MS = 5000;
/** Looks that the picture holds: some minutes, on any screen. */
const HISTORY = 400;

/** @param {string} id */
const el = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * @param {string} name
 * @param {Record<string, string>} [attributes]
 * @param {(string | Node)[]} children
 */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Touches the page only where something has changed. @param {Element} element @param {string} text */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** @param {Element} element @param {[string, string]} figure value and unit */
function figure(element, [value, unit]) {
  if (element.textContent === value + unit) return;
  element.replaceChildren(value, ...(unit ? [make("small", {}, unit)] : []));
  element.toggleAttribute("data-empty", value === DASH);
}

/* ── streams ─────────────────────────────────────────────────────────────────────────────────────────────── */

/** Bytes a second of each stream from look to look, evened out over some of them. */
class Speeds {
  /** @type {Map<string, {at: number, bytes: number, speed: number | null}>} */
  #before = new Map();

  /** @param {Stream[]} streams @param {number} now ms @returns {Map<string, number | null>} by id */
  look(streams, now) {
    const seen = new Map();
    for (const { id, bytes_out: bytes, age_s: age } of streams) {
      if (bytes === null) continue;
      const before = this.#before.get(id) ?? { at: now - age * 1000, bytes: 0, speed: null };
      const seconds = (now - before.at) / 1000;
      const fresh = seconds > 0 ? Math.max(0, bytes - before.bytes) / seconds : 0;
      const speed = before.speed === null ? fresh : 0.5 * before.speed + 0.5 * fresh;
      seen.set(id, { at: now, bytes, speed: speed < 0.5 ? 0 : speed });
    }
    this.#before = seen;
    return new Map(streams.map(({ id }) => [id, seen.get(id)?.speed ?? null]));
  }
}

/** One running request: a row of the table, a card where the screen is narrow. */
class Row {
  /** @type {Record<string, HTMLElement>} */
  #cells = {};
  #model = make("span", { class: "name" });
  #upstream = make("span", { class: "sub" });
  #dot = make("span", { class: "dot" });
  #phase = make("span");
  #button = /** @type {HTMLButtonElement} */ (make("button", { type: "button", class: "stop" }, "Stop"));
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #sure = false;

  /** @param {Stream} stream */
  constructor(stream) {
    this.id = stream.id;
    this.element = make("tr", { role: "row", "data-id": stream.id });
    this.#cell("model", "Model").append(this.#model, this.#upstream);
    this.#cell("key", "Key");
    this.#cell("phase", "Phase").append(this.#dot, this.#phase);
    for (const [name, label] of [["age", "Age"], ["first", "First token"], ["speed", "Speed"]]) this.#cell(name, label, true);
    for (const [name, label] of [["idle", "Idle"], ["buffered", "Buffered"]]) this.#cell(name, label, true);
    this.#cell("stop", "").append(this.#button);
    this.#button.addEventListener("click", () => void this.#pressed());
    this.#button.addEventListener("blur", () => this.#calm());
    this.#button.addEventListener("keydown", (event) => event.key === "Escape" && this.#calm());
  }

  get focused() {
    return document.activeElement === this.#button;
  }

  focus() {
    this.#button.focus();
  }

  /** @param {Stream} stream @param {number | null} speed bytes a second */
  draw(stream, speed) {
    write(this.#model, stream.model ?? stream.route);
    write(this.#upstream, stream.upstream ?? "no upstream yet");
    write(this.#cells.key, stream.key_id ?? DASH);
    write(this.#phase, phaseName(stream.phase, stream.queue_place));
    this.#dot.dataset.phase = stream.phase;
    this.element.title = `Stream ${stream.id} · request ${stream.request_id} · from ${stream.client_ip}`;
    const streaming = stream.bytes_out !== null && stream.bytes_out > 0;
    figure(this.#cells.age, duration(stream.age_s));
    figure(this.#cells.first, duration(stream.ttft_s));
    figure(this.#cells.speed, streaming ? perSecond(speed) : [DASH, ""]);
    figure(this.#cells.idle, streaming ? duration(stream.idle_s) : [DASH, ""]);
    figure(this.#cells.buffered, stream.buffered_bytes ? size(stream.buffered_bytes) : [DASH, ""]);
    this.#cells.buffered.toggleAttribute("data-high", (stream.buffered_bytes ?? 0) > 100_000);
    if (!this.#sure && !this.#button.disabled) this.#name(`Stop ${stream.model ?? stream.route}, stream ${stream.id}`);
  }

  /** @param {string} name @param {string} label @param {boolean} [number] */
  #cell(name, label, number = false) {
    const cell = make("td", { role: "cell", class: number ? `${name} n` : name, "data-label": label });
    this.#cells[name] = cell;
    this.element.append(cell);
    return cell;
  }

  /** @param {string} name */
  #name(name) {
    this.#button.setAttribute("aria-label", name);
  }

  /** A row may move under the pointer at any moment: the first press only asks. */
  async #pressed() {
    if (!this.#sure) {
      this.#sure = true;
      this.#button.dataset.sure = "";
      write(this.#button, "Sure?");
      this.#name(`Sure? Press again to stop stream ${this.id}`);
      this.#timer = setTimeout(() => this.#calm(), SURE_MS);
      return;
    }
    this.#calm();
    this.#button.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
    write(this.#button, "Stopping");
    const said = await stop(this.id);
    write(el("said"), said);
    if (said.startsWith("Stopped")) return;
    this.#button.removeAttribute("aria-disabled");
    this.#calm();
  }

  #calm() {
    clearTimeout(this.#timer);
    this.#sure = false;
    delete this.#button.dataset.sure;
    write(this.#button, "Stop");
  }
}

/** @param {number | null} speed @returns {[string, string]} */
function perSecond(speed) {
  const [value, unit] = size(speed);
  return [value, unit && `${unit}/s`];
}

/** @param {string} id @returns {Promise<string>} what came of it, for everybody to hear */
async function stop(id) {
  try {
    const answer = await fetch(`/admin/streams/${encodeURIComponent(id)}`, { method: "DELETE" });
    if (answer.ok) return `Stopped stream ${id}`;
    return answer.status === 404 ? `Stream ${id} had ended already` : `Stream ${id} was not stopped: status ${answer.status}`;
  } catch {
    return `Stream ${id} was not stopped: no connection`;
  }
}

/** @type {Map<string, Row>} */
const rows = new Map();
const speeds = new Speeds();
/** @type {number[]} */
const history = [];

/** @param {Look} look */
function drawStreams({ streams, running }) {
  const speed = speeds.look(streams, performance.now());
  let last = null;
  for (const stream of streams) {
    const row = rows.get(stream.id) ?? new Row(stream);
    rows.set(stream.id, row);
    row.draw(stream, speed.get(stream.id) ?? null);
    const place = last ? last.nextSibling : el("streams-rows").firstChild;
    if (place !== row.element) el("streams-rows").insertBefore(row.element, place);
    last = row.element;
  }
  const here = new Set(streams.map(({ id }) => id));
  for (const [id, row] of rows) if (!here.has(id)) drop(id, row);
  const all = Object.values(running).reduce((sum, number) => sum + number, 0);
  el("streams").hidden = !streams.length;
  el("streams-none").hidden = streams.length > 0;
  write(el("streams-note"), all > streams.length ? `The oldest ${streams.length} of ${count(all)}` : all ? some(all, "request") : "");
  history.push([...speed.values()].reduce((sum, one) => /** @type {number} */ (sum) + (one ?? 0), 0) ?? 0);
  if (history.length > HISTORY) history.shift();
}

/** The focus goes to the next row's button; without one, to the heading. @param {string} id @param {Row} row */
function drop(id, row) {
  const next = /** @type {HTMLElement | null} */ (row.element.nextElementSibling ?? row.element.previousElementSibling);
  const focused = row.focused;
  rows.delete(id);
  row.element.remove();
  if (!focused) return;
  const heir = next && rows.get(next.dataset.id ?? "");
  if (heir) heir.focus();
  else el("streams-title").focus();
}

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
  write(el("rhythm-note"), `most ${most} ${unit}`);
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
    write(/** @type {Element} */ (failed), upstream.failed ? `${count(upstream.failed)} of ${count(upstream.attempts)}` : "None");
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
  write(el("queue-note"), [...longest, ...(plans.length > 1 ? plans : [])].join(" · ") || "Nobody waits");
  const refused = Object.entries(limits.refused).sort(([, a], [, b]) => b - a);
  drawPairs(el("refused"), refused.map(([scope, number]) => [scopeName(scope), count(number)]));
  write(el("refused-note"), refused.length ? "Refused since the start, by limit" : "No limit has refused anybody");
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
  drawStreams(look);
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
document.addEventListener("keydown", (event) => {
  if (event.key === "p" && !event.ctrlKey && !event.metaKey && !event.altKey) togglePause();
});
document.addEventListener("visibilitychange", attend);
addEventListener("resize", drawRhythm);
attend();
