// What is known of one training run: built from its events, asked by the panel. No page, no network.

export const ENDED = ["finished", "stopped", "failed"];
const CAPACITY = 1024; // a point for each pixel of a wide node
const KEPT_SAMPLES = 32;

// A loss curve of bounded size: buckets of `width` steps with the lowest and highest loss and the last smoothed one.
// A bucket that would be one too many doubles the width, so a million steps cost what a thousand do. Drawn as it is.
export class Curve {
  constructor(capacity = CAPACITY) {
    this.capacity = capacity;
    this.width = 1;
    this.buckets = [];
  }

  get last() {
    return this.buckets.at(-1);
  }

  // A step that is already known changes nothing: after a reload events come twice.
  add(step, loss, smoothed) {
    if (!Number.isFinite(step) || !Number.isFinite(loss)) return;
    const bucket = { step, low: loss, high: loss, smoothed: Number.isFinite(smoothed) ? smoothed : loss };
    const place = this.#place(step);
    const before = this.buckets[place - 1];
    if (before && this.#slot(before.step) === this.#slot(step)) merge(before, bucket);
    else this.buckets.splice(place, 0, bucket);
    if (this.buckets.length > this.capacity) this.#coarsen();
  }

  // A resumed run does some steps again.
  cut(after) {
    while (this.buckets.length && this.last.step > after) this.buckets.pop();
  }

  nearest(step) {
    const place = this.#place(step);
    const [before, after] = [this.buckets[place - 1], this.buckets[place]];
    if (!before || !after) return before ?? after;
    return step - before.step <= after.step - step ? before : after;
  }

  #slot(step) {
    return Math.floor((step - 1) / this.width);
  }

  // Index behind the last bucket that begins at or before this step's bucket. Nearly always the end.
  #place(step) {
    const slot = this.#slot(step);
    let low = 0;
    let high = this.buckets.length;
    if (high && this.#slot(this.last.step) <= slot) return high;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#slot(this.buckets[middle].step) <= slot) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  #coarsen() {
    this.width *= 2;
    this.buckets = grouped(this.buckets, (bucket) => this.#slot(bucket.step));
  }
}

// Neighbours with the same key become one.
function grouped(buckets, key) {
  const groups = [];
  let current;
  for (const bucket of buckets) {
    const next = key(bucket);
    if (next === current) merge(groups.at(-1), bucket);
    else groups.push({ ...bucket });
    current = next;
  }
  return groups;
}

function merge(into, bucket) {
  into.low = Math.min(into.low, bucket.low);
  into.high = Math.max(into.high, bucket.high);
  if (bucket.step >= into.step) {
    into.step = bucket.step;
    into.smoothed = bucket.smoothed;
  }
}

// A run as one node shows it. `take` accepts what the server sends, whole or in parts.
export class Job {
  constructor(node, run) {
    this.node = node;
    this.run = run;
    this.prompt = undefined; // id of the queue entry
    this.workflow = undefined; // id of the workflow it was queued from, "" when nobody knows
    this.former = null; // the node's run before, while this one has no name
    this.state = "preparing";
    this.text = "";
    this.warnings = [];
    this.reset();
  }

  reset() {
    this.curve = new Curve();
    this.validation = [];
    this.samples = [];
    this.strengths = null; // the event of that name: step, strengths, shown, drift
    this.phase = null;
    this.step = 0;
    this.steps = 0;
    this.eta = null;
    this.seconds = null;
    this.peak = null;
    this.rate = null; // learning rate
    this.lastEvent = ""; // its kind
    this.reason = "";
  }

  get ended() {
    return ENDED.includes(this.state);
  }

  // `caughtUp`: events of a run that began before this page did. They come by kind, so they are put in order first.
  take(message, caughtUp = false) {
    const events = Array.isArray(message.events) ? [...message.events] : [];
    if (caughtUp) events.sort((before, after) => (before.time ?? 0) - (after.time ?? 0));
    for (const event of events) this.#event(event);
    this.lastEvent = events.at(-1)?.event ?? this.lastEvent;
    if (typeof message.state === "string") this.state = message.state;
    if (typeof message.text === "string") this.text = message.text;
    if (Array.isArray(message.warnings)) this.warnings = message.warnings.map(String);
    if (this.state === "preparing") [this.phase, this.reason] = [null, ""]; // those of an earlier start
    for (const name of message.samples ?? []) this.#sample(Number(String(name).match(/(\d+)(?!.*\d)/)?.[1]));
  }

  #event(event) {
    switch (event?.event) {
      case "started":
        this.#restart(event.first_step, event.steps);
        break;
      case "phase":
        this.phase = event;
        break;
      case "step":
        this.#advance(event);
        break;
      case "validation":
        if (Number.isFinite(event.loss)) this.#validated(event);
        break;
      case "sample":
        this.#sample(event.step);
        break;
      case "strengths":
        if ([event.strengths, event.shown, event.drift].every(Array.isArray)) this.strengths = event;
        break;
      case "failed":
        this.reason = String(event.message ?? "");
        break;
      case "finished":
      case "stopped":
        this.step = Math.max(this.step, event.step ?? 0);
        break;
    }
  }

  #restart(first, steps) {
    if (!first) this.reset();
    this.curve.cut(first);
    this.validation = this.validation.filter(({ step }) => step <= first);
    this.samples = this.samples.filter((step) => step <= first);
    if (this.strengths?.step !== first) this.strengths = null;
    this.step = first;
    this.steps = steps;
    this.reason = "";
  }

  #advance({ step, steps, loss, smoothed_loss, lr, seconds, eta, peak_memory }) {
    this.curve.add(step, loss, smoothed_loss);
    if (step < this.step) return; // known already
    this.step = step;
    this.steps = steps;
    this.seconds = seconds;
    this.eta = eta;
    this.peak = peak_memory;
    this.rate = lr;
  }

  #validated({ step, loss }) {
    this.validation = this.validation.filter((point) => point.step !== step).slice(1 - CAPACITY);
    this.validation.push({ step, loss });
    this.validation.sort((before, after) => before.step - after.step);
  }

  #sample(step) {
    if (!Number.isInteger(step) || this.samples.includes(step)) return;
    this.samples = [...this.samples, step].sort((before, after) => before - after).slice(-KEPT_SAMPLES);
  }
}
