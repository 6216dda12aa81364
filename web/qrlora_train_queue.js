// Which Train nodes of the open workflow wait in ComfyUI's queue, and how many entries run before them.
import { api } from "../../scripts/api.js";
import { openWorkflow } from "./qrlora_graph.js";

const NODE = "QRLoRATrain";
const PAUSE = 150; // the host reports every change, some of them several times

// entries: [number, prompt id, prompt, extra data, outputs]
function trains(entry, ran) {
  const workflow = entry[3]?.extra_pnginfo?.workflow?.id ?? "";
  if (workflow && openWorkflow() && workflow !== openWorkflow()) return [];
  return Object.entries(entry[2] ?? {})
    .filter(([id, one]) => one?.class_type === NODE && !ran(entry[1], id))
    .map(([id]) => id);
}

// Node id -> entries before it, 0 where its own entry runs; the first time that a node is in the queue counts.
export function waitingIn({ queue_running: running = [], queue_pending: pending = [] }, ran) {
  const waiting = new Map();
  const entries = [...running, ...[...pending].sort((one, other) => one[0] - other[0])];
  entries.forEach((entry, place) => {
    for (const id of trains(entry, ran)) if (!waiting.has(id)) waiting.set(id, place);
  });
  return waiting;
}

// onChange(waiting) now and whenever the queue changes. ran(prompt, node): whether it has its turn already, or had it.
export function followQueue(ran, onChange) {
  const cached = new Map(); // prompt -> nodes whose result the server has: they do not run
  let asking = 0;
  const look = () => {
    clearTimeout(asking);
    asking = setTimeout(async () => {
      try {
        const queue = await (await api.fetchApi("/queue")).json();
        onChange(waitingIn(queue, (prompt, node) => cached.get(prompt)?.has(node) || ran(prompt, node)));
      } catch (error) {
        console.warn("QR-LoRA: the queue could not be read", error); // the next change asks again
      }
    }, PAUSE);
  };
  api.addEventListener("execution_cached", ({ detail }) => {
    cached.clear(); // of entries that are done
    cached.set(detail?.prompt_id, new Set((detail?.nodes ?? []).map(String)));
    look();
  });
  for (const event of ["status", "execution_start", "executing", "promptQueued", "reconnected"]) {
    api.addEventListener(event, look);
  }
  look();
  return look;
}
