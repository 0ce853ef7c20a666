// The layout editor: the collage's layers on their canvas, to move, scale, turn and reorder. Knows the DOM, but not ComfyUI.
import {
  centreOf,
  cornersOf,
  handleOf,
  isInside,
  isOffCanvas,
  matrixOf,
  moved,
  pointIn,
  restack,
  rotated,
  scaled,
  stack,
} from "./layers.js";
import { Drag, LEFT, hasMoved, pictureBox, placeIn } from "./pointer.js";
import { NodeEditor, button, canvasSize, claim, clear, fill, make, setAddress, toolbar } from "./widget.js";
import { t } from "./words.js";

const REACH = { mouse: 9, pen: 12, touch: 20 }; // CSS pixels around a handle that take hold of it
const STEM = 22; // CSS pixels from the frame to the handle that turns it
const LEAST = 12; // CSS pixels of half a frame, so that a layer can be seen between its handles
const MARGIN = 8; // CSS pixels that handles of large layers keep from the border
const MARGIN_OF_CANVAS = 26; // CSS pixels around it on its stage, as in the style sheet
const SOLID = 24; // alpha out of 255 that can be taken hold of
const ALPHA_SIDE = 256; // of the copies in which it is looked up
const CURSORS = ["ew-resize", "nwse-resize", "ns-resize", "nesw-resize"];
const NUDGES = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] };
const MOST_SHIFT = 10; // times as far

export class LayoutEditor extends NodeEditor {
  /**
   * address(name, kind): the URL of a picture; kind is "layer" or "background".
   * node: what the editor needs of its node, besides what a NodeEditor does:
   *   collage(): as it is now, null before the first run: {width, height, background: CSS colour or name of a picture, layers,
   *     outdated: whether there are others than those shown}; its layers in the order of their chain, each
   *     {id, picture: name, width, height, text, values: {x, y, scale, rotation, depth}, fed: [names of values that come from
   *     other nodes], defaults: values, depths: [least, most]};
   *   write(id, values): set them, as far as they are not fed; commit(): one step of the graph's history, of what was written;
   *   travel("undo" or "redo"): in the graph's history;
   *   duplicate(id): the new layer's id, flip(id), remove(id): each one step of the graph's history;
   *   addPictures(files, [x, y]): as layers, the first with its centre there, in fractions of the canvas.
   */
  constructor({ address, node }) {
    super(node, t("Layout: Tab selects a layer, arrows move it, [ and ] send it back and bring it forward"));
    this.address = address;
    this.margin = MARGIN_OF_CANVAS;
    this.view = { layer: null };
    this.collage = null;
    this.layers = []; // back to front
    this.pictures = new Map(); // name -> {image, missing, alpha}
    this.frame = 0;
    this.nudged = false;
    this.notice = "";
    this.build();
    this.listen();
    this.render();
  }

  build() {
    this.list = make("div", { className: "montage-layers", role: "listbox", ariaLabel: t("Layers, front to back") });
    this.tools = {
      forward: button(t("Forward"), t("Bring the selected layer one step forward (])"), () => this.step(1)),
      back: button(t("Back"), t("Send the selected layer one step back ([)"), () => this.step(-1)),
      reset: button(t("Reset"), t("Reset the selected layer to the place of a new one, upright (double-click)"), () =>
        this.reset(),
      ),
      add: button(t("Add"), t("Add a picture as a layer; or drop pictures onto the canvas"), () => this.files.click()),
      duplicate: button(t("Duplicate"), t("Add a copy of the selected layer (D)"), () => this.duplicate()),
      flip: button(t("Flip"), t("Mirror the selected layer, left to right (M)"), () => this.flip()),
      remove: button(t("Delete"), t("Delete the selected layer and its node (Delete)"), () => this.remove()),
      undo: button(t("Undo"), t("Undo the last change of the graph (Ctrl+Z)"), () => this.travel("undo")),
      redo: button(t("Redo"), t("Redo (Ctrl+Y)"), () => this.travel("redo")),
      ...this.viewTools,
    };
    this.files = make("input", { type: "file", accept: "image/*", multiple: true, hidden: true });
    this.canvas = make("canvas");
    this.hint = make("div", { className: "montage-hint" });
    this.stage = make("div", { className: "montage-stage montage-layout" }, this.canvas);
    this.stage.insertAdjacentHTML(
      "beforeend",
      '<svg class="montage-frame"><path class="line"/><path class="dots"/><path class="dots inner"/></svg>',
    );
    this.stage.append(this.hint, this.files);
    this.svg = this.stage.querySelector("svg");
    this.status = make("div", { className: "montage-status" });
    this.assemble(this.list, toolbar(this.tools), this.stage, this.status, this.list);
  }

