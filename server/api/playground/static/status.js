// @ts-check
// The status page: asks `/api/status` every few seconds while its tab is seen.

import { byId, el } from "./dom.js";
import { acceptKey, setUpKeyForm } from "./key.js";
import { clockTime, Plot } from "./plots.js";
import { callJson, readiness, ServerError } from "./server.js";
import { showServerState } from "./state.js";

const ASK_MS = 5_000;
const AWAY_MS = 2_000;
/** A server that takes longer hangs. */
const PATIENCE_MS = 10_000;

/** @typedef {{p50: number, p95: number} | null} Percentiles */
/**
 * @typedef {{starts_at: string, finished: number, failed: number, cancelled: number,
 *   latency_s: Percentiles, wait_s: Percentiles, run_s: Percentiles}} Period
 */

/** @type {Record<string, [level: string, text: string]>} */
const WORKER_STATES = { ready: ["ok", "Ready"], loading: ["wait", "Loading"], failed: ["bad", "Failed"] };

const throughput = new Plot(byId("throughput"), {
  isStacked: true,
  label: "Jobs that ended, by minute",
  tops: [4, 10, 20, 40, 60, 100, 200, 400, 600, 1000, 2000, 4000, 10_000, 20_000],
  format: (value) => String(value),
});
const latency = new Plot(byId("latency"), {
  isStacked: false,
  label: "Latency, by minute",
  tops: [1, 2, 4, 10, 20, 40, 60, 120, 240, 600, 1200, 2400, 3600, 7200, 14_400, 28_800, 57_600],
  format: duration,
});

let timer = 0;
let isAsking = false;
/** When the figures on the page were read; "" before the first. */
let readAt = "";

