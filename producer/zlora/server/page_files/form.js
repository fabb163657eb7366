// The form as a request, a request as the form, and errors at their fields.

import { byId, h } from "./dom.js";
import { fillLoras, inputNamedIn, offerNames, readLoras } from "./loras.js";
import { WrongValue, fillSweep, readSweep } from "./sweep.js";

const NUMBERS = {
  width: "width",
  height: "height",
  seed: "seed",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  num_images: "images",
  strength: "strength",
};
const TEXTS = { model: "model", scheduler: "scheduler", output_format: "format" };
const MIN_SIDE = 64; // pixels
const SHAPES = [
  [1, 1],
  [4, 5],
  [3, 4],
  [2, 3],
  [9, 16],
  [5, 4],
  [4, 3],
  [3, 2],
  [16, 9],
];
// What errors call the types of JSON.
const TYPES = { int: "a whole number", float: "a number", str: "a text", bool: "true or false" };
const DRAFT = "zlora-draft"; // in sessionStorage: a reload keeps the form

let filledImage; // with its checksum, as long as its address is in the field
let limits = { side_step: 8, prompts: "windows" };

/** Offer what the queue serves, by its record. */
export function offerServed(info) {
  limits = info.limits;
  offerNames(info.catalogue);
  offer(
    "model",
    info.models.map((name) => [name, name]),
  );
  byId("model-field").hidden = info.models.length < 2;
  const own = info.scheduler.replace(/(Discrete)?Scheduler$/, "");
  offer("scheduler", [["", `Default: ${own}`], ...info.schedulers.map((name) => [name, name])]);
  byId("steps").placeholder = info.num_inference_steps;
  byId("guidance").placeholder = info.guidance_scale;
  byId("width").placeholder = info.width;
  byId("height").placeholder = info.height;
  byId("width").step = byId("height").step = limits.side_step;
  const shapes = SHAPES.map(([wide, high]) => [
    sides(wide / high, info.width * info.height).join(" "),
    `${wide}:${high}`,
  ]);
  const others = shapes.filter(([value]) => value !== `${info.width} ${info.height}`);
  offer("shape", [["", "Default"], ...others, ["other", "Other"]]);
  const isChat = limits.prompts === "chat"; // one message, which has neither weights nor previews
  byId("syntax-field").hidden = byId("previews-field").hidden = isChat;
}

/** Set up what the fields do by themselves; `onChange` is called after each change. */
export function setUpForm(onChange) {
  byId("form").addEventListener("input", onChange);
  byId("shape").addEventListener("input", () => {
    const shape = byId("shape").value;
    if (shape === "other") byId("width").focus();
    else [byId("width").value, byId("height").value] = shape === "" ? ["", ""] : shape.split(" ");
  });
  byId("swap").addEventListener("click", () => {
    const [width, height] = [byId("width"), byId("height")];
    [width.value, height.value] = [height.value, width.value];
    onChange();
  });
  byId("random-seed").addEventListener("click", () => {
    byId("seed").value = "";
    byId("seed").focus();
    onChange();
  });
  byId("image").addEventListener("input", () => byId("image-shown").replaceChildren());
  byId("image-remove").addEventListener("click", () => {
    startFrom(undefined);
    byId("image").focus();
    onChange();
  });
}

/** Set the image to start from; `shown` is an element that shows it, if there is one. */
export function startFrom(asset, shown) {
  filledImage = asset;
  byId("image").value = addressOf(asset) ?? "";
  byId("image-shown").replaceChildren(...(shown ? [shown] : []));
  byId("image-group").open ||= asset !== undefined;
}

/** Return the request of the form; raise `WrongValue`. */
export function readForm() {
  const request = { ...otherFields(), prompt: byId("prompt").value };
  const negative = byId("negative").value;
  if (negative) request.negative_prompt = negative;
  const loras = readLoras();
  if (loras.length) request.loras = loras;
  for (const [field, id] of Object.entries(NUMBERS)) {
    const input = byId(id);
    if (input.validity.badInput) throw new WrongValue(input, "Expected a number");
    if (input.value !== "") request[field] = Number(input.value);
  }
  for (const [field, id] of Object.entries(TEXTS)) {
    const { value, options } = byId(id);
    if (value && value !== options[0].value) request[field] = value;
  }
  if (byId("syntax").checked) request.prompt_syntax = "a1111";
  if (byId("previews").checked && limits.prompts !== "chat") request.previews = true;
  const address = byId("image").value.trim();
  if (address === addressOf(filledImage)) request.image = filledImage;
  else if (address)
    request.image = /^(job|upload):/.test(address) ? { ref: address } : { url: address };
  request.sweep = readSweep();
  if (request.sweep || request.num_images === 1) delete request.num_images;
  return request;
}

