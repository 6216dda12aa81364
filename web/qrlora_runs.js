// What of earlier runs still stands on the nodes: errors until the next run, reports of what was not run anew.
import { app } from "../../scripts/app.js";
import { showChosen } from "./qrlora_chosen.js";
import { everyNode, nodeById, openWorkflow, workflowOf } from "./qrlora_graph.js";
import { ERROR_TEXT, put, show } from "./qrlora_report.js";

const [MUTED, BYPASSED] = [2, 4];

// Nodes that failed, by the server's id, until they run again: {text, workflow}. The text is "" once a run has begun.
const failures = new Map();

function isOurs(node) {
  return !!node?.type?.startsWith("QRLoRA");
}

// Undo and a change of tab make every node anew, and a node that the server has cached does not report again.
export function restore() {
  for (const place of everyNode()) {
    if (!isOurs(place.node) || isSilent(place.node)) continue;
    show(place.node, output(place));
    showChosen(place.node).then(showFailures);
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
export function sentence({ exception_type: type, exception_message: message }) {
  return [String(type ?? "").split(".").pop(), String(message ?? "").trim()].filter(Boolean).join(": ");
}

export async function failed({ detail }) {
  if (!detail?.node_type?.startsWith("QRLoRA")) return;
  failures.set(String(detail.node_id), { text: sentence(detail), workflow: await workflowOf(detail.prompt_id) });
  showFailures();
}

// What the last run said of a node that failed, or that this run leaves out, is no longer true.
export async function began({ detail }) {
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
export async function succeeded({ detail }) {
  if (!failures.size || !isOpen(await workflowOf(detail?.prompt_id))) return;
  for (const [id, { text, workflow }] of failures) if (!text && isOpen(workflow)) failures.delete(id);
  restore();
}

// The node has run: what it says now counts.
export function executed(node) {
  for (const id of failures.keys()) if (nodeById(id) === node) failures.delete(id);
}
