/** The event-stream parser in every chunking: what comes out does not depend on how the bytes were cut. */

import assert from "node:assert/strict";
import test from "node:test";

import { EventStreamParser } from "../../proxy/static/stream-client.js";

const encoder = new TextEncoder();
const ENDS = ["\n", "\r\n", "\r"];

/** mulberry32: the same numbers for the same seed, on every machine. */
function numbers(seed) {
  return (below) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

function parse(pieces) {
  const parser = new EventStreamParser();
  const events = pieces.flatMap((piece) => parser.push(piece));
  return [...events, ...parser.end()];
}

const whole = (text) => parse([encoder.encode(text)]);

function cut(bytes, at) {
  const edges = [0, ...at, bytes.length];
  return edges.slice(1).map((end, index) => bytes.subarray(edges[index], end));
}

function shuffled(pick, bytes) {
  const at = new Set(Array.from({ length: pick(20) }, () => pick(bytes.length + 1)));
  return cut(bytes, [...at].sort((a, b) => a - b));
}

const WORDS = ["a", "", " ", "Grüße", "水車", "🌊", "data: x", ":", '{"a":"\\n"}', "\u{feff}", "x".repeat(300)];

/** A stream, and the events that it means. */
function made(pick) {
  const events = [];
  let [text, id] = ["", null];
  const line = (content) => {
    const end = ENDS[pick(3)];
    text += content + (content === "" && end === "\n" && text.endsWith("\r") ? "\r" : end); // CR LF is one end
  };
  for (let count = 1 + pick(8); count > 0; count--) {
    const data = Array.from({ length: pick(4) }, () => WORDS[pick(WORDS.length)]);
    const named = pick(3) === 0;
    for (let noise = pick(3); noise > 0; noise--) line([": headrace", ":", "retry: 10", "unknown: x"][pick(4)]);
    if (named) line(pick(2) ? "event: error" : "event:error");
    if (pick(4) === 0) line(`id: ${(id = String(pick(100)))}`);
    for (const value of data) line(pick(2) || value.startsWith(" ") ? `data: ${value}` : `data:${value}`);
    line("");
    if (data.length) events.push({ event: named ? "error" : "message", data: data.join("\n"), id });
  }
  return { bytes: encoder.encode((pick(4) ? "" : "\u{feff}") + text), events };
}

test("any stream in any chunking", () => {
  for (let seed = 1; seed <= 400; seed++) {
    const pick = numbers(seed);
    const { bytes, events } = made(pick);
    assert.deepEqual(parse([bytes]), events, `seed ${seed}, whole`);
    assert.deepEqual(parse([...bytes].map((byte) => Uint8Array.of(byte))), events, `seed ${seed}, byte by byte`);
    for (let time = 0; time < 5; time++) assert.deepEqual(parse(shuffled(pick, bytes)), events, `seed ${seed}`);
  }
});

test("every place for one cut and for two", () => {
  const text = "\u{feff}: c\r\ndata: 水\r\ndata:车\r\rdata: [DONE]\n\n";
  const bytes = encoder.encode(text);
  const expected = whole(text);
  assert.equal(expected.length, 2);
  for (let first = 0; first <= bytes.length; first++) {
    for (let second = first; second <= bytes.length; second++) {
      assert.deepEqual(parse(cut(bytes, [first, second])), expected, `${first}, ${second}`);
    }
  }
});

test("an event is there with the last byte of its blank line, whatever the line ends", () => {
  for (const end of ["\n\n", "\r\n\r\n", "\r\r", "\n\r", "\r\n\r", "\r\n\n"]) {
    const parser = new EventStreamParser();
    assert.deepEqual(parser.push(encoder.encode(`data: a${end.slice(0, -1)}`)).length, end === "\r\n\r\n" ? 1 : 0);
    const last = parser.push(encoder.encode(end.slice(-1)));
    assert.equal(last.length, end === "\r\n\r\n" ? 0 : 1, JSON.stringify(end)); // CR ends a line by itself
    assert.deepEqual(parser.push(encoder.encode("data: b\n\n")).map((event) => event.data), ["b"]);
    assert.deepEqual(parser.end(), []);
  }
});

test("what the standard says of fields", () => {
  const datas = (text) => whole(text).map((event) => event.data);
  assert.deepEqual(datas("data\ndata\n\n"), ["\n"]);
  assert.deepEqual(datas("data:a\ndata: b\ndata:  c\n\n"), ["a\nb\n c"]);
  assert.deepEqual(datas("event: x\n\n: nothing\n\n"), []);
  assert.deepEqual(datas("Data: a\n\n data: b\n\n"), []);
  assert.deepEqual(whole("event: x\n\ndata: a\n\n")[0].event, "message"); // a name without data is forgotten
  assert.deepEqual(whole("id: 1\ndata: a\n\nid: 2\0\ndata: b\n\nid\ndata: c\n\n").map((event) => event.id), ["1", "1", ""]);
});

test("a last event without its blank line is kept for the end", () => {
  const parser = new EventStreamParser();
  assert.deepEqual(parser.push(encoder.encode("data: [DONE]")), []);
  assert.deepEqual(parser.end().map((event) => event.data), ["[DONE]"]);
  assert.deepEqual(whole("data: a\ndata: b").map((event) => event.data), ["a\nb"]);
  assert.deepEqual(whole(": only a comment"), []);
});

test("bytes that are no UTF-8 become replacement characters and hide nothing after them", () => {
  const bytes = Uint8Array.of(...encoder.encode("data: "), 0xff, 0xe6, 0xb0, ...encoder.encode("\n\ndata: b\n\n"));
  assert.deepEqual(parse([bytes]).map((event) => event.data), ["\ufffd\ufffd", "b"]);
});

test("an event has a largest size, a stream has none", () => {
  const parser = new EventStreamParser();
  const mebi = encoder.encode("x".repeat(1 << 20));
  const endless = () => {
    for (let count = 0; count < 17; count++) parser.push(mebi);
  };
  assert.throws(endless, { name: "ChatError", category: "parse" });
  const lines = encoder.encode(`data: ${"x".repeat(1 << 20)}\n`);
  const folded = new EventStreamParser();
  assert.throws(() => {
    for (let count = 0; count < 17; count++) folded.push(lines);
  }, { category: "parse" });
  const patient = new EventStreamParser();
  for (let count = 0; count < 20; count++) assert.equal(patient.push(lines).concat(patient.push(encoder.encode("\n"))).length, 1);
});

test("a long event in small pieces takes linear time", () => {
  const parser = new EventStreamParser();
  const piece = encoder.encode("x".repeat(16));
  const begun = process.cpuUsage().user;
  parser.push(encoder.encode("data: "));
  for (let count = 0; count < 250_000; count++) parser.push(piece);
  assert.equal(parser.push(encoder.encode("\n\n"))[0].data.length, 4_000_000);
  assert.ok(process.cpuUsage().user - begun < 10e6); // 0.2 s; searching from the beginning again: minutes
});
