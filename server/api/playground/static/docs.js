// @ts-check
// The API reference: the list of calls, the chosen one by the address's hash, and the key.

import { announce, byId, el } from "./dom.js";
import { setUpKeyForm } from "./key.js";
import { buildCall } from "./operation.js";
import { Api, inCode } from "./schema.js";
import { readiness, storedKey } from "./server.js";
import { showServerState } from "./state.js";

/** @type {Api | null} */
let api = null;

/** The chosen call; "" for a hash that is no encoded text. */
function chosenId() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

function show() {
  if (!api) return;
  const found = api.find(chosenId());
  document.body.classList.toggle("open", Boolean(found));
  byId("call").replaceChildren(...(found ? buildCall(api, found.tag, found.call) : overview(api)));
  document.title = `${found ? `${found.call.method.toUpperCase()} ${found.call.path}` : "API reference"} – inpaint-server`;
  for (const link of document.querySelectorAll("#call-list a")) {
    const isChosen = link.getAttribute("href") === `#${found?.call.id}`;
    if (isChosen) {
      link.setAttribute("aria-current", "page");
      const tag = /** @type {HTMLDetailsElement} */ (link.closest("details"));
      tag.open = true;
      link.scrollIntoView({ block: "nearest" });
    } else link.removeAttribute("aria-current");
  }
}

/** @param {Api} api @returns {HTMLElement[]} */
function overview(api) {
  const { info, components } = api.document;
  const keys = Object.values(components.securitySchemes).map((each) => el("li", {}, keyText(each), ...inCode(`: ${each.description}.`)));
  const tags = api.tags.map((tag) => el("li", {},
    el("h3", {}, el("a", { href: `#${tag.calls[0].id}` }, tag.title)), el("p", {}, ...inCode(tag.text))));
  return [
    el("h2", {}, `inpaint-server ${info.version}`),
    el("p", { class: "lead" }, info.description),
    el("h3", {}, "The API key"),
    el("ul", { class: "plain" }, ...keys),
    el("p", { class: "hint" }, "Calls that are sent from this page have the key of this tab, if you entered one."),
    el("h3", {}, "The APIs"),
    el("ul", { class: "tags" }, ...tags),
  ];
}

/** @param {any} scheme */
function keyText(scheme) {
  if (scheme.type === "apiKey") return el("code", {}, `${scheme.name}: KEY`);
  return el("code", {}, `Authorization: ${scheme.scheme === "basic" ? "Basic base64(name:KEY)" : "Bearer KEY"}`);
}

/** @param {Api} api */
function buildList(api) {
  byId("call-list").append(...api.tags.map((tag, index) => el("details", { class: "tag-calls", open: index === 0 },
    el("summary", {}, tag.title, el("span", { class: "count" }, String(tag.calls.length))),
    el("ul", {}, ...tag.calls.map((call) => el("li", { "data-words": `${tag.name} ${tag.title} ${call.method} ${call.path} ${call.sentence}`.toLowerCase() },
      el("a", { href: `#${call.id}`, title: call.sentence }, badge(call.method), el("span", { class: "path" }, ...broken(call.path)))))))));
}

/** @param {string} method */
function badge(method) {
  return el("span", { class: `method ${method}` }, method.toUpperCase());
}

/** A path that may be broken at its slashes. @param {string} path */
function broken(path) {
  return path.split(/(?=\/)/).flatMap((part) => [document.createElement("wbr"), part]);
}

/** Leave only the calls that have every word. */
function filter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let total = 0;
  for (const tag of document.querySelectorAll(".tag-calls")) {
    let count = 0;
    for (const item of tag.querySelectorAll("li")) {
      const isFound = words.every((word) => item.dataset.words?.includes(word));
      item.hidden = !isFound;
      count += Number(isFound);
    }
    const details = /** @type {HTMLDetailsElement} */ (tag);
    details.hidden = count === 0;
    if (words.length) details.open = true;
    /** @type {HTMLElement} */ (tag.querySelector(".count")).textContent = String(count);
    total += count;
  }
  byId("no-calls").hidden = total > 0;
  if (words.length) announce(`${total} ${total === 1 ? "call" : "calls"}`);
}

/** Up and down among what can be seen in the list. @param {KeyboardEvent} event */
function moveInList(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const all = [byId("filter"), ...[...document.querySelectorAll("#call-list a")].filter((link) => link.checkVisibility())];
  const next = all[all.indexOf(event.target) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
}

function showKeyState() {
  byId("key-change").textContent = storedKey() ? "Change key" : "Enter a key";
}

function keepKey() {
  byId("key-form").hidden = true;
  showKeyState();
  announce(storedKey() ? "The key is kept for this tab." : "No key is sent.");
}

async function watchServer() {
  const { level, text } = document.hidden ? { level: "", text: "" } : await readiness();
  if (text) showServerState({ level, text });
  if (!api && level !== "bad") await load();
  setTimeout(watchServer, level === "bad" ? 2_000 : 10_000);
}

async function load() {
  try {
    const answer = await fetch("openapi.json");
    api = new Api(await answer.json());
  } catch {
    byId("call").replaceChildren(el("p", { class: "error" }, "The server does not answer. Is it running?"));
    return;
  }
  buildList(api);
  filter();
  show();
}

function start() {
  showKeyState();
  setUpKeyForm(keepKey);
  byId("filter").addEventListener("input", filter);
  byId("calls").addEventListener("keydown", moveInList);
  window.addEventListener("hashchange", () => {
    show();
    if (chosenId()) byId("call").focus({ preventScroll: true });
    byId(chosenId() ? "call" : "calls").scrollIntoView({ block: "start" });
  });
  document.addEventListener("keydown", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    if (event.key === "/" && !/^(TEXTAREA|INPUT|SELECT)$/.test(target.tagName)) {
      event.preventDefault();
      byId("filter").focus();
    }
    if (event.key === "Escape" && target === byId("filter")) {
      byId("filter").value = "";
      filter();
    }
  });
  watchServer();
}

start();
