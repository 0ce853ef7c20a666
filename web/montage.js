// Puts the stroke editor into the GraphCutMontage node, as the widget of its `strokes` input.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { StrokeEditor } from "./editor.js";

const NODE = "GraphCutMontage";
const WIDGET = "MONTAGE_STROKES";

const editors = new WeakMap(); // node -> its editor
const seats = new Map(); // place of a node -> {view, element}: what outlives the node when undo makes it anew

const FILES = { picture: ".jpg", thumbnail: "-small.jpg", regions: ".png" };

function address(name, kind) {
  return api.apiURL("/view?" + new URLSearchParams({ filename: name + FILES[kind], subfolder: "montage", type: "temp" }));
}

/** The part of the node that its editor may see. */
function nodeSide(node, widget) {
  const base = () => node.widgets?.find((one) => one.name === "base");
  return {
    base: () => (node.inputs?.some((input) => input.widget?.name === "base" && input.link != null) ? null : base()?.value ?? 0),
    chooseBase(image) {
      base().value = image;
      base().callback?.(image, app.canvas, node);
    },
    changed() {
      // One entry of the graph's undo history, for touch as well, which makes no mouse events.
      app.canvas?.emitBeforeChange?.();
      widget().callback?.(widget().value);
      node.graph?.setDirtyCanvas?.(true, false);
      app.canvas?.emitAfterChange?.();
    },
    panning: () => Boolean(app.canvas?.read_only), // space is held, or the hand tool is chosen
    forward(event) {
      const canvas = app.canvas;
      const handler = { wheel: "processMouseWheel", pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" }[event.type];
      canvas[handler](event);
    },
  };
}

function makeWidget(node, name, spec) {
  const options = spec[1] ?? {};
  const editor = new StrokeEditor({ colours: options.colours, address, node: nodeSide(node, () => widget) });
  editor.element.dataset.captureWheel = "true"; // Nodes 2.0: with the keyboard comes the wheel
  const widget = node.addDOMWidget(name, WIDGET, editor.element, {
    hideOnZoom: false,
    socketless: options.socketless,
    getValue: () => editor.getValue(),
    setValue: (value) => editor.setValue(value),
    getMinHeight: () => 340, // classic nodes; Nodes 2.0 reads the style sheet
  });
  // The side panel writes its own width here, and the classic canvas would lay the node out with it.
  Object.defineProperty(widget, "width", { get: () => undefined, set() {}, configurable: true });
  const { onRemove } = widget;
  widget.onRemove = function () {
    onRemove?.call(this);
    editor.release();
  };
  editors.set(node, editor);
  return { widget, minWidth: 400, minHeight: 740 };
}

/** Runs `then` after a method of the node, whoever else has hooked it. */
function after(node, method, then) {
  const before = node[method];
  node[method] = function (...values) {
    const result = before?.apply(this, values);
    then(...values);
    return result;
  };
}

/** What the node's last run sent; after a reload of the page, what the strokes were painted on. */
function showPictures(node, output = app.nodeOutputs?.[outputKey(node)]) {
  const editor = editors.get(node);
  if (output?.montage_images) {
    remember(output.montage_images);
    editor.showPictures({ names: output.montage_images, size: output.montage_size, regions: output.montage_regions?.[0] });
  } else if (isRemembered(editor.painting.paintedOn.names)) editor.showPictures(editor.painting.paintedOn);
}

// Previews that this tab has seen, so that a workflow from another day asks the server for no picture it cannot have.
const MEMORY = "Montage.previews";
const remembered = () => JSON.parse(sessionStorage.getItem(MEMORY) ?? "[]");

function isRemembered(names) {
  const known = new Set(remembered());
  return names.length > 0 && names.every((name) => known.has(name));
}

function remember(names) {
  if (!isRemembered(names)) sessionStorage.setItem(MEMORY, JSON.stringify([...remembered(), ...names].slice(-1000)));
}

function outputKey(node) {
  const inside = node.graph && node.graph !== node.graph.rootGraph;
  return inside ? `${node.graph.id}:${node.id}` : String(node.id);
}

/**
 * Undo makes the node anew under its old id. In Nodes 2.0 the page then keeps the element of the old editor, where
 * strokes would be lost: the new one takes its place, and the tools stay as they were.
 */
function takeSeat(node) {
  const editor = editors.get(node);
  const place = [node.graph?.rootGraph?.id, node.graph?.id, node.id].join(":");
  const seat = seats.get(place);
  const element = seat?.element.deref();
  if (element && element !== editor.element && element.isConnected) element.replaceWith(editor.element);
  if (seat) editor.view = seat.view;
  editor.resume();
  seats.set(place, { view: editor.view, element: new WeakRef(editor.element) });
}

/**
 * Newer pages of Nodes 2.0 show nodes of one id in a graph and its subgraph by one component, which keeps the element
 * it had first.
 */
function showEditorsOfGraph() {
  for (const node of app.canvas.graph?.nodes ?? []) {
    const element = editors.get(node)?.element;
    const shown = element && document.querySelector(`[data-node-id="${node.id}"] .montage-editor`);
    if (shown && shown !== element) shown.replaceWith(element);
  }
}

function* allNodes(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes ?? []) {
    yield node;
    yield* allNodes(node.subgraph, seen);
  }
}

app.registerExtension({
  name: "montage.strokes",
  setup() {
    app.canvas.canvas.addEventListener("litegraph:set-graph", showEditorsOfGraph);
  },
  afterConfigureGraph: showEditorsOfGraph,
  getCustomWidgets: () => ({ [WIDGET]: makeWidget }),
  nodeCreated(node) {
    if (node.comfyClass !== NODE || !editors.has(node)) return;
    const editor = editors.get(node);
    after(node, "onExecuted", (output) => showPictures(node, output));
    for (const method of ["onAdded", "onConfigure"]) {
      after(node, method, () => {
        takeSeat(node);
        showPictures(node);
      });
    }
    after(node, "onConnectionsChange", () => editor.render());
    after(node.widgets.find((widget) => widget.name === "base"), "callback", () => editor.render());
  },
  onNodeOutputsUpdated() {
    for (const node of allNodes(app.graph?.rootGraph ?? app.graph)) if (editors.has(node)) showPictures(node);
  },
});
