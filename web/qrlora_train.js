// The Train node's own view of its run: from the server's messages, and after a reload from what it still knows.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { everyNode, nodeById, openWorkflow, workflowOf } from "./qrlora_graph.js";
import { sentence } from "./qrlora_runs.js";
import { Job } from "./qrlora_train_job.js";
import { HEIGHT, Panel } from "./qrlora_train_panel.js";
import { followQueue } from "./qrlora_train_queue.js";
import { addElement, makeRoom } from "./qrlora_widget.js";
import { translated } from "./qrlora_words.js";

const NODE = "QRLoRATrain";
const WIDGET = "qrlora_train";
const MARGIN = 8; // around the panel, in the classic renderer
const KEPT_JOBS = 64;

const jobs = new Map(); // node id as the server names it ("5", or "1:5" in a subgraph) -> Job, newest last
let early = []; // messages that came before the state was known
let asking = false;
let drawing = 0;
let waiting = new Map(); // node id -> entries of the queue before it
let lookAtQueue = () => {};

function find(id) {
  const node = nodeById(id);
  return node?.type === NODE ? node : null;
}

// Tabs of other workflows have nodes of the same ids. A workflow that was saved under another name has another id,
// but its node still asks for the adapter that is trained.
function here(job, node) {
  if (job.workflow === undefined) return false; // asked for
  const open = openWorkflow();
  if (!job.workflow || !open || job.workflow === open) return true;
  const name = node.widgets?.find((widget) => widget.name === "output_name")?.value;
  return !!name && job.run.startsWith(`${String(name).split(/[\\/]/).pop()}-`);
}

function take(message, caughtUp) {
  if (message?.node == null || typeof message.run !== "string") return;
  const id = String(message.node);
  const job = nextJob(jobs.get(id), id, message.run);
  jobs.delete(id);
  jobs.set(id, job); // at the end: two instances of a subgraph share a node, which shows the newest
  if (jobs.size > KEPT_JOBS) jobs.delete(jobs.keys().next().value);
  if (job.prompt !== (message.prompt_id ?? null)) identify(job, message.prompt_id);
  job.take(message, caughtUp);
}

// While a run prepares it has no name yet. When it turns out to be the one before, its curve goes on.
function nextJob(known, id, run) {
  if (known?.run === run) return known;
  if (known && !known.run) {
    if (known.former?.run !== run) return Object.assign(known, { run, former: null });
    return Object.assign(known.former, { phase: known.phase });
  }
  return Object.assign(new Job(id, run), { former: run ? null : known });
}

async function identify(job, prompt) {
  job.prompt = prompt ?? null;
  job.workflow = prompt ? undefined : "";
  if (!prompt) return;
  const workflow = await workflowOf(prompt);
  if (job.prompt !== prompt) return;
  job.workflow = workflow;
  draw();
}

async function catchUp() {
  if (asking) return;
  asking = true;
  early ??= [];
  try {
    const answer = await api.fetchApi("/qrlora/train/state");
    if (answer.ok) {
      const states = (await answer.json()).jobs ?? [];
      forget(new Set(states.map(({ node, run }) => `${node} ${run}`)));
      for (const state of states) take(state, true);
    }
  } catch (error) {
    console.warn("QR-LoRA: the state of training runs could not be read", error); // the next message still shows
  }
  const waiting = early;
  early = null;
  asking = false;
  for (const message of waiting) take(message);
  draw();
}

// A training that was live before ComfyUI was started anew is none any more.
function forget(known) {
  for (const job of jobs.values()) {
    if (job.ended || known.has(`${job.node} ${job.run}`)) continue;
    Object.assign(job, { state: "stopped", text: translated("ComfyUI was restarted; queue again to go on."), reason: "" });
  }
}

// What ends a node before it has a job of its own: an input that is not what it expects.
function failed({ detail }) {
  if (detail?.node_type !== NODE) return;
  const id = String(detail.node_id);
  if (jobs.get(id)?.prompt === (detail.prompt_id ?? null) && jobs.get(id).ended) return; // it has said so itself
  take({ node: id, prompt_id: detail.prompt_id, run: "", state: "failed", text: sentence(detail), events: [] });
  draw();
}

async function stop(job) {
  const body = JSON.stringify({ node: job.node });
  try {
    const answer = await api.fetchApi("/qrlora/train/stop", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body,
    });
    if (answer.ok) return "";
    const reason = (await answer.json().catch(() => ({}))).error ?? `status ${answer.status}`;
    return translated("The server did not stop the run: {reason}", { reason });
  } catch (error) {
    return translated("The server could not be asked to stop: {reason}", { reason: error.message });
  }
}

