// The loss curve as SVG: sharp at every zoom of the canvas, and its colours follow the theme by themselves.
import { translated } from "./qrlora_words.js";

const SVG = "http://www.w3.org/2000/svg";
// A blue and the vermilion of Okabe and Ito, told apart by every kind of colour vision; width and shape differ as well.
// Mixed with the text's colour they keep their contrast on light and on dark palettes.
export const TEXT = "var(--input-text, #ddd)";
export const BLUE = `color-mix(in srgb, #2a93d5 72%, ${TEXT})`;
export const ORANGE = `color-mix(in srgb, #d55e00 72%, ${TEXT})`;
const FAINT = `color-mix(in srgb, ${TEXT} 22%, transparent)`;
const RAW = `color-mix(in srgb, ${TEXT} 55%, transparent)`;
const MARGIN = { left: 44, right: 8, top: 20, bottom: 20 };
const FONT = 11;
const LOG_FROM = 10; // a smoothed loss that falls to a tenth is read on a logarithmic scale

export function shape(parent, name, attributes, style = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  Object.assign(element.style, style);
  parent.append(element);
  return element;
}

export class Chart {
  constructor() {
    this.size = [320, 140];
    this.element = document.createElementNS(SVG, "svg");
    this.element.setAttribute("role", "img");
    Object.assign(this.element.style, {
      display: "block",
      position: "absolute",
      inset: "0",
      width: "100%",
      height: "100%",
    });
    this.grid = shape(this.element, "g", { "font-size": FONT }, { fill: TEXT, stroke: "none" });
    this.plot = shape(this.element, "svg", { overflow: "hidden" }); // what leaves it is not drawn
    const line = { fill: "none", "stroke-linejoin": "round" };
    this.raw = shape(this.plot, "path", { ...line, "stroke-width": 1, "data-series": "raw" }, { stroke: RAW });
    this.smoothed = shape(
      this.plot,
      "path",
      { ...line, "stroke-width": 2.5, "data-series": "smoothed" },
      { stroke: BLUE },
    );
    this.validation = shape(
      this.plot,
      "path",
      { ...line, "stroke-width": 1.5, "data-series": "validation" },
      { stroke: ORANGE },
    );
    this.cursor = shape(this.plot, "path", { ...line, "stroke-width": 1 }, { stroke: TEXT });
    this.legend = shape(this.element, "g", { "font-size": FONT }, { fill: TEXT });
    this.element.addEventListener("pointermove", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => this.#point());
    new ResizeObserver(([{ contentRect }]) => this.resize(contentRect.width, contentRect.height)).observe(this.element);
  }

  resize(width, height) {
    if (width < 80 || height < 60) return; // hidden, or folded away
    this.size = [width, height];
    this.draw();
  }

  // job: qrlora_train_job.js; without one the chart is empty.
  draw(job = this.job) {
    this.job = job;
    const [width, height] = this.size;
    this.inner = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
    const buckets = job?.curve.buckets ?? [];
    this.element.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const [name, value] of [
      ["x", MARGIN.left],
      ["y", MARGIN.top],
      ["width", this.inner[0]],
      ["height", this.inner[1]],
    ]) {
      this.plot.setAttribute(name, value);
    }
    this.scale = buckets.length ? scales(buckets, job.validation, this.inner) : null;
    this.raw.setAttribute("d", this.scale ? rawPath(buckets, this.scale) : "");
    this.smoothed.setAttribute(
      "d",
      this.scale
        ? path(
            buckets.map(({ step, smoothed }) => [step, smoothed]),
            this.scale,
          )
        : "",
    );
    this.validation.setAttribute("d", this.scale ? diamonds(job.validation, this.scale) : "");
    this.#axes();
    this.#point();
    this.#describe(buckets);
  }

