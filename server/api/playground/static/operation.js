// @ts-check
// One call of the reference: what it takes, what it answers, and the form that sends it.

import { el } from "./dom.js";
import { fieldRow, fieldTable, inCode } from "./schema.js";
import { buildTrial } from "./trial.js";

/**
 * @param {import("./schema.js").Api} api
 * @param {import("./schema.js").Tag} tag
 * @param {import("./schema.js").Call} call
 * @returns {HTMLElement[]}
 */
export function buildCall(api, tag, call) {
  const { operation } = call;
  const texts = (operation.description ?? call.sentence).split("\n\n");
  return [
    el("p", { class: "crumbs" }, el("a", { href: "#", class: "back" }, "All calls"), ` ${tag.title}`),
    el("h2", { class: "call-title" }, el("span", { class: `method ${call.method}` }, call.method.toUpperCase()), " ", el("span", { class: "path" }, call.path)),
    ...texts.map((/** @type {string} */ text) => el("p", {}, ...inCode(text))),
    buildTrial(api, tag, call),
    ...parameters(api, operation),
    ...body(api, operation),
    el("h3", {}, "Answers"),
    el("div", { class: "answers" }, ...Object.entries(operation.responses).map(([status, each]) => answer(api, status, api.resolve(each)))),
  ];
}

/** @param {import("./schema.js").Api} api @param {any} operation @returns {HTMLElement[]} */
function parameters(api, operation) {
  const rows = (operation.parameters ?? []).map((/** @type {any} */ each) => {
    const text = [each.in, each.description ?? each.schema?.description].filter(Boolean).join(": ");
    return fieldRow(each.name, each.required, api.typeOf(each.schema), api.rangeOf(each.schema), each.schema?.default, text);
  });
  return rows.length ? [el("h3", {}, "Parameters"), fieldTable(rows)] : [];
}

/** @param {import("./schema.js").Api} api @param {any} operation @returns {HTMLElement[]} */
function body(api, operation) {
  const content = operation.requestBody?.content;
  if (!content) return [];
  const [schema] = Object.values(content).map((each) => each.schema);
  const types = Object.keys(content).flatMap((type, index) => [index ? " or " : "", el("code", {}, type)]);
  const table = Object.keys(api.resolve(schema).properties ?? {}).length ? [api.table(schema)] : [];
  return [el("h3", {}, "Body"), el("p", { class: "hint" }, ...types), ...table];
}

/** @param {import("./schema.js").Api} api @param {string} status @param {any} response @returns {HTMLElement} */
function answer(api, status, response) {
  const content = Object.entries(response.content ?? {});
  const head = [el("span", { class: `status ${kindOf(status)}` }, status), el("span", { class: "meaning" }, ...inCode(response.description ?? "")), el("span", { class: "hint" }, content.map(([type]) => type).join(", "))];
  const tables = content.flatMap(([, media]) => (media.schema ? forms(api, media.schema) : []));
  const headers = Object.entries(response.headers ?? {}).map(([name, each]) => el("p", { class: "hint" }, el("code", {}, name), `: ${each.description}`));
  if (!tables.length && !headers.length) return el("div", { class: "answer" }, ...head);
  return el("details", { class: "answer" }, el("summary", {}, ...head), ...headers, ...tables);
}

/** The tables of an answer that has one of several forms. @param {import("./schema.js").Api} api @param {any} node */
function forms(api, node) {
  const schema = api.resolve(node);
  const inner = api.nested(node);
  const isOne = inner.length === 1 && inner[0] === schema;
  return inner.map((each, index) => el("div", {}, isOne ? null : el("p", { class: "hint" }, schema.items ? "Each entry" : each.description ?? `Form ${index + 1}`), api.table(each)));
}

/** @param {string} status */
export function kindOf(status) {
  return { 2: "good", 4: "warn", 5: "bad" }[status[0]] ?? "none";
}
