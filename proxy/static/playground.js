/**
 * The playground: one request, its answer as it comes, and what can be learned from how it came.
 *
 * What a model says is only ever set as text. The key is in the session storage of this tab and goes into the
 * Authorization header of requests to this origin, nowhere else.
 *
 * @module
 */

import { Figures, bars, count, dollars, duration, rate, spread } from "./playground-figures.js";
import * as snippets from "./playground-snippets.js";
import { ChatError, streamChat } from "./stream-client.js";

const BASE = `${location.origin}/v1`;
const KEY = "headrace.key";
const OTHER = "\0other";
/** What a mock can be told to do, for `x-mock`. @type {[string, string][]} */
const FAULTS = [
  ["Steadily", "words=90, gap=0.03"],
  ["Slow to begin", "words=60, gap=0.03, ttfb=2"],
  ["Slowly", "words=40, gap=0.2"],
  ["As fast as it can", "words=2000"],
  ["Rate limited: 429, in 12 s again", "status=429, retry_after=12"],
  ["Overloaded: 503", "status=503"],
  ["With an error in the stream", "words=60, gap=0.03, error_after=20"],
  ["Cut off between two events", "words=60, gap=0.03, cut_after=20"],
  ["Cut off inside an event", "words=60, gap=0.03, cut_after=20, cut_mid_event"],
  ["Without its terminator", "words=40, gap=0.03, no_done"],
  ["Falling silent", "words=60, gap=0.03, stall_after=20"],
  ["With broken JSON", "words=40, gap=0.03, bad_json=20"],
];
const CUSTOM = "As the header says";

/** @template {HTMLElement} T @param {string} id @returns {T} */
const el = (id) => /** @type {T} */ (document.getElementById(id));
/** @param {string} id @returns {HTMLInputElement} */
const field = (id) => el(id);

const models = /** @type {Map<string, Record<string, any>>} */ (new Map());
/** Whether the server asks for keys; null until it has answered. @type {boolean | null} */
let keyed = null;
/** @type {AbortController | null} */
let running = null;
/** @type {ReturnType<typeof setInterval> | undefined} */
let countdown;

/* ── who asks, and whom ──────────────────────────────────────────────────────────────────────────────────── */

const key = () => (keyed ? field("key").value.trim() : "");
/** @returns {Record<string, string>} */
const credential = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

/** Asks without a key first: where that is enough, none is asked for. */
async function begin() {
  const answer = await fetch("/v1/models").catch(() => null);
  keyed = answer?.status === 401;
  el("access-key").hidden = !keyed;
  el("access-open").hidden = !answer?.ok;
  if (keyed) {
    field("key").value = sessionStorage.getItem(KEY) ?? "";
    return useKey();
  }
  await offer(answer);
}

async function useKey() {
  if (key()) sessionStorage.setItem(KEY, key());
  else sessionStorage.removeItem(KEY);
  if (!key()) return offer(null);
  await offer(await fetch("/v1/models", { headers: credential() }).catch(() => null));
}

/** Fills the list of models from an answer of /v1/models. @param {Response | null} answer */
async function offer(answer) {
  const listed = answer?.ok ? (await answer.json()).data : [];
  const select = /** @type {HTMLSelectElement} */ (el("model"));
  const before = select.value;
  models.clear();
  for (const model of listed) models.set(model.id, model);
  select.replaceChildren(...[...models.keys()].map((id) => new Option(id, id)), new Option("Another model…", OTHER));
  if (models.has(before)) select.value = before;
  noteKey(answer);
  chosen();
}

/** @param {Response | null} answer */
function noteKey(answer) {
  const note = el("key-note");
  const bad = Boolean(key()) && !answer?.ok;
  note.toggleAttribute("data-bad", bad);
  field("key").setAttribute("aria-invalid", String(bad));
  if (!bad) note.textContent = "Kept in this tab only";
  else note.textContent = answer?.status === 401 ? "This key is not valid" : "The models could not be listed";
  if (key() && answer?.ok) void showSpend();
}

/** What this key has spent today, if the server counts it. */
async function showSpend() {
  const answer = await fetch("/v1/usage", { headers: credential() }).catch(() => null);
  const day = answer?.ok ? (await answer.json()).day : null;
  if (day?.cost_usd) el("key-note").textContent = `Kept in this tab only · $${day.cost_usd} spent today`;
}

function chosen() {
  const other = field("model").value === OTHER;
  field("model-name").hidden = !other;
  el("mock").hidden = other || models.get(field("model").value)?.mock !== true;
  showCode();
}

const modelName = () => (field("model").value === OTHER ? field("model-name").value.trim() : field("model").value);

/* ── the request ─────────────────────────────────────────────────────────────────────────────────────────── */

/** @returns {snippets.Asked & { body: import("./stream-client.js").ChatRequest }} */
function asked() {
  const system = field("system").value.trim();
  const stream = field("stream").checked;
  const body = {
    model: modelName(),
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      { role: "user", content: field("user").value },
    ],
    ...numberOf("temperature"),
    ...numberOf("max-tokens"),
    stream,
    ...(stream ? { stream_options: { include_usage: true } } : {}),
  };
  const faults = el("mock").hidden ? "" : field("x-mock").value.trim();
  return { base: BASE, keyed: keyed === true, headers: faults ? { "x-mock": faults } : {}, body };
}

