// The axes of a sweep in the form, and the grid of its images.

import { byId, cut, h, short } from "./dom.js";
import { loraName, loraRows } from "./loras.js";

const FIELDS = {
  seed: "Seed",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  scheduler: "Scheduler",
  strength: "Strength",
};
const MOST_AXES = 3;
const LORA_PATH = /^loras\[(\d)\]\.weight$/;
const NUMBER = String.raw`([+-]?\d+(?:\.\d+)?)`;
const RANGE = new RegExp(`^${NUMBER}\\s*-\\s*${NUMBER}\\s*(?:\\(${NUMBER}\\)|\\[(\\d+)\\])?$`);
const MOST_VALUES = 64; // of a range

let axes = [];
let changed = () => {};

/** A value of the form that cannot become a request. */
export class WrongValue extends Error {
  constructor(input, message) {
    super(message);
    this.input = input;
  }
}

/** Set up the button that adds an axis; `onChange` is called after each change. */
export function setUpSweep(onChange) {
  changed = onChange;
  byId("axis-add").addEventListener("click", () => {
    const taken = new Set(axes.map((axis) => axis.field.value));
    const free = choices().find(([value]) => !taken.has(value)) ?? choices()[0];
    const axis = addAxis(free[0], "");
    axis.field.focus();
  });
}

/** Return the sweep of the form, undefined for none; raise `WrongValue`. */
export function readSweep() {
  if (axes.length === 0) return undefined;
  const found = {};
  for (const axis of axes) {
    const path = pathOf(axis.field.value);
    if (path in found) throw new WrongValue(axis.field, "This field has an axis already.");
    found[path] = valuesOf(axis.values, path);
  }
  return found;
}

/** Replace all axes by those of a recipe. */
export function fillSweep(sweep) {
  axes.forEach((axis) => axis.element.remove());
  axes = [];
  for (const [path, values] of Object.entries(sweep ?? {})) {
    const index = LORA_PATH.exec(path)?.[1];
    const row = index === undefined ? undefined : loraRows()[Number(index)];
    const isNumbers = hasNumbers(path) && values.every((value) => typeof value === "number");
    const isList = path === "scheduler" || isNumbers;
    addAxis(row ? `lora ${row.id}` : path, isList ? values.join(", ") : JSON.stringify(values));
  }
}

/** Offer the LoRAs that the form has by now; an axis of a LoRA that was removed goes, too. */
export function offerFields() {
  const offered = new Set(choices().map(([value]) => value));
  for (const axis of [...axes]) {
    const value = axis.field.value;
    if (value.startsWith("lora ") && !offered.has(value)) removeAxis(axis);
    else axis.field.replaceChildren(...optionsWith(value));
  }
}

/** Return the number of images in words; empty for no sweep, and while a value is wrong. */
export function countWords() {
  try {
    const counts = Object.values(readSweep() ?? {}).map((values) => values.length);
    const all = counts.reduce((product, count) => product * count, 1);
    if (counts.length === 0) return "";
    return counts.length > 1 ? `${counts.join(" × ")} = ${all} images` : `${all} images`;
  } catch (error) {
    if (error instanceof WrongValue) return "";
    throw error;
  }
}

/** Return the grid of a sweep's images: the last path makes the columns, all others the rows. */
export function sweepGrid(cells, makeImage) {
  const paths = Object.keys(cells[0].values);
  const column = paths[paths.length - 1];
  const rowOf = (cell) =>
    paths
      .slice(0, -1)
      .map((path) => labelOf(cell, path))
      .join("\n");
  const columns = [...new Set(cells.map((cell) => labelOf(cell, column)))];
  const rows = [...new Set(cells.map(rowOf))];
  const byPlace = new Map(
    cells.map((cell, index) => [JSON.stringify([rowOf(cell), labelOf(cell, column)]), index]),
  );
  const heading = (text, scope) =>
    h(
      "th",
      { scope },
      text.split("\n").map((line) => h("span", {}, line)),
    );
  return h(
    "table",
    { class: "sweep" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        paths.length > 1 ? h("td") : null,
        columns.map((text) => heading(text, "col")),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) =>
        h(
          "tr",
          {},
          paths.length > 1 ? heading(row, "row") : null,
          columns.map((text) => {
            const index = byPlace.get(JSON.stringify([row, text]));
            const label = row === "" ? text : `${row.replaceAll("\n", ", ")}, ${text}`;
            return h("td", {}, index === undefined ? null : makeImage(index, label));
          }),
        ),
      ),
    ),
  );
}

