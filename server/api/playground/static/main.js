// @ts-check
// Starts the page and connects its parts: editor, form, jobs, result.

import { announce, byId } from "./dom.js";
import { Ask } from "./ask.js";
import { ResultView } from "./compare.js";
import { Editor } from "./editor.js";
import { Jobs } from "./jobs.js";
import { acceptKey, setUpKeyForm } from "./key.js";
import { MaskCheck } from "./maskcheck.js";
import { fileToSend, openPicture } from "./picture.js";
import { callJson, readiness, ServerError } from "./server.js";
import { showServerState } from "./state.js";
import { buildTools } from "./tools.js";

/** @type {Ask | null} */
let ask = null;
/** @type {ResultView | null} */
let result = null;
/** The state of the editor when the newest request was sent. */
let sentVersion = -1;
let isSending = false;
let fullUntil = 0;

const editor = new Editor({
  onChange: showWhatIsMissing,
  onExample: (fields) => {
    for (const [name, value] of Object.entries(fields)) ask?.set(name, value);
    showWhatIsMissing();
  },
  onExtend: () => {
    ask?.set("strength", 1);
    byId("hint").textContent = "Strength is set to 1, so that the new area is painted from nothing.";
  },
  onMaskFile: (file) => maskCheck.loaded(file),
});
const maskCheck = new MaskCheck(editor, () => ask);
const jobs = new Jobs({
  onOpen: (entry) => {
    openResult(entry);
  },
  onEnd: (entry) => {
    // What ends while its user goes on painting does not take the stage away.
    const isUnchanged = editor.version === sentVersion && !result?.isOpen;
    if (entry.state === "finished" && isUnchanged && entry.key === newestSent) openResult(entry);
  },
});
let newestSent = "";

/** @param {any} entry */
function openResult(entry) {
  result?.open(entry);
  byId("result").scrollIntoView({ block: "start" });
}

/** Why the request cannot be sent yet; "" where it can. */
function missing() {
  if (!byId("key-form").hidden) return "Enter an API key first.";
  if (!ask) return "The server has not answered yet.";
  if (!editor.picture || !editor.mask) return "Choose a picture first.";
  return "";
}

function showWhatIsMissing() {
  const wait = Math.ceil((fullUntil - Date.now()) / 1000);
  const reason = missing();
  byId("send").disabled = Boolean(reason) || isSending || wait > 0;
  byId("send-hint").textContent = reason || maskHint();
  maskCheck.refresh();
  for (const each of document.querySelectorAll("[data-edit]")) {
    const mask = editor.mask;
    const isUndo = /** @type {HTMLElement} */ (each).dataset.edit === "undo";
    const isPossible = mask && (isUndo ? mask.applied > 0 || editor.before.length > 0 : mask.applied < mask.operations.length);
    /** @type {HTMLButtonElement} */ (each).disabled = !isPossible;
  }
}

/** What may surprise about the mask. */
function maskHint() {
  const { mask } = editor;
  if (!mask || !ask) return "";
  const { coverage, isSoft } = mask.measure();
  if (coverage === 0) return "Nothing is marked: paint over what is to be replaced.";
  if (coverage === 1) return "All of the picture is marked.";
  const share = `${coverage < 0.01 ? "Less than 1" : Math.round(coverage * 100)} % of the picture is marked.`;
  if (isSoft && !ask.input("soft_mask")?.checked) return `${share} Soft edges count only with “Soft mask”; otherwise half-grey is the border.`;
  return share;
}

/** @param {Event} [event] */
async function send(event) {
  event?.preventDefault();
  const { picture, mask } = editor;
  if (byId("send").disabled || !ask || !picture || !mask) return;
  isSending = true;
  sentVersion = editor.version;
  showWhatIsMissing();
  byId("send-error").textContent = "";
  byId("send-hint").textContent = "Sending…";
  try {
    const fields = ask.read();
    const { file, note } = picture.file ? await fileToSend(picture, Boolean(fields.only_masked)) : { file: null, note: "" };
    const url = note ? null : picture.url;
    await submit({ fields, typed: ask.typed(), url, picture: file, mask: await mask.toPng(), note });
  } finally {
    isSending = false;
    showWhatIsMissing();
  }
}

