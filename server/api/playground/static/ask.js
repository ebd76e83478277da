// @ts-check
// The form. Ranges, defaults and choices come from the server's own description of `POST /api/jobs`;
// a field that this page has no label for appears below "Advanced" under its own name.

import { announce, byId, el } from "./dom.js";

const LABELS = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  samples: "Samples",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  strength: "Strength",
  seed: "Seed",
  width: "Width",
  height: "Height",
  only_masked: "Only masked",
  only_masked_padding: "Padding around the mask",
  mask_blur: "Mask blur",
  mask_grow: "Grow the mask",
  soft_mask: "Soft mask",
  invert_mask: "Invert the mask",
  match_colours: "Match colours",
  fill: "Fill under the mask",
  scheduler: "Scheduler",
  noise_spacing: "Noise spacing",
  guidance_end: "Guidance until (share)",
  clip_skip: "CLIP skip",
  safety_check: "Safety check",
  model: "Model",
  flagged_as: "Flagged pictures become",
  output_format: "File format",
  output_quality: "File quality",
  deadline_s: "Needed within (s)",
  webhook: "Webhook URL",
  track_id: "Track id",
};
const SHOWN_FIRST = ["prompt", "negative_prompt", "samples", "num_inference_steps", "strength", "guidance_scale", "width", "height", "seed"];
/** What the stage and the page itself fill in, or what a form cannot show. */
const NOT_IN_FORM = ["init_image", "mask_image", "extend", "previews", "loras"];
const PLACEHOLDERS = { seed: "random", width: "from picture", height: "from picture", webhook: "none", track_id: "none", deadline_s: "any time" };
const FAMILIES = { sd15: "Stable Diffusion 1.x", sd2: "Stable Diffusion 2.x", sdxl: "Stable Diffusion XL" };

/**
 * @typedef {{name: string, schema: any, input: any, error: HTMLElement}} FormField
 * @typedef {{family: keyof typeof FAMILIES | null, is_inpainting: boolean, native_px: number | null,
 *   has_safety_checker: boolean, licence: string | null}} Traits
 * @typedef {{model: string, models: string[], traits: Record<string, Traits | null>, loras: string[],
 *   public_url: string, enhance: {suffix: string, negative_list: string}}} Facts
 */

export class Ask {
  /**
   * @param {any} openapi
   * @param {Facts} facts
   */
  constructor(openapi, facts) {
    this.facts = facts;
    /** @type {Map<string, FormField>} */
    this.fields = new Map();
    const body = openapi.paths["/api/jobs"].post.requestBody.content["application/json"].schema;
    byId("fields").replaceChildren();
    byId("more-fields").replaceChildren();
    const names = Object.keys(body.properties).filter((name) => !NOT_IN_FORM.includes(name));
    const known = Object.keys(LABELS).filter((name) => names.includes(name));
    for (const name of [...known, ...names.filter((each) => !known.includes(each))]) {
      const field = this.build(name, plainSchema(body.properties[name]));
      const isFirst = SHOWN_FIRST.includes(name) || (name === "model" && facts.models.length > 1);
      if (field) byId(isFirst ? "fields" : "more-fields").append(field);
    }
    this.addLoras(body.properties.loras);
    this.addEnhance();
    this.showModel();
  }

  /** A number for each LoRA on offer; an empty one leaves it out. @param {any} schema */
  addLoras(schema) {
    const { minimum, maximum } = schema.items.properties.scale;
    /** @type {Map<string, any>} */
    this.loras = new Map(this.facts.loras.map((name) => [name, el("input", { type: "number", min: minimum, max: maximum, step: 0.05, placeholder: "off" })]));
    if (!this.loras.size) return;
    const rows = [...this.loras].map(([name, input]) => el("label", { class: "lora" }, el("span", {}, name), input));
    byId("more-fields").append(el("fieldset", { class: "field field-loras", title: schema.description }, el("legend", { class: "label" }, "LoRAs and their scales"), ...rows));
  }

