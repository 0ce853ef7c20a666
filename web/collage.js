// Puts the layout editor into the CollageCanvas node. It holds no value: the numbers are those of the CollageLayer nodes.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { cutoutAddress, cutoutOf } from "./files.js";
import {
  addEditor,
  after,
  asOneChange,
  elementAt,
  fileAddress,
  graphSide,
  isFed,
  keepMeaning,
  pictureAddress,
  placeOf,
  onOutput,
  soon,
} from "./graph_node.js";
import { settled } from "./layers.js";
import { LayoutEditor } from "./layout.js";
import { idOf, pathOf, pathTo, sourceOf } from "./paths.js";

const CANVAS = "CollageCanvas";
const LAYER = "CollageLayer";
const LOADER = "LoadImage";
const GREY = "#969696";
const ASIDE = 0.05; // of the canvas, from a layer to its copy
const VALUES = ["x", "y", "scale", "rotation", "depth"];
const [MUTED, BYPASSED] = [2, 4]; // modes of a node
const FILES = { layer: ".png", background: ".jpg" };

const editors = new Map(); // node -> its editor, of the canvases in the graph

/** The part of the graph that the editor of a canvas may see. */
function graphPart(node, shown) {
  const written = new Map(); // widget -> its node, since the last commit
  return {
    ...graphSide(),
    collage: () => collageNow(node, shown()),
    duplicate: (id) => duplicate(node, pathTo(id)),
    flip(id) {
      const layer = pathTo(id).at(-1);
      const widget = widgetOf(layer, "flip");
      if (!isFed(layer, "flip")) asOneChange(node, () => setValue(layer, widget, !widget.value));
    },
    remove: (id) => removeLayer(node, pathTo(id)),
    addPictures: (files, place) => addPictures(node, files, place),
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

/** The collage with the numbers of now: pictures of Load Image as they are, others as the last run showed them. */
function collageNow(node, shown) {
  const chain = chainOf(node);
  const run = new Map(
    (shown?.layers ?? []).map((layer) => [layer.node, layer]).filter(([id]) => pathTo(id)?.at(-1).comfyClass === LAYER),
  );
  const ids = chain ?? [...run.keys()];
  const pictures = new Map(ids.map((id) => [id, fileOf(pathTo(id)) ?? run.get(id)]).filter(([, picture]) => picture));
  if (!shown && !pictures.size) return null;
  const size = (name) => (isFed(node, name) ? shown?.[name] : widgetOf(node, name).value);
  const [width, height] = [size("width"), size("height")];
  if (!width || !height) return null;
  const colour = isFed(node, "background") ? "" : widgetOf(node, "background").value.trim();
  const isPlain = (shown?.background ?? "#").startsWith("#") && /^#[0-9a-f]{6}$/i.test(colour);
  const layers = [...pictures].map(([id, picture]) => layerNow(id, picture));
  const isOfRun = layers.every(({ id }) => pictures.get(id) === run.get(id));
  return {
    width,
    height,
    background: isPlain ? colour : (shown?.background ?? GREY),
    layers,
    outdated: layers.length !== ids.length || (isOfRun && layers.length !== shown.layers.length),
  };
}

/** A layer's picture where it comes from Load Image alone, cut out as the node will do it, or null. */
function fileOf(path) {
  const source = sourceOf(path, "image");
  const loader = source?.path?.at(-1);
  const name = loader?.comfyClass === LOADER && !isFed(loader, "image") && widgetOf(loader, "image")?.value;
  const mask = sourceOf(path, "mask");
  const layer = path.at(-1);
  const isAlpha =
    mask?.path?.at(-1) === loader &&
    mask?.slot === 1 &&
    (widgetOf(layer, "mask_is").value === "transparency" ||
      (widgetOf(layer, "mask_is").value === "auto" && !String(name).startsWith("clipspace/")));
  if (!name || (mask && !isAlpha)) return null;
  const [, folder, filename, type] = String(name).match(/^(?:(.*)\/)?(.*?)(?: \[(input|output|temp)\])?$/);
  const address = pictureAddress({ filename, subfolder: folder ?? "", type: type ?? "input" });
  const made = cutoutOf(address, { opaque: !mask, trim: widgetOf(layer, "trim").value }, renderAll);
  return made && { ...made, picture: made.name, text: "", flip: false, isUncut: !mask && made.isTransparent };
}

function layerNow(id, { picture, width, height, text, flip = false, isUncut = false }) {
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
    isUncut,
    mirrored: !isFed(node, "flip") && widgetOf(node, "flip").value !== flip,
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

// ---- layers that come and go

function setValue(node, widget, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

function slotOf(node, name) {
  return node.inputs.findIndex((input) => input.name === name);
}

/** Puts a layer into the chain in front of another, or of none, where it is the last one before the canvas. */
function insert(canvas, layer, behind) {
  const graph = layer.graph;
  const ends = (behind?.outputs[0].links ?? []).map((id) => graph.getLink(id));
  const next = ends.map((link) => [graph.getNodeById(link.target_id), link.target_slot]).filter(([target]) => target);
  if (behind) behind.connect(0, layer, slotOf(layer, "collage"));
  for (const [target, slot] of next.length ? next : [[canvas, slotOf(canvas, "collage")]])
    layer.connect(0, target, slot);
}

/** A copy of a layer in front of it, a little to the side, with the same pictures. Returns its id. */
function duplicate(canvas, path) {
  const layer = path.at(-1);
  const { graph } = layer;
  const copy = layer.clone();
  asOneChange(canvas, () => {
    graph.add(copy);
    copy.pos = [layer.pos[0] + 40, layer.pos[1] + 40];
    for (const name of ["image", "mask"]) {
      const link = graph.getLink(layer.inputs[slotOf(layer, name)].link);
      graph.getNodeById(link?.origin_id)?.connect(link.origin_slot, copy, slotOf(copy, name));
    }
    insert(canvas, copy, layer);
    for (const name of ["x", "y"]) setValue(copy, widgetOf(copy, name), widgetOf(layer, name).value + ASIDE);
  });
  return idOf([...path.slice(0, -1), copy]);
}

/** Takes a layer out of the chain, which is closed behind it. */
function removeLayer(canvas, path) {
  const layer = path.at(-1);
  const { graph } = layer;
  asOneChange(canvas, () => {
    const behind = graph.getLink(layer.inputs[slotOf(layer, "collage")].link);
    const source = graph.getNodeById(behind?.origin_id);
    for (const link of (layer.outputs[0].links ?? []).map((id) => graph.getLink(id)))
      source?.connect(behind.origin_slot, graph.getNodeById(link.target_id), link.target_slot);
    graph.remove(layer);
  });
  renderAll();
}

/** Uploads files and adds each as Load Image and Collage Layer, in front of all others. */
async function addPictures(canvas, files, [x, y]) {
  const uploaded = [];
  for (const file of files) {
    const body = new FormData();
    body.append("image", file);
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (!answer.ok) continue;
    const { name, subfolder } = await answer.json();
    uploaded.push(subfolder ? `${subfolder}/${name}` : name);
  }
  if (!uploaded.length) return;
  asOneChange(canvas, () => uploaded.forEach((name, i) => addLayer(canvas, name, [x + i * ASIDE, y + i * ASIDE])));
  renderAll();
}

function addLayer(canvas, name, [x, y]) {
  const { graph } = canvas;
  const last = graph.getNodeById(graph.getLink(canvas.inputs[slotOf(canvas, "collage")].link)?.origin_id);
  const [layer, loader] = [LAYER, LOADER].map((type) => window.LiteGraph.createNode(type));
  const anchor = last ?? canvas;
  for (const node of [layer, loader]) graph.add(node);
  layer.pos = last
    ? [anchor.pos[0], anchor.pos[1] + anchor.size[1] + 60]
    : [canvas.pos[0] - layer.size[0] - 60, canvas.pos[1]];
  loader.pos = [layer.pos[0] - loader.size[0] - 60, layer.pos[1]];
  const image = widgetOf(loader, "image");
  if (Array.isArray(image.options?.values) && !image.options.values.includes(name)) image.options.values.push(name);
  setValue(loader, image, name);
  loader.connect(0, layer, slotOf(layer, "image"));
  loader.connect(1, layer, slotOf(layer, "mask"));
  if (last?.comfyClass === LAYER) insert(canvas, layer, last);
  else layer.connect(0, canvas, slotOf(canvas, "collage"));
  for (const [value, number] of [
    ["x", x],
    ["y", y],
  ])
    setValue(layer, widgetOf(layer, value), settled(number, widgetOf(layer, value).options));
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

/** In Nodes 2.0, which shares the height of a taller node among all boxes, has this last one take it. */
function growAlone(element) {
  const grid = element.closest(".lg-node-widgets");
  const rows = grid?.style.gridTemplateRows ?? "";
  const own = rows.lastIndexOf("auto");
  const mended = rows.slice(0, own).replaceAll("auto", "min-content") + rows.slice(own);
  if (own > 0 && mended !== rows) grid.style.gridTemplateRows = mended;
}

function addLayout(node) {
  let shown = null;
  const editor = new LayoutEditor({
    address: (name, kind) => cutoutAddress(name) ?? fileAddress(name + FILES[kind]),
    node: graphPart(node, () => shown),
  });
  const widget = addEditor(node, "layout", "MONTAGE_LAYOUT", editor, { serialize: false, getMinHeight: () => 420 });
  widgetOf(node, "prompt").options.getMaxHeight = () => 110; // a taller node is for the picture
  new ResizeObserver(() => growAlone(editor.element)).observe(editor.element);
  widget.serialize = false;
  node.setSize([Math.max(400, node.size[0]), Math.max(860, node.size[1])]);
  onOutput(node, editor, (output) => {
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
    else if (node.comfyClass === LAYER) keepMeaning(node, "mask_is", "shape");
    else if (node.comfyClass !== LOADER) return;
    for (const widget of node.widgets) if (widget.name !== "layout") after(widget, "callback", renderAll);
    for (const method of ["onConnectionsChange", "onAdded", "onRemoved"]) after(node, method, renderAll);
  },
});
