// @ts-check
// A job's request as code: curl, Python, JavaScript and PHP, in the dialects that this server has.
// The key is never in it; the code takes it from the environment. Each program prints the answer.
// They need nothing but their language: PHP's curl and Python's requests are often not installed.

import { newCanvas, toBlob, toDataUri } from "./dom.js";
import { quoted } from "./shell.js";

export const LANGUAGES = ["curl", "Python", "JavaScript", "PHP"];

/** @type {Record<string, {path: string, write: (entry: any, images: Images) => {call: Call, note: string}}>} */
const DIALECTS = {
  native: { path: "/api/jobs", write: nativeCall },
  V3: { path: "/api/v3/inpaint", write: v3Call },
  OpenAI: { path: "/v1/images/edits", write: openaiCall },
  A1111: { path: "/sdapi/v1/img2img", write: a1111Call },
  Replicate: { path: "/v1/predictions", write: replicateCall },
};

/** Names of V3 for our own. */
const V3_NAMES = {
  prompt: "prompt", negative_prompt: "negative_prompt", width: "width", height: "height", samples: "samples",
  num_inference_steps: "num_inference_steps", guidance_scale: "guidance_scale", strength: "strength", seed: "seed",
  scheduler: "scheduler", model: "model_id", webhook: "webhook", safety_check: "safety_checker",
};
const A1111_NAMES = {
  prompt: "prompt", negative_prompt: "negative_prompt", width: "width", height: "height", samples: "batch_size",
  num_inference_steps: "steps", guidance_scale: "cfg_scale", strength: "denoising_strength", seed: "seed",
  scheduler: "sampler_name", noise_spacing: "scheduler", mask_blur: "mask_blur", fill: "inpainting_fill",
  invert_mask: "inpainting_mask_invert", only_masked: "inpaint_full_res", only_masked_padding: "inpaint_full_res_padding",
};
/** Settings of A1111, which stand in an object of their own. */
const A1111_SETTINGS = { model: "sd_model_checkpoint", clip_skip: "CLIP_stop_at_last_layers", output_format: "samples_format", output_quality: "jpeg_quality" };
const A1111_FILLS = ["blur", "original", "noise", "zero"];
/** A1111's own defaults are others. */
const OUR_DEFAULTS = { steps: 20, cfg_scale: 7.5, denoising_strength: 0.7, mask_blur: 0, inpainting_fill: 1, inpaint_full_res: false, sampler_name: "Automatic" };
const REPLICATE_NAMES = {
  prompt: "prompt", negative_prompt: "negative_prompt", width: "width", height: "height", samples: "num_outputs",
  num_inference_steps: "num_inference_steps", guidance_scale: "guidance_scale", strength: "strength", seed: "seed",
  scheduler: "scheduler", output_format: "output_format", output_quality: "output_quality",
};

/** A picture in a body: the file that holds it. */
class FileText {
  /** @param {string} name @param {string | null} dataUri @param {boolean} isUri whether the body has a data URI, or base64 */
  constructor(name, dataUri, isUri = false) {
    this.name = name;
    this.dataUri = dataUri;
    this.isUri = isUri;
  }

  get head() {
    return this.isUri ? `data:image/${this.name.split(".")[1]};base64,` : "";
  }

  get uri() {
    return new FileText(this.name, this.dataUri, true);
  }
}

/**
 * @typedef {{picture: FileText | string, mask: FileText, size: {width: number, height: number} | null}} Images
 * @typedef {{url: string, headers: string[], json: Record<string, any>, form?: Record<string, any>}} Call
 *   headers: with `KEY` in place of the key. form: what curl sends in place of JSON
 */

