// Colours for our sockets, and the few lines that a node shows about what it did.
import { app } from "../../scripts/app.js";

// Two hues that none of ComfyUI's own types beside them in a FLUX graph has.
const COLORS = { DELTA_R: "#1FBFA8", RESIDUAL: "#B07D52" };
const WIDGET = "qrlora_report";

function paint() {
  Object.assign(app.canvas?.default_connection_color_byType ?? {}, COLORS);
  Object.assign(window.LGraphCanvas?.link_type_colors ?? {}, COLORS);
  for (const [type, color] of Object.entries(COLORS)) {
    document.documentElement.style.setProperty(`--color-datatype-${type}`, color);
  }
  app.canvas?.setDirty(true, true);
}

function report(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
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
  const widget = node.addDOMWidget(WIDGET, "qrlora_report", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 72,
    getMaxHeight: () => 140,
  });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

app.registerExtension({
  name: "QR-LoRA",
  setup() {
    paint();
    // A change of the palette clears the colours of types that it does not know.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paint, 0));
  },
  // The first palette is applied after setup; a workflow is loaded after that.
  afterConfigureGraph: paint,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("QRLoRA")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      const lines = output?.text;
      if (!lines?.length) return;
      report(this).element.textContent = Array.isArray(lines) ? lines.join("\n") : String(lines);
      this.setDirtyCanvas?.(true, true);
    };
  },
});