/** @param {any} request */
async function submit(request) {
  ask?.showErrors([]);
  try {
    const entry = await jobs.send(request);
    newestSent = entry.key;
    announce(`Job ${entry.id} sent.`);
  } catch (error) {
    showRefusal(error instanceof ServerError ? error : new ServerError(String(error)));
  }
}

/** @param {ServerError} error */
function showRefusal(error) {
  const others = ask?.showErrors(error.errors) ?? [];
  const text = [error.message, ...others].join(" ");
  byId("send-error").textContent = text;
  announce(text);
  if (error.retryAfter && error.status !== 401) countDown(error, text);
}

/** @param {ServerError} error @param {string} text */
function countDown(error, text) {
  fullUntil = Date.now() + error.retryAfter * 1000;
  const tick = () => {
    const left = Math.ceil((fullUntil - Date.now()) / 1000);
    byId("send-error").textContent = left > 0 ? `${text} Try again in ${left} s.` : "";
    showWhatIsMissing();
    if (left > 0) setTimeout(tick, 500);
  };
  tick();
}

/** @param {any} entry @param {Record<string, any>} changes null removes a field */
async function again(entry, changes) {
  const fields = { ...entry.fields, ...changes };
  for (const name of Object.keys(fields)) if (fields[name] === null) delete fields[name];
  const { typed, url, picture, mask, note } = entry;
  result?.close();
  sentVersion = editor.version;
  await submit({ fields, typed, url, picture, mask, note });
}

/** Bring a request back onto the stage and into the form. @param {any} entry */
async function edit(entry) {
  result?.close();
  ask?.write(entry.fields, entry.typed);
  const name = `job-${entry.id}`;
  if (entry.picture) editor.show({ ...(await openPicture(entry.picture, name)), url: entry.url });
  else editor.show({ file: null, url: entry.url, name, width: 512, height: 512 });
  await editor.loadMask(entry.mask, "light");
}

/** @param {Blob} file @param {string} name */
async function useAsNext(file, name) {
  result?.close();
  editor.show(await openPicture(file, name));
}

/** Facts and ranges; again when a key was entered. */
async function connect() {
  try {
    const [openapi, facts] = await Promise.all([callJson("openapi.json"), callJson("playground/facts")]);
    const isFirst = !ask;
    const kept = ask?.read();
    ask = new Ask(openapi, facts);
    editor.publicUrl = facts.public_url;
    if (kept) ask.write(kept);
    result ??= new ResultView({ openapi, onClose: () => (byId("editor").hidden = false), onNext: useAsNext, onEdit: edit, onAgain: again });
    acceptKey();
    if (isFirst) await jobs.restore();
    else jobs.followAll();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    byId("server-state").textContent = error.message;
    byId("server-state").dataset.level = "wait";
  }
  showWhatIsMissing();
}

/** @returns {Promise<string | undefined>} how the server is */
async function showServer() {
  const state = byId("server-state");
  const { level, text } = document.hidden ? { level: state.dataset.level, text: state.textContent } : await readiness();
  const isBack = level !== "bad" && state.dataset.level === "bad";
  showServerState({ level, text });
  if ((isBack || !ask) && level !== "bad" && byId("key-form").hidden) await connect();
  return level;
}

async function watchServer() {
  const level = await showServer();
  setTimeout(watchServer, level === "ok" ? 10_000 : 2_000);
}

function start() {
  setUpKeyForm(() => connect().then(() => byId("key-form").hidden && showServer()));
  buildTools(editor);
  byId("ask").addEventListener("submit", send);
  byId("ask").addEventListener("input", showWhatIsMissing);
  byId("clear-history").addEventListener("click", () => jobs.removeEnded());
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") send(event);
    const isTyping = /^(TEXTAREA|INPUT|SELECT)$/.test(/** @type {HTMLElement} */ (event.target).tagName);
    if (event.shiftKey && event.key === "X" && !isTyping) jobs.cancelNewest();
    if (event.key === "Escape" && result?.isOpen) result.close();
  });
  watchServer();
}

start();
