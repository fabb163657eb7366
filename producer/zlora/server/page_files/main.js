// The page: which view and which job it shows, and what keys and buttons do.

import { actions } from "./actions.js";
import { Problem, forgetKey, get, hasKey, onUnauthorized } from "./api.js";
import { announce, byId } from "./dom.js";
import * as form from "./form.js";
import { openGallery, setUpGallery, showStrip, updateCard } from "./gallery.js";
import { isOver, jobs, recipeOf } from "./jobs.js";
import { setUpLoras } from "./loras.js";
import { imageElement, showJob, showNothing, stateOf } from "./result.js";
import { WrongValue, countWords, offerFields, setUpSweep } from "./sweep.js";

const LOOK = 2000; // milliseconds between two questions for a worker

let selected = null; // id of the job on the stage
let fromForm = null; // id of the job that the form has made as it stands
let spoken = ""; // what screen readers were told last of the selected job

/** Return a function that shows its errors: at the field, else below the form. */
const reporting =
  (call) =>
  async (...args) => {
    byId("form-error").hidden = true;
    form.clearErrors();
    try {
      await call(...args);
    } catch (error) {
      if (!(error instanceof Problem || error instanceof WrongValue)) throw error;
      showProblem(error);
    }
  };

function showProblem(error) {
  if (form.showError(error)) return;
  const box = byId("form-error");
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  box.textContent = error.message + wait;
  box.hidden = false;
}

const draw = reporting(async (request, labels) => {
  const job = await jobs.submit(request, labels);
  location.hash = `#/jobs/${job.id}`;
});

const drawForm = reporting(async () => {
  byId("submit").disabled = true;
  try {
    const job = await jobs.submit(form.readForm());
    fromForm = job.id;
    location.hash = `#/jobs/${job.id}`;
  } finally {
    byId("submit").disabled = false;
  }
});

/** Show that there is no job to show. */
function showNoJob() {
  selected = null;
  jobs.unfollow();
  showNothing();
  showStrip(selected);
}

function fill(request) {
  form.fillForm(request);
  onFormChange();
  announce("The form has this recipe.");
  byId("prompt").focus();
}

/** Show why a job has failed at the field of the form that it is from. */
function showFailure(job) {
  const isCancelled = stateOf(job) === "cancelled";
  if (job.id === fromForm && job.error && !isCancelled) form.showError(new Problem(job.error));
}

function onFormChange() {
  fromForm = null;
  offerFields();
  byId("sweep-count").textContent = countWords();
  byId("images").disabled = countWords() !== "";
  form.showShape();
  form.keepDraft();
}

Object.assign(actions, {
  draw,
  fill,
  cancel: reporting((id) => jobs.cancel(id)),
  save: reporting((save) => save()),
  startFrom(job, index) {
    form.startFrom({ ref: `job:${job.id}#${index}` }, imageElement(job, index));
    onFormChange();
    byId("strength").focus();
  },
});

const upload = reporting(async (file) => {
  const asset = await get("/v1/uploads", { method: "POST", body: file });
  const shown = Object.assign(document.createElement("img"), {
    alt: file.name,
    src: URL.createObjectURL(file),
  });
  shown.addEventListener("load", () => URL.revokeObjectURL(shown.src), { once: true });
  form.startFrom(asset, shown);
  onFormChange();
});

/** Take images that are chosen, dropped or pasted. */
function setUpUploads() {
  const take = (files) => {
    const file = [...files].find(({ type }) => type.startsWith("image/"));
    if (file) upload(file);
    return file !== undefined;
  };
  byId("image-file").addEventListener("change", ({ target }) => take(target.files));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault(); // else the browser would leave the page for the file
    take(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => take(event.clipboardData.files) && event.preventDefault());
}