  #axes() {
    this.grid.replaceChildren();
    const { left, top } = MARGIN;
    const [width, height] = this.inner;
    shape(this.grid, "path", { d: `M${left} ${top}v${height}h${width}`, fill: "none" }, { stroke: RAW });
    if (!this.scale) {
      this.#label(left + width / 2, top + height / 2, translated("no steps yet"), "middle");
      return;
    }
    for (const value of this.scale.yTicks) {
      const y = top + this.scale.y(value);
      shape(this.grid, "path", { d: `M${left} ${y}h${width}`, fill: "none" }, { stroke: FAINT });
      this.#label(left - 5, y + 4, number(value), "end");
    }
    for (const value of this.scale.xTicks) {
      const x = left + this.scale.x(value);
      shape(this.grid, "path", { d: `M${x} ${top + height}v4`, fill: "none" }, { stroke: RAW });
      this.#label(Math.min(x, left + width - 8), top + height + 14, count(value), "middle");
    }
    this.#label(left - 14, top + height + 14, translated("step"), "end");
    const [x, y] = [10, top + height / 2];
    this.#label(x, y, translated(this.scale.log ? "loss (log)" : "loss"), "middle").setAttribute(
      "transform",
      `rotate(-90 ${x} ${y})`,
    );
  }

  #label(x, y, text, anchor, parent = this.grid) {
    const element = shape(parent, "text", { x, y, "text-anchor": anchor });
    element.textContent = text;
    return element;
  }

  #describe(buckets) {
    const { job } = this;
    this.element.dataset.points = buckets.length;
    this.element.dataset.scale = this.scale?.log ? "log" : "linear";
    const end = buckets.at(-1);
    this.element.setAttribute(
      "aria-label",
      end
        ? translated("Loss curve up to step {step} of {steps}: smoothed loss {loss}", {
            step: end.step,
            steps: job.steps,
            loss: number(end.smoothed),
          })
        : translated("Loss curve: no steps yet"),
    );
  }

  // The numbers under the pointer, or without one what the lines are.
  #point(event) {
    this.legend.replaceChildren();
    this.cursor.setAttribute("d", "");
    if (!this.scale) return;
    const bounds = event && this.element.getBoundingClientRect();
    const x = event ? ((event.clientX - bounds.left) / bounds.width) * this.size[0] - MARGIN.left : -1;
    if (x < 0 || x > this.inner[0]) return this.#legend();
    const bucket = this.job.curve.nearest(this.scale.step(x));
    this.cursor.setAttribute("d", `M${this.scale.x(bucket.step)} 0v${this.inner[1]}`);
    const [low, high] = [number(bucket.low), number(bucket.high)];
    const raw = bucket.low === bucket.high ? low : translated("{low} to {high}", { low, high });
    this.#label(
      MARGIN.left,
      13,
      `${translated("step")} ${count(bucket.step)}   ${translated("loss")} ${raw}   ` +
        `${translated("smoothed")} ${number(bucket.smoothed)}`,
      "start",
      this.legend,
    );
  }

  #legend() {
    const items = [
      ["loss", RAW, 1],
      ["smoothed", BLUE, 2.5],
    ];
    if (this.job.validation.length) items.push(["validation", ORANGE, 1.5]);
    let x = MARGIN.left;
    for (const [name, stroke, width] of items) {
      const d = name === "validation" ? diamond(x + 8, 9, 4) : `M${x} 9h16`;
      shape(this.legend, "path", { d, fill: "none", "stroke-width": width }, { stroke });
      this.#label(x + 21, 13, translated(name), "start", this.legend);
      x += 21 + name.length * FONT * 0.56 + 14;
    }
  }
}

// Where steps and losses lie, and the ticks. The top and bottom hundredth of the raw losses may be cut off, so that
// one outlier does not flatten the curve; the smoothed line and the validation are always inside.
function scales(buckets, validation, [width, height]) {
  const lines = [...buckets.map(({ smoothed }) => smoothed), ...validation.map(({ loss }) => loss)];
  const raw = buckets.flatMap(({ low, high }) => [low, high]).sort((one, other) => one - other);
  const cut = Math.floor(raw.length / 100);
  let low = Math.min(raw[cut], ...lines);
  let high = Math.max(raw[raw.length - 1 - cut], ...lines);
  const log = low > 0 && Math.max(...lines) >= LOG_FROM * Math.min(...lines);
  if (!log) {
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }
  const [from, to] = log ? [Math.log(low) - 0.05, Math.log(high) + 0.05] : [low, high];
  const first = Math.min(buckets[0].step, buckets.at(-1).step - 1);
  const span = buckets.at(-1).step - first;
  return {
    log,
    x: (step) => round(((step - first) / span) * width),
    y: (loss) =>
      round(height - (((log ? Math.log(Math.max(loss, Number.MIN_VALUE)) : loss) - from) / (to - from)) * height),
    step: (x) => first + (x / width) * span,
    xTicks: ticks(first, first + span, Math.max(2, Math.floor(width / 70))).filter(Number.isInteger),
    yTicks: log ? decades(low, high) : ticks(low, high, Math.max(3, Math.floor(height / 28))),
  };
}

function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const values = [];
  for (let index = Math.ceil(low / step); index * step <= high; index++)
    values.push(Number((index * step).toPrecision(12)));
  return values;
}

function decades(low, high) {
  const factors = high / low > 300 ? [1] : [1, 2, 5];
  const values = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) values.push(Number((factor * 10 ** power).toPrecision(6)));
  }
  return values.filter((value) => value >= low && value <= high);
}

function path(points, { x, y }) {
  return points.map(([step, loss], index) => `${index ? "L" : "M"}${x(step)} ${y(loss)}`).join("");
}

// Where a bucket holds many steps its whole range is drawn.
function rawPath(buckets, scale) {
  const points = buckets.flatMap(({ step, low, high }) =>
    low === high
      ? [[step, low]]
      : [
          [step, low],
          [step, high],
        ],
  );
  return path(points, scale);
}

function diamonds(points, { x, y }) {
  return points.map(({ step, loss }) => diamond(x(step), y(loss), 3.5)).join("");
}

function diamond(x, y, size) {
  return `M${x - size} ${y}l${size} ${-size}l${size} ${size}l${-size} ${size}z`;
}

function round(value) {
  return Math.round(value * 10) / 10;
}

export function number(value) {
  if (!Number.isFinite(value)) return "?";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e4) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export function count(value) {
  if (value >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  return value >= 1e4 ? `${Number((value / 1e3).toPrecision(4))}k` : String(value);
}
