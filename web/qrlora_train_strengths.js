// What a trained adapter does at several strengths, in one row of the panel: the two curves, and a link to the picture.
import { BLUE, ORANGE, TEXT, shape } from "./qrlora_train_chart.js";
import { translated } from "./qrlora_words.js";

const [WIDTH, HEIGHT] = [300, 64]; // of the drawing; it is scaled to the row
const [LEFT, RIGHT, TOP, BOTTOM] = [22, 296, 6, 52];
const SERIES = [
  ["shown", "concept shown", BLUE],
  ["drift", "drift without trigger", ORANGE],
];

export class Strengths {
  constructor() {
    this.element = document.createElement("a");
    Object.assign(this.element.style, {
      display: "none",
      flex: "0 0 64px",
      color: TEXT,
      textDecoration: "none",
      gap: "8px",
      overflow: "hidden",
    });
    Object.entries({ target: "_blank", rel: "noopener", "data-qrlora-strengths": "" }).forEach((entry) =>
      this.element.setAttribute(...entry),
    );
  }

  // event: of the trainer, null hides the row. address: of the picture, which is there once the node has finished.
  show(event, address) {
    const key = event ? `${address} ${event.shown} ${event.drift}` : "";
    if (key === this.shown) return;
    this.shown = key;
    this.element.replaceChildren();
    this.element.style.display = event ? "flex" : "none";
    if (!event) return;
    this.element.href = address;
    this.element.title = translated("Pictures at several strengths: open in a new tab");
    this.#curves(event);
    this.#legend(event);
  }

  #curves(event) {
    const chart = shape(this.element, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, { flex: "1 1 0", minWidth: "0" });
    const known = SERIES.flatMap(([name]) => event[name]).filter(Number.isFinite);
    const [low, high] = [Math.min(0, ...known), Math.max(1, ...known)];
    const last = Math.max(1, ...event.strengths);
    const x = (strength) => LEFT + ((RIGHT - LEFT) * strength) / last;
    const y = (value) => BOTTOM - ((BOTTOM - TOP) * (value - low)) / (high - low);
    const line = { fill: "none", "stroke-width": 1 };
    for (const value of [0, 1]) {
      shape(chart, "path", { ...line, d: `M${LEFT} ${y(value)}H${RIGHT}` }, { stroke: `color-mix(in srgb, ${TEXT} 25%, transparent)` });
      label(chart, LEFT - 5, y(value) + 3, String(value), "end");
    }
    for (const strength of event.strengths) label(chart, x(strength), HEIGHT - 2, String(strength), "middle");
    for (const [name, , stroke] of SERIES) {
      const points = event.strengths.map((strength, index) => [strength, event[name][index]]).filter(([, value]) => Number.isFinite(value));
      const d = [[0, 0], ...points].map(([strength, value], index) => `${index ? "L" : "M"}${x(strength)} ${y(value)}`).join("");
      shape(chart, "path", { ...line, d: points.length ? d : "", "stroke-width": 2, "data-series": name }, { stroke });
      for (const [strength, value] of points) shape(chart, "circle", { cx: x(strength), cy: y(value), r: 2.5 }, { fill: stroke });
    }
    chart.setAttribute("aria-label", SERIES.map(([name, title]) => `${title}: ${event[name].map(said).join(", ")}`).join("; "));
  }

  #legend(event) {
    const list = document.createElement("span");
    Object.assign(list.style, { flex: "0 0 auto", display: "flex", flexDirection: "column", justifyContent: "center" });
    const full = event.strengths.indexOf(1);
    for (const [name, title, color] of SERIES) {
      const entry = document.createElement("span");
      const mark = document.createElement("span");
      Object.assign(mark.style, { display: "inline-block", width: "10px", height: "3px", background: color, marginRight: "5px", verticalAlign: "middle" });
      entry.append(mark, `${translated(title)} ${said(event[name][full])}`);
      list.append(entry);
    }
    this.element.append(list);
  }
}

function label(parent, x, y, text, anchor) {
  shape(parent, "text", { x, y, "text-anchor": anchor, "font-size": 9 }, { fill: TEXT }).textContent = text;
}

function said(value) {
  return Number.isFinite(value) ? value.toFixed(2) : "";
}
