// @ts-check
// Pictures on their way to the stage and to the server: files, URLs, extensions, sizes.

import { newCanvas, toBlob } from "./dom.js";
import { ownPath } from "./server.js";

/** The longer side of a mask. The server stretches it; no result has more pixels than this squared. */
const MAX_MASK_SIDE = 2048;
/** The server keeps a picture's own size, which only-masked needs, up to so many pixels. */
export const MAX_KEPT_PIXELS = 2048 * 2048;
/** Default of the server's `fetch.max_image_bytes`. */
const MAX_BYTES = 10_000_000;
const SENT_AS_IS = ["image/png", "image/jpeg", "image/webp"];

/**
 * @typedef {object} Picture
 * @property {Blob | null} file null for a URL of another host, which this page may not load
 * @property {string | null} url sent as it is in place of the file
 * @property {string} name
 * @property {number} width
 * @property {number} height
 */

/** @param {Blob} file @param {string} name @returns {Promise<Picture>} */
export async function openPicture(file, name) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error(`${name || "This file"} is not a picture that your browser can read.`);
  const { width, height } = bitmap;
  bitmap.close();
  return { file, url: null, name, width, height };
}

/**
 * A picture by URL. The page's security policy loads this server's own pictures only; the server
 * fetches all others.
 * @param {string} url
 * @param {string} publicUrl what the URLs of the server's pictures begin with, which may be another host than the page's
 * @returns {Promise<Picture>}
 */
export async function pictureOfUrl(url, publicUrl) {
  const name = url.split(/[?#]/)[0].split("/").pop() || "picture";
  const path = publicUrl && url.startsWith(`${publicUrl}/`) ? ownPath(url) : url;
  if (new URL(path, document.baseURI).origin !== location.origin) return { file: null, url, name, width: 512, height: 512 };
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`There is not a picture at ${url} (status ${answer.status}).`);
  return { ...(await openPicture(await answer.blob(), name)), url };
}

/** @param {{width: number, height: number}} picture @returns {[number, number]} width and height of its mask */
export function maskSize({ width, height }) {
  const scale = Math.min(1, MAX_MASK_SIDE / Math.max(width, height));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/**
 * The file that is sent: as it is where the server takes it, else smaller or in another format.
 * @param {Picture} picture with a file
 * @param {boolean} keepsSize whether the request is only-masked
 * @returns {Promise<{file: Blob, note: string}>} note: a sentence about a change, or ""
 */
export async function fileToSend(picture, keepsSize) {
  const file = /** @type {Blob} */ (picture.file);
  const pixels = picture.width * picture.height;
  const isTooLarge = keepsSize && pixels > MAX_KEPT_PIXELS;
  if (!isTooLarge && file.size <= MAX_BYTES && SENT_AS_IS.includes(file.type)) return { file, note: "" };
  const scale = isTooLarge ? Math.sqrt(MAX_KEPT_PIXELS / pixels) : 1;
  const [canvas, context] = newCanvas(Math.floor(picture.width * scale), Math.floor(picture.height * scale));
  const bitmap = await createImageBitmap(file);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  let sent = file.type === "image/jpeg" ? await toBlob(canvas, "image/jpeg", 0.95) : await toBlob(canvas);
  if (sent.size > MAX_BYTES) sent = await toBlob(canvas, "image/jpeg", 0.92);
  const reason = isTooLarge ? "only-masked keeps up to 4 megapixels" : "the server takes PNG, JPEG and WebP up to 10 MB";
  return { file: sent, note: `Sent as ${canvas.width}×${canvas.height} ${sent.type.slice(6).toUpperCase()}: ${reason}.` };
}

/**
 * The picture with new pixels around it, which repeat its border until they are painted.
 * @param {Picture} picture with a file
 * @param {{left: number, top: number, right: number, bottom: number}} sides
 * @returns {Promise<Picture>}
 */
export async function extendPicture(picture, { left, top, right, bottom }) {
  const bitmap = await createImageBitmap(/** @type {Blob} */ (picture.file));
  const { width, height } = picture;
  const [canvas, context] = newCanvas(width + left + right, height + top + bottom);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, 1, height, 0, top, left, height);
  context.drawImage(bitmap, width - 1, 0, 1, height, left + width, top, right, height);
  context.drawImage(bitmap, 0, 0, width, 1, left, 0, width, top);
  context.drawImage(bitmap, 0, height - 1, width, 1, left, top + height, width, bottom);
  context.drawImage(bitmap, left, top);
  return openPicture(await toBlob(canvas), picture.name);
}

/** A small JPEG for the history. @param {Blob} file @returns {Promise<Blob>} */
export async function thumbnail(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, 160 / Math.max(bitmap.width, bitmap.height));
  const [canvas, context] = newCanvas(Math.ceil(bitmap.width * scale), Math.ceil(bitmap.height * scale));
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return toBlob(canvas, "image/jpeg", 0.8);
}