/** @param {any} openapi @returns {string[]} */
export function dialectsIn(openapi) {
  return Object.keys(DIALECTS).filter((name) => DIALECTS[name].path in openapi.paths);
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
  const size = entry.picture ? await createImageBitmap(entry.picture) : null;
  const { call, note } = DIALECTS[dialect].write(entry, { picture, mask: new FileText("mask.png", await toDataUri(mask)), size });
  call.url = new URL(DIALECTS[dialect].path.slice(1), document.baseURI).href;
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

/** @param {any} entry @param {Images} images @returns {{call: Call, note: string}} */
function nativeCall({ fields }, { picture, mask }) {
  return { call: { url: "", headers: ["X-API-Key: KEY"], json: { ...fields, init_image: picture, mask_image: mask } }, note: "" };
}

/** @param {any} entry @param {Images} images @returns {{call: Call, note: string}} */
function v3Call({ fields, typed }, { picture, mask }) {
  const { json, left } = renamed({ ...fields, ...typed }, V3_NAMES, (_, value) => (typeof value === "boolean" ? (value ? "yes" : "no") : value));
  return {
    call: { url: "", headers: ["key: KEY"], json: { init_image: picture, mask_image: mask, enhance_prompt: typed ? "yes" : "no", ...json } },
    note: lacking("V3", left),
  };
}

/**
 * This server's edits take our own names beside OpenAI's.
 * @param {any} entry @param {Images} images @returns {{call: Call, note: string}}
 */
function openaiCall({ fields, url }, { picture, mask }) {
  const { prompt, samples, width, height, webhook, previews, ...others } = fields;
  /** @type {Record<string, any>} */
  const own = { prompt, response_format: "url", ...others };
  if (samples) own.n = samples;
  if (width && height) own.size = `${width}x${height}`;
  const left = [webhook && "webhook", !own.size && width && "width", !own.size && height && "height"];
  const image = typeof picture === "string" ? picture : picture.uri;
  return {
    call: {
      url: "", headers: ["Authorization: Bearer KEY"],
      json: { images: [{ image_url: image }], mask: { image_url: mask.uri }, ...own },
      form: { image: url ? new FileText("picture.png", null) : picture, mask, ...own },
    },
    note: lacking("OpenAI's API", left.filter(Boolean)),
  };
}

/** @param {any} entry @param {Images} images @returns {{call: Call, note: string}} */
function a1111Call({ fields }, { picture, mask, size }) {
  const { loras = [], previews, model, clip_skip, output_format, output_quality, ...others } = fields;
  const { json, left } = renamed(others, A1111_NAMES, (name, value) => {
    if (name === "fill") return A1111_FILLS.indexOf(value);
    return name === "invert_mask" ? Number(value) : value;
  });
  for (const { name, scale } of loras) json.prompt += ` <lora:${name}:${scale ?? 1}>`;
  const { json: settings } = renamed({ model, clip_skip, output_format, output_quality }, A1111_SETTINGS, (name, value) => (name === "clip_skip" ? value + 1 : value));
  const sides = size ? { width: size.width, height: size.height } : {};
  const override = Object.keys(settings).length ? { override_settings: settings } : {};
  return {
    call: { url: "", headers: ["X-API-Key: KEY"], json: { init_images: [picture], mask, ...sides, ...OUR_DEFAULTS, ...json, ...override } },
    note: lacking("A1111's API", left),
  };
}

/** @param {any} entry @param {Images} images @returns {{call: Call, note: string}} */
function replicateCall({ fields, answer }, { picture, mask }) {
  const { safety_check: isChecked = true, webhook, model = answer?.receipt?.model?.id ?? "default", previews, ...others } = fields;
  const { json, left } = renamed({ num_inference_steps: 20, strength: 0.7, ...others }, REPLICATE_NAMES, (_, value) => value);
  if (!isChecked) json.disable_safety_checker = true;
  const input = { image: typeof picture === "string" ? picture : picture.uri, mask: mask.uri, ...json };
  const version = /^[\w.-]+\/[\w.-]+$/.test(model) ? model : `inpaint-server/${model.split("/").pop()}`;
  return {
    call: { url: "", headers: ["Authorization: Bearer KEY", "Prefer: wait"], json: { version, input, ...(webhook ? { webhook } : {}) } },
    note: lacking("Replicate's API", left),
  };
}

/**
 * Fields under a dialect's names, and those that it lacks.
 * @param {Record<string, any>} fields
 * @param {Record<string, string>} names
 * @param {(name: string, value: any) => any} convert
 */
function renamed(fields, names, convert) {
  /** @type {Record<string, any>} */
  const json = {};
  const left = [];
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined) continue;
    if (names[name]) json[names[name]] = convert(name, value);
    else left.push(name);
  }
  return { json, left };
}

/** @param {string} api @param {string[]} names */
function lacking(api, names) {
  return names.length ? `${api} has no field for ${names.join(", ")}.` : "";
}

/**
 * A value as source code.
 * @typedef {{literal: (value: any) => string, file: (file: FileText) => string, entry: (name: string, value: string) => string, open: string, close: string}} Style
 * @param {any} value
 * @param {Style} style
 * @param {string} indent of the line that the value begins on
 * @returns {string}
 */
function source(value, style, indent = "") {
  if (value instanceof FileText) return style.file(value);
  if (value === null || typeof value !== "object") return style.literal(value);
  const inner = `${indent}    `;
  if (Array.isArray(value)) return `[${value.map((each) => source(each, style, indent)).join(", ")}]`;
  const entries = Object.entries(value).map(([name, each]) => `${inner}${style.entry(name, source(each, style, inner))},\n`);
  return `${style.open}\n${entries.join("")}${indent}${style.close}`;
}