/** @param {string} id */
function numberOf(id) {
  const value = field(id).valueAsNumber;
  return Number.isNaN(value) ? {} : { [id.replace("-", "_")]: value };
}

const languages = { curl: snippets.curl, python: snippets.python, javascript: snippets.javascript };

function showCode() {
  const language = document.querySelector('input[name="language"]:checked');
  const write = languages[/** @type {keyof typeof languages} */ (/** @type {HTMLInputElement} */ (language).value)];
  el("code").textContent = write(asked());
}

/* ── the answer ──────────────────────────────────────────────────────────────────────────────────────────── */

async function send() {
  if (running || !(/** @type {HTMLFormElement} */ (el("ask")).reportValidity())) return;
  const controller = new AbortController();
  running = controller;
  const { headers, body } = asked();
  const view = new View(new Figures(performance.now()));
  intoView(el("result"));
  /** @type {ChatError | null} */
  let failure = null;
  try {
    const options = { url: `${BASE}/chat/completions`, headers, apiKey: key(), signal: controller.signal };
    // No second try behind the reader's back: what went wrong is what the page is there to show.
    const answer = streamChat(body, { ...options, retries: 0, onResponse: (head) => view.head(head) });
    for await (const delta of answer) view.add(delta);
  } catch (cause) {
    failure = cause instanceof ChatError ? cause : new ChatError("parse", String(cause), { cause });
  }
  running = null;
  view.end(failure);
  if (keyed) void showSpend();
}

const stop = () => running?.abort();

/** On a narrow screen the answer is below the request. @param {HTMLElement} section */
function intoView(section) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const { top } = section.getBoundingClientRect();
  if (top > innerHeight * 0.6) section.scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

/** What the page shows of one answer; drawn at most once a frame. */
class View {
  #figures;
  #text = document.createTextNode("");
  #fresh = "";
  #frame = 0;

  /** @param {Figures} figures */
  constructor(figures) {
    this.#figures = figures;
    clearInterval(countdown);
    el("answer").replaceChildren();
    el("answer").dataset.hint = "";
    el("notices").replaceChildren();
    el("facts").textContent = "";
    el("id-row").hidden = true;
    this.#busy(true);
    phase("waiting", "Waiting for the first token");
    this.#draw();
  }

  /** @param {import("./stream-client.js").Head} head */
  head({ status, headers, requestId }) {
    const upstream = headers.get("x-headrace-upstream");
    const attempts = Number(headers.get("x-headrace-attempts") ?? 0);
    const tries = attempts ? `${attempts} attempt${attempts === 1 ? "" : "s"}` : null;
    el("facts").textContent = [`Status ${status}`, upstream, tries].filter(Boolean).join(" · ");
    el("request-id").textContent = requestId;
    el("id-row").hidden = !requestId;
  }

  /** @param {import("./stream-client.js").Delta} delta */
  add(delta) {
    this.#figures.add(delta, performance.now());
    this.#fresh += delta.content;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** @param {ChatError | null} failure */
  end(failure) {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.#total(performance.now() - this.#figures.startedAt);
    el("rhythm").setAttribute("aria-label", `Gaps between chunks: ${spread(this.#figures.gaps) || "none"}`);
    this.#busy(false);
    if (!this.#text.length) el("answer").dataset.hint = "No text came.";
    if (!failure) phase("complete", "Complete");
    else if (failure.category === "aborted") phase("stopped", "Stopped");
    else report(failure);
  }

  /** @param {boolean} busy */
  #busy(busy) {
    el("answer").setAttribute("aria-busy", String(busy)); // read out when it is whole, not word by word
    const send = /** @type {HTMLButtonElement} */ (el("send"));
    const stop = /** @type {HTMLButtonElement} */ (el("stop"));
    const focused = document.activeElement;
    send.disabled = busy;
    stop.disabled = !busy;
    // A button that is disabled loses the focus: the other one takes it.
    if (focused === send && busy) stop.focus();
    if (focused === stop && !busy) send.focus();
  }

  #draw() {
    this.#frame = 0;
    const figures = this.#figures;
    const answer = el("answer");
    const follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 32;
    if (this.#fresh) {
      if (!this.#text.parentNode) answer.append(this.#text);
      this.#text.appendData(this.#fresh);
      this.#fresh = "";
      if (follows) answer.scrollTop = answer.scrollHeight;
    }
    if (figures.firstAt !== null && el("status").dataset.phase === "waiting") phase("streaming", "Streaming");
    show("f-first", duration(figures.firstAt === null ? null : figures.firstAt - figures.startedAt));
    show("f-speed", rate(figures.speed()));
    show("f-in", count(figures.usage?.prompt_tokens));
    show("f-out", count(figures.usage?.completion_tokens));
    show("f-cost", dollars(figures.cost()));
    el("f-cost-cell").hidden = figures.cost() === null;
    this.#total(figures.firstAt === null ? null : figures.lastAt - figures.startedAt);
    el("rhythm-bars").setAttribute("d", bars(figures.gaps, el("rhythm").clientWidth));
    el("rhythm-note").textContent = spread(figures.gaps);
  }

  /** @param {number | null} ms */
  #total(ms) {
    show("f-total", duration(ms));
  }
}

