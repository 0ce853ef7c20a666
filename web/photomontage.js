// Puts the stroke editor into the GraphCutMontage node, as the widget of its `strokes` input.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { StrokeEditor } from "./editor.js";
import {
  addEditor,
  after,
  asOneChange,
  fileAddress,
  graphSide,
  isFed,
  keepMeaning,
  lastOutput,
  pictureAddress,
  onOutput,
  soon,
} from "./graph_node.js";
import { allPaths, nodesBehind, pathOf } from "./paths.js";
import { t } from "./words.js";

const NODE = "GraphCutMontage";
const WIDGET = "MONTAGE_STROKES";
const COMPOSITE = "CompositeAttentionInject";
const MASKS = 0; // output of the cut
const BASE = 3;
const INPUT = 1; // LiteGraph's name of the side of a node
const FILES = { picture: ".jpg", thumbnail: "-small.jpg", regions: ".png", weights: ".bin" };
const OTHER_STROKES = ["stroke_masks", "stroke_picture"]; // inputs
const [AUTO, AS_SET] = ["auto", "as unmarked_is_base"]; // values of `unmarked`

const editors = new WeakMap(); // node -> its editor

/** The part of the node that its editor may see. */
function nodeSide(node, widget) {
  const base = () => node.widgets?.find((one) => one.name === "base");
  return {
    ...graphSide(),
    base: () => (isFed(node, "base") ? null : (base()?.value ?? 0)),
    chooseBase(image) {
      base().value = image;
      base().callback?.(image, app.canvas, node);
    },
    changed: () => asOneChange(node, () => widget().callback?.(widget().value)),
    unpainted() {
      if (node.inputs?.some(({ name, link }) => OTHER_STROKES.includes(name) && link != null)) return null;
      const value = (name) => node.widgets?.find((one) => one.name === name)?.value;
      return value("unmarked_is_base") ? "base" : value("unmarked") === AUTO ? "auto" : "strokes";
    },
    warning: () => warningOfBase(node, base()?.value),
  };
}

/** The nodes that compose by this node's masks, as paths. */
function compositesOf(node) {
  const path = pathOf(node);
  if (!path) return [];
  return [...nodesBehind(path, MASKS)]
    .map((target) => target.path)
    .filter((one) => one.at(-1).comfyClass === COMPOSITE);
}

/** A composite that has a base of its own, which is another one. */
function warningOfBase(node, base) {
  for (const path of compositesOf(node)) {
    const composite = path.at(-1);
    const isFollowing = composite.inputs.some(({ name, link }) => name === "cut_base" && link != null);
    const own = composite.widgets?.find((widget) => widget.name === "base")?.value;
    if (!isFollowing && !isFed(composite, "base") && own !== base)
      return t("{node} has base {own}, and here it is {base}: connect this node's output base to its input cut_base.", {
        node: composite.title,
        own,
        base,
      });
  }
  return "";
}

/** The address of the picture that the last run composed by this node's masks, or null. */
function resultOf(node) {
  for (const composite of compositesOf(node)) {
    for (const { path } of nodesBehind(composite)) {
      const picture = lastOutput(path.at(-1))?.images?.at(-1);
      if (picture?.filename) return pictureAddress(picture);
    }
  }
  return null;
}

const outdated = new WeakMap(); // node -> address of a result that is older than the node's last run

function showResult(node) {
  const address = resultOf(node);
  if (outdated.get(node) !== address) editors.get(node).showResult(address);
}

function makeWidget(node, name, spec) {
  const options = spec[1] ?? {};
  const editor = new StrokeEditor({
    colours: options.colours,
    address: (name, kind) => fileAddress(name + FILES[kind]),
    node: nodeSide(node, () => widget),
  });
  const widget = addEditor(node, name, WIDGET, editor, {
    socketless: options.socketless,
    getValue: () => editor.getValue(),
    setValue: (value) => editor.setValue(value),
    getMinHeight: () => 340, // classic nodes; Nodes 2.0 reads the style sheet
  });
  editors.set(node, editor);
  return { widget, minWidth: 400, minHeight: 740 };
}

/** What the node's last run sent; after a reload of the page, what the strokes were painted on. */
function showPictures(editor, output) {
  if (output?.montage_images) {
    remember(output.montage_images);
    editor.showPictures({
      names: output.montage_images,
      size: output.montage_size,
      regions: output.montage_regions?.[0],
      cut: output.montage_cut?.[0] ?? null,
      base: output.montage_base?.[0] ?? null,
      strokes: output.montage_strokes?.[0] ?? null,
    });
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

/** A run of the node: the result of other strokes is none of these. */
function beginResult(node, output) {
  const { pictures } = editors.get(node);
  const isAnother = output?.montage_strokes?.[0] !== pictures.strokes || output?.montage_base?.[0] !== pictures.base;
  if (isAnother) outdated.set(node, resultOf(node));
}

/** Masks of a cut that are wired to a composite bring the cut's base along. */
function bringBase(composite, type, slot, isConnected) {
  if (type !== INPUT || !isConnected || app.configuringGraph || composite.inputs[slot]?.name !== "masks") return;
  const link = composite.graph?.getLink(composite.inputs[slot].link);
  const cut = link && composite.graph.getNodeById(link.origin_id);
  const free = composite.inputs.findIndex(({ name, link }) => name === "cut_base" && link == null);
  if (cut?.comfyClass === NODE && free >= 0) cut.connect(BASE, composite, free);
}

const renderAll = soon(() => {
  for (const path of allPaths()) editors.get(path.at(-1))?.render();
});

const showResults = soon(() => {
  for (const path of allPaths()) if (editors.has(path.at(-1))) showResult(path.at(-1));
});

app.registerExtension({
  name: "montage.strokes",
  getCustomWidgets: () => ({ [WIDGET]: makeWidget }),
  setup: () => api.addEventListener("executed", showResults),
  onNodeOutputsUpdated: showResults,
  nodeCreated(node) {
    if (node.comfyClass === COMPOSITE) {
      after(node, "onConnectionsChange", (...values) => bringBase(node, ...values));
      after(node, "onConnectionsChange", renderAll);
      for (const widget of node.widgets) if (widget.name === "base") after(widget, "callback", renderAll);
    }
    const editor = node.comfyClass === NODE && editors.get(node);
    if (!editor) return;
    keepMeaning(node, "unmarked", AS_SET);
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      beginResult(node, output);
      return before?.apply(this, arguments);
    };
    onOutput(node, editor, (output) => showPictures(editor, output));
    after(node, "onConnectionsChange", () => editor.render());
    for (const widget of node.widgets)
      if (["base", "unmarked", "unmarked_is_base"].includes(widget.name))
        after(widget, "callback", () => editor.render());
  },
});