  listen() {
    const { element, stage, list } = this;
    this.drag = new Drag(stage, (event) => this.take(event));
    this.sorting = new Drag(list, (event) => this.takeRow(event));
    stage.addEventListener("pointermove", (event) => this.drag.gesture || this.point(event));
    stage.addEventListener("pointerenter", () => this.drag.gesture || this.render()); // values may have been set without a word
    stage.addEventListener("dblclick", (event) => {
      claim(event);
      if (this.chosen && !this.handleAt(event) && this.layerAt(event) === this.chosen) this.reset();
    });
    stage.addEventListener("contextmenu", (event) => this.drag.gesture && claim(event)); // of a long touch
    list.addEventListener("click", (event) => this.rowOf(event) && this.choose(this.rowOf(event).layer));
    this.files.addEventListener("change", () => {
      this.node.addPictures([...this.files.files], [0.5, 0.5]);
      this.files.value = "";
    });
    element.addEventListener("dragover", (event) => event.dataTransfer?.types.includes("Files") && claim(event));
    element.addEventListener("drop", (event) => this.drop(event));
    element.addEventListener("keyup", () => this.endNudge());
    element.addEventListener("focusout", () => this.endNudge());
    new ResizeObserver(() => this.renderFrame()).observe(stage);
  }

  // ---- layers

  get chosen() {
    return this.layers.find((layer) => layer.id === this.view.layer) ?? null;
  }

  choose(layer) {
    this.notice = "";
    this.look({ layer: layer?.id ?? null });
  }

  /** The next layer further back, or further to the front. */
  chooseNext(back) {
    const { layers } = this;
    const place = this.chosen ? layers.indexOf(this.chosen) + (back ? -1 : 1) : back ? layers.length - 1 : 0;
    this.choose(layers[(place + layers.length) % layers.length]);
  }

  step(by) {
    const place = this.layers.indexOf(this.chosen);
    if (place >= 0) this.bring(this.chosen, place + by);
  }

  /** Brings a layer to a place of the stack, back to front. */
  bring(layer, place) {
    if (place < 0 || place >= this.layers.length || place === this.layers.indexOf(layer)) return;
    const depths = restack(this.collage.layers, layer, place, ({ fed }) => fed.includes("depth"), layer.depths);
    this.notice = depths ? "" : t("This order would need other depths, and those are set by other nodes.");
    for (const [one, depth] of depths ?? []) this.node.write(one.id, { depth });
    if (depths) this.node.commit();
    this.render();
  }

  reset() {
    const {
      id,
      defaults: { x, y, scale, rotation },
    } = this.chosen;
    this.node.write(id, { x, y, scale, rotation });
    this.node.commit();
    this.render();
  }

  duplicate() {
    if (!this.chosen) return;
    this.view.layer = this.node.duplicate(this.chosen.id) ?? this.view.layer;
    this.render();
  }

  flip() {
    if (this.chosen) this.node.flip(this.chosen.id);
    this.render();
  }

  remove() {
    if (this.chosen) this.node.remove(this.chosen.id);
    this.render();
  }

  drop(event) {
    const files = [...(event.dataTransfer?.files ?? [])].filter(({ type }) => type.startsWith("image/"));
    if (!files.length) return;
    claim(event);
    this.node.addPictures(files, this.collage ? placeIn(this.canvas, event) : [0.5, 0.5]);
  }

  nudge([dx, dy], far) {
    const { chosen, collage } = this;
    if (!chosen) return;
    const pixels = far ? MOST_SHIFT : 1;
    this.node.write(chosen.id, moved(chosen, collage, [0, 0], [dx * pixels, dy * pixels]));
    this.nudged = true;
    this.render();
  }

  /** A key that is held is one change. */
  endNudge() {
    if (this.nudged) this.node.commit();
    this.nudged = false;
  }

  travel(direction) {
    this.endNudge();
    this.node.travel(direction);
  }

  // ---- drags on the canvas

