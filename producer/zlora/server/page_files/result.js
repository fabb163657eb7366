// The stage: the progress of a job, its images, and what can be done with them.

import { actions } from "./actions.js";
import { saveImage, showImage } from "./api.js";
import { byId, cut, h, seconds, size } from "./dom.js";
import { messageOf } from "./form.js";
import { hasEnded, jobs, recipeOf } from "./jobs.js";
import { loraName } from "./loras.js";
import { showReceipt } from "./receipt.js";
import { sweepGrid } from "./sweep.js";

/** Return one word for the state of a job. */
export function stateOf(job) {
  if (job.error)
    return { job_revoked: "cancelled", expired: "expired" }[job.error.code] ?? "failed";
  const words = { SUCCESS: "done", FAILURE: "failed", REVOKED: "cancelled", UNKNOWN: "expired" };
  return words[job.status.state] ?? (job.status.phase === "queued" ? "queued" : "running");
}

/** Return what a job is doing, in a few words. */
export function progressOf({ state, phase, position, step, steps, eta, received, expected, code }) {
  if (phase === "away") return "The server does not answer; asking again";
  if (state === "PENDING" || phase === "queued") {
    if (position === undefined) return "In the queue";
    return position === 0 ? "Next in the queue" : `In the queue, behind ${position}`;
  }
  if (phase === "fetching") {
    const bytes = received === undefined ? "" : ` · ${size(received)}`;
    return `Fetching LoRAs${bytes}${expected === undefined ? "" : ` of ${size(expected)}`}`;
  }
  if (phase === "denoising") {
    const rest = eta === undefined ? "" : ` · ${seconds(eta)} left`;
    return `Step ${step ?? 0} of ${steps ?? "…"}${rest}`;
  }
  if (phase === "uploading") return "Storing the image";
  if (phase === "waiting" || state === "RETRY")
    return `Waiting to try again${code ? ` (${code})` : ""}`;
  return "Loading";
}

/** Show a job, beside the one that its labels compare it with. */
export function showJob(job) {
  const stage = byId("stage");
  const compared = job.labels?.compared_with && jobs.get(job.labels.compared_with);
  // A status changes the progress only: what has the focus stays.
  if (stage.dataset.job === job.id && !hasEnded(job) && stage.dataset.state === "open") {
    updateProgress(job.status);
    return;
  }
  stage.dataset.job = job.id;
  stage.dataset.state = hasEnded(job) ? "ended" : "open";
  const main = hasEnded(job) ? endOf(job) : progressView(job);
  if (compared?.result) {
    const before = figure(compared, 0, captionOf(compared));
    const caption = job.labels.without ? `Without ${job.labels.without}` : "Drawn again";
    const after = job.result ? [figure(job, 0, caption), sameness(job, compared)] : main;
    stage.replaceChildren(
      h("div", { class: "pair" }, h("div", {}, before), h("div", {}, after)),
      job.result ? toolbar(job) : "",
    );
  } else {
    stage.replaceChildren(...[main].flat(), job.result ? toolbar(job) : "");
  }
  showReceipt(job);
}

/** Show that there is nothing yet. */
export function showNothing() {
  const stage = byId("stage");
  delete stage.dataset.job;
  stage.replaceChildren(
    h(
      "div",
      { class: "empty" },
      h("p", {}, "Describe an image, and press Draw."),
      h(
        "p",
        {},
        h("kbd", {}, "Ctrl"),
        " ",
        h("kbd", {}, "Enter"),
        " draws from anywhere in the form.",
      ),
    ),
  );
  byId("receipt").hidden = true;
}

/** Show an image at its full size, with what can be done with it. */
export function enlarge(job, index) {
  const viewer = byId("viewer");
  byId("viewer-image").replaceChildren(imageElement(job, index));
  byId("viewer-caption").textContent = `Seed ${job.result.images[index].seed}`;
  byId("viewer-save").onclick = () =>
    actions.save(() => saveImage(job.id, index, fileName(job, index)));
  byId("viewer-start").onclick = () => {
    viewer.close();
    actions.startFrom(job, index);
  };
  const count = job.result.images.length;
  for (const [id, key, step] of [
    ["viewer-previous", "ArrowLeft", count - 1],
    ["viewer-next", "ArrowRight", 1],
  ]) {
    byId(id).hidden = count === 1;
    byId(id).onclick = () => enlarge(job, (index + step) % count);
    byId(id).setAttribute("aria-keyshortcuts", key);
  }
  if (!viewer.open) viewer.showModal();
}

function progressView(job) {
  return h(
    "div",
    { class: "progress" },
    h("div", { class: "frame", id: "preview" }),
    h("progress", { id: "progress-bar", max: 1, "aria-label": "Progress of the job" }),
    h("p", { id: "progress-text" }, progressOf(job.status)),
    h("button", { type: "button", id: "cancel", onclick: () => actions.cancel(job.id) }, "Cancel"),
  );
}

