// The API /v1: requests with the key, problems as errors, events of a job, images.

const KEY = "zlora-api-key"; // in sessionStorage: gone when the tab is closed
const RETRY = 2000; // milliseconds before a stream of events is opened again

let askForKey;
let afterKey;
let asking = null;

/** An error of the API, as a problem document (RFC 9457). */
export class Problem extends Error {
  constructor(document) {
    super(document.detail ?? document.message);
    this.code = document.code;
    this.retryable = document.retryable ?? false;
    this.path = document.path ?? pathIn(document.details ?? {});
    this.retryAfter = document.retryAfter;
  }
}

/** Set the function that asks for an API key, null if there is none, and one for a new key. */
export function onUnauthorized(ask, after) {
  askForKey = ask;
  afterKey = after;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export const forgetKey = () => sessionStorage.removeItem(KEY);

/** Send a request, with a file or JSON; ask for the API key until the server knows it. */
export async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const authorization = key === null ? {} : { Authorization: `Bearer ${key}` };
    let response;
    try {
      response = await fetch(path, {
        method,
        body: body === undefined || body instanceof Blob ? body : JSON.stringify(body),
        headers: { ...headers, ...authorization },
        signal,
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      const detail = "The server does not answer.";
      throw new Problem({ code: "unreachable", detail, retryable: true });
    }
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw problem;
    if (key === sessionStorage.getItem(KEY) && !(await newKey(key !== null))) throw problem;
  }
}

/** Return the JSON document that the server answers. */
export const get = async (path, options) => (await send(path, options)).json();

/** Follow a job to its end, and return the job; `onStatus` gets each status on the way.
 *
 * While the server or Redis does not answer, the status has the phase `away`.
 */
export async function follow(id, onStatus, signal) {
  let last = "";
  let status = {};
  for (;;) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const response = await send(`/v1/jobs/${id}/events`, { headers, signal });
      if (response.status === 204) return get(`/v1/jobs/${id}`, { signal });
      if (last) onStatus(status); // the server does not send the same one again
      for await (const event of events(response.body)) {
        if (event.name === "end") return JSON.parse(event.data);
        if (event.name !== "status") continue;
        last = event.id;
        status = JSON.parse(event.data);
        onStatus(status);
      }
    } catch (error) {
      if (signal.aborted || (error instanceof Problem && !error.retryable)) throw error;
    }
    onStatus({ ...status, phase: "away" });
    await new Promise((resolve) => setTimeout(resolve, RETRY));
    signal.throwIfAborted();
  }
}

/** Yield the server-sent events of a body; an event that the end cuts off is left out. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(
        block.split("\n").map((line) => [line.split(":", 1)[0], line.replace(/^\w+: /, "")]),
      );
      if (fields.event) yield { name: fields.event, id: fields.id, data: fields.data };
    }
  }
}

/** Show an image of a job, by its index or `sheet`, once its place is near the screen. */
export function showImage(image, id, index) {
  const path = `/v1/jobs/${id}/images/${index}?proxy=true`;
  const gone = () => image.replaceWith(missing());
  image.addEventListener("error", gone);
  if (!hasKey()) {
    image.loading = "lazy";
    image.src = path;
    return image;
  }
  image.load = async () => {
    try {
      const blob = await (await send(path)).blob();
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
      image.src = URL.createObjectURL(blob);
    } catch {
      gone();
    }
  };
  observer.observe(image);
  return image;
}

/** Save an image of a job as a file. */
export async function saveImage(id, index, name) {
  const blob = await (await send(`/v1/jobs/${id}/images/${index}?proxy=true`)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Requests by <img> have no API key.
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      target.load();
    }
  },
  { rootMargin: "300px" },
);

function missing() {
  const note = document.createElement("span");
  note.className = "missing";
  note.textContent = "The image is not in the store any more.";
  return note;
}

/** Return the path that the details of an error name, such as that of a LoRA by its index. */
function pathIn({ path, field = "loras", index }) {
  return path ?? (index === undefined ? undefined : `$.${field}[${index}]`);
}

async function problemOf(response) {
  const type = response.headers.get("Content-Type") ?? "";
  const retryAfter = Number(response.headers.get("Retry-After")) || undefined;
  if (type.startsWith("application/problem+json")) {
    return new Problem({ ...(await response.json()), retryAfter });
  }
  const detail = `The server answered with status ${response.status}.`;
  return new Problem({ code: "unknown", detail, retryable: response.status >= 500 });
}

/** Ask once for all requests that wait for a key; return whether there is one. */
async function newKey(wasWrong) {
  asking ??= askForKey(wasWrong)
    .then((key) => {
      if (key === null) return false;
      sessionStorage.setItem(KEY, key);
      afterKey();
      return true;
    })
    .finally(() => {
      asking = null;
    });
  return asking;
}