  take(event) {
    if (event.button !== LEFT || this.panning() || !this.collage) return null;
    this.endNudge();
    const handle = this.handleAt(event);
    if (!handle) this.choose(event.altKey ? this.chosen : this.layerAt(event));
    const { chosen: layer, collage } = this;
    if (!layer) return null;
    const from = this.pointAt(event);
    const change = { turn: rotated, scale: scaled }[handle] ?? moved;
    let begun = false;
    return {
      move: (to) => {
        begun ||= hasMoved(event, to);
        if (begun)
          this.drawSoon(() => this.node.write(layer.id, change(layer, collage, from, this.pointAt(to), to.shiftKey)));
      },
      end: () => {
        this.drawNow();
        if (begun) this.node.commit();
      },
      cancel: () => {
        this.pending = null;
        if (begun) this.node.write(layer.id, layer.values);
        this.render();
      },
    };
  }

  /** One write and one picture a frame, however many moves of the pointer come. */
  drawSoon(write) {
    this.pending = write;
    this.frame ||= requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.pending?.();
    this.pending = null;
    this.render();
  }

  pointAt(event) {
    const [x, y] = placeIn(this.canvas, event);
    return [x * this.collage.width, y * this.collage.height];
  }

  /** The nearest layer that is seen at a place; the chosen one's frame may also be held where it is transparent. */
  layerAt(event) {
    const point = this.pointAt(event);
    const seen = this.layers.findLast((layer) => this.isSolid(layer, pointIn(layer, this.collage, point)));
    const held = this.chosen && isInside(pointIn(this.chosen, this.collage, point));
    return seen ?? (held ? this.chosen : null);
  }

  isSolid({ picture: name, mirrored }, [across, v]) {
    const u = mirrored ? 1 - across : across;
    const picture = this.pictures.get(name);
    if (!isInside([u, v]) || !picture.image.naturalWidth) return false;
    const { data, width, height } = (picture.pixels ??= pixelsOf(picture.image));
    return data[4 * (Math.floor(v * height) * width + Math.floor(u * width)) + 3] >= SOLID;
  }

  /** "turn", "scale" or null. */
  handleAt(event) {
    if (!this.chosen) return null;
    const [x, y] = this.pointAt(event);
    const reach = (REACH[event.pointerType] ?? REACH.mouse) * this.scale().perPixel;
    const near = ([hx, hy]) => Math.hypot(x - hx, y - hy) <= reach;
    const { corners, handle } = this.handles();
    return handle && near(handle) ? "turn" : corners.some(near) ? "scale" : null;
  }

  point(event) {
    const handle = this.collage && this.handleAt(event);
    this.stage.style.cursor =
      handle === "turn"
        ? "grab"
        : handle === "scale"
          ? CURSORS[this.octant(event)]
          : this.collage && this.layerAt(event)
            ? "move"
            : "";
  }

  /** The direction from the chosen layer's centre, in eighths of a turn, opposite ones alike. */
  octant(event) {
    const [[cx, cy], [x, y]] = [centreOf(this.chosen, this.collage), this.pointAt(event)];
    return (Math.round((Math.atan2(y - cy, x - cx) / Math.PI) * 4) + 8) % 4;
  }

  // ---- drags in the list

  rowOf(event) {
    const row = event.target.closest?.(".montage-layer");
    return row && { layer: this.layers[this.layers.length - 1 - [...this.list.children].indexOf(row)] };
  }

  takeRow(event) {
    const row = this.rowOf(event);
    const scrolls = event.pointerType === "touch" && !event.target.closest(".montage-grip");
    if (event.button !== LEFT || !row || scrolls) return null;
    this.choose(row.layer);
    const count = this.layers.length;
    let gap = null; // in the list, counted from its top
    return {
      move: (to) => {
        if (gap === null && !hasMoved(event, to)) return;
        gap = this.gapAt(to);
        [...this.list.children].forEach((one, i) => {
          one.classList.toggle("above", i === gap);
          one.classList.toggle("below", i === count - 1 && gap === count);
        });
      },
      end: () => {
        this.showNoGap();
        const place = this.layers.indexOf(this.chosen);
        if (gap !== null && place >= 0) this.bring(this.chosen, count - gap - (count - gap > place ? 1 : 0));
      },
      cancel: () => this.showNoGap(),
    };
  }

  gapAt({ clientY }) {
    const { list } = this;
    const { top, bottom, height } = list.getBoundingClientRect();
    const row = list.firstChild.getBoundingClientRect().height;
    if (list.scrollHeight > list.clientHeight)
      list.scrollTop += clientY < top + row / 2 ? -6 : clientY > bottom - row / 2 ? 6 : 0;
    return (
      height &&
      [...list.children].filter((one) => {
        const box = one.getBoundingClientRect();
        return (box.top + box.bottom) / 2 < clientY;
      }).length
    );
  }

