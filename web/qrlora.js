// Colours for our sockets, and the few lines that a node shows about what it did.
import { app } from "../../scripts/app.js";

// Two hues that none of ComfyUI's own types beside them in a FLUX graph has.
const COLORS = { DELTA_R: "#1FBFA8", RESIDUAL: "#B07D52" };
const WIDGET = "qrlora_report";
// Five lines. Fixed, so that a longer or shorter report never moves the graph; what is longer scrolls.
const HEIGHT = 96;
// What the canvas keeps free above and below such an element; without it a picture below would begin under the text.
const MARGIN = 10;

function paint() {
  Object.assign(app.canvas?.default_connection_color_byType ?? {}, COLORS);
  Object.assign(window.LGraphCanvas?.link_type_colors ?? {}, COLORS);
  for (const [type, color] of Object.entries(COLORS)) {
    document.documentElement.style.setProperty(`--color-datatype-${type}`, color);
  }
  app.canvas?.setDirty(true, true);
}

function reportWidget(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
    height: `${HEIGHT}px`,
    minHeight: `${HEIGHT}px`, // the new renderer shrinks what may shrink
    padding: "4px 8px",
    overflow: "auto",
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    font: "12px/1.4 monospace",
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
    userSelect: "text",
  });
  element.setAttribute("role", "status");
  // Never part of the workflow: neither a widget value nor an input of the prompt.
  const widget = node.addDOMWidget(WIDGET, WIDGET, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT + 2 * MARGIN,
    getMaxHeight: () => HEIGHT + 2 * MARGIN,
  });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

// A node that ran once for each item of a list reports as often; what is the same is shown once.
function summary(reports) {
  if (!Array.isArray(reports)) return String(reports);
  const counts = new Map();
  for (const report of reports) counts.set(report, (counts.get(report) ?? 0) + 1);
  return [...counts].map(([report, count]) => (count > 1 ? `${count} times: ${report}` : report)).join("\n");
}

function show(node, output) {
  if (!output?.text?.length) return;
  const text = summary(output.text);
  if (node.qrloraReport) return node.qrloraReport(text); // a node with a view of its own
  reportWidget(node).element.textContent = text;
  node.setDirtyCanvas?.(true, true);
}

// Undo and a change of tab make every node anew, and a node that the server has cached does not report again.
function restore() {
  const root = app.rootGraph ?? app.graph;
  const outputs = app.nodeOutputs ?? {};
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])]) {
    for (const node of graph?.nodes ?? []) {
      if (!node.type?.startsWith("QRLoRA")) continue;
      show(node, outputs[graph === root ? String(node.id) : `${graph.id}:${node.id}`]);
    }
  }
}

app.registerExtension({
  name: "QR-LoRA",
  setup() {
    paint();
    // A change of the palette clears the colours of types that it does not know.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paint, 0));
  },
  afterConfigureGraph() {
    paint(); // the first palette is applied after setup; a workflow is loaded after that
    setTimeout(restore, 0); // the outputs of a tab come back just after its graph
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("QRLoRA")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      show(this, output);
    };
  },
});