  /** @param {string} name @param {any} schema @returns {HTMLElement | null} */
  build(name, schema) {
    const input = inputFor(name, schema, this.facts);
    if (!input) return null;
    const label = /** @type {Record<string, string>} */ (LABELS)[name] ?? name.replaceAll("_", " ");
    const error = el("span", { class: "error", id: `error-${name}` });
    input.id = `field-${name}`;
    input.name = name;
    input.title = schema.description ?? "";
    input.setAttribute("aria-describedby", error.id);
    this.fields.set(name, { name, schema, input, error });
    const isCheck = input.type === "checkbox";
    const output = input.type === "range" ? el("output", { for: input.id }, input.value) : null;
    if (output) input.addEventListener("input", () => (output.textContent = input.value));
    if (name === "model") input.addEventListener("change", () => this.showModel());
    const text = el("span", { class: "label" }, label, output);
    return el("label", { class: `field ${isCheck ? "check" : ""} field-${name}` }, ...(isCheck ? [input, text] : [text, input]), error);
  }

  addEnhance() {
    const { suffix, negative_list: negative } = this.facts.enhance;
    if (!suffix && !negative) return;
    this.enhance = el("input", { type: "checkbox", id: "enhance" });
    this.preview = el("p", { class: "enhanced", id: "enhanced", hidden: true, tabindex: 0 });
    const label = el("label", { class: "field check field-enhance", title: "The words that V3 adds for enhance_prompt" }, this.enhance, el("span", { class: "label" }, "Enhance prompt"));
    byId("fields").querySelector(".field-negative_prompt")?.after(label, this.preview);
    for (const input of [this.enhance, this.input("prompt"), this.input("negative_prompt")]) {
      input.addEventListener("input", () => this.showEnhanced());
    }
  }

  showEnhanced() {
    this.preview.hidden = !this.enhance.checked;
    const { prompt, negative_prompt: negative } = this.read();
    this.preview.replaceChildren(el("b", {}, "Sent: "), prompt, el("br"), el("b", {}, "Negative: "), negative ?? "");
  }

  showModel() {
    const model = this.fields.has("model") ? this.input("model").value || this.facts.model : this.facts.model;
    byId("model-facts").replaceChildren(el("b", {}, model), ...(model === "builtin" ? builtinFacts() : modelFacts(this.facts.traits[model] ?? null)));
  }

  /** @param {string} name @returns {any} */
  input(name) {
    return this.fields.get(name)?.input;
  }

  /** What is sent: every field that is not left at its default. @returns {Record<string, any>} */
  read() {
    /** @type {Record<string, any>} */
    const values = {};
    for (const { name, schema, input } of this.fields.values()) {
      const value = valueOf(input, schema);
      if (value !== null && value !== (schema.default ?? null)) values[name] = value;
    }
    values.prompt ??= "";
    const loras = [...this.loras].filter(([, input]) => input.value !== "").map(([name, input]) => ({ name, scale: Number(input.value) }));
    if (loras.length) values.loras = loras;
    if (!this.enhance?.checked) return values;
    const { suffix, negative_list: negative } = this.facts.enhance;
    return { ...values, prompt: `${values.prompt} ${suffix}`, negative_prompt: `${values.negative_prompt ?? ""} ${negative}` };
  }

  /** The prompts as typed, where they are enhanced before they are sent; else null. */
  typed() {
    if (!this.enhance?.checked) return null;
    return { prompt: this.input("prompt").value, negative_prompt: this.input("negative_prompt").value };
  }

  /** @param {Record<string, any>} values all other fields get their defaults @param {{prompt: string, negative_prompt: string} | null} typed */
  write(values, typed = null) {
    for (const { name, schema, input } of this.fields.values()) {
      const value = (typed ? { ...values, ...typed } : values)[name] ?? schema.default ?? null;
      if (input.type === "checkbox") input.checked = Boolean(value);
      else input.value = value === null ? "" : String(value);
      input.dispatchEvent(new Event("input"));
    }
    for (const [name, input] of this.loras) {
      input.value = values.loras?.find((/** @type {any} */ each) => each.name === name)?.scale ?? "";
    }
    if (this.enhance) {
      this.enhance.checked = typed !== null;
      this.showEnhanced();
    }
    this.showModel();
  }

  /** @param {string} name @param {any} value */
  set(name, value) {
    const input = this.input(name);
    if (!input) return;
    input.value = String(value);
    input.dispatchEvent(new Event("input"));
  }