function updateProgress(status) {
  byId("progress-text").textContent = progressOf(status);
  const bar = byId("progress-bar");
  if (status.steps) bar.value = (status.step ?? 0) / status.steps;
  else bar.removeAttribute("value");
  if (!status.preview?.startsWith("data:image/")) return;
  const shown = byId("preview").querySelector("img");
  if (shown) shown.src = status.preview;
  else byId("preview").replaceChildren(h("img", { src: status.preview, alt: "The image so far" }));
}

function endOf(job) {
  if (job.result) return imagesOf(job);
  if (job.error) {
    const isCancelled = stateOf(job) === "cancelled";
    return h(
      "div",
      { class: isCancelled ? "empty" : "failure", role: "alert" },
      h("h2", {}, isCancelled ? "Cancelled" : "This job has failed"),
      isCancelled ? null : h("p", {}, messageOf(job.error)),
      isCancelled ? null : h("p", { class: "code" }, job.error.code),
      job.request
        ? h("button", { type: "button", onclick: () => actions.draw(job.request) }, "Draw again")
        : null,
    );
  }
  return h("div", { class: "empty" }, h("p", {}, "The record of this job has expired."));
}

function imagesOf(job) {
  const { images, cells } = job.result;
  if (cells.length) {
    const image = (index, label) => figure(job, index, "", label);
    return h(
      "div",
      {
        class: "frame sweep-frame",
        tabindex: "0",
        role: "region",
        "aria-label": "Images of the sweep",
      },
      sweepGrid(cells, image),
    );
  }
  if (images.length === 1) return figure(job, 0, "");
  return h(
    "div",
    { class: "several" },
    images.map((image, index) => figure(job, index, `Seed ${image.seed}`)),
  );
}

/** Return the element of an image; those who cannot see it are told `alt`, else the prompt. */
export function imageElement(job, index, alt) {
  const { width, height } = job.result.images[index];
  const text = alt ?? (cut(job.result.request.prompt, 200) || `Image ${index}`);
  const image = h("img", { width, height, alt: text, class: width < 200 ? "small" : "" });
  return showImage(image, job.id, index);
}

function figure(job, index, caption, label) {
  const image = imageElement(job, index, label);
  const open = h(
    "button",
    { type: "button", class: "picture", onclick: () => enlarge(job, index) },
    image,
  );
  const uses = job.result.cells.length
    ? h(
        "button",
        {
          type: "button",
          class: "use",
          onclick: () => actions.fill(cellRecipe(job, index)),
          "aria-label": `Use the values of ${label}`,
        },
        "Use",
      )
    : null;
  return h("figure", {}, open, caption ? h("figcaption", {}, caption) : null, uses);
}

function toolbar(job) {
  const { result } = job;
  const recipe = recipeOf(result);
  const { seed: _seed, ...withoutSeed } = recipe;
  const button = (text, onclick, title) => h("button", { type: "button", onclick, title }, text);
  const isSweep = result.cells.length > 0;
  const isOne = result.images.length === 1;
  const compared = isSweep ? [] : [`compared_with=${job.id}`];
  const saveSheet = () => saveImage(job.id, "sheet", `${job.id}-sheet.jpeg`);
  return h(
    "div",
    { class: "toolbar", role: "group", "aria-label": "What to do with this result" },
    button("Again", () => actions.draw(recipe, compared), "The same recipe and seed once more"),
    recipe.sweep?.seed
      ? null
      : button("Vary seed", () => actions.draw(withoutSeed), "The same recipe with another seed"),
    button(
      "Use this recipe",
      () => actions.fill(recipe),
      "Fill the form with what drew this image",
    ),
    isOne ? button("Start from it", () => actions.startFrom(job, 0), "Draw from this image") : null,
    isOne ? button("Save", () => actions.save(() => saveImage(job.id, 0, fileName(job, 0)))) : null,
    result.sheet ? button("Save sheet", () => actions.save(saveSheet)) : null,
  );
}

function sameness(job, compared) {
  if (job.labels.without) return null;
  const [one, other] = [job, compared].map(({ result }) =>
    result.images.map((image) => image.pixels_sha256).join(),
  );
  return h(
    "p",
    { class: "details" },
    one === other ? "The same pixels, to the last bit." : "Other pixels.",
  );
}

function captionOf(job) {
  const names = (job.result.request.loras ?? []).map(loraName);
  return names.length ? `With ${names.join(", ")}` : "Without LoRAs";
}

function cellRecipe(job, index) {
  const { request } = job.result.cells[index];
  return { seed: job.result.images[index].seed, ...request };
}

const fileName = (job, index) => `${job.id}-${job.result.images[index].key.split("/").pop()}`;
