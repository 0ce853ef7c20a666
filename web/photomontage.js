// Puts the stroke editor into the GraphCutMontage node, as the widget of its `strokes` input.
import { app } from "../../scripts/app.js";
import { StrokeEditor } from "./editor.js";
import { addEditor, after, asOneChange, fileAddress, graphSide, isFed, settle } from "./graph_node.js";

const NODE = "GraphCutMontage";
const WIDGET = "MONTAGE_STROKES";
const FILES = { picture: ".jpg", thumbnail: "-small.jpg", regions: ".png" };

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
  };
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

app.registerExtension({
  name: "montage.strokes",
  getCustomWidgets: () => ({ [WIDGET]: makeWidget }),
  nodeCreated(node) {
    const editor = node.comfyClass === NODE && editors.get(node);
    if (!editor) return;
    settle(node, editor, (output) => showPictures(editor, output));
    after(node, "onConnectionsChange", () => editor.render());
    after(
      node.widgets.find((widget) => widget.name === "base"),
      "callback",
      () => editor.render(),
    );
  },
});
