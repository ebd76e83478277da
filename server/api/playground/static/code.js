// @ts-check
// A job's request as code: curl, Python, JavaScript and PHP, in the dialects that this server has.
// The key is never in it; the code takes it from the environment.

import { newCanvas, toBlob, toDataUri } from "./dom.js";

export const LANGUAGES = ["curl", "Python", "JavaScript", "PHP"];
const PATHS = { native: "/api/jobs", V3: "/api/v3/inpaint", OpenAI: "/v1/images/edits" };

/** Names of V3 for our own. */
const V3_NAMES = {
  prompt: "prompt", negative_prompt: "negative_prompt", width: "width", height: "height", samples: "samples",
  num_inference_steps: "num_inference_steps", guidance_scale: "guidance_scale", strength: "strength", seed: "seed",
  scheduler: "scheduler", model: "model_id", webhook: "webhook", safety_check: "safety_checker",
};

/** A picture in a body: the file that holds it. */
class FileText {
  /** @param {string} name @param {string | null} dataUri */
  constructor(name, dataUri) {
    this.name = name;
    this.dataUri = dataUri;
  }
}

/**
 * @typedef {{url: string, header: string, json?: Record<string, any>, form?: Record<string, any>}} Call
 *   header: the key's header with `KEY` in place of the key
 */

/** @param {any} openapi @returns {string[]} */
export function dialectsIn(openapi) {
  return Object.entries(PATHS).filter(([, path]) => path in openapi.paths).map(([name]) => name);
}

/**
 * @param {any} entry
 * @param {string} dialect
 * @param {string} language
 * @returns {Promise<{text: string, note: string, mask: Blob}>} mask: as the code's `mask.png`
 */
export async function codeOf(entry, dialect, language) {
  const mask = dialect === "OpenAI" ? await maskWithHole(entry.mask) : entry.mask;
  const name = `picture.${entry.picture?.type.slice(6) ?? "png"}`;
  const picture = entry.url ?? new FileText(name, await toDataUri(entry.picture));
  const images = { picture, mask: new FileText("mask.png", await toDataUri(mask)) };
  const { call, note } = { native: nativeCall, V3: v3Call, OpenAI: openaiCall }[/** @type {"native"} */ (dialect)](entry, images);
  call.url = new URL(call.url.slice(1), document.baseURI).href;
  const write = { curl, Python: python, JavaScript: javascript, PHP: php }[/** @type {"curl"} */ (language)];
  return { text: write(call), note, mask };
}

/** OpenAI's masks: transparent is repainted. @param {Blob} file */
async function maskWithHole(file) {
  const bitmap = await createImageBitmap(file);
  const [canvas, context] = newCanvas(bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let index = 0; index < pixels.data.length; index += 4) {
    pixels.data[index + 3] = 255 - pixels.data[index];
    pixels.data[index] = pixels.data[index + 1] = pixels.data[index + 2] = 0;
  }
  context.putImageData(pixels, 0, 0);
  return toBlob(canvas);
}

/** @param {any} entry @param {any} images @returns {{call: Call, note: string}} */
function nativeCall({ fields }, { picture, mask }) {
  return { call: { url: PATHS.native, header: "X-API-Key: KEY", json: { ...fields, init_image: picture, mask_image: mask } }, note: "" };
}

/** @param {any} entry @param {any} images @returns {{call: Call, note: string}} */
function v3Call({ fields, typed }, { picture, mask }) {
  const given = { ...fields, ...typed };
  /** @type {Record<string, any>} */
  const json = { init_image: picture, mask_image: mask, enhance_prompt: typed ? "yes" : "no" };
  const left = [];
  for (const [name, value] of Object.entries(given)) {
    const own = /** @type {Record<string, string>} */ (V3_NAMES)[name];
    if (own) json[own] = typeof value === "boolean" ? (value ? "yes" : "no") : value;
    else left.push(name);
  }
  return { call: { url: PATHS.V3, header: "key: KEY", json }, note: lacking("V3", left) };
}

/**
 * This server's edits take our own names beside OpenAI's.
 * @param {any} entry @param {any} images @returns {{call: Call, note: string}}
 */
function openaiCall({ fields, url }, { picture, mask }) {
  const { prompt, samples, width, height, webhook, ...others } = fields;
  /** @type {Record<string, any>} */
  const form = { image: url ? new FileText("picture.png", null) : picture, mask, prompt, ...others };
  if (samples) form.n = samples;
  if (width && height) form.size = `${width}x${height}`;
  const left = [webhook && "webhook", !form.size && width && "width", !form.size && height && "height"];
  return { call: { url: PATHS.OpenAI, header: "Authorization: Bearer KEY", form }, note: lacking("OpenAI's API", left.filter(Boolean)) };
}

/** @param {string} api @param {string[]} names */
function lacking(api, names) {
  return names.length ? `${api} has no field for ${names.join(", ")}.` : "";
}

