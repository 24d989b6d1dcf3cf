/**
 * A small client for streaming chat completions: an async iterator over what the model says.
 *
 *     import { streamChat } from "./stream-client.js";
 *     for await (const delta of streamChat({ messages }, { url: "/api/chat/stream" })) show(delta.content);
 *
 * It reads Server-Sent Events however they are cut (WHATWG HTML, 9.2), tells every failure's kind apart, asks
 * again only while nothing has been delivered, waits as long as the server says, and takes a stream that ends
 * without its terminator for what it is: truncated. No dependencies; browsers, Node 18 and newer, Deno, Bun.
 *
 * @module
 */

/**
 * Why there is no (whole) answer.
 *
 * - `network`: no answer at all: DNS, connection, TLS, CORS
 * - `auth`: 401 or 403
 * - `rate_limit`: 429
 * - `server`: any 5xx, and an error that the stream itself tells
 * - `timeout`: 408 or 504, or silence longer than this client waits
 * - `parse`: an answer that is no chat completion
 * - `aborted`: by your AbortSignal
 * - `truncated`: the stream ended before its terminator
 * - `request`: any other 4xx: the same request will fail again
 * @typedef {"network"|"auth"|"rate_limit"|"server"|"timeout"|"parse"|"aborted"|"truncated"|"request"} Category
 */

/**
 * One message of a conversation. Other fields are sent as they are.
 * @typedef {{ role: string, content: unknown, [field: string]: unknown }} Message
 */

/**
 * The body of the request: a chat completion as OpenAI defines it. `stream` is true unless you say otherwise.
 * @typedef {{ messages: ReadonlyArray<Message>, model?: string, stream?: boolean, temperature?: number,
 *   max_tokens?: number, [field: string]: unknown }} ChatRequest
 */

/**
 * What an answer used, as the provider reports it.
 * @typedef {{ prompt_tokens?: number, completion_tokens?: number, total_tokens?: number,
 *   [field: string]: unknown }} Usage
 */

/**
 * One step of an answer. `content` may be empty (a role, a tool call, the usage); `chunk` is the whole event.
 * @typedef {{ content: string, finishReason: string | null, usage: Usage | null,
 *   chunk: Record<string, any> }} Delta
 */

/**
 * The head of an answer. `attempt` counts from 1.
 * @typedef {{ status: number, headers: Headers, requestId: string | null, attempt: number }} Head
 */

/**
 * How to ask. Durations are seconds.
 * @typedef {object} StreamOptions
 * @property {string} [url] default `/v1/chat/completions`
 * @property {string} [apiKey] sent as `Authorization: Bearer`
 * @property {Record<string, string>} [headers] more header fields
 * @property {AbortSignal} [signal] ends the request, its pauses and the stream
 * @property {number} [retries] further attempts, default 2
 * @property {number} [baseDelay] the first back-off is a random part of this, default 0.5
 * @property {number} [maxDelay] no back-off is longer, default 8
 * @property {number} [maxRetryAfter] a longer Retry-After is not waited for but thrown, default 60
 * @property {number} [timeout] until the head of the answer, default 300
 * @property {number} [idleTimeout] silence between bytes, comments included, default 120
 * @property {(head: Head) => void} [onResponse] called with the head of every answer, failures included
 * @property {(retry: { error: ChatError, delay: number, attempt: number }) => void} [onRetry] before a pause
 * @property {typeof globalThis.fetch} [fetch] default `globalThis.fetch`
 * @property {() => number} [random] in [0, 1), default `Math.random`
 */

/**
 * @typedef {object} ErrorDetails
 * @property {number | null} [status] of the answer, if there was one
 * @property {string | null} [code] the server's `error.code`
 * @property {string | null} [type] the server's `error.type`
 * @property {string | null} [param] the server's `error.param`
 * @property {string | null} [requestId] what to ask the operator about
 * @property {boolean} [retryable] whether asking again may help
 * @property {number | null} [retryAfter] seconds, if the server says when
 * @property {unknown} [cause] what was caught
 */

