// Where a message of the server belongs: which node of the open graph, and which workflow it was queued from.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// Every node, those in subgraphs too, with the graph that holds it.
export function* everyNode() {
  const root = app.rootGraph ?? app.graph;
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])]) {
    for (const node of graph?.nodes ?? []) yield { node, graph, inRoot: graph === root };
  }
}

// The node of this id in the graph that is open. The server's id is the way through the subgraphs: "5", "1:5".
export function nodeById(id) {
  let graph = app.rootGraph ?? app.graph;
  const way = String(id).split(":");
  const last = way.pop();
  for (const part of way) graph = graph?.getNodeById?.(part)?.subgraph;
  return graph?.getNodeById?.(last) ?? null;
}

export function openWorkflow() {
  return (app.rootGraph ?? app.graph)?.id ?? "";
}

// The id of the workflow that a queue entry was made from, "" where the host does not say.
export async function workflowOf(prompt) {
  const json = async (path) => (await api.fetchApi(path)).json();
  try {
    const { queue_running: running = [], queue_pending: pending = [] } = await json("/queue");
    const entry =
      [...running, ...pending].find((queued) => queued[1] === prompt) ??
      (await json(`/history/${encodeURIComponent(prompt)}`))[prompt]?.prompt;
    return entry?.[3]?.extra_pnginfo?.workflow?.id ?? "";
  } catch {
    return ""; // then what comes of it is shown in every workflow that has the node
  }
}
