// What the Train node shows of its run: built once, filled by `show`. Text is only ever set as text.
import { BLUE, Chart, count, number } from "./qrlora_train_chart.js";
import { Strengths } from "./qrlora_train_strengths.js";
import { translated, translatedReport } from "./qrlora_words.js";

export const HEIGHT = 380;
const TEXT = "var(--input-text, #ddd)";
const LINE = `color-mix(in srgb, ${TEXT} 30%, transparent)`;
const PHASES = {
  load: "Reading the model",
  basis: "Decomposing the model",
  model: "Loading the model",
  train: "Training",
  sample: "Sampling",
  strengths: "Trying strengths",
  save: "Saving",
};
const STATES = {
  queued: "Queued",
  preparing: "Preparing",
  running: "Training",
  stopping: "Stopping",
  finished: "Finished",
  stopped: "Stopped",
  failed: "Failed",
};
const IDLE = "Queue the workflow to train. The loss curve and samples appear here.";
const SHOWN_SAMPLES = 8;
const RETRIES = 5; // a picture may be a moment later than the event that names it

function make(parent, tag, style = {}, attributes = {}) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

export class Panel {
  // stop(job): asks the server, resolves to an error message or "". picture(job, step): address of a sample.
  // sheet(job, step): address of the picture of several strengths.
  constructor({ stop, picture, sheet }) {
    this.picture = picture;
    this.sheet = sheet;
    this.job = null;
    this.scaling = "";
    this.before = null;
    this.element = make(null, "div", {
      boxSizing: "border-box",
      display: "flex",
      flexDirection: "column",
      gap: "6px",
      minHeight: `${HEIGHT}px`, // the new renderer shrinks what may shrink
      padding: "8px",
      overflow: "hidden",
      font: "12px/1.35 system-ui, sans-serif",
      color: TEXT,
      background: "var(--comfy-input-bg, #222)",
      borderRadius: "6px",
      fontVariantNumeric: "tabular-nums", // digits that change do not move what follows
    });
    this.element.dataset.qrloraTrain = "";
    this.#head();
    this.chart = new Chart();
    make(this.element, "div", { position: "relative", flex: "1 1 0", minHeight: "60px" }).append(this.chart.element);
    this.samples = make(this.element, "div", {
      display: "none",
      gap: "4px",
      flex: "0 0 64px",
      overflowX: "auto",
      overflowY: "hidden",
      scrollbarWidth: "none", // it would cover the pictures
    });
    this.samples.setAttribute("aria-label", translated("Newest samples"));
    this.strengths = new Strengths();
    this.element.append(this.strengths.element);
    this.message = make(this.element, "div", {
      flex: "0 0 auto",
      height: "2.7em",
      overflow: "auto",
      whiteSpace: "pre-wrap",
      overflowWrap: "anywhere",
      userSelect: "text",
    });
    this.#foot(stop);
    this.show(null);
  }

