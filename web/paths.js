// Nodes of ComfyUI's graph as paths, [node of the subgraph, ..., node], and what is wired to what through subgraphs and
// reroutes. Ids are those of a prompt, "5:7".
import { app } from "../../scripts/app.js";

export function rootGraph() {
  return app.graph?.rootGraph ?? app.graph;
}

/** Every node of the graph as its path; of subgraphs used twice the first. */
export function* allPaths(graph = rootGraph(), above = [], seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes ?? []) {
    const path = [...above, node];
    yield path;
    yield* allPaths(node.subgraph, path, seen);
  }
}

/** null for a node that is not in the graph, as in a subgraph on its way into it. */
export function pathOf(node) {
  return [...allPaths()].find((path) => path.at(-1) === node) ?? null;
}

export function pathTo(id) {
  const path = [];
  for (const part of id.split(":")) {
    const graph = path.length ? path.at(-1).subgraph : rootGraph();
    const node = graph?.getNodeById(part);
    if (!node) return null;
    path.push(node);
  }
  return path;
}

export function idOf(path) {
  return path.map((node) => node.id).join(":");
}

/** What feeds an input: {path of the node, slot of its output, value if it can be told before a run}, or null. */
export function sourceOf(path, name) {
  const node = path.at(-1);
  const link = node.inputs.find((input) => input.name === name)?.link;
  return link == null ? null : originOf(path.slice(0, -1), node.graph.getLink(link));
}

function originOf(above, link) {
  if (link.originIsIoNode) {
    const host = above.at(-1);
    const input = host.inputs[link.origin_slot];
    return input.link == null
      ? { path: null, value: host.getWidgetFromSlot(input)?.value }
      : originOf(above.slice(0, -1), host.graph.getLink(input.link));
  }
  const graph = above.length ? above.at(-1).subgraph : rootGraph();
  const node = graph.getNodeById(link.origin_id);
  const path = [...above, node];
  const inner = node.subgraph?.outputNode.slots[link.origin_slot].getLinks().at(0);
  if (inner) return originOf(path, inner);
  const passed = node.isVirtualNode ? node.inputs?.[0]?.link : null;
  if (passed != null) return originOf(above, graph.getLink(passed));
  const value = /^Primitive/.test(node.type)
    ? node.widgets.find((widget) => widget.name === "value")?.value
    : undefined;
  return { path, slot: link.origin_slot, value };
}

/** Every input that an output feeds: {path of its node, name}. */
export function* targetsOf(path, slot) {
  const node = path.at(-1);
  for (const id of node.outputs[slot]?.links ?? []) yield* endsOf(path.slice(0, -1), node.graph.getLink(id));
}

function* endsOf(above, link) {
  if (!link) return;
  if (link.targetIsIoNode) {
    if (above.length) yield* targetsOf(above, link.target_slot);
    return;
  }
  const graph = above.length ? above.at(-1).subgraph : rootGraph();
  const node = graph.getNodeById(link.target_id);
  if (!node) return;
  const path = [...above, node];
  if (node.subgraph)
    for (const inner of node.subgraph.inputNode.slots[link.target_slot].getLinks()) yield* endsOf(path, inner);
  else if (node.isVirtualNode) yield* targetsOf(path, 0);
  else yield { path, name: node.inputs[link.target_slot].name };
}

/** The nodes behind a node, nearest first, each once: from one output of it (slot), or from all. */
export function* nodesBehind(path, slot = null) {
  const seen = new Set();
  const waiting = [[path, slot]];
  while (waiting.length) {
    const [next, only] = waiting.shift();
    const slots = only === null ? next.at(-1).outputs?.keys() : [only];
    for (const output of slots ?? []) {
      for (const target of targetsOf(next, output)) {
        const node = target.path.at(-1);
        if (seen.has(node)) continue;
        seen.add(node);
        yield target;
        waiting.push([target.path, null]);
      }
    }
  }
}
