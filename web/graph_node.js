// An editor's place in a node of ComfyUI's graph: what every kind of them needs.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allPaths } from "./paths.js";

const mounted = new WeakMap(); // node -> {editor, show}
const savedViews = new Map(); // place of a node -> {view, element}: what outlives the node when undo makes it anew

/** The address of a file that a node has left in the temp folder. */
export function fileAddress(filename) {
  return api.apiURL("/view?" + new URLSearchParams({ filename, subfolder: "montage", type: "temp" }));
}

/** The address of a picture as nodes of ComfyUI name them. */
export function pictureAddress({ filename, subfolder = "", type = "output" }) {
  return api.apiURL("/view?" + new URLSearchParams({ filename, subfolder, type }));
}

/** What a NodeEditor needs of any node. */
export function graphSide() {
  return {
    panning: () => Boolean(app.canvas?.read_only), // space is held, or the hand tool is chosen
    forward(event) {
      const canvas = app.canvas;
      const handler = {
        wheel: "processMouseWheel",
        pointerdown: "processMouseDown",
        pointermove: "processMouseMove",
        pointerup: "processMouseUp",
      }[event.type];
      canvas[handler](event);
    },
  };
}

/** Makes a change one entry of the graph's undo history; for touch as well, which makes no mouse events. */
export function asOneChange(node, change) {
  app.canvas?.emitBeforeChange?.();
  change();
  node.graph?.setDirtyCanvas?.(true, false);
  app.canvas?.emitAfterChange?.();
}

/** Whether another node feeds a widget. */
export function isFed(node, name) {
  return Boolean(node.inputs?.some((input) => input.widget?.name === name && input.link != null));
}

/** Puts an editor into its node, as a widget. options: of the widget, with its value and least height. */
export function addEditor(node, name, type, editor, options) {
  editor.element.dataset.captureWheel = "true"; // Nodes 2.0: with the keyboard comes the wheel
  const widget = node.addDOMWidget(name, type, editor.element, { hideOnZoom: false, ...options });
  // The side panel writes its own width here, and the classic canvas would lay the node out with it.
  Object.defineProperty(widget, "width", { get: () => undefined, set() {}, configurable: true });
  const { onRemove } = widget;
  widget.onRemove = function () {
    onRemove?.call(this);
    editor.release();
  };
  return widget;
}

/** Has `show(output)` called with what the node's last run sent, whenever that may have changed. */
export function onOutput(node, editor, show) {
  mounted.set(node, { editor, show });
  after(node, "onExecuted", (output) => show(plain(output)));
  for (const method of ["onAdded", "onConfigure"]) {
    after(node, method, () => {
      restoreView(node);
      show(lastOutput(node));
    });
  }
}

const earlier = new Map(); // node type -> {input: the value that its absence means}

/** Has an input that older workflows do not have mean there what they meant, whatever the default of a new node is. */
export function keepMeaning(node, name, before) {
  earlier.set(node.comfyClass, { ...earlier.get(node.comfyClass), [name]: before });
  after(node, "onConfigure", ({ widgets_values: values }) => {
    const place = node.widgets.findIndex((widget) => widget.name === name);
    if (Array.isArray(values) && values.length <= place) node.widgets[place].value = before;
  });
}

/** The same for a prompt of the API that is opened as a workflow. */
function keepMeaningOfPrompt(prompt) {
  for (const [id, { inputs }] of Object.entries(prompt)) {
    const names = [Number(id), id, id.replaceAll(":", "_")]; // the last: of nodes in a subgraph, in newer pages
    const node = names.map((name) => app.graph.getNodeById(name)).find(Boolean);
    for (const [name, value] of Object.entries(earlier.get(node?.comfyClass) ?? {}))
      if (!(name in inputs)) node.widgets.find((widget) => widget.name === name).value = value;
  }
}

/** The same function, called once when all is done that happens now, however often it was asked for. */
export function soon(act) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    queueMicrotask(() => {
      waiting = false;
      act();
    });
  };
}

/** Runs `then` after a method of the node, whoever else has hooked it. */
export function after(node, method, then) {
  const before = node[method];
  node[method] = function (...values) {
    const result = before?.apply(this, values);
    then(...values);
    return result;
  };
}

export function placeOf(node) {
  return [node.graph?.rootGraph?.id, node.graph?.id, node.id].join(":");
}

/** The element that shows the editor of a place now. */
export function elementAt(place) {
  return savedViews.get(place)?.element.deref();
}

/** What the node's last run sent to the page, as a plain copy: newer pages watch theirs, and such cannot go to a thread. */
export function lastOutput(node) {
  const inside = node.graph && node.graph !== node.graph.rootGraph;
  return plain(app.nodeOutputs?.[inside ? `${node.graph.id}:${node.id}` : String(node.id)]);
}

function plain(output) {
  return output && JSON.parse(JSON.stringify(output));
}

/**
 * Undo makes the node anew under its old id. In Nodes 2.0 the page then keeps the element of the old editor, where
 * edits would be lost: the new one takes its place, and the tools stay as they were.
 */
function restoreView(node) {
  const { editor } = mounted.get(node);
  const place = placeOf(node);
  const seat = savedViews.get(place);
  const element = seat?.element.deref();
  if (element && element !== editor.element && element.isConnected) element.replaceWith(editor.element);
  if (seat) editor.view = seat.view;
  editor.resume();
  savedViews.set(place, { view: editor.view, element: new WeakRef(editor.element) });
}

/**
 * Newer pages of Nodes 2.0 show nodes of one id in a graph and its subgraph by one component, which keeps the element
 * it had first.
 */
function showEditorsOfGraph() {
  for (const node of app.canvas.graph?.nodes ?? []) {
    const element = mounted.get(node)?.editor.element;
    const shown = element && document.querySelector(`[data-node-id="${node.id}"] .montage-editor`);
    if (shown && shown !== element) shown.replaceWith(element);
  }
}

app.registerExtension({
  name: "montage.editors",
  setup() {
    app.canvas.canvas.addEventListener("litegraph:set-graph", showEditorsOfGraph);
    const load = app.loadApiJson;
    app.loadApiJson = async function (prompt, ...others) {
      await load.call(this, prompt, ...others); // newer pages return before the nodes are there
      keepMeaningOfPrompt(prompt);
    };
  },
  afterConfigureGraph: showEditorsOfGraph,
  onNodeOutputsUpdated() {
    for (const path of allPaths()) mounted.get(path.at(-1))?.show(lastOutput(path.at(-1)));
  },
});