  showNoGap() {
    for (const row of this.list.children) row.classList.remove("above", "below");
  }

  // ---- what is shown

  render() {
    if (this.released) return;
    this.collage = this.node.collage();
    this.layers = stack(this.collage?.layers ?? []);
    this.load();
    this.paint();
    this.renderFrame();
    this.renderList();
    this.renderTools();
    this.renderStatus();
  }

  /** Loads pictures that are new, and lets go of those no longer shown. */
  load() {
    const wanted = new Map(this.layers.map(({ picture }) => [picture, "layer"]));
    if (this.collage && !isColour(this.collage.background)) wanted.set(this.collage.background, "background");
    for (const name of this.pictures.keys()) if (!wanted.has(name)) this.pictures.delete(name);
    for (const [name, kind] of wanted) {
      if (this.pictures.has(name)) continue;
      const picture = { image: new Image(), missing: false };
      const loaded = (missing) => {
        picture.missing = missing;
        if (this.pictures.get(name) === picture) this.render();
      };
      picture.image.onload = () => loaded(false);
      picture.image.onerror = () => loaded(true);
      picture.image.src = this.address(name, kind);
      this.pictures.set(name, picture);
    }
  }

  paint() {
    const { canvas, collage } = this;
    const [width, height] = collage ? canvasSize([collage.width, collage.height]) : [1, 1];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = clear(canvas);
    if (!collage) return;
    const { background } = collage;
    context.imageSmoothingQuality = "high";
    context.fillStyle = isColour(background) ? background : "#000";
    context.fillRect(0, 0, width, height);
    const picture = this.pictures.get(background)?.image;
    if (picture?.naturalWidth) {
      const cover = Math.max(width / picture.naturalWidth, height / picture.naturalHeight);
      const [w, h] = [picture.naturalWidth * cover, picture.naturalHeight * cover];
      context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
    }
    for (const layer of this.layers) {
      const { image } = this.pictures.get(layer.picture);
      if (!image.naturalWidth) continue;
      context.setTransform(width / collage.width, 0, 0, height / collage.height, 0, 0);
      context.transform(...matrixOf(layer, collage));
      if (layer.mirrored) context.scale(-1, 1);
      context.drawImage(image, -layer.width / 2, -layer.height / 2, layer.width, layer.height);
    }
  }

  /** {perPixel: pixels of the canvas for one CSS pixel, bounds: [left, top, right, bottom] of the stage, in pixels of the canvas}. */
  scale() {
    const { canvas, stage, collage } = this;
    const box = stage.getBoundingClientRect();
    const { scale, left, top } = pictureBox(canvas);
    const perPagePixel = collage.width / (canvas.width * scale);
    const bounds = [box.left - left, box.top - top, box.right - left, box.bottom - top].map(
      (side) => side * perPagePixel,
    );
    return { perPixel: perPagePixel * (box.width / stage.offsetWidth), bounds };
  }

  /** Where the chosen layer's handles are; those of a layer beyond the stage stay at its border. */
  handles() {
    const { chosen: layer, collage } = this;
    const {
      perPixel,
      bounds: [left, top, right, bottom],
    } = this.scale();
    const margin = MARGIN * perPixel;
    const visible = ([x, y]) => [
      Math.min(right - margin, Math.max(left + margin, x)),
      Math.min(bottom - margin, Math.max(top + margin, y)),
    ];
    const least = LEAST * perPixel;
    const frame = cornersOf(layer, collage, least);
    return {
      frame,
      corners: layer.fed.includes("scale") ? [] : frame.map(visible),
      handle: layer.fed.includes("rotation") ? null : visible(handleOf(layer, collage, STEM * perPixel, least)),
    };
  }

  renderFrame() {
    const { chosen, collage, svg, stage } = this;
    const [line, ...dots] = svg.children;
    svg.style.display = chosen && stage.offsetWidth ? "" : "none";
    if (!chosen || !stage.offsetWidth) return;
    svg.setAttribute("viewBox", `0 0 ${collage.width} ${collage.height}`);
    const { frame, corners, handle } = this.handles();
    const stem = handle && [middle(frame[0], frame[1]), handle];
    line.setAttribute("d", `M${frame.join("L")}Z${stem ? `M${stem.join("L")}` : ""}`);
    for (const path of dots)
      path.setAttribute("d", [...corners, ...(handle ? [handle] : [])].map((point) => `M${point}h0`).join("")); // round caps
  }

