/** The client against a server of Node's own that answers as a test says: kinds of failure, second tries, waits. */

import assert from "node:assert/strict";
import http from "node:http";
import test from "node:test";

import { ChatError, retryAfterOf, streamChat } from "../../proxy/static/stream-client.js";

const ASK = { model: "m", messages: [{ role: "user", content: "hi" }] };
const event = (content, finish = null) =>
  `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content }, finish_reason: finish }] })}\n\n`;
const DONE = "data: [DONE]\n\n";
const STREAM = { "content-type": "text/event-stream" };
const JSON_TYPE = { "content-type": "application/json" };

/** A stream that is sent whole. */
const says = (...events) => (_, response) => response.writeHead(200, STREAM).end(events.join(""));
const refuses = (status, headers = {}, body = `{"error":{"message":"no","type":"t","param":"p","code":"c"}}`) =>
  (_, response) => response.writeHead(status, { ...JSON_TYPE, ...headers }).end(body);

/** A server that answers each request by the next of these, the last one again and again. */
async function serving(t, ...answers) {
  const seen = [];
  const server = http.createServer((request, response) => {
    let body = "";
    request.on("data", (data) => (body += data));
    request.on("end", () => {
      seen.push({ headers: request.headers, body: JSON.parse(body), socket: request.socket, response });
      answers[Math.min(seen.length, answers.length) - 1](request, response);
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { url: `http://127.0.0.1:${server.address().port}/v1/chat/completions`, seen, server };
}

async function collect(url, options = {}, request = ASK) {
  const deltas = [];
  try {
    for await (const delta of streamChat(request, { url, baseDelay: 0.001, ...options })) deltas.push(delta);
  } catch (error) {
    assert.ok(error instanceof ChatError, String(error?.stack ?? error));
    return { text: deltas.map((delta) => delta.content).join(""), deltas, error };
  }
  return { text: deltas.map((delta) => delta.content).join(""), deltas, error: null };
}

test("a stream comes delta by delta, with its end and its usage", async (t) => {
  const usage = { prompt_tokens: 1, completion_tokens: 2 };
  const { url, seen } = await serving(t, says(": headrace\n", event("a"), event("b", "stop"), `data: ${JSON.stringify({ choices: [], usage })}\n\n`, DONE));
  const { text, deltas, error } = await collect(url, { apiKey: "k", headers: { "x-mock": "words=1" } });
  assert.equal(error, null);
  assert.equal(text, "ab");
  assert.deepEqual(deltas.map((delta) => delta.finishReason), [null, "stop", null]);
  assert.deepEqual(deltas[2].usage, usage);
  assert.equal(deltas[0].chunk.choices[0].index, 0);
  assert.deepEqual(seen[0].body, { stream: true, ...ASK });
  assert.equal(seen[0].headers.authorization, "Bearer k");
  assert.equal(seen[0].headers["x-mock"], "words=1");
});

test("what counts as a whole answer", async (t) => {
  const cases = [
    [says(event("a"), DONE), null],
    [says(event("a"), "data: [DONE]"), null],
    [says(event("a", "stop")), null],
    [says(event("a", "stop").trimEnd()), null],
    [says(event("a"), "event: ping\ndata: {}\n\n", "data:\n\n", DONE), null],
    [says(event("a")), "truncated"],
    [says(event("a"), event("b").slice(0, 20)), "truncated"],
    [says(event("a"), `data: {"cho\n\n`, DONE), "parse"],
    [says(event("a"), `data: 7\n\n`, DONE), "parse"],
    [says(event("a"), `data: {"error":{"message":"m","type":"server_error","code":"upstream_error"}}\n\n`), "server"],
    [says(event("a"), `event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n`), "server"],
    [says(event("a"), `event: error\ndata: {"message":"flat"}\n\n`), "server"],
    [says(event("a"), `data: {"object":"error","message":"vLLM"}\n\n`), "server"],
    [says(event("a"), `data: {"error":"text"}\n\n`), "server"],
    [says(event("a"), `data: {"error":{"type":"rate_limit_error"}}\n\n`), "rate_limit"],
    [says(event("a"), `data: {"error":{"code":"upstream_timeout","type":"server_error"}}\n\n`), "timeout"],
    [says(event("a"), `data: {"error":{"type":"authentication_error"}}\n\n`), "auth"],
    [(_, response) => response.writeHead(200, STREAM).write(event("a"), () => response.destroy()), "truncated"],
    [(_, response) => response.writeHead(200, STREAM).write(event("a") + DONE, () => response.destroy()), null],
  ];
  for (const [at, [answer, category]] of cases.entries()) {
    const { url, seen } = await serving(t, answer);
    const { text, error } = await collect(url);
    assert.equal(error?.category ?? null, category, `case ${at}: ${error?.stack}`);
    assert.equal(text, "a", `case ${at}`);
    assert.equal(error?.partial ?? true, true);
    assert.equal(seen.length, 1, `case ${at}: nothing is asked again once something was delivered`);
  }
});

test("statuses: category, what the server said, and whether it was asked again", async (t) => {
  const cases = [
    [400, {}, "request", 1], [401, {}, "auth", 1], [403, {}, "auth", 1], [404, {}, "request", 1],
    [408, {}, "timeout", 3], [409, {}, "request", 3], [413, {}, "request", 1], [422, {}, "request", 1],
    [429, {}, "rate_limit", 3], [500, {}, "server", 3], [502, {}, "server", 3], [503, {}, "server", 3],
    [504, {}, "timeout", 3], [529, {}, "server", 3],
    [429, { "x-should-retry": "false" }, "rate_limit", 1], [503, { "x-should-retry": "false" }, "server", 1],
    [400, { "x-should-retry": "true" }, "request", 3],
  ];
  for (const [status, headers, category, asked] of cases) {
    const { url, seen } = await serving(t, refuses(status, { "x-request-id": "id-1", ...headers }));
    const { error } = await collect(url);
    const { message, type, param, code, requestId, retryable, partial } = error;
    assert.deepEqual([error.category, error.status, seen.length], [category, status, asked]);
    assert.deepEqual([message, type, param, code, requestId], ["no", "t", "p", "c", "id-1"]);
    assert.deepEqual([retryable, partial], [asked > 1, false]);
  }
});

test("errors in other shapes", async (t) => {
  const cases = [
    [`<html>Bad Gateway</html>`, "The server answered with status 502."],
    [``, "The server answered with status 502."],
    [`[{"error":{"code":400,"message":"Gemini's","status":"INVALID_ARGUMENT"}}]`, "Gemini's"],
    [`{"type":"error","error":{"type":"api_error","message":"Anthropic's"}}`, "Anthropic's"],
    [`{"object":"error","message":"vLLM's"}`, "vLLM's"],
    [`{"error":"text"}`, "text"],
  ];
  for (const [body, message] of cases) {
    const { url } = await serving(t, refuses(502, {}, body));
    assert.equal((await collect(url, { retries: 0 })).error.message, message);
  }
});

test("a second try after a failure before the first delta", async (t) => {
  const heads = [];
  const told = [];
  const { url, seen } = await serving(
    t,
    refuses(503),
    (request) => request.socket.destroy(),
    says(event("a"), DONE),
  );
  const { text, error } = await collect(url, {
    onResponse: ({ status, attempt }) => heads.push([status, attempt]),
    onRetry: ({ error, attempt }) => told.push([error.category, attempt]),
  });
  assert.deepEqual([text, error, seen.length], ["a", null, 3]);
  assert.deepEqual(heads, [[503, 1], [200, 3]]);
  assert.deepEqual(told, [["server", 1], ["network", 2]]);
});

test("an error event, a cut or silence before the first delta is tried again as well", async (t) => {
  const failures = [
    says(`data: {"error":{"message":"m","type":"server_error","code":"overloaded"}}\n\n`),
    says(": headrace\n"),
    (_, response) => response.writeHead(200, STREAM).write(": headrace\n", () => response.destroy()),
    (_, response) => response.writeHead(200, STREAM).write(": headrace\n"),
    () => {},
  ];
  for (const [at, failure] of failures.entries()) {
    const { url, seen } = await serving(t, failure, says(event("a"), DONE));
    const { text, error } = await collect(url, { idleTimeout: 0.2, timeout: 0.2 });
    assert.deepEqual([text, error, seen.length], ["a", null, 2], `case ${at}: ${error}`);
  }
});

test("silence is a timeout; signs of life are none", async (t) => {
  let timer;
  const alive = (_, response) => {
    response.writeHead(200, STREAM);
    let count = 0;
    timer = setInterval(() => {
      response.write(": headrace\n");
      if (++count < 20) return;
      clearInterval(timer);
      response.end(event("a") + DONE);
    }, 50);
  };
  const { url } = await serving(t, alive);
  assert.deepEqual((await collect(url, { idleTimeout: 0.6 })).error, null);
  const silent = await serving(t, (_, response) => response.writeHead(200, STREAM).write(event("a")));
  const { error, text } = await collect(silent.url, { idleTimeout: 0.1 });
  assert.deepEqual([error.category, error.retryable, error.partial, text], ["timeout", true, true, "a"]);
});

test("back-off: full jitter under a bound that doubles up to a limit", async (t) => {
  const { url } = await serving(t, refuses(503));
  for (const [share, expected] of [[0, [0, 0, 0, 0]], [0.5, [0.001, 0.002, 0.0025, 0.0025]]]) {
    const delays = [];
    const options = { retries: 4, baseDelay: 0.002, maxDelay: 0.005, random: () => share };
    await collect(url, { ...options, onRetry: ({ delay }) => delays.push(delay) });
    assert.deepEqual(delays, expected);
  }
});

test("never sooner than the server says, and later than all others who were told the same", async (t) => {
  for (const headers of [{ "retry-after": "0.2" }, { "retry-after-ms": "200", "retry-after": "9" }]) {
    const { url } = await serving(t, refuses(429, headers), says(event("a"), DONE));
    const delays = [];
    const begun = performance.now();
    const options = { random: () => 0.5, baseDelay: 0.1, onRetry: ({ error, delay }) => delays.push([error.retryAfter, delay]) };
    assert.equal((await collect(url, options)).text, "a");
    assert.deepEqual(delays, [[0.2, 0.25]]);
    assert.ok(performance.now() - begun >= 245);
  }
});

test("a wait that is too long is the caller's to decide", async (t) => {
  const { url, seen } = await serving(t, refuses(429, { "retry-after": "61" }));
  const { error } = await collect(url);
  assert.deepEqual([error.retryAfter, error.retryable, seen.length], [61, true, 1]);
  assert.equal((await collect(url, { maxRetryAfter: 0.1, retries: 9 })).error.retryAfter, 61);
});

test("Retry-After in all its forms", () => {
  const now = Date.parse("Sat, 21 Nov 2026 12:00:00 GMT");
  const of = (fields) => retryAfterOf(new Headers(fields), now);
  assert.equal(of({}), null);
  assert.equal(of({ "retry-after": "7" }), 7);
  assert.equal(of({ "retry-after": "0" }), 0);
  assert.equal(of({ "retry-after": "1.5" }), 1.5);
  assert.equal(of({ "retry-after": "Sat, 21 Nov 2026 12:01:00 GMT" }), 60);
  assert.equal(of({ "retry-after": "Sat, 21 Nov 2026 11:00:00 GMT" }), 0);
  assert.equal(of({ "retry-after": "soon" }), null);
  assert.equal(of({ "retry-after": "-5" }) ?? 0, 0);
  assert.equal(of({ "retry-after-ms": "1500", "retry-after": "9" }), 1.5);
  assert.equal(of({ "retry-after-ms": "x", "retry-after": "9" }), 9);
});

test("an abort ends it in every phase, and the server sees it", async (t) => {
  const waits = (_, response) => response.writeHead(200, STREAM).write(event("a"));
  for (const [phase, answer] of [["head", () => {}], ["stream", waits]]) {
    const { url, seen, server } = await serving(t, answer);
    const controller = new AbortController();
    const gone = new Promise((resolve) => server.on("connection", (socket) => socket.on("close", resolve)));
    const asked = new Promise((resolve) => server.on("request", resolve));
    let begun;
    const streaming = new Promise((resolve) => (begun = resolve));
    const answered = collect(url, { signal: controller.signal, onResponse: begun });
    await (phase === "head" ? asked : streaming);
    controller.abort();
    const { error } = await answered;
    assert.deepEqual([error.category, error.retryable], ["aborted", false], phase);
    await gone;
    assert.ok(seen.length <= 1, phase);
  }
  const { url, seen } = await serving(t, refuses(503, { "retry-after": "30" }));
  const controller = new AbortController();
  const begun = performance.now();
  const answered = collect(url, { signal: controller.signal, onRetry: () => controller.abort() });
  assert.equal((await answered).error.category, "aborted");
  assert.ok(performance.now() - begun < 15_000);
  assert.equal((await collect(url, { signal: AbortSignal.abort() })).error.category, "aborted");
  assert.equal(seen.length, 1);
});

test("a reader that stops early gives its connection up", async (t) => {
  const { url, server } = await serving(t, (_, response) => response.writeHead(200, STREAM).write(event("a") + event("b")));
  const gone = new Promise((resolve) => server.on("connection", (socket) => socket.on("close", resolve)));
  for await (const delta of streamChat(ASK, { url })) {
    assert.equal(delta.content, "a");
    break;
  }
  await gone;
});

test("after the terminator the connection can be used again", async (t) => {
  const slow = (_, response) => {
    response.writeHead(200, STREAM).write(event("a") + DONE);
    setTimeout(() => response.end(), 10);
  };
  const { url, seen } = await serving(t, slow);
  for (let time = 0; time < 6; time++) assert.equal((await collect(url)).text, "a");
  // Node may open a second one before it has put the first one back; without reading on there would be six.
  assert.ok(new Set(seen.map((each) => each.socket)).size <= 3);
  const endless = await serving(t, (_, response) => response.writeHead(200, STREAM).write(event("a") + DONE));
  assert.equal((await collect(endless.url)).error, null);
});

test("answers of one piece", async (t) => {
  const whole = (document) => (_, response) => response.writeHead(200, JSON_TYPE).end(JSON.stringify(document));
  const said = { choices: [{ message: { content: "ab" }, finish_reason: "stop" }], usage: { total_tokens: 3 } };
  const first = await serving(t, whole(said));
  const { text, deltas } = await collect(first.url, {}, { ...ASK, stream: false });
  assert.deepEqual([text, deltas.length, deltas[0].finishReason, deltas[0].usage], ["ab", 1, "stop", { total_tokens: 3 }]);
  assert.equal(first.seen[0].body.stream, false);
  assert.equal((await collect((await serving(t, whole({ content: "ab", usage: null }))).url)).text, "ab");
  assert.equal((await collect((await serving(t, whole({ error: { message: "m" } }))).url, { retries: 0 })).error.category, "server");
  assert.equal((await collect((await serving(t, whole({ x: 1 }))).url)).error.category, "parse");
  assert.equal((await collect((await serving(t, whole(null))).url)).error.category, "parse");
  const page = (_, response) => response.writeHead(200, { "content-type": "text/html" }).end("<html>");
  assert.equal((await collect((await serving(t, page)).url)).error.category, "parse");
});

test("the browser API's own shape, and lists of parts", async (t) => {
  const { url } = await serving(t, says(`data: {"content": "a"}\n\n`, `data: {"choices":[{"delta":{"content":[{"type":"text","text":"b"},{"type":"x"}]}}]}\n\n`, DONE));
  assert.equal((await collect(url)).text, "ab");
});

test("nobody there", async (t) => {
  const { url, server } = await serving(t, says(DONE));
  await new Promise((resolve) => server.close(resolve));
  const told = [];
  const { error } = await collect(url, { onRetry: (retry) => told.push(retry.attempt) });
  assert.deepEqual([error.category, error.retryable, error.status, told], ["network", true, null, [1, 2]]);
  assert.ok(error.cause);
});

test("a mistake in the caller's own function is the caller's", async (t) => {
  const { url, seen } = await serving(t, says(DONE));
  const failing = streamChat(ASK, { url, onResponse: () => { throw new RangeError("mine"); } });
  await assert.rejects(failing.next(), RangeError);
  assert.equal(seen.length, 1);
});
