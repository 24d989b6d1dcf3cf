// The openai package for Node does one case; prints one JSON line of what it saw.
//
//     node drive_openai.mjs BASE_URL KEY CASE REQUEST_ID
//
// It ends when its standard input does: until then its connections stay as the SDK left them.
import { createHash } from "node:crypto";
import OpenAI, { APIError, toFile } from "openai";
import { VERSION } from "openai/version";

const [baseURL, apiKey, name, requestId] = process.argv.slice(2);
const ASK = [{ role: "user", content: "one two three" }];
const TOOLS = [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }];
const CONTENT = Buffer.alloc(256 * 1200, Buffer.from([...Array(256).keys()]));
const client = new OpenAI({ baseURL, apiKey, defaultHeaders: { "x-request-id": requestId } });

const mock = (behaviour) => ({ headers: { "x-mock": behaviour } });
const digest = (bytes) => createHash("sha256").update(bytes).digest("hex");
const chat = (more = {}, options = {}, by = client) =>
  by.chat.completions.create({ model: "m", messages: ASK, ...more }, options);

// What an application reads from an SDK's exception.
const failure = (error) => ({
  class: error.constructor.name,
  message: error.message,
  ...(error instanceof APIError && {
    status: error.status,
    code: error.code,
    request_id: error.requestID,
    retry_after: error.headers?.get("retry-after"),
  }),
});

// A request that must not succeed.
async function refused(more, options, by = client) {
  const started = performance.now();
  try {
    await chat(more, options, by);
  } catch (error) {
    return { ...failure(error), elapsed_s: (performance.now() - started) / 1000 };
  }
  return { class: null };
}

// A stream that ends early; what came before it counts as delivered.
async function broken(behaviour) {
  let text = "";
  try {
    for await (const chunk of await chat({ stream: true }, mock(behaviour)))
      text += chunk.choices[0].delta.content ?? "";
  } catch (error) {
    return { text, ...failure(error) };
  }
  return { text, class: null };
}

const cases = {
  async whole() {
    const answer = await chat();
    return {
      text: answer.choices[0].message.content,
      finish: answer.choices[0].finish_reason,
      usage: [answer.usage.prompt_tokens, answer.usage.completion_tokens],
      request_id: answer._request_id,
    };
  },

  lingers: () => cases.stream("linger=0.05"),

  async stream(behaviour = "") {
    let text = "", finish = null;
    for await (const chunk of await chat({ stream: true }, mock(behaviour))) {
      text += chunk.choices[0].delta.content ?? "";
      finish = chunk.choices[0].finish_reason;
    }
    return { text, finish };
  },

  async usage() {
    let last;
    for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } }))
      last = chunk;
    if (last.choices.length) throw new Error("no usage chunk");
    return { usage: [last.usage.prompt_tokens, last.usage.completion_tokens] };
  },

  async tools() {
    const asked = { tools: TOOLS, tool_choice: "required" };
    const whole = (await chat(asked)).choices[0].message.tool_calls[0].function;
    let called = "", pieces = [], finish = null;
    for await (const chunk of await chat({ stream: true, ...asked })) {
      for (const call of chunk.choices[0].delta.tool_calls ?? []) {
        called = call.function.name ?? called;
        if (call.function.arguments) pieces.push(call.function.arguments);
      }
      finish = chunk.choices[0].finish_reason;
    }
    return {
      whole: [whole.name, whole.arguments],
      streamed: [called, pieces.join("")],
      pieces: pieces.length,
      finish,
    };
  },

  async responses() {
    const whole = await client.responses.create({ model: "m", input: "one two" });
    let streamed = "", last;
    for await (const event of await client.responses.create({ model: "m", input: "one", stream: true })) {
      if (event.type === "response.output_text.delta") streamed += event.delta;
      last = event;
    }
    const usage = last.response.usage;
    return {
      whole: whole.output_text,
      streamed,
      last: last.type,
      usage: [usage.input_tokens, usage.output_tokens],
    };
  },

  async embeddings() {
    const answer = await client.embeddings.create({ model: "m", input: ["one two", "three"] });
    return { vectors: answer.data.map((item) => [...item.embedding]) };
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
      event: await broken("words=9, error_after=5"),
      cut: await broken("words=9, cut_after=5, cut_mid_event"),
    };
  },

  retries: () => refused({}, { ...mock("status=500"), maxRetries: 2 }),

  steered: () => refused({}, { ...mock("status=503"), maxRetries: 2 }),

  async waits() {
    const texts = [];
    for (let n = 0; n < 2; n++) texts.push((await chat({}, { maxRetries: 2 })).choices[0].message.content);
    return { texts };
  },

  async abort() {
    let chunks = 0;
    for await (const _ of await chat({ stream: true }, mock("words=100000, gap=0.01")))
      if (++chunks === 3) break; // leaving the loop aborts the request
    return { chunks };
  },

  timeout: () => refused({}, { ...mock("hang"), maxRetries: 0, timeout: 500 }),

  async uploads() {
    const made = await client.files.create({ file: await toFile(CONTENT, "notes.bin"), purpose: "user_data" });
    const back = Buffer.from(await (await client.files.content(made.id)).arrayBuffer());
    await client.files.delete(made.id);
    return { name: made.filename, bytes: made.bytes, same: digest(back) === digest(CONTENT) };
  },

  async transcriptions() {
    const file = await toFile(CONTENT, "speech.wav", { type: "audio/wav" });
    return { text: (await client.audio.transcriptions.create({ model: "provided", file })).text };
  },
};

const seen = await cases[name]();
console.log(JSON.stringify({ version: VERSION, ...seen }));
process.stdin.on("end", () => process.exit(0)).resume();
