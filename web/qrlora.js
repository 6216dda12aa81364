// Colours for our sockets, and the few lines that a node shows about what it did.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { everyNode, nodeById, openWorkflow, workflowOf } from "./qrlora_graph.js";
import { loadWords, translated } from "./qrlora_words.js";

// Two hues that none of ComfyUI's own types beside them in a FLUX graph has.
const COLORS = { DELTA_R: "#1FBFA8", RESIDUAL: "#B07D52" };
const WIDGET = "qrlora_report";
// Those that report, which have their box from the start: what a run shows must not make a node grow.
const REPORTS = [
  ...["Apply", "BlockScale", "ContactSheet", "CreateHook", "ExportLoRA", "LoadDeltaR", "LoadResidual", "Merge", "Prompt"],
  ...["SaveDeltaR", "SaveResidual", "ScaleSweep", "Schedule", "Similarity", "ToyAdapter"],
].map((name) => `QRLoRA${name}`);
const EMPTY = "What it did stands here after a run.";
const CHOOSER = { type: "QRLoRALoadDeltaR", widget: "delta_r_name" };
// Five lines. Fixed, so that a longer or shorter report never moves the graph; what is longer scrolls.
const HEIGHT = 96;
// What the canvas keeps free above and below such an element; without it a picture below would begin under the text.
const MARGIN = 10;
const TEXT = "var(--input-text, #ddd)";
const ERROR_TEXT = "var(--error-text, #ff6b6b)";
const [MUTED, BYPASSED] = [2, 4];

// Nodes that failed, by the server's id, until they run again: {text, workflow}. The text is "" once a run has begun.
const failures = new Map();

function addStyle() {
  const style = document.createElement("style");
  style.textContent = `
    [data-qrlora-report]:empty::before { content: attr(data-qrlora-report); opacity: 0.6; }
    [data-qrlora-report] img { float: right; height: ${HEIGHT - 8}px; margin-left: 8px; border-radius: 4px; }
  `;
  document.head.append(style);
}

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
    color: TEXT,
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
    userSelect: "text",
  });
  element.setAttribute("role", "status");
  element.dataset.qrloraReport = translated(EMPTY);
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

function put(node, text, color = TEXT) {
  if (!text && !node.widgets?.some((widget) => widget.name === WIDGET)) return; // nothing to clear
  const { element } = reportWidget(node);
  const parts = [text && node.qrloraPicture, text].filter(Boolean);
  element.replaceChildren(...parts);
  element.style.color = color;
  node.setDirtyCanvas?.(true, true);
}

// What is in the adapter that was chosen, and the picture beside its file: before anything runs.
async function showChosen(node) {
  const chosen = () => node.widgets?.find((widget) => widget.name === CHOOSER.widget)?.value;
  const name = chosen();
  if (node.type !== CHOOSER.type || typeof name !== "string" || !name) return;
  const query = `name=${encodeURIComponent(name)}`;
  try {
    const answer = await api.fetchApi(`/qrlora/adapter?${query}`);
    const { text, picture, error } = await answer.json();
    if (chosen() !== name) return; // another one meanwhile
    node.qrloraPicture = picture ? pictureOf(name, api.apiURL(`/qrlora/adapter/picture?${query}`)) : null;
    put(node, text ?? String(error ?? ""), text ? TEXT : ERROR_TEXT);
  } catch (error) {
    console.warn("QR-LoRA: the adapter that was chosen could not be asked about", error);
  }
}

function pictureOf(name, address) {
  const image = document.createElement("img");
  Object.assign(image, { src: address, alt: translated("Picture of {name}", { name }), draggable: false });
  return image;
}

function followChoice(node) {
  const widget = node.widgets?.find((input) => input.name === CHOOSER.widget);
  if (!widget) return;
  const { callback } = widget;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    showChosen(node);
    return result;
  };
  showChosen(node);
}

function show(node, output) {
  if (!output?.text?.length) return;
  const text = summary(output.text);
  if (node.qrloraReport) return node.qrloraReport(text); // a node with a view of its own
  put(node, text);
}

function isOurs(node) {
  return !!node?.type?.startsWith("QRLoRA");
}

// Undo and a change of tab make every node anew, and a node that the server has cached does not report again.
function restore() {
  for (const place of everyNode()) {
    if (!isOurs(place.node) || isSilent(place.node)) continue;
    show(place.node, output(place));
    if (place.node.type === CHOOSER.type) showChosen(place.node).then(showFailures);
  }
  showFailures();
}

function output({ node, graph, inRoot }) {
  return app.nodeOutputs?.[inRoot ? String(node.id) : `${graph.id}:${node.id}`];
}

function isSilent({ mode }) {
  return [MUTED, BYPASSED].includes(mode);
}

function showFailures() {
  for (const [id, { text, workflow }] of failures) {
    const node = nodeById(id);
    if (isOurs(node) && !node.qrloraReport && isOpen(workflow)) put(node, text, ERROR_TEXT);
  }
}

function isOpen(workflow) {
  return !workflow || !openWorkflow() || workflow === openWorkflow();
}

// "custom_nodes.qr-lora.nodes.host.places.PlaceError" is for the log; the last word is for the node.
function sentence({ exception_type: type, exception_message: message }) {
  return [String(type ?? "").split(".").pop(), String(message ?? "").trim()].filter(Boolean).join(": ");
}

async function failed({ detail }) {
  if (!detail?.node_type?.startsWith("QRLoRA")) return;
  failures.set(String(detail.node_id), { text: sentence(detail), workflow: await workflowOf(detail.prompt_id) });
  showFailures();
}

// What the last run said of a node that failed, or that this run leaves out, is no longer true.
async function began({ detail }) {
  const places = [...everyNode()].filter(({ node }) => isOurs(node) && !node.qrloraReport);
  if (!failures.size && !places.some(({ node }) => isSilent(node) || node.qrloraSilenced)) return;
  if (!isOpen(await workflowOf(detail?.prompt_id))) return;
  for (const place of places) {
    const { node } = place;
    if (isSilent(node)) put(node, "");
    else if (node.qrloraSilenced) show(node, output(place)); // the server may have it cached: it would not report
    node.qrloraSilenced = isSilent(node);
  }
  for (const failure of failures.values()) if (isOpen(failure.workflow)) failure.text = "";
  showFailures();
}

// A node that failed before and did not run now is one whose former result the server still has.
async function succeeded({ detail }) {
  if (!failures.size || !isOpen(await workflowOf(detail?.prompt_id))) return;
  for (const [id, { text, workflow }] of failures) if (!text && isOpen(workflow)) failures.delete(id);
  restore();
}

app.registerExtension({
  name: "QR-LoRA",
  aboutPageBadges: [{ label: "QR-LoRA", url: "https://github.com/qr-lora/comfyui-qr-lora", icon: "pi pi-github" }],
  init: loadWords,
  setup() {
    addStyle();
    paint();
    // A change of the palette clears the colours of types that it does not know.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paint, 0));
    api.addEventListener("execution_error", failed);
    api.addEventListener("execution_start", began);
    api.addEventListener("execution_success", succeeded);
  },
  afterConfigureGraph() {
    paint(); // the first palette is applied after setup; a workflow is loaded after that
    setTimeout(restore, 0); // the outputs of a tab come back just after its graph
  },
  nodeCreated(node) {
    if (REPORTS.includes(node.comfyClass)) reportWidget(node);
    if (node.comfyClass === CHOOSER.type) followChoice(node);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("QRLoRA")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      for (const id of failures.keys()) if (nodeById(id) === this) failures.delete(id);
      show(this, output);
    };
  },
});