  /** Show the server's word on each field. @param {{field: string, message: string}[]} errors @returns {string[]} those of no field */
  showErrors(errors) {
    const others = [];
    for (const { error, input } of this.fields.values()) {
      error.textContent = "";
      input.removeAttribute("aria-invalid");
    }
    for (const { field, message } of errors) {
      const own = this.fields.get(field);
      if (!own) {
        others.push(`${field} ${message}.`);
        continue;
      }
      own.error.textContent = message;
      own.input.setAttribute("aria-invalid", "true");
      own.input.closest("details")?.setAttribute("open", "");
      announce(`${field} ${message}`);
    }
    return others;
  }
}

function builtinFacts() {
  return [
    el("p", {}, "Paints coloured shapes, such as “a red circle” or “a green star”, and without a prompt goes on with what is around the mask. Load a real checkpoint for anything else:"),
    el("code", {}, "inpaint-server serve --model sd15-inpainting"),
  ];
}

/** What a checkpoint can and cannot do. @param {Traits | null} traits null where this server's machine lacks its files */
function modelFacts(traits) {
  if (!traits) return [el("p", {}, "This server does not have the model's files yet, so its properties are not known here.")];
  const { family, is_inpainting: isInpainting, native_px: side, has_safety_checker: hasChecker, licence } = traits;
  const lines = [
    `${family ? FAMILIES[family] : "Of no published size"}, ${isInpainting ? "made for inpainting" : "not made for inpainting"}.`,
    isInpainting
      ? "It sees the picture around the mask (9 channels)."
      : "It was trained without masks (4 channels): new parts may fit in less well, and a strength below 1 helps.",
    side ? `Best near ${side}×${side} pixels; the masked part of a larger picture with “Only masked”.` : null,
    hasChecker ? "A safety checker examines the results." : "There is no safety checker: results are not checked.",
    licence ? `Licence: ${licence}.` : null,
  ];
  return [el("ul", {}, ...lines.filter((each) => each !== null).map((each) => el("li", {}, each)))];
}

/** A schema without its null. @param {any} schema */
function plainSchema(schema) {
  const choices = schema.anyOf?.filter((/** @type {any} */ each) => each.type !== "null");
  return choices ? { ...schema, ...choices[0], isNullable: true, description: schema.description ?? choices[0].description } : schema;
}

/** @param {string} name @param {any} schema @param {{models: string[]}} facts @returns {any} */
function inputFor(name, schema, facts) {
  if (name === "model") return select(facts.models, "server's own");
  if (schema.enum) return select(schema.enum, schema.isNullable ? "model's own" : null, schema.default);
  if (schema.type === "boolean") return el("input", { type: "checkbox", checked: Boolean(schema.default) });
  if (name.endsWith("prompt")) return el("textarea", { rows: name === "prompt" ? 3 : 2, maxLength: schema.maxLength, placeholder: name === "prompt" ? "empty: the surroundings go on" : "" });
  const placeholder = /** @type {Record<string, string>} */ (PLACEHOLDERS)[name] ?? "";
  if (schema.type === "string") return el("input", { type: schema.format === "uri" ? "url" : "text", placeholder });
  if (!["integer", "number"].includes(schema.type)) return null;
  const step = schema.multipleOf ?? (schema.type === "integer" ? 1 : "any");
  const bounds = { min: schema.minimum, max: schema.maximum };
  const isRange = !schema.isNullable && schema.maximum - schema.minimum <= 300;
  if (!isRange) return el("input", { type: "number", step, placeholder, value: schema.default ?? "", ...bounds });
  // A fine step that still reaches both ends: ranges such as 0.001 to 1 have odd beginnings.
  return el("input", { type: "range", ...bounds, step: step === "any" ? (schema.maximum <= 1 ? 0.001 : 0.1) : step, value: schema.default });
}

/** @param {string[]} choices @param {string | null} none @param {string} [chosen] */
function select(choices, none, chosen) {
  const options = choices.map((each) => el("option", { value: each, selected: each === chosen }, each.replace(/Scheduler$/, "")));
  return el("select", {}, ...(none === null ? [] : [el("option", { value: "" }, none)]), ...options);
}

/** @param {any} input @param {any} schema @returns {any} null where the field is left open */
function valueOf(input, schema) {
  if (input.type === "checkbox") return input.checked;
  if (input.value === "") return schema.isNullable ? null : (schema.default ?? null);
  return ["integer", "number"].includes(schema.type) ? Number(input.value) : input.value;
}