/** Every failure of this client. */
export class ChatError extends Error {
  /**
   * @param {Category} category
   * @param {string} message
   * @param {ErrorDetails} [details]
   */
  constructor(category, message, details = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = "ChatError";
    /** @type {Category} */
    this.category = category;
    /** @type {number | null} */
    this.status = details.status ?? null;
    /** @type {string | null} */
    this.code = details.code ?? null;
    /** @type {string | null} */
    this.type = details.type ?? null;
    /** @type {string | null} */
    this.param = details.param ?? null;
    /** @type {string | null} */
    this.requestId = details.requestId ?? null;
    /** Whether asking again may help. @type {boolean} */
    this.retryable = details.retryable ?? RETRYABLE.has(category);
    /** Seconds. @type {number | null} */
    this.retryAfter = details.retryAfter ?? null;
    /** Whether a part of the answer had been delivered. @type {boolean} */
    this.partial = false;
  }
}

/** @type {ReadonlySet<Category>} */
const RETRYABLE = new Set(/** @type {Category[]} */ (["network", "rate_limit", "server", "timeout", "truncated"]));

/* ── server-sent events ──────────────────────────────────────────────────────────────────────────────────── */

/**
 * One event; `event` is its type, "message" unless it names another.
 * @typedef {{ event: string, data: string, id: string | null }} ServerSentEvent
 */

/** Characters of one event: an endless line must not fill the memory. */
const MAX_EVENT = 16 * 1024 * 1024;
const LINE_END = /\r\n|\r|\n/g;

/**
 * Reads an event stream from pieces of any size (WHATWG HTML, 9.2.6): line ends CR, LF and CRLF, comments,
 * data of several lines, UTF-8 characters cut in two, a byte order mark at the beginning.
 */
export class EventStreamParser {
  #decoder = new TextDecoder("utf-8"); // which also removes the byte order mark
  #begun = ""; // of a line whose end has not come; never searched again
  #afterCR = false; // an LF that comes now belongs to the CR before it
  #event = "";
  /** @type {string[]} */
  #data = [];
  #size = 0;
  /** @type {string | null} */
  #id = null;

  /**
   * The events that these bytes complete.
   * @param {Uint8Array} bytes
   * @returns {ServerSentEvent[]}
   */
  push(bytes) {
    return this.#read(this.#decoder.decode(bytes, { stream: true }));
  }

  /**
   * At the end of the stream: the event that lacks its blank line, if there is one. A browser's EventSource
   * throws it away, but some servers leave the last blank line out.
   * @returns {ServerSentEvent[]}
   */
  end() {
    const events = this.#read(this.#decoder.decode());
    if (this.#begun !== "") this.#line(this.#begun);
    this.#begun = "";
    const last = this.#dispatch();
    return last ? [...events, last] : events;
  }

  /** @param {string} text @returns {ServerSentEvent[]} */
  #read(text) {
    if (this.#afterCR && text !== "") {
      this.#afterCR = false;
      if (text[0] === "\n") text = text.slice(1);
    }
    /** @type {ServerSentEvent[]} */
    const events = [];
    let start = 0;
    for (const found of text.matchAll(LINE_END)) {
      const line = this.#begun + text.slice(start, found.index);
      this.#begun = "";
      start = found.index + found[0].length;
      // A CR ends its line at once, so that no event waits for the next one's first byte.
      this.#afterCR = found[0] === "\r" && start === text.length;
      const event = line === "" ? this.#dispatch() : this.#line(line);
      if (event) events.push(event);
    }
    this.#begun += text.slice(start);
    if (this.#begun.length + this.#size > MAX_EVENT) throw new ChatError("parse", "An event is too large.");
    return events;
  }

  /** @param {string} line @returns {undefined} */
  #line(line) {
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment
    const name = colon < 0 ? line : line.slice(0, colon);
    const skip = colon >= 0 && line[colon + 1] === " " ? 2 : 1;
    const value = colon < 0 ? "" : line.slice(colon + skip);
    if (name === "data") {
      this.#data.push(value);
      this.#size += value.length + 1;
    } else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
  }

  /** @returns {ServerSentEvent | null} */
  #dispatch() {
    const event = this.#event || "message";
    const data = this.#data;
    this.#event = "";
    this.#data = [];
    this.#size = 0;
    return data.length ? { event, data: data.join("\n"), id: this.#id } : null;
  }
}

