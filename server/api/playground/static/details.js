// @ts-check
// What stands below a result: the request as code, the answer, the receipt, the webhook's calls.

import { block } from "./block.js";
import { button, el, save } from "./dom.js";
import { codeOf, dialectsIn, LANGUAGES } from "./code.js";
import { callJson } from "./server.js";

/** A webhook's next call is waited for if it is due within this time. */
const SOON_MS = 10_000;

/** @param {any} entry @param {any} openapi @returns {HTMLElement} */
export function buildDetails(entry, openapi) {
  const { answer } = entry;
  return tabs("About this job", [
    ["Code", () => codePanel(entry, openapi)],
    ["Answer", () => jsonPanel(answer, "There is no answer to show yet.")],
    ["Receipt", () => jsonPanel(answer?.receipt && { receipt: answer.receipt, mask: answer.mask, outputs: answer.outputs, timings_ms: answer.timings_ms }, "Only a finished job has a receipt.")],
    ["Webhook", () => webhookPanel(entry)],
  ]);
}

/** @param {string} label @param {[string, () => HTMLElement][]} parts @returns {HTMLElement} */
function tabs(label, parts) {
  const panel = el("div", { class: "panel", role: "tabpanel", tabindex: 0 });
  const list = el("div", { class: "tabs", role: "tablist", "aria-label": label });
  const buttons = parts.map(([name, build], index) => {
    const tab = button(name, () => choose(index), { role: "tab", id: `tab-${name}`, "aria-selected": "false" });
    tab.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) choose((index + step + parts.length) % parts.length).focus();
    });
    return tab;
  });
  /** @param {number} chosen */
  function choose(chosen) {
    buttons.forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(index === chosen));
      tab.tabIndex = index === chosen ? 0 : -1;
    });
    panel.setAttribute("aria-labelledby", buttons[chosen].id);
    panel.replaceChildren(parts[chosen][1]());
    return buttons[chosen];
  }
  list.append(...buttons);
  choose(0);
  return el("div", { class: "details" }, list, panel);
}

/** @param {any} value @param {string} otherwise @returns {HTMLElement} */
function jsonPanel(value, otherwise) {
  return value ? block(JSON.stringify(value, null, 2)) : el("p", { class: "hint" }, otherwise);
}

/** @param {any} entry @param {any} openapi @returns {HTMLElement} */
function codePanel(entry, openapi) {
  const panel = el("div", {});
  const dialect = choice("API", dialectsIn(openapi));
  const language = choice("Language", LANGUAGES);
  const place = el("div", {});
  const show = async () => {
    const { text, note, mask } = await codeOf(entry, dialect.value, language.value);
    const isByFile = /picture\.\w+|mask\.png/.test(text);
    place.replaceChildren(
      ...(note ? [el("p", { class: "hint" }, note)] : []),
      ...(isByFile ? [filesRow(entry, mask)] : []),
      block(text),
    );
  };
  dialect.addEventListener("change", show);
  language.addEventListener("change", show);
  panel.append(el("p", { class: "row" }, el("label", {}, "API ", dialect), el("label", {}, "Language ", language)), place);
  show();
  return panel;
}

/** The files that the code reads. @param {any} entry @param {Blob} mask */
function filesRow(entry, mask) {
  const name = `picture.${entry.picture?.type.slice(6) ?? "png"}`;
  return el("p", { class: "row hint" }, "The code reads ",
    entry.picture ? button(`Save ${name}`, () => save(entry.picture, name)) : null,
    button("Save mask.png", () => save(mask, "mask.png")));
}

/** @param {string} label @param {string[]} options */
function choice(label, options) {
  return el("select", { "aria-label": label }, ...options.map((each) => el("option", { value: each }, each)));
}

/** @param {any} entry @returns {HTMLElement} */
function webhookPanel(entry) {
  const panel = el("div", {}, el("p", { class: "hint" }, "Asking the server…"));
  const show = (/** @type {any[]} */ deliveries) => {
    panel.replaceChildren(...(deliveries.length ? deliveries.map(deliveryOf) : [
      el("p", { class: "hint" }, entry.fields.webhook ? "No call yet: it is made when the job has ended." : "This request named no webhook. Give one below “Advanced”."),
    ]));
    const isAwaited = deliveries.some((each) => {
      const isInProgress = each.attempts_total > (each.attempts.at(-1)?.attempt ?? 0);
      return each.next_attempt_at && (isInProgress || Date.parse(each.next_attempt_at) - Date.now() < SOON_MS);
    });
    if (isAwaited) setTimeout(() => panel.isConnected && look(), 1_000);
  };
  const explain = (/** @type {Error} */ error) => panel.append(el("p", { class: "error" }, error.message));

  /** @param {any} delivery */
  function deliveryOf(delivery) {
    const again = button("Redeliver", () =>
      callJson(`api/jobs/${entry.id}/deliveries/redeliver`, { method: "POST" }).then((answer) => show(answer.deliveries)).catch(explain));
    const rows = delivery.attempts.map((/** @type {any} */ each) => el("li", {},
      `${new Date(each.started_at).toLocaleString()}: ${each.status ?? each.outcome}${each.duration_ms === null ? "" : `, ${each.duration_ms} ms`}`));
    return el("div", {}, el("p", {}, el("b", {}, delivery.state), ` · ${delivery.url} · attempts: ${delivery.attempts_total}`),
      el("ol", {}, ...rows), el("p", { class: "row" }, again, button("Look again", () => look())));
  }

  function look() {
    callJson(`api/jobs/${entry.id}/deliveries`).then((answer) => show(answer.deliveries)).catch((error) => {
      panel.replaceChildren();
      explain(error);
    });
  }
  look();
  return panel;
}
