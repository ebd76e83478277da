// @ts-check
// Jobs: sends requests, follows each job by its events, and keeps a card for each.

import { announce, byId, button, el, toDataUri } from "./dom.js";
import * as history from "./history.js";
import { thumbnail } from "./picture.js";
import { call, callJson, ownPath, readEvents, ServerError } from "./server.js";

const ENDED = ["finished", "failed", "cancelled", "gone"];
/** A browser opens six connections to a server; some are left for everything else. */
const MAX_STREAMS = 3;
const POLL_MS = 2_000;
const MAX_WAIT_MS = 8_000;

/**
 * @typedef {object} Entry a job of this browser
 * @property {string} key
 * @property {number} id
 * @property {string} state of the API, or "gone"
 * @property {string} createdAt
 * @property {Record<string, any>} fields as sent, without the pictures
 * @property {{prompt: string, negative_prompt: string} | null} typed prompts before they were enhanced
 * @property {string | null} url of the init image where that was sent
 * @property {Blob | null} picture
 * @property {Blob} mask
 * @property {string} note
 * @property {Blob | null} thumb
 * @property {any} answer the job in full, once it has ended
 */

/** @param {number} ms @returns {Promise<void>} */
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Jobs {
  /** @param {{onOpen: (entry: Entry) => void, onEnd: (entry: Entry) => void}} hooks */
  constructor(hooks) {
    this.hooks = hooks;
    /** @type {Map<string, Entry>} */
    this.entries = new Map();
    /** @type {Map<string, Card>} */
    this.cards = new Map();
    /** Entries with a stream of events. @type {Set<string>} */
    this.streams = new Set();
    this.isPolling = false;
  }

  async restore() {
    for (const entry of (await history.load()).sort((a, b) => (a.createdAt < b.createdAt ? -1 : 1))) this.add(entry);
    this.followAll();
  }

  /** @param {Entry} entry */
  add(entry) {
    this.entries.set(entry.key, entry);
    const card = new Card(entry, {
      open: () => this.hooks.onOpen(entry),
      cancel: () => this.cancel(entry),
      remove: () => this.remove(entry),
    });
    this.cards.set(entry.key, card);
    byId("cards").prepend(card.element);
    this.showCount();
    return card;
  }

  showCount() {
    const all = [...this.entries.values()];
    byId("no-jobs").hidden = all.length > 0;
    byId("clear-history").hidden = !all.some((entry) => ENDED.includes(entry.state));
  }

  /** @returns {boolean} */
  get areActive() {
    return [...this.entries.values()].some((entry) => !ENDED.includes(entry.state));
  }

  /**
   * Send a request. It is sent once more where the connection broke: the idempotency key makes that one job.
   * @param {Omit<Entry, "key" | "id" | "state" | "createdAt" | "thumb" | "answer">} request
   * @returns {Promise<Entry>}
   */
  async send(request) {
    const key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
    const init_image = request.url ?? (await toDataUri(/** @type {Blob} */ (request.picture)));
    const body = JSON.stringify({ ...request.fields, previews: true, init_image, mask_image: await toDataUri(request.mask) });
    // Made while the request is on its way: until the job is in the history, who leaves the page loses it.
    const thumb = request.picture ? thumbnail(request.picture).catch(() => null) : null;
    const options = { method: "POST", body, headers: { "Content-Type": "application/json", "Idempotency-Key": key } };
    const job = await callJson("api/jobs", options).catch((error) => {
      if (error instanceof ServerError && error.status === 0) return callJson("api/jobs", options);
      throw error;
    });
    /** @type {Entry} */
    const entry = { ...request, key, id: job.id, state: job.state, createdAt: job.created_at, thumb: await thumb, answer: null };
    await history.put(entry);
    const card = this.add(entry);
    card.showEta(job.eta_s);
    card.element.scrollIntoView({ block: "nearest" });
    await this.forgetOldest();
    this.followAll();
    return entry;
  }

  async forgetOldest() {
    const ended = [...this.entries.values()].filter((entry) => ENDED.includes(entry.state));
    for (const entry of ended.slice(0, Math.max(0, this.entries.size - history.MAX_ENTRIES))) await this.remove(entry);
  }

  /** Give streams to the oldest jobs that have none, and poll for the others. */
  followAll() {
    const waiting = [...this.entries.values()].filter((entry) => !ENDED.includes(entry.state) && !this.streams.has(entry.key));
    while (waiting.length && this.streams.size < MAX_STREAMS) this.follow(/** @type {Entry} */ (waiting.shift()));
    if (waiting.length) this.poll();
  }

  /** @param {Entry} entry */
  async follow(entry) {
    this.streams.add(entry.key);
    let wait = 500;
    while (!ENDED.includes(entry.state) && this.entries.has(entry.key)) {
      try {
        for await (const { name, data } of readEvents(await call(`api/jobs/${entry.id}/events`))) {
          wait = 500;
          await this.handle(entry, name, data);
        }
      } catch (error) {
        if (error instanceof ServerError && error.status === 404) await this.end(entry, "gone", null);
        else if (error instanceof ServerError && error.status === 401) break;
        else this.cards.get(entry.key)?.showState(entry, "Connection lost. Trying again…");
      }
      await sleep(wait);
      wait = Math.min(MAX_WAIT_MS, wait * 2);
    }
    this.streams.delete(entry.key);
    if (ENDED.includes(entry.state)) this.followAll();
  }

  /** @param {Entry} entry @param {string} name @param {any} data */
  async handle(entry, name, data) {
    const card = this.cards.get(entry.key);
    if (ENDED.includes(name)) return this.end(entry, name, data);
    if (name === "queued") {
      entry.state = "queued";
      card?.showState(entry, `Waiting, number ${data.position ?? "?"} in the queue`);
    }
    if (name === "started") {
      entry.state = "running";
      card?.showState(entry, data.attempt > 1 ? `Started, attempt ${data.attempt}` : "Started");
    }
    if (name === "step") card?.showStep(data);
    if (name === "preview") card?.showPicture(data.image);
    if (name === "queued" || name === "started") {
      const job = await callJson(`api/jobs/${entry.id}`);
      card?.showEta(job.eta_s);
    }
  }

  /** One list for all jobs that have no stream. */
  async poll() {
    if (this.isPolling) return;
    this.isPolling = true;
    try {
      const { jobs } = await callJson("api/jobs?limit=100");
      for (const job of jobs) {
        const entry = [...this.entries.values()].find((each) => each.id === job.id && each.createdAt === job.created_at);
        if (!entry || this.streams.has(entry.key) || ENDED.includes(entry.state)) continue;
        if (ENDED.includes(job.state)) await this.end(entry, job.state, await callJson(`api/jobs/${entry.id}`));
        else if (job.state === "running") this.cards.get(entry.key)?.showStep(job.progress);
        else this.cards.get(entry.key)?.showState(entry, "Waiting in the queue");
      }
    } catch {
      // The state line tells that the server is away; the next look is due all the same.
    }
    await sleep(POLL_MS);
    this.isPolling = false;
    this.followAll();
  }

  /** @param {Entry} entry @param {string} state @param {any} answer */
  async end(entry, state, answer) {
    // Another database may have given the same number to another job.
    const isOther = answer && answer.created_at !== entry.createdAt;
    entry.state = isOther ? "gone" : state;
    entry.answer = isOther ? null : answer;
    const output = entry.answer?.outputs?.[0];
    if (output) {
      const picture = await call(ownPath(output.url)).then((each) => each.blob()).catch(() => null);
      if (picture) entry.thumb = await thumbnail(picture).catch(() => entry.thumb);
    }
    this.cards.get(entry.key)?.showEnd(entry);
    if (this.entries.has(entry.key)) await history.put(entry);
    this.showCount();
    announce(`Job ${entry.id}: ${sentenceOf(entry)}`);
    this.hooks.onEnd(entry);
  }

  /** @param {Entry} entry */
  async cancel(entry) {
    this.cards.get(entry.key)?.showState(entry, "Cancelling…");
    try {
      await this.end(entry, "cancelled", await callJson(`api/jobs/${entry.id}/cancel`, { method: "POST" }));
    } catch (error) {
      // Where the job has ended meanwhile, its events say so.
      if (error instanceof ServerError && error.status !== 409) this.cards.get(entry.key)?.showState(entry, error.message);
    }
  }

  cancelNewest() {
    const active = [...this.entries.values()].filter((entry) => !ENDED.includes(entry.state)).pop();
    if (active) this.cancel(active);
  }

  /** @param {Entry} entry */
  async remove(entry) {
    this.entries.delete(entry.key);
    // The card goes last, so that what is no longer shown stays away after a reload.
    await history.remove(entry.key);
    this.cards.get(entry.key)?.element.remove();
    this.cards.delete(entry.key);
    this.showCount();
  }

  async removeEnded() {
    for (const entry of [...this.entries.values()]) if (ENDED.includes(entry.state)) await this.remove(entry);
    announce("Ended jobs removed from the list.");
  }
}

