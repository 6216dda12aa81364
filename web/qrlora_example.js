// What a template's node will show once it has run, shown before: a picture of this pack, named by the node's property.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeById } from "./qrlora_graph.js";
import { addElement } from "./qrlora_widget.js";
import { translated } from "./qrlora_words.js";

const WIDGET = "qrlora_example";
const VIEW = "qrlora_view";
const LOOKS = 16; // four seconds
const HEIGHT = 250;

function show(node) {
  const name = node.properties?.[WIDGET];
  // A workflow is somebody else's: it names a picture in this folder and nothing else.
  if (!node.type?.startsWith("QRLoRA") || !/^[a-z_]+\.jpg$/.test(name ?? "")) return;
  const element = document.createElement("figure");
  Object.assign(element.style, { margin: 0, height: `${HEIGHT}px`, minHeight: `${HEIGHT}px`, textAlign: "center" });
  const picture = document.createElement("img");
  picture.src = new URL(name, import.meta.url).href;
  picture.alt = translated("An earlier run of this workflow");
  Object.assign(picture.style, { maxWidth: "100%", height: `${HEIGHT - 20}px`, objectFit: "contain" });
  const caption = document.createElement("figcaption");
  caption.textContent = translated("An earlier run. Press Run for your own.");
  Object.assign(caption.style, { font: "12px/20px sans-serif", color: "var(--input-text, #ddd)" });
  element.append(picture, caption);
  addElement(node, { name: WIDGET, label: translated("Example"), element, height: HEIGHT, hideOnZoom: false });
}

function remove(node) {
  const widget = node?.widgets?.find((one) => one.name === WIDGET);
  if (!widget) return;
  const size = [...node.size]; // what comes in its place has the same room
  widget.onRemove?.();
  node.widgets.splice(node.widgets.indexOf(widget), 1);
  node.setSize(size);
  node.setDirtyCanvas?.(true, true);
}

api.addEventListener("executed", ({ detail }) => remove(nodeById(detail?.display_node ?? detail?.node)));

// Where a page of ours begins. The front end shows the whole of a template that is named in the address, however small,
// some time after it is loaded; so this looks again until then, or until the reader looks elsewhere.
function lookAt() {
  const { scale, offset } = app.graph?.extra?.[VIEW] ?? {};
  if (!(scale > 0.1 && scale < 10) || !Array.isArray(offset) || !offset.every(Number.isFinite)) return;
  delete app.graph.extra[VIEW]; // once: after that it is the reader's own view
  const graph = app.graph.id;
  let left = LOOKS;
  const stop = () => (left = 0);
  for (const event of ["pointerdown", "wheel", "keydown"]) window.addEventListener(event, stop, { once: true, capture: true });
  const look = () => {
    if (left-- <= 0 || app.graph?.id !== graph) return;
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [offset[0], offset[1]];
    app.canvas.setDirty(true, true);
    setTimeout(look, 250);
  };
  look();
}

app.registerExtension({ name: "qrlora.example", loadedGraphNode: show, afterConfigureGraph: lookAt });
