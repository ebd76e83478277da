// Edits a picture: node javascript.mjs PICTURE MASK PROMPT OUT
import { readFile, writeFile } from "node:fs/promises";

const { INPAINT_URL: url = "http://127.0.0.1:8000", INPAINT_KEY: key = "" } = process.env;
const [picture, mask, prompt, out] = process.argv.slice(2);

async function post(path, fields) {
  const answer = await fetch(url + path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ key, ...fields }),
  });
  return answer.json();
}

let answer = await post("/api/v3/inpaint", {
  prompt,
  init_image: await readFile(picture, "base64"),
  mask_image: await readFile(mask, "base64"),
});
while (answer.status === "processing") {
  await new Promise((resolve) => setTimeout(resolve, 1000));
  answer = await post(`/api/v3/fetch/${answer.id}`, {});
}
if (answer.status !== "success") {
  console.error(JSON.stringify(answer));
  process.exit(1);
}
const file = await fetch(answer.output[0]);
await writeFile(out, Buffer.from(await file.arrayBuffer()));
