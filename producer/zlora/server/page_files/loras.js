// The LoRAs of the form: a row each, with name, weight, and what a recipe says beyond that.

import { byId, h } from "./dom.js";

const SLIDER = { min: -1, max: 2, step: 0.05 }; // of a weight; the number beside it may be greater
const MOST_CHIPS = 12; // names of the catalogue that are shown as buttons

let names = [];
let isWhole = true; // whether `names` are all names of the catalogue
let rows = [];
let lastRow = 0;
let changed = () => {};

/** Set up the inputs that add a LoRA; `onChange` is called after each change. */
export function setUpLoras(onChange) {
  changed = onChange;
  const input = byId("lora-new");
  const addTyped = () => {
    const text = input.value.trim();
    if (text === "") return input.focus();
    input.value = "";
    addLora({ file: { url: addressOf(text) } });
  };
  byId("lora-add").addEventListener("click", addTyped);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    addTyped();
  });
}

/** Offer the names of the catalogue, null if it has too many to list. */
export function offerNames(catalogue) {
  isWhole = catalogue !== null;
  names = catalogue ?? [];
  byId("lora-names").replaceChildren(...names.map((name) => h("option", { value: name })));
  render();
}

/** Return the name by which people know a LoRA of a request. */
export function loraName(spec) {
  if (spec.adapter_name) return spec.adapter_name;
  const address = spec.file.url ?? spec.file.ref ?? spec.file.cozy_ref;
  const last = address.split(/[?#]/, 1)[0].split("/").filter(Boolean).pop() ?? address;
  return decoded(last).replace(/\.safetensors$/, "");
}

/** Return the LoRAs as a request has them. */
export const readLoras = () => rows.map((row) => row.read());

/** Return id and name of each row; the id stays when other rows are removed. */
export const loraRows = () => rows.map((row) => ({ id: row.id, name: row.name }));

/** Return the input of the LoRA whose address a message begins with, as those of workers do. */
export function inputNamedIn(message) {
  return rows.find((row) => message.startsWith(`${row.address.split(/[?#]/, 1)[0]}: `))?.weight;
}

/** Replace all rows. */
export function fillLoras(specs) {
  rows = specs.map(makeRow);
  render();
}

/** Add a row, and put the focus on its weight. */
export function addLora(spec) {
  const row = makeRow(spec);
  rows.push(row);
  render();
  row.weight.focus();
}

function makeRow(spec) {
  const { weight, ...rest } = spec;
  const id = (lastRow += 1);
  const name = loraName(spec);
  const isNamed = spec.file.url?.startsWith("lora://") ?? false;
  const weightInput = h("input", {
    type: "number",
    step: "any",
    value: weight ?? "",
    placeholder: isNamed ? "usual" : "1",
    title: isNamed ? "Empty for the usual weight by the catalogue" : "Empty for 1",
    "aria-label": `Weight of ${name}`,
  });
  const slider = h("input", {
    type: "range",
    "aria-label": `Weight of ${name}, slider`,
    ...SLIDER,
  });
  const follow = () => {
    const value = weightInput.valueAsNumber;
    slider.classList.toggle("unset", Number.isNaN(value));
    slider.min = Math.min(SLIDER.min, value || 0);
    slider.max = Math.max(SLIDER.max, value || 0);
    slider.value = Number.isNaN(value) ? 1 : value;
  };
  weightInput.addEventListener("input", follow);
  slider.addEventListener("input", () => {
    weightInput.value = slider.value;
    follow();
    changed();
  });
  follow();
  const remove = h(
    "button",
    { type: "button", class: "icon", "aria-label": `Remove ${name}` },
    "✕",
  );
  const { file, adapter_name: _label, ...beyond } = rest;
  const address = file.url ?? file.ref ?? file.cozy_ref;
  const row = {
    id,
    name,
    address,
    weight: weightInput,
    element: h(
      "li",
      { class: "lora field" },
      h("span", { class: "lora-name", title: address }, name),
      remove,
      slider,
      weightInput,
      Object.keys(beyond).length ? h("small", { class: "wide" }, wordsOf(beyond)) : null,
    ),
    read() {
      return weightInput.value === "" ? rest : { ...rest, weight: weightInput.valueAsNumber };
    },
  };
  remove.addEventListener("click", () => {
    rows = rows.filter((other) => other !== row);
    render();
    byId("lora-new").focus();
  });
  return row;
}

function render() {
  rows.forEach((row, index) => {
    row.weight.dataset.path = `$.loras[${index}]`;
  });
  byId("lora-rows").replaceChildren(...rows.map((row) => row.element));
  const unused = names.filter((name) => !rows.some((row) => row.name === name));
  const add = (name) => addLora({ file: { url: addressOf(name) } });
  byId("lora-chips").replaceChildren(
    ...(names.length > MOST_CHIPS ? [] : unused).map((name) =>
      h("button", { type: "button", class: "chip", onclick: () => add(name) }, `+ ${name}`),
    ),
  );
  changed();
}

/** Return the address of what was typed: a name of the catalogue, or an address. */
function addressOf(text) {
  const isAddress = text.includes("://") || /^[\w.-]+\/[\w.-]+(@[\w./-]+)?$/.test(text);
  const isName = names.includes(text) || (!isAddress && (isWhole || !text.includes("/")));
  return isName ? `lora://${encodeURIComponent(text)}` : text;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

const wordsOf = (fields) =>
  Object.entries(fields)
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${JSON.stringify(value)}`)
    .join(" · ");