  #head() {
    const head = make(this.element, "div", {
      display: "flex",
      gap: "8px",
      alignItems: "baseline",
      whiteSpace: "nowrap",
    });
    this.title = make(head, "strong", {
      flex: "1 1 auto",
      fontSize: "14px",
      overflow: "hidden",
      textOverflow: "ellipsis",
    });
    this.title.setAttribute("role", "status");
    this.steps = make(head, "span");
    const track = make(this.element, "div", {
      flex: "0 0 8px",
      borderRadius: "4px",
      background: LINE,
      overflow: "hidden",
    });
    this.track = track;
    Object.entries({
      role: "progressbar",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-label": translated("Training progress"),
    }).forEach(([key, value]) => track.setAttribute(key, value));
    this.bar = make(track, "div", { height: "100%", width: "0", background: BLUE, transition: "width 0.2s linear" });
    this.facts = make(this.element, "div", {
      display: "flex",
      gap: "4px 14px",
      justifyContent: "space-between",
      whiteSpace: "nowrap",
      overflow: "hidden",
      flex: "0 0 auto",
      minHeight: "1.35em",
    });
    this.eta = make(this.facts, "span");
    this.speed = make(this.facts, "span", {}, { title: translated("Duration of one step") });
    this.memory = make(this.facts, "span", {}, { title: translated("Highest memory use of the trainer so far") });
  }

  #foot(stop) {
    const foot = make(this.element, "div", { display: "flex", gap: "8px", alignItems: "center", flex: "0 0 34px" });
    this.button = make(
      foot,
      "button",
      {
        flex: "0 0 auto",
        minWidth: "72px",
        height: "28px",
        padding: "0 12px",
        font: "inherit",
        fontWeight: "600",
        color: TEXT,
        background: "var(--comfy-menu-bg, #353535)",
        border: `1px solid ${LINE}`,
        borderRadius: "6px",
      },
      { type: "button", title: translated("Save a checkpoint and stop. Queueing again goes on from there.") },
    );
    this.hint = make(foot, "span", { opacity: "0.85", overflow: "hidden" });
    // The canvas would take these keys for its own shortcuts.
    this.button.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && event.stopPropagation());
    this.button.addEventListener("keyup", (event) => [" ", "Enter"].includes(event.key) && event.stopPropagation());
    this.button.addEventListener(
      "focus",
      () => this.button.matches(":focus-visible") && (this.button.style.outline = `2px solid ${BLUE}`),
    );
    this.button.addEventListener("blur", () => (this.button.style.outline = ""));
    this.button.addEventListener("click", () => this.#stop(stop));
  }

  async #stop(stop) {
    const { job } = this;
    if (!job || this.button.disabled) return;
    this.asked = true;
    this.refused = "";
    this.show(job);
    const refused = await stop(job);
    if (!refused) return;
    this.asked = false;
    this.refused = refused;
    this.show(this.job);
  }

  // What the widgets say now; null where another node decides.
  settings(rank, alpha) {
    this.scaling = rank > 0 && Number.isFinite(alpha) ? scalingText(rank, alpha) : "";
    this.show(this.job);
  }

  // before: entries of the queue that run before this node's; null when it is not in the queue.
  queued(before) {
    if (before === this.before) return;
    this.before = before;
    this.show(this.job);
  }

  // lines: what the node said when it was executed; also without a run, when the adapter was there already.
  report(lines) {
    this.lines = lines;
    this.show(this.job);
  }

  // job: qrlora_train_job.js or null.
  show(job) {
    if (job?.run !== this.job?.run) this.refused = "";
    this.job = job;
    const state = job?.state ?? (this.lines ? "finished" : "idle");
    const live = ["preparing", "running", "stopping"].includes(state);
    if (!["preparing", "running"].includes(state)) this.asked = false;
    const shown = this.asked ? "stopping" : this.before !== null && !live ? "queued" : state;
    Object.assign(this.element.dataset, {
      state: shown,
      step: job?.step ?? 0,
      steps: job?.steps ?? 0,
      run: job?.run ?? "",
    });
    put(this.title, heading(shown, job));
    put(this.steps, job?.steps ? translated("step {step} / {steps}", { step: count(job.step), steps: count(job.steps) }) : "");
    this.#progress(shown, job);
    const counting = shown === "running" || shown === "stopping";
    const left = counting && Number.isFinite(job.eta) ? translated("{time} left", { time: duration(job.eta) }) : "";
    put(this.eta, counting ? left : this.scaling);
    this.eta.title = translated(counting ? "Time left" : "The update is scaled by alpha / rank; alpha 0 means as rank");
    put(this.speed, Number.isFinite(job?.seconds) ? speed(job.seconds) : "");
    put(this.memory, job?.peak > 0 ? translated("peak {size} GB", { size: (job.peak / 1e9).toFixed(1) }) : "");
    this.chart.draw(job);
    this.#pictures(job);
    this.strengths.show(job?.strengths, job?.strengths && this.sheet(job, job.strengths.step));
    put(this.message, this.refused || this.#message(state, job));
    const read = state === "failed" || job?.warnings.length; // not watched
    this.message.style.height = read ? "6.75em" : "2.7em";
    this.button.disabled = !(shown === "running" || shown === "preparing");
    this.button.style.opacity = this.button.disabled ? "0.45" : "1";
    this.button.style.cursor = this.button.disabled ? "default" : "pointer";
    put(this.button, translated(shown === "stopping" ? "Stopping" : "Stop"));
    put(this.hint, shown === "queued" ? turn(this.before) : hint(shown, job));
  }

  #message(state, job) {
    if (state === "finished" && this.lines) return this.lines;
    // Of a step the server's line says what stands above already.
    const stepping = state === "running" && job.lastEvent === "step" && job.curve.last;
    const text = stepping ? losses(job) : job ? translatedReport(job.text || job.reason) : translated(IDLE);
    return [...(job?.warnings ?? []).map(translatedReport), text].join("\n");
  }

  #progress(state, job) {
    const phase = job?.phase;
    const working = state === "running" && phase && !["train", "sample"].includes(phase.phase);
    let part = job?.steps ? job.step / job.steps : 0;
    if (working && phase.total > 0) part = phase.done / phase.total;
    if (state === "finished") part = 1;
    const percent = Math.round(1000 * Math.min(1, Math.max(0, part))) / 10;
    this.bar.style.width = `${percent}%`;
    this.track.setAttribute("aria-valuenow", Math.round(percent));
  }

  #pictures(job) {
    const steps = [...(job?.samples ?? [])].slice(-SHOWN_SAMPLES).reverse();
    const key = steps.length ? `${job.run} ${steps}` : "";
    if (key === this.shownSamples) return;
    this.shownSamples = key;
    this.samples.style.display = steps.length ? "flex" : "none";
    const kept = new Map([...this.samples.children].map((link) => [link.getAttribute("href"), link]));
    this.samples.replaceChildren(
      ...steps.map((step) => kept.get(this.picture(job, step)) ?? thumbnail(this.picture(job, step), step)),
    );
  }
}

