// The few lines that a node shows about what it did, in a box that it has from the start.
import { addElement, makeRoom } from "./qrlora_widget.js";
import { translated, translatedReport } from "./qrlora_words.js";

const WIDGET = "qrlora_report";
const EMPTY = "What it did stands here after a run.";
// Five lines. Fixed, so that a longer or shorter report never moves the graph; what is longer scrolls.
const HEIGHT = 96;
const TEXT = "var(--input-text, #ddd)";
export const ERROR_TEXT = "var(--error-text, #ff6b6b)";

export function addStyle() {
  const style = document.createElement("style");
  style.textContent = `
    [data-qrlora-report]:empty::before { content: attr(data-qrlora-report); opacity: 0.6; }
    /* the line by which the new renderer parts the colours of a socket with two types, where both have one colour */
    .slot-dot:has([fill*="QRLORA_"]) { --inner-stroke: transparent; }
    [data-qrlora-report] img { float: right; height: ${HEIGHT - 8}px; margin-left: 8px; border-radius: 4px; }
  `;
  document.head.append(style);
}

export function reportWidget(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known;
  const element = document.createElement("div");
  Object.assign(element.style, {
    boxSizing: "border-box",
    height: `${HEIGHT}px`,
    minHeight: `${HEIGHT}px`, // the new renderer shrinks what may shrink
    contain: "size", // and lets what is long make the node grow
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
  const widget = addElement(node, {
    name: WIDGET,
    label: translated("Report"),
    element,
    height: HEIGHT,
    hideOnZoom: false,
  });
  makeRoom(node);
  return widget;
}

// A node that ran once for each item of a list reports as often; what is the same is shown once.
function summary(reports) {
  if (!Array.isArray(reports)) return translatedReport(reports);
  const counts = new Map();
  for (const report of reports) counts.set(report, (counts.get(report) ?? 0) + 1);
  return [...counts]
    .map(([english, count]) => {
      const report = translatedReport(english);
      return count > 1 ? translated("{count} times: {report}", { count, report }) : report;
    })
    .join("\n");
}

// color: of the text. The picture of an adapter that was chosen stays beside it.
export function put(node, text, color = TEXT) {
  if (!text && !node.widgets?.some((widget) => widget.name === WIDGET)) return; // nothing to clear
  const { element } = reportWidget(node);
  const parts = [text && node.qrloraPicture, text].filter(Boolean);
  element.replaceChildren(...parts);
  element.style.color = color;
  node.setDirtyCanvas?.(true, true);
}

export function show(node, output) {
  if (!output?.text?.length) return;
  node.qrloraBlocks?.(output.qrlora_blocks ?? []);
  const text = summary(output.text);
  if (node.qrloraReport) return node.qrloraReport(text); // a node with a view of its own
  put(node, text);
}
