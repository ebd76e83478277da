// @ts-check
// Reads OpenAPI's document: calls by tag, schemas as texts and tables.

import { el } from "./dom.js";

const METHODS = ["get", "post", "put", "delete"];

/**
 * @typedef {{id: string, method: string, path: string, operation: any, sentence: string}} Call
 * @typedef {{name: string, title: string, text: string, calls: Call[]}} Tag
 */

export class Api {
  /** @param {any} document */
  constructor(document) {
    this.document = document;
    /** @type {Tag[]} */
    this.tags = document.tags.map((/** @type {any} */ tag) => ({
      name: tag.name, title: tag["x-displayName"] ?? tag.name, text: tag.description, calls: [],
    }));
    for (const [path, methods] of Object.entries(document.paths)) {
      for (const method of Object.keys(methods)) if (METHODS.includes(method)) this.add(path, method, methods[method]);
    }
  }

  /** @param {string} path @param {string} method @param {any} operation */
  add(path, method, operation) {
    const sentence = (operation.description ?? operation.summary ?? "").split("\n")[0];
    const call = { id: `${method}${path}`, method, path, operation, sentence };
    this.tags.find((tag) => tag.name === operation.tags[0])?.calls.push(call);
  }

  /** @param {string} id */
  find(id) {
    for (const tag of this.tags) for (const call of tag.calls) if (call.id === id) return { tag, call };
    return null;
  }

  /** What a reference points to; any other node itself. @param {any} node @returns {any} */
  resolve(node) {
    while (node?.$ref) node = node.$ref.slice(2).split("/").reduce((/** @type {any} */ at, /** @type {string} */ part) => at[part], this.document);
    return node;
  }

  /** @param {any} media @returns {[string, any][]} names and values */
  examples(media) {
    return Object.entries(media.examples ?? {}).map(([name, each]) => [name, this.resolve(each).value]);
  }

  /** The required fields with empty values, for a body without an example. @param {any} node */
  skeleton(node) {
    const schema = this.resolve(node);
    const names = schema.required ?? [];
    return Object.fromEntries(names.map((/** @type {string} */ name) => {
      const type = [this.resolve(schema.properties[name]).type].flat()[0];
      return [name, { integer: 1, number: 1, boolean: false, array: [], object: {} }[/** @type {"integer"} */ (type)] ?? ""];
    }));
  }

  /** A schema's type in words. @param {any} node @returns {string} */
  typeOf(node) {
    const schema = this.resolve(node) ?? {};
    const alternatives = schema.anyOf ?? schema.oneOf;
    if (alternatives) return [...new Set(alternatives.map((/** @type {any} */ each) => this.typeOf(each)))].join(" or ");
    if ("const" in schema) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((/** @type {any} */ each) => (typeof each === "string" && each ? each : JSON.stringify(each))).join(", ");
    const types = [schema.type ?? "any"].flat();
    return types.map((type) => (type === "array" && schema.items && Object.keys(schema.items).length ? `array of ${this.typeOf(schema.items)}` : type)).join(" or ");
  }

  /** The range of a value in words; "" without one. @param {any} node @returns {string} */
  rangeOf(node) {
    const schema = this.resolve(node) ?? {};
    const inner = (schema.anyOf ?? []).find((/** @type {any} */ each) => this.resolve(each).type !== "null");
    if (inner) return this.rangeOf(inner);
    const { minimum, maximum, multipleOf, minLength, maxLength, maxItems } = schema;
    const parts = [];
    if (minimum !== undefined && maximum !== undefined) parts.push(`${minimum} to ${maximum}`);
    else if (minimum !== undefined) parts.push(`at least ${minimum}`);
    if (multipleOf) parts.push(`a multiple of ${multipleOf}`);
    if (maxLength) parts.push(`${minLength ? `${minLength} to ` : "at most "}${maxLength} characters`);
    if (maxItems) parts.push(`at most ${maxItems}`);
    return parts.join(", ");
  }

  /** The schemas with fields of their own inside of one. @param {any} node @returns {any[]} */
  nested(node) {
    const schema = this.resolve(node) ?? {};
    if (schema.properties) return [schema];
    const inner = [...(schema.anyOf ?? schema.oneOf ?? []), ...(schema.items ? [schema.items] : [])];
    return inner.flatMap((each) => this.nested(each));
  }

  /** The fields of a schema as a table. @param {any} node @returns {HTMLElement} */
  table(node) {
    const schema = this.resolve(node);
    const required = new Set(schema.required ?? []);
    const rows = Object.entries(schema.properties ?? {}).flatMap(([name, each]) => this.rows(name, each, required.has(name)));
    return fieldTable(rows);
  }

  /** @param {string} name @param {any} node @param {boolean} isRequired @returns {HTMLElement[]} */
  rows(name, node, isRequired) {
    const schema = this.resolve(node) ?? {};
    const row = fieldRow(name, isRequired, this.typeOf(node), this.rangeOf(node), schema.default, schema.description ?? "");
    const inner = this.nested(node).map((each) => el("details", { class: "nested" }, el("summary", {}, `Fields of ${name}`), this.table(each)));
    return inner.length ? [row, el("tr", { class: "inner" }, el("td", { colSpan: 4 }, ...inner))] : [row];
  }
}

/** @param {HTMLElement[]} rows @returns {HTMLElement} */
export function fieldTable(rows) {
  const heads = ["Field", "Type and range", "Default", "Meaning"].map((text) => el("th", { scope: "col" }, text));
  return el("table", { class: "fields" }, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
}

/**
 * @param {string} name @param {boolean} isRequired @param {string} type @param {string} range
 * @param {any} standard the default @param {string} text
 * @returns {HTMLElement}
 */
export function fieldRow(name, isRequired, type, range, standard, text) {
  const words = standard === undefined || standard === null ? "" : typeof standard === "string" ? standard : JSON.stringify(standard);
  return el("tr", {},
    el("th", { scope: "row" }, el("code", {}, name), isRequired ? el("span", { class: "required" }, "required") : null),
    el("td", {}, type, range ? el("span", { class: "range" }, range) : null),
    el("td", {}, words ? el("code", {}, words) : el("span", { class: "none" }, "–")),
    el("td", {}, ...inCode(text)));
}

/** A text whose parts between backquotes are code. @param {string} text @returns {(HTMLElement | string)[]} */
export function inCode(text) {
  return text.split("`").map((part, index) => (index % 2 ? el("code", {}, part) : part));
}
