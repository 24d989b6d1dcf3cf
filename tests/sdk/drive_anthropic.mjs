// The @anthropic-ai/sdk package for Node does one case; prints one JSON line of what it saw.
//
//     node drive_anthropic.mjs BASE_URL KEY CASE REQUEST_ID
//
// It ends when its standard input does: until then its connections stay as the SDK left them.
import { createHash } from "node:crypto";
import Anthropic, { APIError, toFile } from "@anthropic-ai/sdk";
import { VERSION } from "@anthropic-ai/sdk/version";

const [baseURL, apiKey, name, requestId] = process.argv.slice(2);
const ASK = [{ role: "user", content: "one two three" }];
const TOOLS = [{ name: "weather", input_schema: { type: "object" } }];
const CONTENT = Buffer.alloc(256 * 1200, Buffer.from([...Array(256).keys()]));
const client = new Anthropic({ baseURL, apiKey, defaultHeaders: { "x-request-id": requestId } });

const mock = (behaviour) => ({ headers: { "x-mock": behaviour } });
const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");
const body = (more) => ({ model: "m", max_tokens: 99, messages: ASK, ...more });
const ask = (more = {}, options = {}, by = client) => by.messages.create(body(more), options);

// What an application reads from an SDK's exception.
const failure = (error) => ({
  class: error.constructor.name,
  message: error.message,
  ...(error instanceof APIError && {
    status: error.status,
    request_id: error.requestID,
    retry_after: error.headers?.get("retry-after"),
  }),
});

// A request that must not succeed.
async function refused(more, options, by = client) {
  const started = performance.now();
  try {
    await ask(more, options, by);
  } catch (error) {
    return { ...failure(error), elapsed_s: (performance.now() - started) / 1000 };
  }
  return { class: null };
}

// A stream that ends early; what came before it counts as delivered.
async function broken(behaviour) {
  let text = "";
  try {
    for await (const event of await ask({ stream: true }, mock(behaviour)))
      if (event.type === "content_block_delta") text += event.delta.text;
  } catch (error) {
    return { text, ...failure(error) };
  }
  return { text, class: null };
}

const cases = {
  async whole() {
    const answer = await ask();
    return {
      text: answer.content[0].text,
      finish: answer.stop_reason,
      usage: [answer.usage.input_tokens, answer.usage.output_tokens],
      request_id: answer._request_id,
    };
  },

  lingers: () => cases.stream("linger=0.05"),

  async stream(behaviour = "") {
    let text = "", finish = null;
    for await (const event of await ask({ stream: true }, mock(behaviour))) {
      if (event.type === "content_block_delta") text += event.delta.text;
      if (event.type === "message_delta") finish = event.delta.stop_reason;
    }
    return { text, finish };
  },

  async usage() {
    const { usage } = await client.messages.stream(body()).finalMessage();
    return { usage: [usage.input_tokens, usage.output_tokens] };
  },

  async tools() {
    const asked = { model: "provided", tools: TOOLS };
    const whole = (await ask(asked)).content[0];
    const final = await client.messages.stream(body(asked)).finalMessage();
    let pieces = 0;
    for await (const event of await ask({ stream: true, ...asked }))
      pieces += event.type === "content_block_delta" && event.delta.type === "input_json_delta";
    return {
      whole: [whole.name, JSON.stringify(whole.input)],
      streamed: [final.content[0].name, JSON.stringify(final.content[0].input)],
      pieces,
      finish: final.stop_reason,
    };
  },

  async count_tokens() {
    const answer = await client.messages.countTokens({ model: "provided", messages: ASK });
    return { tokens: answer.input_tokens };
  },

  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    return { ids: ids.sort(), one: (await client.models.retrieve("m")).id };
  },

  async errors() {
    const once = client.withOptions({ maxRetries: 0 });
    const stranger = once.withOptions({ apiKey: "hr_nobody_knows" });
    return {
      400: await refused({}, mock("status=400"), once),
      401: await refused({}, {}, stranger),
      404: await refused({ model: "nothing" }, {}, once),
      429: await refused({}, mock("status=429, retry_after=7"), once),
      500: await refused({}, mock("status=500"), once),
    };
  },

  async breaks() {
    return {
      event: await broken("words=9, error_after=8"),
      cut: await broken("words=9, cut_after=8, cut_mid_event"),
    };
  },

  retries: () => refused({}, { ...mock("status=500"), maxRetries: 2 }),

  steered: () => refused({}, { ...mock("status=503"), maxRetries: 2 }),

  async waits() {
    const texts = [];
    for (let n = 0; n < 2; n++) texts.push((await ask({}, { maxRetries: 2 })).content[0].text);
    return { texts };
  },

  async abort() {
    let chunks = 0;
    for await (const _ of await ask({ stream: true }, mock("words=100000, gap=0.01")))
      if (++chunks === 3) break; // leaving the loop aborts the request
    return { chunks };
  },

  timeout: () => refused({}, { ...mock("hang"), maxRetries: 0, timeout: 500 }),

  async uploads() {
    const files = client.files;
    const made = await files.upload({
      file: await toFile(CONTENT, "notes.bin", { type: "application/octet-stream" }),
    });
    const back = Buffer.from(await (await files.download(made.id)).arrayBuffer());
    await files.delete(made.id);
    return { name: made.filename, bytes: made.size_bytes, same: digest(back) === digest(CONTENT) };
  },
};

const seen = await cases[name]();
console.log(JSON.stringify({ version: VERSION, ...seen }));
process.stdin.on("end", () => process.exit(0)).resume();