function addAxis(value, text) {
  const field = h("select", { "aria-label": "Field of the axis" }, optionsWith(value));
  const values = h("input", {
    type: "text",
    value: text,
    placeholder: "0, 0.5, 1  or  0-1 [5]",
    "aria-label": "Values of the axis",
    "data-path": "$.sweep",
    autocomplete: "off",
  });
  const remove = h(
    "button",
    { type: "button", class: "icon", "aria-label": "Remove the axis" },
    "✕",
  );
  const axis = { field, values, element: h("li", { class: "axis field" }, field, remove, values) };
  remove.addEventListener("click", () => {
    removeAxis(axis);
    byId("axis-add").focus();
  });
  axes.push(axis);
  byId("axes").append(axis.element);
  changed();
  return axis;
}

function removeAxis(axis) {
  axes = axes.filter((other) => other !== axis);
  axis.element.remove();
  changed();
}

const choices = () => [
  ...loraRows().map((row) => [`lora ${row.id}`, `${row.name} weight`]),
  ...Object.entries(FIELDS),
];

function optionsWith(value) {
  const known = choices();
  const all = known.some(([each]) => each === value) ? known : [...known, [value, value]];
  byId("axis-add").disabled = axes.length >= MOST_AXES;
  return all.map(([each, text]) =>
    h("option", { value: each, selected: each === value }, cut(text, 40)),
  );
}

function pathOf(value) {
  if (!value.startsWith("lora ")) return value;
  const index = loraRows().findIndex((row) => `lora ${row.id}` === value);
  return `loras[${index}].weight`;
}

const hasNumbers = (path) => path !== "scheduler" && (path in FIELDS || LORA_PATH.test(path));

/** Parse a JSON list, or values with commas between them; numbers may be ranges as in A1111. */
function valuesOf(input, path) {
  const text = input.value.trim();
  const wrong = (message) => new WrongValue(input, message);
  if (text === "") throw wrong("Expected values, such as 0, 0.5, 1");
  if (text.startsWith("[")) {
    try {
      return JSON.parse(text);
    } catch {
      throw wrong("Expected a JSON list after the [");
    }
  }
  const parts = text
    .split(",")
    .map((part) => part.trim())
    .filter((part) => part !== "");
  if (!hasNumbers(path)) return parts;
  return parts.flatMap((part) => {
    const found = RANGE.exec(part);
    const numbers = found ? numbersOf(found) : [Number(part)];
    if (numbers.length === 0) throw wrong(`Expected 1 to ${MOST_VALUES} values, got ${part}`);
    if (Number.isNaN(numbers[0])) throw wrong(`Expected numbers, got ${cut(part, 20)}`);
    return numbers;
  });
}

/** Return the numbers of a range: `1-5`, `1-9 (+2)`, `9-1 (-2)`, `0-1 [5]`; none if too many. */
function numbersOf([, first, last, by, times]) {
  const from = Number(first);
  const way = Number(last) - from;
  const step = by ? Number(by) : times ? way / (times - 1 || 1) : Math.sign(way) || 1;
  const count = times ? Number(times) : Math.floor(way / step + 1e-9) + 1;
  if (!(count >= 1 && count <= MOST_VALUES)) return [];
  return Array.from({ length: count }, (_, index) => Number((from + index * step).toFixed(6)));
}

/** Return the value that a cell has at a path, with the name of its field. */
function labelOf(cell, path) {
  const index = LORA_PATH.exec(path)?.[1];
  const spec = index === undefined ? undefined : cell.request.loras?.[Number(index)];
  const value = cell.values[path];
  const text =
    typeof value === "number"
      ? short(value, 4)
      : typeof value === "string"
        ? value
        : JSON.stringify(value);
  return `${cut(spec ? loraName(spec) : (FIELDS[path] ?? path), 30)} ${cut(text, 40)}`;
}
