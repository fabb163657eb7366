// Elements from text and attributes: nothing here or elsewhere parses markup.

/** Return an element; `on…` attributes are listeners, `true` and `false` switch an attribute. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat(2).filter((child) => child !== undefined && child !== null));
  return element;
}

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/** Return a number with at most so many decimals, as people write it. */
export const short = (number, decimals = 2) => String(Number(number.toFixed(decimals)));

/** Return a text with at most `length` characters. */
export const cut = (text, length) =>
  text.length > length ? `${text.slice(0, length - 1)}…` : text;

/** Return bytes in the unit that people use. */
export const size = (bytes) =>
  bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${short(bytes / 1e6, 1)} MB`;

/** Return seconds as people say them. */
export function seconds(count) {
  if (count < 10) return `${short(count, 1)} s`;
  return count < 100 ? `${Math.round(count)} s` : `${Math.round(count / 60)} min`;
}

/** Speak a sentence to screen readers. */
export function announce(sentence) {
  byId("announcement").textContent = sentence;
}