/** Show the view and the job that the address names. */
const route = reporting(async () => {
  const [, view, id, option] = location.hash.split("/");
  const isGallery = view === "gallery";
  byId("draw").hidden = isGallery;
  byId("gallery").hidden = !isGallery;
  byId("to-draw").setAttribute("aria-current", isGallery ? "false" : "page");
  byId("to-gallery").setAttribute("aria-current", isGallery ? "page" : "false");
  if (isGallery) return openGallery();
  if (view !== "jobs") return selected === null ? showNothing() : undefined;
  const job = await jobs.load(id).catch((error) => {
    showNoJob();
    throw error;
  });
  selected = id;
  spoken = stateOf(job);
  const fills = option === "fill" && job.result;
  if (fills) {
    history.replaceState(null, "", `#/jobs/${id}`);
    fill(recipeOf(job.result));
  }
  const compared = job.labels?.compared_with;
  if (compared) await jobs.load(compared).catch(() => {}); // it may have expired
  showJob(job);
  // On a phone the form is above the stage, and recent jobs are below.
  if (!fills) byId("stage").scrollIntoView({ block: "start" });
  showStrip(selected);
  showFailure(job);
  return isOver(job) ? jobs.unfollow() : jobs.follow(id);
});

jobs.addEventListener("change", ({ detail: id }) => {
  showStrip(selected);
  if (id === null) return;
  updateCard(id);
  if (id !== selected) return;
  const job = jobs.get(id);
  showJob(job);
  const state = stateOf(job);
  if (state !== spoken) announce(`The job is ${state}.`);
  spoken = state;
  showFailure(job);
});

/** Ask for an API key in a dialog; resolve to null if the user cancels. */
function askForKey(wasWrong) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-hint").textContent = wasWrong
    ? "The server does not know this key."
    : "This server asks for a key, which stays in this tab until the tab is closed.";
  byId("change-key").hidden = false;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const onClose = () => resolve(dialog.returnValue === "" ? null : dialog.returnValue);
    dialog.addEventListener("close", onClose, { once: true });
  });
}

function setUpDialogs() {
  const dialog = byId("key-dialog");
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close(byId("key").value.trim());
  });
  byId("key-cancel").addEventListener("click", () => dialog.close(""));
  byId("change-key").hidden = !hasKey();
  byId("change-key").addEventListener("click", () => {
    forgetKey();
    location.assign("#/");
    location.reload();
  });
  const viewer = byId("viewer");
  byId("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", ({ target }) => target === viewer && viewer.close());
  viewer.addEventListener("keydown", ({ key }) => {
    const button = { ArrowLeft: "viewer-previous", ArrowRight: "viewer-next" }[key];
    if (button && !byId(button).hidden) byId(button).click();
  });
}

/** Ask until a worker has said what the queue serves; return whether it may be asked at all. */
async function learnServed() {
  for (;;) {
    try {
      const info = await get("/v1/queue");
      form.offerServed(info);
      byId("served").textContent = [info.base, ...info.models].filter(Boolean).join(" · ");
      return true;
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      const isStarting = error.code === "not_found";
      byId("served").textContent = isStarting ? "No worker has its model yet …" : error.message;
      if (!isStarting && !error.retryable) return false;
    }
    await new Promise((resolve) => setTimeout(resolve, LOOK));
  }
}

/** Learn what the queue serves, then show the job that the address names, and recent ones. */
async function start() {
  const isAllowed = await learnServed();
  onFormChange();
  if (isAllowed) {
    route();
    jobs.loadRecent().catch(showProblem);
  } else if (selected === null) {
    showNothing();
  }
}

let starting = null;

/** Start, also anew once there is a key; not twice at the same time. */
function startOnce() {
  starting ??= start().finally(() => {
    starting = null;
  });
  return starting;
}

setUpDialogs();
setUpUploads();
onUnauthorized(askForKey, startOnce);
setUpLoras(onFormChange);
setUpSweep(onFormChange);
form.setUpForm(onFormChange);
setUpGallery(showProblem);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  drawForm();
});
byId("clear").addEventListener("click", () => fill({ prompt: "" }));
document.addEventListener("keydown", (event) => {
  const isDraw = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (!isDraw || byId("draw").hidden || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
addEventListener("hashchange", route);

const draft = form.keptDraft();
if (draft) form.fillForm(draft);
await startOnce();
jobs.watch();