/** How an ended job ended. @param {Entry} entry @returns {string} */
export function sentenceOf(entry) {
  const { state, answer } = entry;
  if (state === "finished" && answer?.expired_at) return "Finished; the pictures have been removed since";
  if (state === "finished" && answer?.outputs.some((/** @type {any} */ each) => each.is_flagged)) return "Finished; flagged by the safety checker";
  if (state === "failed") return `Failed: ${answer?.error?.message ?? "unknown reason"}`;
  if (state === "gone") return "Gone: the server no longer has this job";
  return state[0].toUpperCase() + state.slice(1);
}

class Card {
  /** @param {Entry} entry @param {{open: () => void, cancel: () => void, remove: () => void}} actions */
  constructor(entry, actions) {
    this.image = el("img", { class: "thumb", alt: "", width: 72, height: 72 });
    this.title = el("span", { class: "title" }, (entry.typed ?? entry.fields).prompt || "(no prompt)");
    this.state = el("span", { class: "card-state" }, "Sent");
    this.bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of job ${entry.id}` });
    this.eta = el("span", { class: "eta" });
    this.open = button("Open", actions.open, { hidden: true, "aria-label": `Open job ${entry.id}` });
    this.cancel = button("Cancel", actions.cancel, { "aria-label": `Cancel job ${entry.id}` });
    this.remove = button("Remove", actions.remove, { class: "quiet", hidden: true, "aria-label": `Remove job ${entry.id} from the list` });
    this.element = el(
      "li", { class: "card", "data-job": entry.id },
      this.image,
      el("div", { class: "card-text" }, this.title, this.state, this.bar, this.eta),
      el("div", { class: "card-actions" }, this.open, this.cancel, this.remove),
    );
    if (entry.thumb) this.showPicture(URL.createObjectURL(entry.thumb));
    if (ENDED.includes(entry.state)) this.showEnd(entry);
  }

  /** @param {Entry} entry @param {string} text */
  showState(entry, text) {
    this.element.dataset.state = entry.state;
    this.state.textContent = text;
  }

  /** @param {{step: number, total_steps: number}} progress */
  showStep({ step, total_steps: total }) {
    this.element.dataset.state = "running";
    this.bar.value = total ? step / total : 0;
    this.state.textContent = `Step ${step} of ${total}`;
  }

  /** @param {number | null} seconds */
  showEta(seconds) {
    this.eta.textContent = seconds === null || seconds === undefined ? "" : `about ${Math.max(1, Math.round(seconds))} s`;
  }

  /** @param {string} url */
  showPicture(url) {
    if (this.image.src.startsWith("blob:")) URL.revokeObjectURL(this.image.src);
    this.image.src = url;
  }

  /** @param {Entry} entry */
  showEnd(entry) {
    this.showState(entry, sentenceOf(entry));
    this.showEta(null);
    this.bar.hidden = this.cancel.hidden = true;
    this.remove.hidden = false;
    this.open.hidden = false;
    if (entry.thumb) this.showPicture(URL.createObjectURL(entry.thumb));
  }
}
