// @ts-check
// The form that sends a call from the page: parameters, a body to edit, pictures, the answer.

import { block, shortened } from "./block.js";
import { announce, button, el, toDataUri } from "./dom.js";
import { askForKey } from "./key.js";
import { curlOf, findPictures, isDataUri, requestOf, withPicture } from "./request.js";
import { storedKey } from "./server.js";

const SHOWN_HEADERS = ["Content-Type", "Location", "Retry-After", "X-Request-ID", "X-Seed", "X-Warnings", "X-Ignored-Fields", "Idempotency-Replayed"];
const KEY_REFUSED = 401;

/** The newest answer's id, which calls about a job or a file take. */
const newest = { id: "" };

class Trial {
  /**
   * @param {import("./schema.js").Api} api
   * @param {import("./schema.js").Tag} tag
   * @param {import("./schema.js").Call} call
   */
  constructor(api, tag, call) {
    this.api = api;
    this.tag = tag;
    this.call = call;
    this.content = call.operation.requestBody?.content ?? {};
    /** @type {AbortController | null} */
    this.running = null;
    this.parameters = (call.operation.parameters ?? []).map((/** @type {any} */ each) => ({ ...each, input: parameterInput(each) }));
    this.mediaType = el("select", { "aria-label": "Form of the body", onchange: () => this.fill() },
      ...Object.keys(this.content).map((type) => el("option", { value: type }, type)));
    this.example = el("select", { "aria-label": "Example", onchange: () => this.fill() });
    this.body = el("textarea", { class: "json", spellcheck: false, "aria-label": "Body as JSON", wrap: "off", oninput: () => this.show() });
    this.pictures = el("div", { class: "pictures" });
    this.problem = el("p", { class: "error" });
    this.curl = el("div", {});
    this.sendButton = el("button", { type: "submit", class: "primary" }, "Send ", el("kbd", {}, "Ctrl Enter"));
    this.stopButton = button("Stop waiting", () => this.running?.abort(), { hidden: true });
    this.answer = el("section", { class: "trial-answer", "aria-label": "Answer" });
  }

