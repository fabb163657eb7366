// The jobs that the page knows, the newest first, and how each is doing.

import { Problem, follow, get, send } from "./api.js";

const ENDED = new Set(["SUCCESS", "FAILURE", "REVOKED"]);
const LOOK = 2000; // milliseconds between two looks at jobs that are not shown
const RECENT = 24; // jobs that are listed at the start, and looked at

export const hasEnded = (job) => ENDED.has(job.status.state);

/** Return whether a job changes no more; the record of an unknown one has expired. */
export const isOver = (job) => hasEnded(job) || job.status.state === "UNKNOWN";

/** The recipe of a result: the request that draws the same images. */
export function recipeOf(result) {
  const { previews: _previews, ...request } = result.request;
  if (!request.sweep?.seed) request.seed = result.seed;
  return request;
}

/** Return the steps of each image of a result, undefined if images of a sweep differ in them. */
export function stepsOf({ request, cells, recipe_fields: fields }) {
  if (request.sweep?.num_inference_steps) return undefined;
  return fields.num_inference_steps ?? (cells[0]?.request ?? request).num_inference_steps;
}

/** Emits `change` with the id of a job that has changed. */
class Jobs extends EventTarget {
  #known = new Map();
  #shown = null; // the job that is followed, and what ends that
  recent = [];

  get(id) {
    return this.#known.get(id);
  }

  /** Queue a request with labels, each `name=value`; return the job. */
  async submit(request, labels = []) {
    const query = new URLSearchParams(labels.map((label) => ["label", label]));
    const job = await get(`/v1/jobs?${query}`, { method: "POST", body: request });
    this.recent.unshift(job.id);
    this.#set({ ...job, request });
    return job;
  }

  /** Return a job with its result or error. */
  async load(id) {
    const known = this.#known.get(id);
    if (known?.result || known?.error) return known;
    return this.#set(await get(`/v1/jobs/${encodeURIComponent(id)}`));
  }

  /** Return a page of jobs, which lack results and errors. */
  async list(cursor, limit) {
    const page = await get(`/v1/jobs?limit=${limit}&cursor=${cursor}`);
    for (const job of page.jobs) if (!this.#known.has(job.id)) this.#known.set(job.id, job);
    return page;
  }

  async loadRecent() {
    const { jobs } = await this.list(0, RECENT);
    this.recent = [...new Set([...this.recent, ...jobs.map((job) => job.id)])];
    this.#changed(null);
  }

  /** Follow a job until it ends, instead of the one before. */
  async follow(id) {
    if (this.#shown?.id === id) return;
    this.unfollow();
    const stop = new AbortController();
    this.#shown = { id, stop };
    try {
      const onStatus = (status) => this.#set({ ...this.#known.get(id), status });
      this.#set(await follow(id, onStatus, stop.signal));
    } catch (error) {
      if (!stop.signal.aborted) throw error;
    } finally {
      if (this.#shown?.id === id) this.#shown = null;
    }
  }

  unfollow() {
    this.#shown?.stop.abort();
    this.#shown = null;
  }

  async cancel(id) {
    await send(`/v1/jobs/${id}/cancel`, { method: "POST" });
    this.#set(await get(`/v1/jobs/${id}`));
  }

  /** Look at the unfinished jobs that are not followed: browsers open few streams per server. */
  async watch() {
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, LOOK));
      const open = [...this.#known.values()].filter(
        (job) => !isOver(job) && job.id !== this.#shown?.id,
      );
      if (document.hidden || open.length === 0) continue;
      try {
        const ids = new Set(open.map((job) => job.id));
        const page = await get(`/v1/jobs?limit=${RECENT}`);
        for (const job of page.jobs.filter(({ id }) => ids.has(id))) {
          if (hasEnded(job)) await this.load(job.id);
          else this.#set(job);
        }
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
      }
    }
  }

  #set(job) {
    const request = job.request ?? this.#known.get(job.id)?.request;
    this.#known.set(job.id, { ...job, request });
    this.#changed(job.id);
    return this.#known.get(job.id);
  }

  #changed(id) {
    this.dispatchEvent(new CustomEvent("change", { detail: id }));
  }
}

export const jobs = new Jobs();
