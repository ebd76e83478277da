// Posts a file twice with Node's fetch: post.mjs URL FILE.
import { readFile } from "node:fs/promises";

const [url, file] = process.argv.slice(2);
for (let call = 0; call < 2; call++) {
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(url, { method: "POST", headers, body: await readFile(file, "utf8") });
  console.log(await answer.text());
}