/** @param {string} text for a POSIX shell */
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** @param {Call} call */
function curl({ url, header, json, form }) {
  const head = `curl ${quoted(url)} \\\n  -H "${header.replace("KEY", "$INPAINT_KEY")}"`;
  if (form) {
    const parts = Object.entries(form).map(([name, value]) => ` \\\n  -F ${quoted(value instanceof FileText ? `${name}=@${value.name}` : `${name}=${value}`)}`);
    return head + parts.join("") + "\n";
  }
  const body = JSON.stringify(json, (_, value) => (value instanceof FileText ? value.dataUri : value), 2);
  return `${head} \\\n  -H 'Content-Type: application/json' --data-binary @- <<'JSON'\n${body}\nJSON\n`;
}

/**
 * A mapping as source code, with files as calls of a function `read`.
 * @param {Record<string, any>} values
 * @param {{entry: (name: string, value: string) => string, file: (name: string) => string, literal: (value: any) => string}} style
 */
function mapping(values, { entry, file, literal }) {
  return Object.entries(values).map(([name, value]) => entry(JSON.stringify(name), value instanceof FileText ? file(value.name) : literal(value))).join("");
}

/** @param {any} value */
const pythonLiteral = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value));

/** @param {Call} call */
function python({ url, header, json, form }) {
  const [name, value] = header.split(": ");
  const key = `{${JSON.stringify(name)}: ${value === "KEY" ? 'os.environ["INPAINT_KEY"]' : '"Bearer " + os.environ["INPAINT_KEY"]'}}`;
  const style = { entry: (/** @type {string} */ n, /** @type {string} */ v) => `    ${n}: ${v},\n`, literal: pythonLiteral };
  if (form) {
    const { files, others } = split(form);
    return `import os\n\nimport requests\n\nanswer = requests.post(${JSON.stringify(url)}, headers=${key}, files={\n${mapping(files, { ...style, file: (n) => `open(${JSON.stringify(n)}, "rb")` })}}, data={\n${mapping(others, { ...style, file: String })}})\nprint(answer.json())\n`;
  }
  return `import base64\nimport os\n\nimport requests\n\n\ndef read(path):\n    with open(path, "rb") as file:\n        return base64.b64encode(file.read()).decode()\n\n\nanswer = requests.post(${JSON.stringify(url)}, headers=${key}, json={\n${mapping(json ?? {}, { ...style, file: (n) => `read(${JSON.stringify(n)})` })}})\nprint(answer.json())\n`;
}

/** @param {Record<string, any>} form */
function split(form) {
  const entries = Object.entries(form);
  return {
    files: Object.fromEntries(entries.filter(([, value]) => value instanceof FileText)),
    others: Object.fromEntries(entries.filter(([, value]) => !(value instanceof FileText))),
  };
}

/** @param {Call} call */
function javascript({ url, header, json, form }) {
  const [name, value] = header.split(": ");
  const key = `${JSON.stringify(name)}: ${value === "KEY" ? "process.env.INPAINT_KEY" : "`Bearer ${process.env.INPAINT_KEY}`"}`;
  const end = `console.log(await answer.json());\n`;
  if (form) {
    const parts = mapping(form, {
      entry: (n, v) => `form.append(${n}, ${v});\n`,
      file: (n) => `new Blob([readFileSync(${JSON.stringify(n)})], { type: ${JSON.stringify(`image/${n.split(".")[1]}`)} }), ${JSON.stringify(n)}`,
      literal: (v) => JSON.stringify(String(v)),
    });
    return `import { readFileSync } from "node:fs";\n\nconst form = new FormData();\n${parts}const answer = await fetch(${JSON.stringify(url)}, {\n  method: "POST",\n  headers: { ${key} },\n  body: form,\n});\n${end}`;
  }
  const body = mapping(json ?? {}, { entry: (n, v) => `    ${n}: ${v},\n`, file: (n) => `read(${JSON.stringify(n)})`, literal: JSON.stringify });
  return `import { readFileSync } from "node:fs";\n\nconst read = (path) => readFileSync(path).toString("base64");\n\nconst answer = await fetch(${JSON.stringify(url)}, {\n  method: "POST",\n  headers: { ${key}, "Content-Type": "application/json" },\n  body: JSON.stringify({\n${body}  }),\n});\n${end}`;
}

/** @param {any} value */
const phpLiteral = (value) => (typeof value === "string" ? `'${value.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'` : JSON.stringify(value));

/** @param {Call} call */
function php({ url, header, json, form }) {
  const key = `'${header.replace("KEY", "")}' . getenv('INPAINT_KEY')`;
  const style = { entry: (/** @type {string} */ n, /** @type {string} */ v) => `    ${phpLiteral(JSON.parse(n))} => ${v},\n`, literal: phpLiteral };
  const fields = form
    ? `[\n${mapping(form, { ...style, file: (n) => `new CURLFile(${phpLiteral(n)})` })}]`
    : `json_encode([\n${mapping(json ?? {}, { ...style, file: (n) => `base64_encode(file_get_contents(${phpLiteral(n)}))` })}])`;
  const headers = form ? `[${key}]` : `[${key}, 'Content-Type: application/json']`;
  return `<?php\n$call = curl_init(${phpLiteral(url)});\ncurl_setopt($call, CURLOPT_RETURNTRANSFER, true);\ncurl_setopt($call, CURLOPT_HTTPHEADER, ${headers});\ncurl_setopt($call, CURLOPT_POSTFIELDS, ${fields});\nprint_r(json_decode(curl_exec($call), true));\n`;
}
