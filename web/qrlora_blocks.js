// The blocks of an adapter with their factors, drawn on delta R Block Scale after a run: a bar for each block.
import { app } from "../../scripts/app.js";
import { addElement, makeRoom } from "./qrlora_widget.js";
import { translated } from "./qrlora_words.js";

const NODE = "QRLoRABlockScale";
const WIDGET = "qrlora_blocks";
const HEIGHT = 84;
const [WIDTH, TOP, FOOT, GAP] = [240, 6, 14, 3];
const SVG = "http://www.w3.org/2000/svg";
const [MORE, LESS] = ["#1FBFA8", "#ff6b6b"];

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, one] of Object.entries(attributes)) element.setAttribute(key, one);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

const written = (number) => String(Math.round(number * 1000) / 1000);

function title(kind, [number, mean, low, high]) {
  const name = kind === "other" ? translated("outside of blocks") : `${kind} ${number}`;
  return low === high ? `${name}: ${written(mean)}` : `${name}: ${written(low)} - ${written(high)}`;
}

// kinds: [{kind, blocks: [[number, mean, lowest, highest], ...]}, ...] in the order of the network.
function draw(svg, kinds) {
  svg.replaceChildren();
  const bars = kinds.reduce((sum, { blocks }) => sum + blocks.length, 0);
  if (!bars) {
    const text = { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle", "font-size": 10, fill: "currentColor" };
    add(svg, "text", { ...text, opacity: 0.6 }, translated("The blocks and their factors stand here after a run."));
    return;
  }
  const means = kinds.flatMap(({ blocks }) => blocks.map(([, mean]) => mean));
  const [low, high] = [Math.min(0, ...means), Math.max(1, ...means)];
  const width = (WIDTH - GAP * (kinds.length + 1)) / bars;
  const y = (factor) => TOP + ((high - factor) / (high - low)) * (HEIGHT - TOP - FOOT);
  let x = GAP;
  for (const factor of [0, 1]) {
    const place = { x1: 0, x2: WIDTH, y1: y(factor), y2: y(factor) };
    add(svg, "line", { ...place, stroke: "currentColor", "stroke-opacity": 0.25 });
  }
  for (const { kind, blocks } of kinds) {
    const label = { x: x + (blocks.length * width) / 2, y: HEIGHT - 3, "text-anchor": "middle", "font-size": 8 };
    if (blocks.length * width > 20) add(svg, "text", { ...label, fill: "currentColor" }, kind.replaceAll("_", " "));
    for (const block of blocks) {
      const [from, to] = [y(Math.max(0, block[1])), y(Math.min(0, block[1]))];
      const place = { x, y: from, width: Math.max(0.5, width - Math.min(1, width / 4)), height: Math.max(0.5, to - from) };
      add(add(svg, "rect", { ...place, fill: block[1] < 0 ? LESS : MORE }), "title", {}, title(kind, block));
      x += width;
    }
    x += GAP;
  }
}

function attach(node) {
  if (node.widgets?.some((widget) => widget.name === WIDGET)) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", translated("blocks and their factors, from the model's input at the left"));
  Object.assign(svg.style, { width: "100%", height: "100%" });
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
    height: `${HEIGHT}px`,
    minHeight: `${HEIGHT}px`, // the new renderer shrinks what may shrink
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
  });
  element.append(svg);
  addElement(node, { name: WIDGET, label: translated("Blocks"), element, height: HEIGHT });
  node.qrloraBlocks = (kinds) => draw(svg, kinds);
  draw(svg, []);
  makeRoom(node);
}

app.registerExtension({
  name: "QR-LoRA.blocks",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...rest) {
      created?.apply(this, rest);
      attach(this);
    };
  },
});