/** @param {Call} call */
function curl({ url, headers, json, form }) {
  const lines = [`curl ${quoted(url)}`, ...headers.map((each) => `-H "${each.replace("KEY", "$INPAINT_KEY")}"`)];
  if (form) {
    lines.push(...Object.entries(form).map(([name, value]) => (value instanceof FileText ? `-F ${quoted(`${name}=@${value.name}`)}` : `--form-string ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`)));
    return `${lines.join(" \\\n  ")}\n`;
  }
  const body = JSON.stringify(json, (_, value) => (value instanceof FileText ? value.dataUri : value), 2);
  return `${[...lines, "-H 'Content-Type: application/json'", "--data-binary @-"].join(" \\\n  ")} <<'JSON'\n${body}\nJSON\n`;
}

/** @type {Style} */
const PYTHON = {
  literal: (value) => (typeof value === "boolean" ? (value ? "True" : "False") : value === null ? "None" : JSON.stringify(value)),
  file: ({ name, head }) => `${head ? `"${head}" + ` : ""}read(${JSON.stringify(name)})`,
  entry: (name, value) => `${JSON.stringify(name)}: ${value}`,
  open: "{",
  close: "}",
};

/** A header's name and its value as a sum of texts. @param {string} header @param {string} key @param {string} plus */
function headerParts(header, key, plus) {
  const [name, value] = header.split(": ");
  const [before, after] = value.split("KEY");
  return [name, after === undefined ? JSON.stringify(value) : [before && JSON.stringify(before), key].filter(Boolean).join(plus)];
}

/** @param {Call} call */
function python({ url, headers, json }) {
  const lines = [...headers, "Content-Type: application/json"].map((each) => headerParts(each, 'os.environ.get("INPAINT_KEY", "")', " + "));
  return `import base64
import json
import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def read(path):
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode()


headers = {
${lines.map(([name, value]) => `    ${JSON.stringify(name)}: ${value},\n`).join("")}}
body = ${source(json, PYTHON)}
call = Request(${JSON.stringify(url)}, json.dumps(body).encode(), headers)
try:
    with urlopen(call) as answer:
        print(answer.read().decode())
except HTTPError as error:
    print(error.read().decode())
`;
}

/** @type {Style} */
const JAVASCRIPT = {
  literal: (value) => JSON.stringify(value),
  file: ({ name, head }) => `${head ? `"${head}" + ` : ""}read(${JSON.stringify(name)})`,
  entry: (name, value) => `${name}: ${value}`,
  open: "{",
  close: "}",
};

/** @param {Call} call */
function javascript({ url, headers, json }) {
  const lines = [...headers, "Content-Type: application/json"].map((each) => headerParts(each, '(process.env.INPAINT_KEY ?? "")', " + "));
  return `import { readFileSync } from "node:fs";

const read = (path) => readFileSync(path).toString("base64");

const headers = {
${lines.map(([name, value]) => `    ${JSON.stringify(name)}: ${value},\n`).join("")}};
const body = ${source(json, JAVASCRIPT)};
const answer = await fetch(${JSON.stringify(url)}, { method: "POST", headers, body: JSON.stringify(body) });
console.log(await answer.text());
`;
}

/** @param {any} value */
const phpLiteral = (value) => (typeof value === "string" ? `'${value.replaceAll("\\", "\\\\").replaceAll("'", "\\'")}'` : JSON.stringify(value));

/** @type {Style} */
const PHP = {
  literal: phpLiteral,
  file: ({ name, head }) => `${head ? `'${head}' . ` : ""}base64_encode(file_get_contents(${phpLiteral(name)}))`,
  entry: (name, value) => `${phpLiteral(name)} => ${value}`,
  open: "[",
  close: "]",
};

/** @param {Call} call */
function php({ url, headers, json }) {
  const lines = headers.map((each) => (each.includes("KEY") ? `${phpLiteral(each.replace("KEY", ""))} . getenv('INPAINT_KEY')` : phpLiteral(each)));
  return `<?php
$body = ${source(json, PHP)};
$context = stream_context_create(['http' => [
    'method' => 'POST',
    'header' => [${["'Content-Type: application/json'", ...lines].join(", ")}],
    'content' => json_encode($body),
    'timeout' => 600,
    'ignore_errors' => true, // the answer says what is wrong
]]);
echo file_get_contents(${phpLiteral(url)}, false, $context), "\\n";
`;
}
