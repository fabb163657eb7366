// The receipt: what each LoRA changed, the recipe, the time of each phase.

import { actions } from "./actions.js";
import { byId, cut, h, seconds, short } from "./dom.js";
import { recipeOf, stepsOf } from "./jobs.js";
import { loraName } from "./loras.js";

const DIGITS = 12; // of a checksum; its title has all

/** Show the receipt of a job that has a result. */
export function showReceipt(job) {
  const receipt = byId("receipt");
  receipt.hidden = !job.result;
  if (!job.result) return;
  const { result } = job;
  const { request } = result;
  const facts = [
    ["Prompt", request.prompt],
    ["Negative", request.negative_prompt],
    [
      "Seed",
      result.images.length > 1 && !result.cells.length ? `${result.seed} and up` : result.seed,
    ],
    ["Size", `${result.images[0].width} × ${result.images[0].height}`],
    ["Steps", stepsOf(result)],
    ["Guidance", result.recipe_fields.guidance_scale ?? request.guidance_scale],
    ["Scheduler", result.scheduler?.replace(/(Discrete)?Scheduler/, "")],
    ["Model", result.model],
    ["Base", baseOf(result)],
    ["Device", result.device],
  ].filter(([, value]) => value !== undefined && value !== null && value !== "");
  receipt.replaceChildren(
    h("h2", {}, "Receipt"),
    ...warningsOf(result).map((text) => h("p", { class: "warning" }, text)),
    result.loras.length ? h("h3", {}, "What each LoRA changed") : "",
    h(
      "ul",
      { class: "changes" },
      result.loras.map((lora, index) => changeOf(job, lora, index)),
    ),
    h("h3", {}, "Recipe"),
    h(
      "dl",
      {},
      facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    ),
    ...labelsOf(job),
    h("h3", {}, "Time"),
    h(
      "dl",
      {},
      Object.entries(result.timings)
        .filter(([, time]) => time >= 0.001)
        .map(([phase, time]) => [
          h("dt", {}, phase),
          h("dd", {}, time < 0.1 ? `${Math.round(time * 1000)} ms` : seconds(time)),
        ]),
    ),
  );
}

/** Return the digest of the base model, and whether it was the same after the job. */
function baseOf({ base_sha256: digest, base_intact: isIntact }) {
  const words = isIntact ? "unchanged by the job" : "not compared after the job";
  return digest ? [h("code", { title: digest }, digest.slice(0, DIGITS)), h("br"), words] : words;
}

function labelsOf(job) {
  const labels = Object.entries(job.labels ?? {});
  if (labels.length === 0) return [];
  const valueOf = (name, value) =>
    name === "compared_with"
      ? h("a", { href: `#/jobs/${encodeURIComponent(value)}` }, "the job beside it")
      : value;
  const rows = labels.map(([name, value]) => [
    h("dt", {}, name.replaceAll("_", " ")),
    h("dd", {}, valueOf(name, value)),
  ]);
  return [h("h3", {}, "Labels"), h("dl", {}, rows)];
}

function changeOf(job, lora, index) {
  const name = lora.catalogue ?? lora.adapter_name ?? loraName({ file: { url: lora.source } });
  const layers = Object.values(lora.modules).reduce((sum, count) => sum + count, 0);
  const weight = lora.unet_weights.length
    ? lora.unet_weights.map(([step, value]) => `${short(value)} from step ${step}`).join(", ")
    : short(lora.unet_weight);
  const norm = lora.relative_norm;
  const text = lora.text_encoder_weight;
  const isSwept = Object.keys(job.result.request.sweep ?? {}).some((path) => /^loras\b/.test(path));
  const isUsed = lora.unet_weight !== 0 || text !== 0;
  const details = [
    `weight ${weight}${isSwept ? " in the image that it changes most" : ""}`,
    isUsed && text !== lora.unet_weight ? `${short(text)} in the text encoders` : null,
    isUsed ? `${layers} layers` : "not used",
    lora.ranks.length ? `rank ${lora.ranks.join(", ")}` : null,
    isUsed ? `from ${lora.tier}` : null,
    lora.recipe ? `recipe ${lora.recipe}` : null,
  ];
  const canRemove = !job.result.cells.length && index < (job.result.request.loras ?? []).length;
  return h(
    "li",
    {},
    h("strong", { title: lora.source }, cut(name, 60)),
    norm === null
      ? null
      : h(
          "span",
          { class: "norm" },
          h("meter", {
            min: 0,
            max: 1,
            value: Math.min(1, norm),
            "aria-label": `Relative norm of the change by ${name}`,
          }),
          h(
            "span",
            { title: "Norm of the change, divided by the norm of the weights that it changes" },
            `${isSwept ? "up to " : ""}${short(norm * 100, 1)} %`,
          ),
        ),
    h("span", { class: "details" }, details.filter(Boolean).join(" · ")),
    lora.trigger_words.length
      ? h("span", { class: "details" }, `Trigger words: ${lora.trigger_words.join(", ")}`)
      : null,
    canRemove
      ? h(
          "button",
          {
            type: "button",
            onclick: () => withoutLora(job, index, name),
            "aria-label": `Draw without it: ${name}`,
          },
          "Draw without it",
        )
      : null,
  );
}

function withoutLora(job, index, name) {
  const recipe = recipeOf(job.result);
  const loras = recipe.loras.filter((_, other) => other !== index);
  actions.draw({ ...recipe, loras }, [`compared_with=${job.id}`, `without=${cut(name, 200)}`]);
}

function warningsOf(result) {
  const texts = [
    ...result.loras.flatMap((lora) =>
      lora.warnings.map((text) => `${lora.catalogue ?? lora.source}: ${text}`),
    ),
    ...(result.prompt_receipt?.warnings ?? []),
    ...(result.negative_prompt_receipt?.warnings ?? []),
    ...(result.image_receipt?.notes ?? []),
  ];
  if (result.tiled) texts.push("Memory allowed only a decode in tiles.");
  return [...new Set(texts)];
}