  /** @returns {HTMLElement} */
  build() {
    const rows = this.parameters.map((/** @type {any} */ each) => el("label", { class: "parameter" }, el("code", {}, each.name), each.input));
    const isBody = Object.keys(this.content).length > 0;
    const head = el("div", { class: "bar" }, el("h3", {}, "Try it"), isBody ? this.example : null, Object.keys(this.content).length > 1 ? this.mediaType : null);
    const form = el("form", { class: "trial", novalidate: true, onsubmit: (/** @type {Event} */ event) => this.send(event) },
      head, ...rows, ...(isBody ? [this.body, this.pictures] : []), this.problem,
      el("div", { class: "row" }, this.sendButton, this.stopButton),
      el("details", { class: "curl" }, el("summary", {}, "The same with curl"), this.curl));
    form.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "Enter") this.send(event);
    });
    form.addEventListener("input", () => this.show());
    this.fill();
    return el("div", { class: "trial-box" }, form, this.answer);
  }

  get media() {
    return this.content[this.mediaType.value];
  }

  /** Write the chosen example into the form. */
  fill() {
    if (this.media) {
      const examples = this.api.examples(this.media);
      if (this.example.options.length !== examples.length) {
        this.example.replaceChildren(...examples.map(([name]) => el("option", { value: name }, name.replace(/^[^_]+_/, "").replaceAll("_", " "))));
      }
      this.example.hidden = examples.length < 2;
      const value = examples.find(([name]) => name === this.example.value)?.[1] ?? this.api.skeleton(this.media.schema);
      if ("request_id" in value && newest.id) value.request_id = newest.id;
      this.write(value);
    }
    this.show();
  }

  /** @param {any} value */
  write(value) {
    this.body.value = JSON.stringify(value, null, 2);
    this.body.rows = Math.min(18, this.body.value.split("\n").length + 1);
  }

  /** The body as a value. @throws {SyntaxError} */
  read() {
    return this.media ? JSON.parse(this.body.value || "{}") : undefined;
  }

  /** Show what belongs to the form's present content: pictures, what is wrong, the curl command. */
  show() {
    this.problem.textContent = "";
    let value;
    try {
      value = this.read();
    } catch (error) {
      this.problem.textContent = `This is not JSON: ${/** @type {Error} */ (error).message}.`;
    }
    this.sendButton.disabled = Boolean(this.problem.textContent) || Boolean(this.running);
    if (this.problem.textContent) return;
    this.pictures.replaceChildren(...findPictures(value).filter(({ src }) => isDataUri(src)).map((each) => this.pictureRow(each)));
    this.curl.replaceChildren(block(curlOf(this.request(value))));
  }

  /** @param {any} value */
  request(value) {
    return requestOf(this.call, this.parameters.map((/** @type {any} */ each) => ({ name: each.name, in: each.in, value: each.input.value })), this.mediaType.value, this.media, value);
  }

  /** @param {{path: (string | number)[], src: string}} picture */
  pictureRow({ path, src }) {
    const name = path.filter((each) => typeof each === "string").join(".");
    const file = el("input", {
      type: "file", accept: "image/*", class: "hidden", tabindex: -1, "aria-label": `File for ${name}`,
      onchange: async () => {
        this.write(withPicture(this.read(), path, await toDataUri(file.files[0])));
        this.show();
      },
    });
    return el("div", { class: "picture" }, el("img", { src, alt: `Picture of ${name}`, width: 72, height: 72 }),
      el("div", {}, el("code", {}, name), button("Choose a file", () => file.click()), file));
  }

  /** @param {Event} event */
  async send(event) {
    event.preventDefault();
    if (this.sendButton.disabled) return;
    const request = this.request(this.read());
    const missing = this.parameters.find((/** @type {any} */ each) => each.required && !each.input.value);
    if (missing) {
      this.problem.textContent = `Enter ${missing.name} first.`;
      return missing.input.focus();
    }
    this.running = new AbortController();
    this.stopButton.hidden = false;
    this.show();
    this.answer.replaceChildren(el("p", { class: "hint" }, "Waiting for the answer…"));
    const began = performance.now();
    try {
      await this.showAnswer(await this.fetch(request), began);
    } catch (error) {
      const isStopped = error instanceof DOMException && error.name === "AbortError";
      this.fail(isStopped ? "You stopped waiting." : "The server does not answer. Is it running?");
    } finally {
      this.running = null;
      this.stopButton.hidden = true;
      this.show();
    }
  }

  /** @param {ReturnType<requestOf>} request */
  fetch({ url, method, headers, body }) {
    const key = storedKey();
    // Without `omit`, Chromium asks for a name and a password of its own where A1111's calls refuse a key.
    return fetch(url, { method, body, headers: { ...headers, ...(key ? { "X-API-Key": key } : {}) }, signal: this.running?.signal, credentials: "omit", cache: "no-store" });
  }

  /** @param {string} text */
  fail(text) {
    this.answer.replaceChildren(el("p", { class: "error" }, text));
    announce(text);
  }

  /** @param {Response} answer @param {number} began */
  async showAnswer(answer, began) {
    const type = answer.headers.get("Content-Type") ?? "";
    const shown = el("div", { class: "content" });
    const line = el("p", { class: "facts" });
    const headers = SHOWN_HEADERS.filter((name) => answer.headers.has(name)).map((name) => el("div", {}, el("dt", {}, name), el("dd", {}, answer.headers.get(name))));
    this.answer.replaceChildren(line, el("dl", { class: "headers" }, ...headers), shown);
    let size = 0;
    if (type.startsWith("image/")) size = await showFile(answer, shown);
    else if (type.startsWith("text/event-stream")) size = await showStream(answer, shown);
    else size = await this.showText(answer, shown);
    const time = `${((performance.now() - began) / 1000).toFixed(2)} s`;
    line.replaceChildren(el("strong", { class: `status ${answer.ok ? "good" : "bad"}` }, String(answer.status)), el("span", {}, answer.statusText), el("span", {}, time), el("span", {}, sizeText(size)));
    this.answer.dataset.status = String(answer.status);
    if (answer.status === KEY_REFUSED) {
      const text = storedKey() ? "This key is unknown, expired or revoked." : "This call needs an API key.";
      shown.prepend(el("p", { class: "error" }, text, " ", button("Enter a key", () => askForKey(false))));
      askForKey(true);
    }
    announce(`Answer ${answer.status} after ${time}.`);
  }

  /** @param {Response} answer @param {HTMLElement} shown */
  async showText(answer, shown) {
    const text = await answer.text();
    let value;
    try {
      value = JSON.parse(text);
    } catch {
      shown.append(text ? block(text) : el("p", { class: "hint" }, "The answer has no body."));
      return text.length;
    }
    if (value?.id !== undefined) newest.id = String(value.id);
    shown.append(...this.next(value), pictureStrip(value), block(JSON.stringify(value, null, 2)));
    return text.length;
  }

  /** A link to the call that reads what an answer is about. @param {any} value @returns {HTMLElement[]} */
  next(value) {
    if (!value?.id || !/^(get|post)\/(api|v1)/.test(this.call.id) || this.call.path.includes("_id}")) return [];
    const reader = this.tag.calls.find((each) => /\{(job|prediction|file)_id\}$/.test(each.path) && each.path.startsWith(this.call.path.replace(/\/(inpaint|img2img|text2img|image-to-image|text-to-image)$/, "")));
    return reader ? [el("p", {}, el("a", { href: `#${reader.id}` }, `${reader.method.toUpperCase()} ${reader.path}`), ` tells how ${value.id} stands.`)] : [];
  }
}

