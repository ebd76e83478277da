// `openai`: images.edit. way: "stream" sends the files chunked and without a type.
import { createReadStream } from "node:fs";
import { readFile } from "node:fs/promises";

import OpenAI, { toFile } from "openai";

import { answerEach } from "./answering.mjs";

async function file(path, way) {
  if (way === "stream") return createReadStream(path);
  return toFile(await readFile(path), "picture.png", { type: "image/png" });
}

async function edit(call) {
  const client = new OpenAI({ baseURL: `${call.base}/v1`, apiKey: call.key });
  const answer = await client.images.edit({
    image: await file(call.image, call.way),
    mask: await file(call.mask, call.way),
    prompt: call.prompt,
    model: "gpt-image-1",
    size: "256x256",
    seed: call.seed,
    num_inference_steps: call.steps,
  });
  return answer.data.map((each) => Buffer.from(each.b64_json, "base64"));
}

await answerEach(edit, OpenAI.APIError);