function picture(job, step) {
  return api.apiURL(`/qrlora/train/sample?run=${encodeURIComponent(job.run)}&step=${step}`);
}

function sheet(job, step) {
  return api.apiURL(`/qrlora/train/strengths?run=${encodeURIComponent(job.run)}&step=${step}`);
}

function panel(node) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (known) return known.qrloraPanel;
  const made = new Panel({ stop, picture, sheet });
  const widget = addElement(node, {
    name: WIDGET,
    label: translated("Training"),
    element: made.element,
    height: HEIGHT, // no more is ever asked for, so nothing that is shown moves the graph
    hideOnZoom: false,
    margin: MARGIN,
    getMaxHeight: undefined, // a node that is made larger has a larger panel
  });
  widget.qrloraPanel = made;
  made.element.addEventListener("wheel", (event) => zoom(event, made), { passive: false });
  for (const kind of ["Down", "Move", "Up"]) {
    made.element.addEventListener(`pointer${kind.toLowerCase()}`, (event) => {
      if (kind === "Move" ? event.buttons & 4 : event.button === 1) app.canvas?.[`processMouse${kind}`]?.(event);
    });
  }
  makeRoom(node, 340);
  return made;
}

// The new renderer hands the wheel to the canvas by itself. What can scroll, scrolls.
function zoom(event, { element, message, samples }) {
  if (element.closest(".lg-node")) return;
  const scrolls = [message, samples].some(
    (one) => one.contains(event.target) && (one.scrollHeight > one.clientHeight || one.scrollWidth > one.clientWidth),
  );
  if (scrolls && !event.ctrlKey) return event.stopPropagation();
  event.preventDefault();
  app.canvas?.processMouseWheel?.(event);
}

// Rank and alpha as they stand on the node; null for one that is wired to another node.
function showSettings(node) {
  const value = (name) => {
    const linked = node.inputs?.find((input) => input.name === name)?.link != null;
    return linked ? null : Number(node.widgets?.find((widget) => widget.name === name)?.value);
  };
  const alpha = value("alpha");
  panel(node).settings(value("rank"), alpha ?? NaN);
}

// Again whenever one of the two is changed, by hand or by loading a workflow.
function followSettings(node) {
  for (const widget of node.widgets ?? []) {
    if (!["rank", "alpha"].includes(widget.name)) continue;
    const { callback } = widget;
    widget.callback = function (...args) {
      const result = callback?.apply(this, args);
      showSettings(node);
      return result;
    };
  }
  for (const name of ["onConfigure", "onConnectionsChange"]) {
    const before = node[name];
    node[name] = function (...args) {
      const result = before?.apply(this, args);
      showSettings(node);
      return result;
    };
  }
  showSettings(node);
}

function draw() {
  if (drawing) return;
  drawing = requestAnimationFrame(() => {
    drawing = 0;
    const shown = new Map();
    for (const job of jobs.values()) {
      const node = find(job.node);
      if (node && here(job, node) && (!job.ended || shown.get(node)?.ended !== false)) shown.set(node, job);
    }
    for (const [node, job] of shown) panel(node)?.show(job);
    const turns = new Map([...waiting].map(([id, before]) => [find(id), before]).reverse()); // the first one counts
    for (const { node } of everyNode()) {
      if (node.type !== NODE) continue;
      if (!shown.has(node)) panel(node)?.show(panel(node).job); // one that the server has forgotten
      panel(node)?.queued(turns.get(node) ?? null);
    }
  });
}

// At once: the host drops messages that nobody listens to, and a run may be going on while the page loads.
api.addEventListener("qrlora.train", ({ detail }) => {
  if (early) return early.push(detail);
  const known = jobs.get(String(detail?.node))?.prompt;
  take(detail);
  if (known !== detail?.prompt_id) lookAtQueue(); // its turn has come
  draw();
});
api.addEventListener("execution_error", failed);

app.registerExtension({
  name: "QR-LoRA.Train",
  setup() {
    api.addEventListener("reconnected", catchUp);
    lookAtQueue = followQueue(
      (prompt, node) => jobs.get(node)?.prompt === prompt,
      (found) => {
        waiting = found;
        draw();
      },
    );
    return catchUp();
  },
  afterConfigureGraph() {
    lookAtQueue(); // the workflow that is open now may be in it
    draw(); // undo and a change of tab make every node anew
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const { onNodeCreated } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      const result = onNodeCreated?.apply(this, args);
      const made = panel(this);
      this.qrloraReport = (lines) => made.report(lines); // qrlora.js: the panel instead of its own few lines
      followSettings(this);
      draw();
      return result;
    };
  },
});
