/**
 * A request as code: what the page sends, for a terminal, the OpenAI SDK for Python and for JavaScript. A key
 * never gets into it: the code reads HEADRACE_KEY from its environment.
 *
 * @module
 */

/**
 * `base`: the address of the API with /v1; `keyed`: whether it asks for a key; `headers`: beyond the usual.
 * @typedef {{ base: string, keyed: boolean, headers: Record<string, string>,
 *   body: Record<string, any> }} Asked
 */

/** @param {Asked} asked @returns {string} */
export function curl({ base, keyed, headers, body }) {
  const lines = [`curl -N ${shell(`${base}/chat/completions`)}`, `-H 'Content-Type: application/json'`];
  if (keyed) lines.push(`-H "Authorization: Bearer $HEADRACE_KEY"`);
  for (const [name, value] of Object.entries(headers)) lines.push(`-H ${shell(`${name}: ${value}`)}`);
  lines.push(`-d ${shell(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

/** @param {string} text */
const shell = (text) => (/^[\w:/.@-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** @param {Asked} asked @returns {string} */
export function python({ base, keyed, headers, body }) {
  const extra = Object.keys(headers).length ? [["extra_headers", headers]] : [];
  const fields = [...Object.entries(body), ...extra].map(([name, value]) => `    ${name}=${pythonValue(value, 1)},`);
  const key = keyed ? `os.environ["HEADRACE_KEY"]` : `"any"`;
  const lines = [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key})`,
    `${body.stream ? "stream" : "answer"} = client.chat.completions.create(`,
    ...fields,
    ")",
  ];
  if (!body.stream) return [...lines, "print(answer.choices[0].message.content)"].join("\n");
  return [
    ...lines,
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].delta.content or "", end="", flush=True)`,
  ].join("\n");
}

/** JSON's strings and numbers are Python's as well. @param {unknown} value @param {number} depth @returns {string} */
function pythonValue(value, depth) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth + 1);
  if (Array.isArray(value)) {
    return `[\n${value.map((item) => `${pad}${pythonValue(item, depth + 1)},\n`).join("")}${"    ".repeat(depth)}]`;
  }
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonValue(item, depth + 1)}`).join(", ")}}`;
}

/** @param {Asked} asked @returns {string} */
export function javascript({ base, keyed, headers, body }) {
  const options = Object.keys(headers).length ? `, { headers: ${JSON.stringify(headers)} }` : "";
  const key = keyed ? "process.env.HEADRACE_KEY" : `"any"`;
  const lines = [
    `import OpenAI from "openai";`,
    "",
    `const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: ${key} });`,
    `const ${body.stream ? "stream" : "answer"} = await client.chat.completions.create(${JSON.stringify(body, null, 2)}${options});`,
  ];
  if (!body.stream) return [...lines, "console.log(answer.choices[0].message.content);"].join("\n");
  return [
    ...lines,
    "for await (const chunk of stream) {",
    `  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");`,
    "}",
  ].join("\n");
}