/** @param {string} name @param {string} text */
function phase(name, text) {
  el("status").dataset.phase = name;
  el("status").textContent = text;
}

/** @param {string} id @param {[string, string]} figure */
function show(id, [value, unit]) {
  const cell = el(id);
  cell.replaceChildren(value);
  cell.toggleAttribute("data-empty", value === "–");
  if (unit) cell.append(Object.assign(document.createElement("small"), { textContent: unit }));
}

/* ── what went wrong ─────────────────────────────────────────────────────────────────────────────────────── */

/** What to call a failure that has no code of the server's. */
const NAMES = {
  network: "No connection",
  auth: "Not allowed",
  rate_limit: "Too many requests",
  server: "The server failed",
  timeout: "No answer in time",
  parse: "Unreadable answer",
  aborted: "Stopped",
  truncated: "The stream was cut off",
  request: "The request was refused",
};

/** @param {ChatError} failure */
function report(failure) {
  const cut = failure.partial || failure.category === "truncated";
  phase(cut ? "incomplete" : "failed", cut ? "Incomplete" : "Failed");
  if (cut) {
    const why = "The stream ended without its terminator: what is above may lack its end, and its usage is not known.";
    notice("warn", "This answer is not complete", [why], failure.category === "truncated" ? failure : null);
  }
  if (failure.category === "truncated") return;
  const status = failure.status && failure.status !== 200 ? `Status ${failure.status}` : null;
  const detail = [status, failure.code ?? failure.type].filter(Boolean).join(" · ");
  notice("bad", NAMES[failure.category], [failure.message, detail], failure);
}

/**
 * @param {"warn" | "bad"} kind
 * @param {string} title
 * @param {string[]} texts
 * @param {ChatError | null} failure that a button may try again
 */
function notice(kind, title, texts, failure) {
  const box = document.createElement("div");
  box.className = `notice ${kind}`;
  const heading = document.createElement("p");
  heading.append(Object.assign(document.createElement("strong"), { textContent: title }));
  box.append(heading);
  for (const [at, text] of texts.filter(Boolean).entries()) {
    box.append(Object.assign(document.createElement("p"), { textContent: text, className: at ? "detail" : "" }));
  }
  if (failure) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Retry" });
    button.addEventListener("click", () => {
      el("send").focus(); // the button goes with its notice
      void send();
    });
    if (failure.retryAfter) wait(box, failure.retryAfter);
    box.append(button);
  }
  el("notices").append(box);
}

/** Counts down what the server asks to wait. @param {HTMLElement} box @param {number} seconds */
function wait(box, seconds) {
  const until = performance.now() + seconds * 1000;
  const text = document.createElement("p");
  text.className = "detail countdown";
  text.setAttribute("aria-live", "off"); // said once, not every second
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    text.textContent = left > 0 ? `The server asks to wait: ${left} s` : "You may try again now";
    if (left <= 0) clearInterval(countdown);
  };
  box.append(text);
  tick();
  countdown = setInterval(tick, 200);
}

/* ── the page ────────────────────────────────────────────────────────────────────────────────────────────── */

/** @param {string} button @param {string} source */
function copies(button, source) {
  el(button).addEventListener("click", async () => {
    const copied = await copy(el(source).textContent ?? "");
    el(button).textContent = copied ? "Copied" : "Not copied";
    el("said").textContent = copied ? "Copied" : "Not copied";
    setTimeout(() => {
      el(button).textContent = "Copy";
      el("said").textContent = "";
    }, 1500);
  });
}

/** The clipboard is there on https and on this machine only; elsewhere a selection has to do. @param {string} text */
async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = Object.assign(document.createElement("textarea"), { value: text, className: "hidden" });
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

function fillFaults() {
  el("fault").replaceChildren(...FAULTS.map(([name, header]) => new Option(name, header)), new Option(CUSTOM, CUSTOM));
  field("x-mock").value = field("fault").value;
}

function listen() {
  const form = el("ask");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void send();
  });
  el("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) void send();
  });
  el("model").addEventListener("change", chosen);
  el("key").addEventListener("change", () => void useKey());
  el("access-key").addEventListener("submit", (event) => event.preventDefault()); // Enter is a change
  el("fault").addEventListener("change", () => {
    if (field("fault").value !== CUSTOM) field("x-mock").value = field("fault").value;
    else field("x-mock").focus();
  });
  el("x-mock").addEventListener("input", () => {
    const known = FAULTS.some(([, header]) => header === field("x-mock").value);
    field("fault").value = known ? field("x-mock").value : CUSTOM;
  });
  form.addEventListener("input", showCode);
  form.addEventListener("change", showCode);
  document.querySelector(".tabs")?.addEventListener("change", showCode);
  copies("copy-id", "request-id");
  copies("copy-code", "code");
}

fillFaults();
listen();
await begin();
