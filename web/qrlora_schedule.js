// The curve of a delta R Schedule, drawn as it is typed. The server reads the same text when the node runs.
import { app } from "../../scripts/app.js";
import { addElement, makeRoom } from "./qrlora_widget.js";
import { translated } from "./qrlora_words.js";

const NODE = "QRLoRASchedule";
const WIDGET = "qrlora_curve";
const [WIDTH, HEIGHT, PAD] = [220, 84, 6];
const SVG = "http://www.w3.org/2000/svg";

function value(node, name) {
  return node.widgets?.find((widget) => widget.name === name)?.value;
}

// Points as they are written. A comma separates, unless that leaves what is no point: then one between digits is decimal.
// The same rule as qrlora_core/written.py.
function parts(text) {
  const isPoint = (part) => /^[^:]+:[^:]+$/.test(part);
  const trimmed = (list) => list.map((part) => part.trim()).filter(Boolean);
  const plain = trimmed(text.split(/[,;\n]/));
  if (plain.every(isPoint)) return plain;
  const decimal = trimmed(text.split(/[;\n]|,(?!\d)|(?<!\d),/)).map((part) => part.replace(/(?<=\d),(?=\d)/g, "."));
  return decimal.every(isPoint) ? decimal : plain;
}

// [[place from 0 at the left to 1 at the right, factor], ...], or null when the text cannot be read.
function points(node, presets) {
  const preset = value(node, "preset");
  const at = 1 - Number(value(node, "switch"));
  if (preset === "content first") return [[0, 1], [at, 1], [at, 0], [1, 0]];
  if (preset === "style second") return [[0, 0], [at, 0], [at, 1], [1, 1]];
  const falling = preset === "points" && value(node, "over") === "sigma";
  const text = preset === "points" ? value(node, "points") : presets[preset];
  const found = [];
  for (const part of parts(String(text ?? ""))) {
    const [place, factor, ...more] = part.split(":").map((one) => (one.trim() === "" ? NaN : Number(one)));
    if (more.length || !Number.isFinite(place) || !Number.isFinite(factor) || Math.abs(factor) > 4) return null;
    found.push([falling ? 1 - Math.min(place, 1) : place, factor]);
  }
  if (!found.length || found.some(([place]) => place < 0 || place > 1)) return null;
  if (found.some(([place], index) => index && place < found[index - 1][0])) return null;
  return [[0, found[0][1]], ...found, [1, found.at(-1)[1]]];
}

function draw(svg, curve) {
  svg.replaceChildren();
  const add = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, one] of Object.entries(attributes)) element.setAttribute(key, one);
    svg.append(element);
    return element;
  };
  if (!curve) {
    const text = add("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle", "font-size": 11 });
    text.setAttribute("fill", "var(--error-text, #ff6b6b)");
    text.textContent = translated("places and factors, as in 0: 1, 0.5: 0");
    return;
  }
  const factors = curve.map(([, factor]) => factor);
  const [low, high] = [Math.min(0, ...factors), Math.max(1, ...factors)];
  const x = (place) => PAD + place * (WIDTH - 2 * PAD);
  const y = (factor) => HEIGHT - PAD - ((factor - low) / (high - low)) * (HEIGHT - 2 * PAD);
  for (const factor of new Set([0, 1])) {
    add("line", { x1: x(0), x2: x(1), y1: y(factor), y2: y(factor), stroke: "currentColor", "stroke-opacity": 0.25 });
  }
  const path = curve.map(([place, factor]) => `${x(place)},${y(factor)}`).join(" ");
  add("polyline", { points: path, fill: "none", stroke: "#1FBFA8", "stroke-width": 2, "stroke-linejoin": "round" });
}

function attach(node, presets) {
  if (node.widgets?.some((widget) => widget.name === WIDGET)) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", translated("strength over the sampling, from the first step at the left"));
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
    height: `${HEIGHT}px`,
    minHeight: `${HEIGHT}px`, // the new renderer shrinks what may shrink
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
  });
  Object.assign(svg.style, { width: "100%", height: "100%" });
  element.append(svg);
  addElement(node, { name: WIDGET, label: translated("Curve"), element, height: HEIGHT });
  const redraw = () => draw(svg, points(node, presets));
  for (const one of node.widgets) {
    if (!["preset", "points", "over", "switch"].includes(one.name)) continue;
    const callback = one.callback;
    one.callback = function (...rest) {
      const result = callback?.apply(this, rest);
      redraw();
      return result;
    };
    one.inputEl?.addEventListener?.("input", redraw);
  }
  node.qrloraRedraw = redraw;
  redraw();
  makeRoom(node);
}

app.registerExtension({
  name: "QR-LoRA.schedule",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const presets = nodeData.input?.required?.preset?.[1]?.qrlora_presets ?? {};
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...rest) {
      created?.apply(this, rest);
      attach(this, presets);
    };
    const configured = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function (...rest) {
      configured?.apply(this, rest);
      this.qrloraRedraw?.();
    };
  },
});