/* ── what the server says about trying again ─────────────────────────────────────────────────────────────── */

/**
 * Seconds from `retry-after-ms`, else from `Retry-After` (a number or an HTTP date); null if neither says.
 * @param {Headers} headers
 * @param {number} now milliseconds since 1970
 * @returns {number | null}
 */
export function retryAfterOf(headers, now = Date.now()) {
  const milliseconds = amount(headers.get("retry-after-ms"));
  if (milliseconds !== null) return milliseconds / 1000;
  const text = headers.get("retry-after");
  const seconds = amount(text);
  if (seconds !== null || !text) return seconds;
  const date = Date.parse(text);
  return Number.isNaN(date) ? null : Math.max(0, (date - now) / 1000);
}

/** @param {string | null} text @returns {number | null} */
function amount(text) {
  return text !== null && /^\s*\d+(\.\d+)?\s*$/.test(text) ? Number(text) : null;
}

/** @param {number} status @returns {Category} */
function categoryOf(status) {
  if (status === 401 || status === 403) return "auth";
  if (status === 429) return "rate_limit";
  if (status === 408 || status === 504) return "timeout";
  return status >= 500 ? "server" : "request";
}

/**
 * The error in an answer's body or in an event, in the shapes of OpenAI, Anthropic, Gemini and vLLM.
 * @param {any} document
 * @returns {{ message?: string, type?: string, param?: string, code?: string } | null}
 */
function errorIn(document) {
  const whole = Array.isArray(document) ? document[0] : document;
  if (typeof whole !== "object" || whole === null) return null;
  const flat = whole.type === "error" || whole.object === "error" ? whole : null;
  const found = whole.error || flat;
  if (!found) return null;
  if (typeof found !== "object") return { message: String(found) };
  /** @param {unknown} value */
  const text = (value) => (typeof value === "string" || typeof value === "number" ? String(value) : undefined);
  const { message, type, param, code } = found;
  return { message: text(message), type: text(type), param: text(param), code: text(code) };
}

/** @param {string} text @returns {any} undefined if it is not JSON */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** @param {Response} response */
const requestIdOf = (response) => response.headers.get("x-request-id") ?? response.headers.get("request-id");

/** @param {Response} response @returns {Promise<ChatError>} */
async function refusal(response) {
  const text = await response.text().catch(() => "");
  const said = errorIn(parsed(text)) ?? {};
  const { status, headers } = response;
  const should = headers.get("x-should-retry");
  const usual = status === 408 || status === 409 || status === 429 || status >= 500;
  return new ChatError(categoryOf(status), said.message ?? `The server answered with status ${status}.`, {
    ...said,
    status,
    requestId: requestIdOf(response),
    retryable: should === "true" || (should !== "false" && usual),
    retryAfter: retryAfterOf(headers),
  });
}

/** Types and codes of errors in a stream, whose status has been 200 since long. @type {[RegExp, Category][]} */
const TOLD = [
  [/rate_?limit|too_many/i, "rate_limit"],
  [/authentication|permission|invalid_api_key/i, "auth"],
  [/timeout/i, "timeout"],
  [/invalid_request|not_found/i, "request"],
];

/**
 * @param {NonNullable<ReturnType<typeof errorIn>>} said
 * @param {Response} response
 */
function errorEvent(said, response) {
  const names = `${said.type ?? ""} ${said.code ?? ""}`;
  const category = TOLD.find(([pattern]) => pattern.test(names))?.[1] ?? "server";
  return new ChatError(category, said.message ?? "The stream ended with an error.", {
    ...said,
    status: response.status,
    requestId: requestIdOf(response),
  });
}

/* ── one attempt ─────────────────────────────────────────────────────────────────────────────────────────── */

/** Seconds; the OpenAI SDK for Python waits as long. */
const DRAIN = 0.1;

/** Ends a request after a silence, and when the caller's signal says so. */
class Watch {
  #controller = new AbortController();
  #outer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  #late = false;
  #abort = () => this.#controller.abort();

