// Puts the layout editor into the CollageCanvas node. It holds no value: the numbers are those of the CollageLayer nodes.
import { app } from "../../scripts/app.js";
import {
  addEditor,
  after,
  asOneChange,
  elementAt,
  fileAddress,
  graphSide,
  isFed,
  placeOf,
  settle,
  soon,
} from "./graph_node.js";
import { settled } from "./layers.js";
import { LayoutEditor } from "./layout.js";
import { idOf, pathOf, pathTo, sourceOf } from "./paths.js";

const CANVAS = "CollageCanvas";
const LAYER = "CollageLayer";
const VALUES = ["x", "y", "scale", "rotation", "depth"];
const [MUTED, BYPASSED] = [2, 4]; // modes of a node
const FILES = { layer: ".png", background: ".jpg" };

const editors = new Map(); // node -> its editor, of the canvases in the graph

/** The part of the graph that the editor of a canvas may see. */
function graphPart(node, shown) {
  const written = new Map(); // widget -> its node, since the last commit
  return {
    ...graphSide(),
    collage: () => (shown() ? collageNow(node, shown()) : null),
    write(id, values) {
      const layer = pathTo(id).at(-1);
      for (const [name, value] of Object.entries(values)) {
        const widget = widgetOf(layer, name);
        if (isFed(layer, name)) continue;
        widget.value = settled(value, widget.options);
        written.set(widget, layer);
      }
      node.graph?.setDirtyCanvas?.(true, false);
    },
    commit() {
      asOneChange(node, () => written.forEach((layer, widget) => widget.callback?.(widget.value, app.canvas, layer)));
      written.clear();
    },
    async travel(direction) {
      const place = placeOf(node); // the node itself is made anew
      await app.extensionManager.command.execute({ undo: "Comfy.Undo", redo: "Comfy.Redo" }[direction]);
      await new Promise(requestAnimationFrame);
      elementAt(place)?.querySelector(".montage-keys").focus({ preventScroll: true });
    },
  };
}

/** What the last run showed, with the numbers of now. */
function collageNow(node, shown) {
  const chain = chainOf(node);
  const here = new Map(
    shown.layers.map((layer) => [layer.node, layer]).filter(([id]) => pathTo(id)?.at(-1).comfyClass === LAYER),
  );
  const order = chain ? chain.filter((id) => here.has(id)) : [...here.keys()];
  const size = (name) => (isFed(node, name) ? shown[name] : widgetOf(node, name).value);
  const colour = isFed(node, "background") ? "" : widgetOf(node, "background").value.trim();
  const isPlain = shown.background.startsWith("#") && /^#[0-9a-f]{6}$/i.test(colour);
  return {
    width: size("width"),
    height: size("height"),
    background: isPlain ? colour : shown.background,
    layers: order.map((id) => layerNow(id, here.get(id))),
    outdated: chain
      ? chain.join() !== order.join() || order.length !== shown.layers.length
      : here.size !== shown.layers.length,
  };
}

function layerNow(id, { picture, width, height, text }) {
  const path = pathTo(id);
  const node = path.at(-1);
  const fed = VALUES.filter((name) => isFed(node, name));
  const { min, max } = widgetOf(node, "depth").options;
  return {
    id,
    picture,
    width,
    height,
    fed,
    text: isFed(node, "text") ? text : widgetOf(node, "text").value.trim(),
    values: Object.fromEntries(
      VALUES.map((name) => [
        name,
        (fed.includes(name) ? sourceOf(path, name)?.value : null) ?? widgetOf(node, name).value,
      ]),
    ),
    defaults: Object.fromEntries(VALUES.map((name) => [name, defaultOf(node, name)])),
    depths: [min, max],
  };
}

function widgetOf(node, name) {
  return node.widgets.find((widget) => widget.name === name);
}

function defaultOf(node, name) {
  return node.constructor.nodeData.input.required[name][1].default;
}

/** The ids of the layers that will be on the canvas, from back to front; null where a node is between that may do anything. */
function chainOf(node) {
  const chain = [];
  let path = pathOf(node);
  if (!path) return null;
  while ((path = sourceOf(path, "collage")?.path)) {
    const layer = path.at(-1);
    if (layer.comfyClass !== LAYER) return null;
    if (layer.mode === MUTED) break;
    if (layer.mode !== BYPASSED) chain.unshift(idOf(path));
  }
  return chain;
}

// ---- what the last run showed, kept for a reload of the page

const MEMORY = "Montage.collages";
const MOST = 20;
const remembered = () => JSON.parse(sessionStorage.getItem(MEMORY) ?? "{}");

function remember(place, shown) {
  const { [place]: _, ...others } = remembered();
  const kept = [...Object.entries(others), [place, shown]].slice(-MOST);
  sessionStorage.setItem(MEMORY, JSON.stringify(Object.fromEntries(kept)));
}

// ---- nodes

function addLayout(node) {
  let shown = null;
  const editor = new LayoutEditor({
    address: (name, kind) => fileAddress(name + FILES[kind]),
    node: graphPart(node, () => shown),
  });
  const widget = addEditor(node, "layout", "MONTAGE_LAYOUT", editor, { serialize: false, getMinHeight: () => 340 });
  widget.serialize = false;
  node.setSize([Math.max(400, node.size[0]), Math.max(860, node.size[1])]);
  settle(node, editor, (output) => {
    if (output?.montage_canvas) remember(placeOf(node), output.montage_canvas[0]);
    shown = output?.montage_canvas?.[0] ?? remembered()[placeOf(node)] ?? null;
    editor.render();
  });
  after(node, "onAdded", () => editors.set(node, editor));
  after(node, "onRemoved", () => editors.delete(node));
}

const renderAll = soon(() => {
  for (const editor of editors.values()) editor.render();
});

app.registerExtension({
  name: "montage.layout",
  nodeCreated(node) {
    const isCanvas = node.comfyClass === CANVAS;
    if (isCanvas) addLayout(node);
    else if (node.comfyClass !== LAYER) return;
    for (const widget of node.widgets) if (widget.name !== "layout") after(widget, "callback", renderAll);
    for (const method of ["onConnectionsChange", "onAdded", "onRemoved"]) after(node, method, renderAll);
  },
});