/** @param {any} parameter @returns {any} */
function parameterInput({ name, required, schema, in: place }) {
  const choices = schema?.enum ?? schema?.anyOf?.find((/** @type {any} */ each) => each.enum)?.enum;
  if (choices) return el("select", {}, ...["", ...choices].map((each) => el("option", { value: each }, each)));
  const known = { owner: "inpaint-server", name: "builtin" };
  const isId = /_id$/.test(name) && place === "path";
  const value = place === "path" ? (isId ? newest.id : /** @type {any} */ (known)[name] ?? "") : schema?.default ?? "";
  return el("input", { value, placeholder: required ? "required" : schema?.examples?.[0] ?? "", autocomplete: "off", spellcheck: false });
}

/** @param {any} value @returns {HTMLElement} */
function pictureStrip(value) {
  return el("div", { class: "strip" }, ...findPictures(value).map(({ path, src }) => el("img", { src, alt: `Picture in ${path.join(".")}` })));
}

/** @param {Response} answer @param {HTMLElement} shown */
async function showFile(answer, shown) {
  const blob = await answer.blob();
  shown.append(el("div", { class: "strip" }, el("img", { src: await toDataUri(blob), alt: "The answer's picture" })));
  return blob.size;
}

/** Events as they come. @param {Response} answer @param {HTMLElement} shown */
async function showStream(answer, shown) {
  const lines = el("pre", { tabindex: 0, class: "events" });
  shown.append(lines);
  const reader = /** @type {ReadableStream<Uint8Array>} */ (answer.body).pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
    lines.textContent = shortened(text);
    lines.scrollTop = lines.scrollHeight;
  }
  const data = [...text.matchAll(/^data: ?(.*)$/gm)].map((each) => JSON.parse(each[1]));
  shown.prepend(pictureStrip(data));
  return text.length;
}

/** @param {number} bytes */
function sizeText(bytes) {
  return bytes < 1024 ? `${bytes} bytes` : `${Math.round(bytes / 1024)} kB`;
}

/**
 * @param {import("./schema.js").Api} api
 * @param {import("./schema.js").Tag} tag
 * @param {import("./schema.js").Call} call
 * @returns {HTMLElement}
 */
export function buildTrial(api, tag, call) {
  return new Trial(api, tag, call).build();
}
