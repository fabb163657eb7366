/*
Draw an image with two LoRAs over HTTP, follow the job, and save the image.

It needs a running `zlora serve`, and Node.js 24. From the folder of the clone:

    node examples/typescript/draw.ts "a lighthouse at dusk" demo://anime-style demo://neon-lights

`ZLORA_SERVER` is the address of the server, `ZLORA_API_KEY` a key if it wants one. The types are
those of the server's OpenAPI document.
*/

import { writeFile } from "node:fs/promises";
import type { components } from "./zlora.d.ts";

type Request = components["schemas"]["GenerateRequest"];
type Job = components["schemas"]["Job"];
type Status = components["schemas"]["JobStatus"];
type Problem = components["schemas"]["Problem"];

const server = process.env.ZLORA_SERVER ?? "http://127.0.0.1:8000";
const key = process.env.ZLORA_API_KEY;
const headers: Record<string, string> = key ? { Authorization: `Bearer ${key}` } : {};

async function call(path: string, options: RequestInit = {}): Promise<Response> {
  const answer = await fetch(server + path, { ...options, headers });
  if (!answer.ok) {
    const problem = (await answer.json()) as Problem;
    throw new Error(`${problem.code}: ${problem.detail}`);
  }
  return answer;
}

/** Yield name and data of each server-sent event. */
async function* events(body: AsyncIterable<Uint8Array>): AsyncGenerator<[string, string]> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of body) {
    const parts = (text + decoder.decode(chunk, { stream: true })).split("\n\n");
    text = parts.pop() ?? "";
    for (const part of parts) {
      const [, name, data] = /^event: (.*)\n(?:id: .*\n)?data: (.*)$/.exec(part) ?? [];
      if (name !== undefined && data !== undefined) yield [name, data];
    }
  }
}

const [prompt = "a lighthouse at dusk", ...addresses] = process.argv.slice(2);
const request: Request = {
  prompt,
  loras: addresses.map((url) => ({ file: { url }, weight: 0.8 })),
};
const submitted = await call("/v1/jobs", { method: "POST", body: JSON.stringify(request) });
let job = (await submitted.json()) as Job;

const stream = await call(`/v1/jobs/${job.id}/events`);
for await (const [name, data] of events(stream.body!)) {
  if (name === "status") {
    const status = JSON.parse(data) as Status;
    console.log(status.phase, status.step ?? "", status.steps ? `of ${status.steps}` : "");
  } else if (name === "end") {
    job = JSON.parse(data) as Job;
  }
}

if (!job.result) throw new Error(job.error ? `${job.error.code}: ${job.error.message}` : "no end");
for (const receipt of job.result.loras) {
  console.log(receipt.source, "changes", receipt.relative_norm);
}
const image = await call(`/v1/jobs/${job.id}/images/0`);
await writeFile(`${job.id}.png`, new Uint8Array(await image.arrayBuffer()));
console.log(`${job.id}.png`);
