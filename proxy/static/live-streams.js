/**
 * The table of what runs. Rows stay the same elements while their streams run, so that neither the focus nor a
 * finger on a button is lost by a redraw.
 *
 * @module
 */

import { el, figure, make, write } from "./live-dom.js";
import { DASH, count, duration, perSecond, phaseName, size, some } from "./live-text.js";

/**
 * @typedef {{id: string, request_id: string, key_id: string | null, route: string, model: string | null,
 *   upstream: string | null, phase: string, age_s: number, ttft_s: number | null, client_ip: string,
 *   bytes_out: number | null, idle_s: number | null, buffered_bytes: number | null,
 *   queue_place: number | null}} Stream
 */

/** A button that was pressed once asks so long whether it was meant. */
const SURE_MS = 4000;

/** Bytes a second of each stream from look to look, evened out over some of them. */
class Speeds {
  /** @type {Map<string, {age: number, bytes: number, speed: number | null}>} */
  #before = new Map();

  /** Time is the stream's own age, which no delay on the way here blurs.
   * @param {Stream[]} streams @returns {Map<string, number | null>} by id */
  look(streams) {
    const seen = new Map();
    for (const { id, bytes_out: bytes, age_s: age } of streams) {
      if (bytes === null) continue;
      const before = this.#before.get(id) ?? { age: 0, bytes: 0, speed: null };
      const seconds = age - before.age;
      const fresh = seconds > 0 ? Math.max(0, bytes - before.bytes) / seconds : 0;
      const speed = before.speed === null ? fresh : 0.5 * before.speed + 0.5 * fresh;
      seen.set(id, { age, bytes, speed: speed < 0.5 ? 0 : speed });
    }
    this.#before = seen;
    return new Map(streams.map(({ id }) => [id, seen.get(id)?.speed ?? null]));
  }
}

/** @param {string} kind @param {string} label @param {Node[]} children */
const cell = (kind, label, ...children) => make("td", { role: "cell", class: kind, "data-label": label }, ...children);

/** One running request: a row of the table, a card where the screen is narrow. */
class Row {
  #model = make("span", { class: "name" });
  #upstream = make("span", { class: "sub" });
  #key = make("code");
  #id = make("code", { class: "sub" });
  #dot = make("span", { class: "dot" });
  #phase = make("span");
  #figures = {
    age: cell("age n", "Age"),
    first: cell("first n", "First token"),
    speed: cell("speed n", "Speed"),
    idle: cell("idle n", "Idle"),
    buffered: cell("buffered n", "Buffered"),
  };
  #button = /** @type {HTMLButtonElement} */ (make("button", { type: "button", class: "halt" }, "Stop"));
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #sure = false;
  #stopping = false;

  /** @param {Stream} stream */
  constructor(stream) {
    this.id = stream.id;
    this.element = make("tr", { role: "row", "data-id": stream.id });
    this.#id.textContent = stream.id;
    const { age, first, speed, idle, buffered } = this.#figures;
    this.element.append(
      cell("model", "Model", this.#model, this.#upstream),
      cell("by", "Key", this.#key, this.#id),
      cell("phase", "Phase", this.#dot, this.#phase),
      ...[age, first, speed, idle, buffered],
      cell("stop", "", this.#button),
    );
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
    write(this.#key, stream.key_id ?? "no key");
    write(this.#phase, phaseName(stream.phase, stream.queue_place));
    this.#dot.dataset.phase = stream.phase;
    this.element.title = `Request ${stream.request_id} from ${stream.client_ip}`;
    const cells = this.#figures;
    const streaming = stream.bytes_out !== null && stream.bytes_out > 0;
    figure(cells.age, duration(stream.age_s));
    figure(cells.first, duration(stream.ttft_s));
    figure(cells.speed, streaming ? perSecond(speed) : [DASH, ""]);
    figure(cells.idle, streaming ? duration(stream.idle_s) : [DASH, ""]);
    figure(cells.buffered, stream.buffered_bytes ? size(stream.buffered_bytes) : [DASH, ""]);
    cells.buffered.toggleAttribute("data-high", (stream.buffered_bytes ?? 0) > 100_000);
    if (!this.#sure && !this.#stopping) this.#name(`Stop ${stream.model ?? stream.route}, stream ${stream.id}`);
  }

  /** @param {string} name */
  #name(name) {
    this.#button.setAttribute("aria-label", name);
  }

  /** A row may move under the pointer at any moment: the first press only asks. */
  async #pressed() {
    if (this.#stopping) return;
    el("notices").replaceChildren();
    if (!this.#sure) {
      this.#sure = true;
      this.#button.dataset.sure = "";
      write(this.#button, "Sure?");
      this.#name(`Sure? Press again to stop stream ${this.id}`);
      this.#timer = setTimeout(() => this.#calm(), SURE_MS);
      return;
    }
    this.#calm();
    this.#stopping = true;
    this.#button.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
    write(this.#button, "Stopping");
    const [gone, said] = await stop(this.id);
    if (gone) return write(el("said"), said);
    el("notices").replaceChildren(make("div", { class: "notice bad" }, make("p", {}, said)));
    this.#button.removeAttribute("aria-disabled");
    this.#stopping = false;
    this.#calm();
  }

  #calm() {
    if (this.#stopping) return;
    clearTimeout(this.#timer);
    this.#sure = false;
    delete this.#button.dataset.sure;
    write(this.#button, "Stop");
  }
}

/** @param {string} id @returns {Promise<[boolean, string]>} whether it has ended; what to say about it */
async function stop(id) {
  try {
    const answer = await fetch(`/admin/streams/${encodeURIComponent(id)}`, { method: "DELETE" });
    if (answer.ok) return [true, `Stopped stream ${id}`];
    if (answer.status === 404) return [true, `Stream ${id} had ended already`];
    return [false, `Stream ${id} was not stopped: status ${answer.status}`];
  } catch {
    return [false, `Stream ${id} was not stopped: no connection`];
  }
}

/** @type {Map<string, Row>} */
const rows = new Map();
const speeds = new Speeds();

/**
 * @param {{streams: Stream[], running: Record<string, number>}} look
 * @returns {number} bytes a second of all of them
 */
export function drawStreams({ streams, running }) {
  const speed = speeds.look(streams);
  /** @type {Element | null} */
  let last = null;
  for (const stream of streams) {
    const row = rows.get(stream.id) ?? new Row(stream);
    rows.set(stream.id, row);
    row.draw(stream, speed.get(stream.id) ?? null);
    /** @type {ChildNode | null} */
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
  return [...speed.values()].reduce((/** @type {number} */ sum, one) => sum + (one ?? 0), 0);
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