/** Fill the form with a request; what it has no field for goes to the other fields as JSON. */
export function fillForm(request) {
  clearErrors();
  const { prompt, negative_prompt, loras, prompt_syntax, previews, sweep, image, ...rest } =
    request;
  byId("prompt").value = prompt ?? "";
  byId("negative").value = negative_prompt ?? "";
  byId("syntax").checked = prompt_syntax === "a1111";
  if (previews !== undefined) byId("previews").checked = previews;
  for (const [field, id] of Object.entries(NUMBERS)) {
    byId(id).value = rest[field] ?? (field === "num_images" ? 1 : "");
    delete rest[field];
  }
  for (const [field, id] of Object.entries(TEXTS)) {
    choose(byId(id), rest[field] ?? byId(id).options[0].value);
    delete rest[field];
  }
  startFrom(image);
  fillLoras(loras ?? []);
  fillSweep(sweep);
  byId("sweep-group").open = sweep !== undefined;
  byId("other").value = Object.keys(rest).length ? JSON.stringify(rest, null, 2) : "";
  if (byId("other").value) byId("more-group").open = true;
  showShape();
}

/** Select the shape that the sides have. */
export function showShape() {
  const sidesText = [byId("width").value, byId("height").value].join(" ").trim();
  const isOffered = [...byId("shape").options].some((option) => option.value === sidesText);
  byId("shape").value = isOffered ? sidesText : "other";
}

/** Keep the form for the case of a reload. */
export function keepDraft() {
  try {
    sessionStorage.setItem(DRAFT, JSON.stringify(readForm()));
  } catch (error) {
    if (!(error instanceof WrongValue)) throw error;
  }
}

/** Return what the form had before a reload. */
export function keptDraft() {
  const text = sessionStorage.getItem(DRAFT);
  return text === null ? undefined : JSON.parse(text);
}

/** Show an error of the API, or a `WrongValue`, at its field; return whether it has one. */
export function showError(error) {
  clearErrors();
  const input = error.input ?? inputAt(error.path) ?? inputNamedIn(error.message);
  if (input === undefined) return false;
  for (
    let group = input.closest("details");
    group;
    group = group.parentElement.closest("details")
  ) {
    group.open = true;
  }
  const note = h("p", { class: "error", id: "field-error" }, messageOf(error));
  const field = input.closest(".field");
  const cell = input.closest(".grid > *");
  if (cell) cell.after(note); // a cell is too narrow for a sentence
  else field.append(note);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", note.id);
  input.focus({ preventScroll: true });
  field.scrollIntoView({ block: "nearest" });
  return true;
}

export function clearErrors() {
  byId("field-error")?.remove();
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}

/** Return an error's message in words, without the path, which the place of the message says. */
export function messageOf({ path, message }) {
  const prefix = path ? `${path}: ` : "";
  const text = message.startsWith(prefix) ? message.slice(prefix.length) : message;
  return text.replace(/^Expected `(\w+)(?: \| null)?`/, (found, type) =>
    type in TYPES ? `Expected ${TYPES[type]}` : found,
  );
}

/** Return the input for a path such as `$.loras[0].weight`: that of the longest part of it. */
function inputAt(path) {
  if (!path) return undefined;
  const name = /^\$\.(\w+)/.exec(path)?.[1];
  if (byId("other").value.includes(JSON.stringify(name))) return byId("other");
  const inputs = [...document.querySelectorAll("#form [data-path]")].filter(({ dataset }) => {
    const rest = path.startsWith(dataset.path) ? path.slice(dataset.path.length) : "no";
    return /^($|[.[])/.test(rest);
  });
  inputs.sort((one, other) => other.dataset.path.length - one.dataset.path.length);
  return inputs[0];
}

const addressOf = (asset) => asset?.url ?? asset?.ref ?? asset?.cozy_ref;

function otherFields() {
  const text = byId("other").value.trim();
  if (text === "") return {};
  try {
    const found = JSON.parse(text);
    if (typeof found === "object" && found !== null && !Array.isArray(found)) return found;
  } catch {
    // The message below says what is expected.
  }
  throw new WrongValue(byId("other"), 'Expected a JSON object, such as {"clip_skip": 1}');
}

/** Replace the options of a select, each value and text; what is chosen stays. */
function offer(id, options) {
  const chosen = byId(id).value;
  byId(id).replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
  if (chosen) choose(byId(id), chosen);
}

/** Choose a value, also one that is not offered: the server says what is wrong with it. */
function choose(select, value) {
  const isOffered = [...select.options].some((option) => option.value === value);
  if (!isOffered) select.append(h("option", { value }, value));
  select.value = value;
}

/** Return the sides of an image with a ratio, and with about as many pixels if it may. */
function sides(ratio, pixels) {
  const shorter = Math.max(MIN_SIDE, Math.sqrt(pixels * Math.min(ratio, 1 / ratio)));
  const [width, height] = ratio < 1 ? [shorter, shorter / ratio] : [shorter * ratio, shorter];
  const rounded = (side) => Math.round(side / limits.side_step) * limits.side_step;
  return [rounded(width), rounded(height)];
}
