// Past jobs: the strip of recent ones below the stage, and the gallery of all.

import { showImage } from "./api.js";
import { byId, cut, h } from "./dom.js";
import { hasEnded, jobs, stepsOf } from "./jobs.js";
import { loraName } from "./loras.js";
import { progressOf, stateOf } from "./result.js";

const PAGE = 24; // jobs
const MOST_RECENT = 24; // in the strip

let cursor = 0; // of the next page, null after the last one
let isLoading = false;

/** Set up the gallery, which loads pages as they are scrolled to. */
export function setUpGallery(onError) {
  const more = byId("more-jobs");
  const next = () => loadPage().catch(onError);
  more.addEventListener("click", next);
  new IntersectionObserver(([entry]) => entry.isIntersecting && next(), {
    rootMargin: "200px",
  }).observe(more);
}

/** Show the gallery from its newest job. */
export async function openGallery() {
  byId("cards").replaceChildren();
  cursor = 0;
  await loadPage();
}

/** Show how a job of the gallery is doing by now. */
export function updateCard(id) {
  const item = byId("cards").querySelector(`[data-job="${CSS.escape(id)}"]`);
  if (item) fillCard(item, jobs.get(id));
}

/** Show the recent jobs below the stage; `selected` is on it. */
export function showStrip(selected) {
  const ids = jobs.recent.filter((id) => jobs.get(id)).slice(0, MOST_RECENT);
  const strip = byId("strip");
  strip.hidden = ids.length === 0;
  const byJob = new Map([...strip.children].map((link) => [link.dataset.job, link]));
  const links = ids.map((id) => {
    const job = jobs.get(id);
    const state = `${stateOf(job)} ${job.result ? "full" : ""}`;
    const known = byJob.get(id);
    const link = known?.dataset.state === state ? known : stripLink(job, state);
    if (id === selected) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
    return link;
  });
  // Elements that stay where they are keep the focus.
  if (
    links.some((link, index) => strip.children[index] !== link) ||
    links.length !== strip.children.length
  ) {
    strip.replaceChildren(...links);
  }
}

function stripLink(job, state) {
  const name = job.result ? cut(job.result.request.prompt, 80) || "No prompt" : stateOf(job);
  const link = h(
    "a",
    { href: `#/jobs/${job.id}`, title: name, "data-job": job.id, "data-state": state },
    h("span", {}, stateOf(job)),
  );
  if (job.result) link.replaceChildren(thumbnail(job, name));
  else if (hasEnded(job) && !job.error) {
    whenSeen(link, async () => {
      await jobs.load(job.id);
    });
  }
  return link;
}

async function loadPage() {
  if (isLoading || cursor === null) return;
  isLoading = true;
  try {
    const page = await jobs.list(cursor, PAGE);
    cursor = page.cursor;
    byId("cards").append(...page.jobs.map(card));
    if (!byId("cards").children.length)
      byId("cards").append(h("li", { class: "empty" }, "No jobs yet."));
    byId("more-jobs").hidden = cursor === null;
  } finally {
    isLoading = false;
  }
}

function card(listed) {
  const item = h(
    "li",
    { class: "card", "data-job": listed.id },
    h("span", { class: "missing" }, stateOf(listed)),
  );
  whenSeen(item, async () => {
    await jobs.load(listed.id);
    updateCard(listed.id); // of a job that was known already
  });
  return item;
}

function fillCard(item, job) {
  const when = new Date(job.submitted * 1000);
  const time = h(
    "time",
    { datetime: when.toISOString() },
    when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" }),
  );
  const labels = Object.entries(job.labels ?? {}).filter(([name]) => name !== "compared_with");
  const shown = labels.map(([name, value]) =>
    h("span", { class: "chip" }, `${name}: ${cut(value, 40)}`),
  );
  if (!job.result) {
    const state = hasEnded(job) ? stateOf(job) : progressOf(job.status);
    item.replaceChildren(
      h("a", { href: `#/jobs/${job.id}`, class: "missing" }, state),
      h("p", {}, job.error && stateOf(job) === "failed" ? cut(job.error.message, 160) : ""),
      h("p", { class: "details" }, time),
      h("p", { class: "chips" }, shown),
    );
    return;
  }
  const { request, images, cells, seed } = job.result;
  const steps = stepsOf(job.result);
  const name = cut(request.prompt, 300) || "No prompt";
  const loras = (request.loras ?? []).map((spec) =>
    `${loraName(spec)} ${spec.weight ?? ""}`.trim(),
  );
  const facts = [
    cells.length
      ? `sweep of ${cells.length}`
      : images.length > 1
        ? `${images.length} images`
        : null,
    `${images[0].width} × ${images[0].height}`,
    steps ? `${steps} steps` : null,
    `seed ${seed}`,
  ];
  item.replaceChildren(
    h("a", { href: `#/jobs/${job.id}/fill` }, thumbnail(job, name)),
    h("p", { class: "prompt" }, name),
    loras.length
      ? h(
          "p",
          { class: "chips" },
          loras.map((text) => h("span", { class: "chip" }, cut(text, 40))),
        )
      : "",
    h("p", { class: "details" }, facts.filter(Boolean).join(" · ")),
    h("p", { class: "details" }, time),
    shown.length ? h("p", { class: "chips" }, shown) : "",
  );
}

function thumbnail(job, name) {
  const { width, height } = job.result.sheet ?? job.result.images[0];
  return showImage(h("img", { width, height, alt: name }), job.id, job.result.sheet ? "sheet" : 0);
}

/** Call a function once an element is near the screen. */
function whenSeen(element, call) {
  const observer = new IntersectionObserver(
    ([entry]) => {
      if (!entry.isIntersecting) return;
      observer.disconnect();
      call().catch((error) =>
        element.replaceChildren(h("span", { class: "missing" }, error.message)),
      );
    },
    { rootMargin: "300px" },
  );
  observer.observe(element);
}