  /** @param {AbortSignal | undefined} outer */
  constructor(outer) {
    this.#outer = outer;
    if (outer?.aborted) this.#abort();
    outer?.addEventListener("abort", this.#abort);
  }

  get signal() {
    return this.#controller.signal;
  }

  /** @param {number} seconds */
  expect(seconds) {
    clearTimeout(this.#timer);
    if (!(seconds > 0 && seconds < 2e6)) return; // 0 and Infinity: no limit; setTimeout takes 31 bits of ms
    this.#timer = setTimeout(() => {
      this.#late = true;
      this.#abort();
    }, seconds * 1000);
  }

  /** What a failed fetch or read means. @param {unknown} cause @param {ChatError} otherwise */
  judge(cause, otherwise) {
    if (this.#outer?.aborted) return aborted(this.#outer);
    if (this.#late) return new ChatError("timeout", "The server was silent for too long.", { cause });
    return otherwise;
  }

  close() {
    clearTimeout(this.#timer);
    this.#outer?.removeEventListener("abort", this.#abort);
    this.#abort(); // a reader that stops early gives its connection up
  }
}

/** @param {AbortSignal} signal */
const aborted = (signal) => new ChatError("aborted", "The request was stopped.", { cause: signal.reason });

/** @param {Record<string, any>} chunk @returns {Delta} */
function deltaOf(chunk) {
  const choice = chunk.choices?.[0];
  const said = choice?.delta ?? choice?.message ?? (chunk.choices ? {} : chunk); // {"content": …} by itself
  return {
    content: textOf(said.content),
    finishReason: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
    chunk,
  };
}

/** Some models give a list of parts. @param {unknown} content @returns {string} */
function textOf(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content.map((part) => (typeof part?.text === "string" ? part.text : "")).join("");
}

/**
 * @param {ChatRequest} request
 * @param {StreamOptions} options
 * @param {Watch} watch
 * @returns {Promise<Response>}
 */
async function send(request, options, watch) {
  watch.expect(options.timeout ?? 300);
  try {
    return await (options.fetch ?? globalThis.fetch)(options.url ?? "/v1/chat/completions", {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        ...(options.apiKey ? { Authorization: `Bearer ${options.apiKey}` } : {}),
        ...options.headers,
      },
      body: JSON.stringify({ stream: true, ...request }),
      signal: watch.signal,
    });
  } catch (cause) {
    throw watch.judge(cause, new ChatError("network", "The server could not be reached.", { cause }));
  }
}

/**
 * The events of a body up to its end, however it ends.
 * @param {Response} response
 * @param {Watch} watch
 * @param {number} idle seconds
 * @returns {AsyncGenerator<{ event: ServerSentEvent, last: boolean }, void, void>}
 */
async function* eventsOf(response, watch, idle) {
  const parser = new EventStreamParser();
  const reader = bodyOf(response).getReader();
  try {
    for (;;) {
      watch.expect(idle);
      const { done, value } = await reader.read().catch((cause) => {
        throw watch.judge(cause, truncated(response, cause));
      });
      for (const event of done ? parser.end() : parser.push(value)) yield { event, last: done };
      if (done) return;
    }
  } finally {
    reader.releaseLock();
  }
}

/** @param {Response} response */
const bodyOf = (response) => /** @type {ReadableStream<Uint8Array>} */ (response.body);

/**
 * After the terminator the body's own end is near: whoever reads it can use the connection again.
 * @param {Response} response
 * @param {Watch} watch
 */
async function drain(response, watch) {
  watch.expect(DRAIN);
  const reader = bodyOf(response).getReader();
  try {
    while (!(await reader.read()).done);
  } catch {
    // The answer is whole.
  }
}

/** @param {Response} response @param {unknown} [cause] */
function truncated(response, cause) {
  const message = "The stream ended before the answer was complete.";
  return new ChatError("truncated", message, { cause, status: response.status, requestId: requestIdOf(response) });
}

/** @param {Response} response @param {unknown} [cause] */
function unreadable(response, cause) {
  const message = "The answer is not a chat completion.";
  return new ChatError("parse", message, { cause, status: response.status, requestId: requestIdOf(response) });
}

/**
 * @param {Response} response
 * @param {Watch} watch
 * @param {number} idle
 * @returns {AsyncGenerator<Delta, void, void>}
 */
async function* deltasOf(response, watch, idle) {
  let finished = false;
  let over = false;
  for await (const { event, last } of eventsOf(response, watch, idle)) {
    const data = event.data.trim();
    over = data === "[DONE]";
    if (over) break;
    if (data === "" || event.event === "ping") continue; // signs of life
    const chunk = parsed(data);
    if (typeof chunk !== "object" || chunk === null) {
      throw last ? truncated(response) : unreadable(response); // half an event at the end of all bytes
    }
    const said = event.event === "error" ? errorIn(chunk) ?? errorIn({ error: chunk }) : errorIn(chunk);
    if (said) throw errorEvent(said, response);
    const delta = deltaOf(chunk);
    finished ||= delta.finishReason !== null;
    yield delta;
  }
  if (over) await drain(response, watch);
  else if (!finished) throw truncated(response);
}

/**
 * An answer that is no event stream: `stream: false`, the browser API's `/api/chat`, or a server that does not
 * stream.
 * @param {Response} response
 * @param {Watch} watch
 * @param {number} idle
 * @returns {Promise<Delta>}
 */
async function wholeAnswer(response, watch, idle) {
  watch.expect(idle);
  const text = await response.text().catch((cause) => {
    throw watch.judge(cause, truncated(response, cause));
  });
  const document = parsed(text);
  const said = errorIn(document);
  if (said) throw errorEvent(said, response);
  if (typeof document?.content !== "string" && !document?.choices?.[0]) throw unreadable(response);
  return deltaOf(document);
}

/**
 * @param {ChatRequest} request
 * @param {StreamOptions} options
 * @param {number} attempt
 * @returns {AsyncGenerator<Delta, void, void>}
 */
async function* once(request, options, attempt) {
  const watch = new Watch(options.signal);
  const idle = options.idleTimeout ?? 120;
  try {
    const response = await send(request, options, watch);
    const { status, headers } = response;
    options.onResponse?.({ status, headers, requestId: requestIdOf(response), attempt });
    if (!response.ok) throw await refusal(response);
    const type = headers.get("content-type") ?? "";
    if (type.includes("text/event-stream")) yield* deltasOf(response, watch, idle);
    else if (type.includes("json")) yield await wholeAnswer(response, watch, idle);
    else throw unreadable(response);
  } finally {
    watch.close();
  }
}

/* ── the client ──────────────────────────────────────────────────────────────────────────────────────────── */

/**
 * Seconds to wait before another attempt: full jitter, a random part of a bound that doubles; never less than
 * the server asked for, and then not the same for everybody it asked.
 * @param {ChatError} error
 * @param {number} attempt from 1
 * @param {StreamOptions} options
 */
function delayOf(error, attempt, options) {
  const { baseDelay = 0.5, maxDelay = 8, random = Math.random } = options;
  if (error.retryAfter !== null) return error.retryAfter + random() * Math.min(baseDelay, maxDelay);
  return random() * Math.min(maxDelay, baseDelay * 2 ** (attempt - 1));
}

/** @param {number} seconds @param {AbortSignal | undefined} signal @returns {Promise<void>} */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(aborted(/** @type {AbortSignal} */ (signal)));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

/**
 * Asks, and yields the answer as it comes. Every failure is a ChatError. Until the first delta has been
 * delivered a failure that may pass is tried again; after it, never: you would get the beginning twice.
 * @param {ChatRequest} request
 * @param {StreamOptions} [options]
 * @returns {AsyncGenerator<Delta, void, void>}
 */
export async function* streamChat(request, options = {}) {
  const { retries = 2, maxRetryAfter = 60, signal } = options;
  let delivered = false;
  for (let attempt = 1; ; attempt++) {
    try {
      for await (const delta of once(request, options, attempt)) {
        delivered = true;
        yield delta;
      }
      return;
    } catch (cause) {
      if (!(cause instanceof ChatError)) throw cause; // of the caller's own functions
      cause.partial = delivered;
      const waits = (cause.retryAfter ?? 0) <= maxRetryAfter;
      if (delivered || !cause.retryable || attempt > retries || !waits) throw cause;
      const delay = delayOf(cause, attempt, options);
      options.onRetry?.({ error: cause, delay, attempt });
      await pause(delay, signal);
    }
  }
}