  renderList() {
    const frontFirst = [...this.layers].reverse();
    fill(this.list, frontFirst.length, () =>
      make(
        "div",
        { className: "montage-layer", role: "option" },
        make("span", { className: "montage-grip", textContent: "⠿", title: t("Drag to reorder") }),
        make("img", { draggable: false, alt: "" }),
        make("span", { className: "montage-text" }),
        make("span"),
      ),
    );
    frontFirst.forEach((layer, i) => {
      const row = this.list.children[i];
      const [, image, text, depth] = row.children;
      const chosen = String(layer === this.chosen);
      setAddress(image, !this.pictures.get(layer.picture).missing && this.address(layer.picture, "layer"));
      text.textContent = layer.text || t("(no text)");
      depth.textContent = t("depth {depth}", { depth: layer.values.depth });
      if (chosen === "true" && row.ariaSelected !== chosen) this.reveal(row);
      row.ariaSelected = chosen;
    });
  }

  renderTools() {
    const place = this.layers.indexOf(this.chosen);
    this.tools.forward.disabled = place < 0 || place === this.layers.length - 1;
    this.tools.back.disabled = place <= 0;
    for (const name of ["reset", "duplicate", "flip", "remove"]) this.tools[name].disabled = place < 0;
    this.renderView();
  }

  renderStatus() {
    const { collage, chosen } = this;
    const missing = [...this.pictures.values()].some((picture) => picture.missing);
    this.hint.textContent = !collage ? t("Drop pictures here, or run once to see the collage.") : "";
    const warning =
      this.notice ||
      (missing
        ? t("The server no longer has these pictures: run to see them again. The layout is kept.")
        : collage?.outdated
          ? t("The layers have changed since the last run: run again to see them here.")
          : this.warnOfLayers());
    this.status.classList.toggle("warning", warning !== "");
    this.status.textContent =
      warning ||
      (chosen ? described(chosen) : this.layers.length ? t("Select a layer to move, scale or rotate it.") : "");
  }

  warnOfLayers() {
    const nameOf = ({ id, text }) => t("“{text}” (node {id})", { text, id });
    const off = this.layers.filter((layer) => isOffCanvas(layer, this.collage));
    if (off.length) return t("Outside the canvas, so not visible: {layers}.", { layers: off.map(nameOf).join(", ") });
    const bare = this.layers.filter((layer) => layer.isUncut);
    return bare.length
      ? t("The picture of {layers} has transparent parts: connect Load Image's MASK to cut it out.", {
          layers: bare.map(nameOf).join(", "),
        })
      : "";
  }

  // ---- keys

  actionOf(key, event) {
    if (key in NUDGES) return () => this.nudge(NUDGES[key], event.shiftKey);
    return {
      tab: this.layers.length ? () => this.chooseNext(!event.shiftKey) : null,
      "]": () => this.step(1),
      pageup: () => this.step(1),
      "[": () => this.step(-1),
      pagedown: () => this.step(-1),
      d: () => this.duplicate(),
      m: () => this.flip(),
      delete: () => this.remove(),
      escape: () =>
        (this.drag.gesture ?? this.sorting.gesture) ? (this.drag.cancel(), this.sorting.cancel()) : this.leave(),
    }[key];
  }

  release() {
    super.release();
    this.drag.cancel();
    this.sorting.cancel();
    this.collage = null;
    this.layers = [];
    this.pictures.clear();
    this.list.replaceChildren();
    this.canvas.width = this.canvas.height = 1;
  }
}

function described({ values: { x, y, scale, rotation, depth }, fed }) {
  const numbers = t("x {x}, y {y}, scale {scale}, {rotation}°, depth {depth}.", { x, y, scale, rotation, depth });
  return fed.length
    ? `${numbers} ${t("Set by other nodes, so it can only be changed there: {names}.", { names: fed.join(", ") })}`
    : numbers;
}

function isColour(background) {
  return background.startsWith("#");
}

function middle([ax, ay], [bx, by]) {
  return [(ax + bx) / 2, (ay + by) / 2];
}

function pixelsOf(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = canvasSize([image.naturalWidth, image.naturalHeight], ALPHA_SIDE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}