// Text is only replaced where it changed: a selection and a screen reader's place survive.
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function thumbnail(address, step) {
  const link = make(
    null,
    "a",
    {
      position: "relative",
      flex: "0 0 auto",
      height: "64px",
      minWidth: "64px",
      background: LINE,
      borderRadius: "4px",
      overflow: "hidden",
    },
    { href: address, target: "_blank", rel: "noopener", title: translated("Sample at step {step}: open in a new tab", { step }) },
  );
  const image = make(
    link,
    "img",
    { height: "100%", display: "block" },
    { alt: translated("Sample at step {step}", { step }), draggable: "false" },
  );
  make(link, "span", {
    position: "absolute",
    left: "0",
    bottom: "0",
    padding: "0 4px",
    fontSize: "11px",
    color: "#fff",
    background: "rgba(0, 0, 0, 0.7)",
    borderTopRightRadius: "4px",
  }).textContent = count(step);
  let tries = 0;
  image.addEventListener("error", () => {
    if (tries++ < RETRIES) setTimeout(() => (image.src = `${address}&try=${tries}`), 500 * 2 ** tries);
  });
  image.src = address;
  return link;
}

function heading(state, job) {
  if (state === "idle") return translated("Not trained yet");
  if (state !== "running") return translated(STATES[state] ?? state);
  const phase = job.phase?.phase;
  if (!phase) return translated(job.step ? "Training" : "Starting");
  return PHASES[phase] ? translated(PHASES[phase]) : phase[0].toUpperCase() + phase.slice(1);
}

function losses(job) {
  const values = { loss: number(job.curve.last.smoothed), rate: number(job.rate) };
  return translated("smoothed loss {loss}, learning rate {rate}", values);
}

function turn(before) {
  if (!before) return translated("Waits for the nodes before it.");
  return translated(before === 1 ? "One entry of the queue runs before it." : "{count} entries of the queue run before it.", {
    count: before,
  });
}

function hint(state, job) {
  if (state === "running" || state === "preparing") return translated("Saves a checkpoint; queueing again resumes.");
  if (state === "stopping") return translated("Saving a checkpoint; queueing again resumes.");
  if (state === "stopped")
    return job.step
      ? translated("Queue again to go on from step {step}.", { step: count(job.step) })
      : translated("Queue again to start.");
  if (state === "failed") return job.step ? translated("Queue again to go on from the last checkpoint.") : "";
  return "";
}

function scalingText(rank, alpha) {
  const scaling = alpha ? alpha / rank : 1;
  const values = { scaling: Number(scaling.toPrecision(3)), alpha, rank };
  return translated(alpha ? "scaling {scaling} (alpha {alpha} / rank {rank})" : "scaling {scaling} (alpha as rank)", values);
}

function speed(seconds) {
  if (seconds >= 1) return translated("{seconds} s/step", { seconds: seconds.toFixed(2) });
  return translated("{steps} steps/s", { steps: (1 / Math.max(seconds, 1e-6)).toFixed(1) });
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const two = (value) => String(value).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)} h` : `${minutes}:${two(whole % 60)} min`;
}
