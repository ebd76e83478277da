// `replicate`: run. way: "base64" gives the files as data URIs, else the package uploads them first.
// unknown: the id of a prediction to ask for, in place of an edit.
import { readFile } from "node:fs/promises";

import Replicate from "replicate";

import { answerEach } from "./answering.mjs";

async function file(path, way) {
  const content = await readFile(path);
  // The package's own strategy "data-uri" sends an input without fields (1.4.0).
  return way === "base64" ? `data:application/octet-stream;base64,${content.toString("base64")}` : content;
}

async function edit(call) {
  const client = new Replicate({ auth: call.key, baseUrl: `${call.base}/v1` });
  if (call.unknown) return [Buffer.from((await client.predictions.get(call.unknown)).output[0])];
  const input = {
    prompt: call.prompt,
    image: await file(call.image, call.way),
    mask: await file(call.mask, call.way),
    num_inference_steps: call.steps,
    num_outputs: call.n ?? 1,
    seed: call.seed,
    width: 256,
    height: 256,
  };
  const wait = { mode: "block", timeout: call.wait ?? 60 };
  const output = await client.run(call.model, { input, wait });
  return Promise.all(output.map(async (each) => Buffer.from(await (await each.blob()).arrayBuffer())));
}

// The package exports no class of its errors.
await answerEach(edit, Error);