/** @param {number} seconds */
function duration(seconds) {
  if (seconds > 0 && seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${Math.round(seconds * 10) / 10} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return inTwo(Math.round(seconds), 60, "min", "s");
  return inTwo(Math.round(seconds / 60), 60, "h", "min");
}

/** @param {number} count of the smaller unit @param {number} size @param {string} large @param {string} small */
function inTwo(count, size, large, small) {
  const rest = count % size;
  return `${Math.floor(count / size)} ${large}${rest ? ` ${rest} ${small}` : ""}`;
}

/** @param {number} bytes */
function size(bytes) {
  return bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(bytes < 1e11 ? 1 : 0)} GB`;
}

/** @param {number} count @param {string} one @param {string} [many] */
function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** Ten thousand stands for more. @param {number} count */
function atMost(count) {
  return count >= 10_000 ? "10000 or more" : String(count);
}

/** @param {string} title @param {string} value @param {string} note @param {boolean} [isBad] */
function tile(title, value, note, isBad = false) {
  return el("div", { class: isBad ? "bad" : "" }, el("dt", {}, title), el("dd", {}, value), el("dd", { class: "note" }, note));
}

/** @param {number} seconds */
function start(seconds) {
  return seconds < 0.5 ? "A new job starts at once" : `A new job starts in about ${duration(seconds)}`;
}

/** @param {number} perMinute */
function rate(perMinute) {
  return perMinute >= 1 ? `${perMinute.toFixed(1)} a minute` : "Less than one a minute";
}

/** @param {any} found */
function showTiles({ queue, last_hour: hour, workers, at }) {
  const ended = hour.finished + hour.failed + hour.cancelled;
  const minutes = Math.max(1, (Date.parse(at) - Date.parse(hour.starts_at)) / 60_000);
  const ready = workers.filter((/** @type {any} */ each) => each.state === "ready").length;
  byId("tiles").replaceChildren(
    tile("Waiting", String(queue.waiting), queue.oldest_s === null ? "No job waits" : `The oldest for ${duration(queue.oldest_s)}`),
    tile("Running", String(queue.running), ready ? start(queue.wait_s) : "No worker is ready", !ready),
    tile("Finished in the last hour", String(hour.finished), hour.finished ? rate(hour.finished / minutes) : "No job has finished"),
    tile("Failed in the last hour", String(hour.failed), ended ? `${Math.round((100 * hour.failed) / ended)} % of those that ended` : "No job has ended", hour.failed > 0),
    tile("Median latency", hour.latency_s ? duration(hour.latency_s.p50) : "–", hour.latency_s ? `95 %: at most ${duration(hour.latency_s.p95)}` : "No job has finished"),
  );
}

/** @param {any} hour */
function showPlots(hour) {
  /** @type {Period[]} */
  const minutes = hour.minutes;
  const times = minutes.map((each) => new Date(each.starts_at));
  throughput.update(times, [
    { name: "finished", text: "finished", values: minutes.map((each) => each.finished) },
    { name: "failed", text: "failed", values: minutes.map((each) => each.failed) },
    { name: "cancelled", text: "cancelled", values: minutes.map((each) => each.cancelled) },
  ]);
  latency.update(times, [
    { name: "p95", text: "p95", values: minutes.map((each) => each.latency_s?.p95 ?? null) },
    { name: "p50", text: "p50", values: minutes.map((each) => each.latency_s?.p50 ?? null) },
    { name: "wait", text: "p50 of the wait", values: minutes.map((each) => each.wait_s?.p50 ?? null) },
  ]);
  const span = minutes.length < 60 ? `The newest 10000 jobs ended within ${counted(minutes.length, "minute")}; of these, ` : "In the last hour ";
  byId("throughput-text").textContent = `${span}${counted(hour.finished, "job")} finished, ${hour.failed} failed, ${counted(hour.cancelled, "was", "were")} cancelled. ${busiest(minutes)}`;
  byId("latency-text").textContent = hour.latency_s
    ? `Half of the finished jobs took at most ${duration(hour.latency_s.p50)}, 95 % at most ${duration(hour.latency_s.p95)}. ${parts(hour)}`
    : "No job has finished.";
}

/** @param {Period[]} minutes */
function busiest(minutes) {
  const best = minutes.reduce((best, each) => (each.finished > best.finished ? each : best));
  return best.finished ? `Most in a minute: ${best.finished}, at ${clockTime(new Date(best.starts_at))}.` : "";
}

/** @param {Period} period */
function parts({ wait_s: wait, run_s: run }) {
  if (!wait || !run) return "";
  return `Half waited at most ${duration(wait.p50)} and ran at most ${duration(run.p50)}; 95 % ${duration(wait.p95)} and ${duration(run.p95)}.`;
}

/** @param {Period[]} minutes */
function showTable(minutes) {
  const busy = minutes.filter((each) => each.finished + each.failed + each.cancelled > 0).reverse();
  const seconds = (/** @type {Percentiles} */ each) => (each ? [duration(each.p50), duration(each.p95)] : ["–", "–"]);
  byId("minute-rows").replaceChildren(
    ...busy.map((each) => {
      const values = [each.finished, each.failed, each.cancelled, ...[each.latency_s, each.wait_s, each.run_s].flatMap(seconds)];
      return el("tr", {}, el("th", { scope: "row" }, clockTime(new Date(each.starts_at))), ...values.map((value) => el("td", {}, String(value))));
    }),
  );
  byId("minute-rows").closest(".scroll").hidden = busy.length === 0;
  byId("no-minutes").hidden = busy.length > 0;
}

/** @param {any[]} workers */
function showWorkers(workers) {
  byId("worker-rows").replaceChildren(
    ...workers.map((each) => {
      const [level, text] = WORKER_STATES[each.state] ?? ["wait", each.state];
      const state = el("span", { class: "state", "data-level": level }, each.loading?.replace(/^./, (/** @type {string} */ first) => first.toUpperCase()) ?? text);
      const cells = [state, runs(each), each.device, each.model, el("code", {}, each.name)];
      return el("tr", {}, ...cells.map((cell) => el("td", {}, cell)));
    }),
  );
  byId("workers").closest(".scroll").hidden = workers.length === 0;
  byId("no-workers").hidden = workers.length > 0;
}

/** @param {any} worker */
function runs({ state, jobs, progress }) {
  if (!jobs) return state === "ready" ? "Nothing" : "–";
  const bar = el("progress", { max: progress.total_steps || 1, value: progress.step, "aria-label": "Steps" });
  const steps = progress.total_steps ? `, step ${progress.step} of ${progress.total_steps}` : "";
  return el("div", { class: "runs" }, `${counted(jobs, "job")}${steps}`, bar);
}

/** @param {{code: string, message: string, count: number}[]} failures */
function showFailures(failures) {
  byId("failures").replaceChildren(
    ...failures.map(({ code, message, count }) => el("li", {}, el("b", {}, String(count)), el("span", {}, message), el("code", {}, code))),
  );
  byId("no-failures").hidden = failures.length > 0;
}

/** @param {string} id @param {[title: string, value: string, isBad?: boolean][]} pairs */
function showPairs(id, pairs) {
  byId(id).replaceChildren(...pairs.flatMap(([title, value, isBad]) => [el("dt", {}, title), el("dd", { class: isBad ? "bad" : "" }, value)]));
}

/** @param {{total_bytes: number, free_bytes: number} | null} disk */
function showDisk(disk) {
  if (!disk) {
    byId("disk").replaceChildren(el("p", { class: "error" }, "The data folder is not there."));
    return;
  }
  const { total_bytes: total, free_bytes: free } = disk;
  const meter = el("meter", { min: 0, max: total, low: 0.8 * total, high: 0.92 * total, optimum: 0, value: total - free, "aria-label": "Used" });
  byId("disk").replaceChildren(meter, el("p", {}, `${size(free)} of ${size(total)} are free (${Math.round((100 * free) / total)} %).`));
}

/** @param {any} found */
function show(found) {
  const { last_hour: hour, webhooks, version, model, models } = found;
  byId("status").hidden = false;
  showTiles(found);
  showPlots(hour);
  showTable(hour.minutes);
  showWorkers(found.workers);
  showFailures(hour.failures);
  showPairs("webhooks", [
    ["Delivered", `${webhooks.delivered}, for jobs that ended in the last hour`],
    ["First attempt due", atMost(webhooks.untried)],
    ["Retrying", atMost(webhooks.retrying)],
    ["Dead", webhooks.dead ? `${atMost(webhooks.dead)}, given up` : "0", webhooks.dead > 0],
  ]);
  showDisk(found.disk);
  showPairs("server", [
    ["Version", version],
    ["Model", model],
    ...(models.length > 1 ? [/** @type {[string, string]} */ (["Also on offer", models.slice(1).join(", ")])] : []),
    ["Figures of", new Date(found.at).toLocaleTimeString([], { hourCycle: "h23" })],
  ]);
}

/** @param {string} reason "" where the figures are new */
function showAge(reason) {
  const old = byId("old");
  old.hidden = !reason;
  old.textContent = readAt ? `${reason} The figures below are of ${new Date(readAt).toLocaleTimeString([], { hourCycle: "h23" })}.` : reason;
}

/** Ask for the figures and show them. @returns {Promise<boolean>} whether they came */
async function refresh() {
  try {
    const found = await callJson("api/status", { signal: AbortSignal.timeout(PATIENCE_MS) });
    readAt = found.at;
    acceptKey();
    show(found);
    showAge("");
    return true;
  } catch (error) {
    if (!(error instanceof ServerError || error instanceof DOMException)) throw error;
    const problem = error instanceof ServerError ? error : new ServerError("The server does not answer.");
    showAge(problem.status === 401 ? "" : problem.message);
    return false;
  }
}

/** One question, and the next one later. A hidden tab asks nothing until it is seen again. */
async function watch() {
  clearTimeout(timer);
  if (document.hidden || isAsking) return;
  isAsking = true;
  try {
    const [isNew, server] = await Promise.all([byId("key-form").hidden ? refresh() : false, readiness()]);
    showServerState(server);
    timer = setTimeout(watch, isNew || server.level !== "bad" ? ASK_MS : AWAY_MS);
  } finally {
    isAsking = false;
  }
}

setUpKeyForm(() => refresh());
document.addEventListener("visibilitychange", watch);
watch();
