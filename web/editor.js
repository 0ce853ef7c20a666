// The stroke editor: thumbnails, tools, the chosen image to paint on. Knows the DOM, but not ComfyUI.
import { Drawing } from "./drawing.js";
import { Pen } from "./pen.js";
import { coverage } from "./raster.js";
import { LONG_TEXT, Painting, UNIT, makeStroke } from "./strokes.js";
import { NodeEditor, button, claim, fill, make, setAddress, toolbar } from "./widget.js";

const RADIUS = { least: 20, most: 1500, first: 250, step: 1.2 };
const MANY = 12; // images, from which on the thumbnails are small
const NO_PICTURES = { names: [], size: null, regions: null };
const UNSEEN = [512, 512]; // fine enough that strokes of different images do not meet before their size is known

export class StrokeEditor extends NodeEditor {
  /**
   * colours: CSS colours of the images, in order.
   * address(name, kind): the URL of a picture; kind is "picture", "thumbnail" or "regions".
   * node: what the editor needs of its node, besides what a NodeEditor does:
   *   base(): number of the base image, null while another node feeds it; chooseBase(image);
   *   changed(): called after each edit.
   */
  constructor({ colours, address, node }) {
    super(node, "Strokes: 0 to 9 and arrows choose an image, E erases, [ and ] size the brush");
    Object.assign(this, { colours, address });
    this.painting = new Painting();
    this.pictures = NO_PICTURES;
    this.missing = false; // the chosen picture's file is gone from the server
    this.view = { image: 0, radius: RADIUS.first, erasing: false, regions: false };
    this.build();
    this.drawing = new Drawing(this.canvas);
    this.pen = new Pen(this.canvas, {
      start: (erasing) => this.beginStroke(erasing),
      draw: (stroke) => this.drawing.paint(stroke),
      finish: (stroke) => this.finishStroke(stroke),
    });
    this.listen();
    this.render();
  }

  build() {
    this.images = make("div", { className: "montage-images" });
    const pen = {
      paint: button("Paint", "Paint what to keep from the chosen image", () => this.look({ erasing: false })),
      erase: button("Erase", "Erase strokes of the chosen image (E)", () => this.look({ erasing: true })),
      radius: make("input", {
        type: "range",
        title: "Brush size ([ and ], or Alt and the wheel)",
        min: Math.log(RADIUS.least),
        max: Math.log(RADIUS.most),
        step: 0.01,
      }),
      undo: button("Undo", "Take back the last change (Ctrl+Z)", () => this.travel("undo")),
      redo: button("Redo", "Bring it back (Ctrl+Y)", () => this.travel("redo")),
    };
    const actions = {
      base: button("Base", "", () => this.edit({ base: this.view.image })),
      regions: button("Regions", "Show which image owns which region after the last cut", () =>
        this.look({ regions: !this.view.regions }),
      ),
      clear: button("Clear", "Remove the strokes of the chosen image", () => this.clear(this.view.image)),
      clearAll: button("Clear all", "Remove the strokes of all images", () => this.clearAll()),
    };
    this.tools = { ...pen, ...actions };
    this.picture = make("img", { draggable: false, alt: "" });
    this.regions = make("img", { className: "montage-regions", draggable: false, alt: "" });
    this.canvas = make("canvas");
    this.ring = make("div", { className: "montage-ring", hidden: true });
    this.hint = make("div", { className: "montage-hint" });
    this.stage = make(
      "div",
      { className: "montage-stage" },
      this.picture,
      this.regions,
      this.canvas,
      this.ring,
      this.hint,
    );
    this.status = make("div", { className: "montage-status" });
    this.assemble(this.images, this.images, toolbar(pen), toolbar(actions), this.stage, this.status);
  }

  listen() {
    const { element, canvas, picture, tools } = this;
    element.addEventListener("contextmenu", (event) => this.pen.stroke && claim(event)); // of a long touch
    tools.radius.addEventListener("input", () => this.look({ radius: Math.exp(tools.radius.value) }));
    canvas.addEventListener("pointermove", (event) => this.moveRing(event));
    canvas.addEventListener("pointerleave", () => (this.ring.hidden = true));
    picture.addEventListener("error", () => this.find(false));
    picture.addEventListener("load", () => this.find(true));
  }

  // ---- the value

  getValue() {
    this.painting.followBase(this.node.base());
    return this.painting.text();
  }

  setValue(value) {
    const text = typeof value === "string" ? value : value ? JSON.stringify(value) : "";
    if (text === this.painting.text()) return;
    this.painting.load(text, this.node.base());
    this.render();
  }

  edit(change) {
    const { names, size } = this.pictures;
    this.painting.followBase(this.node.base());
    if (!this.painting.edit(change, names.length ? { names, size } : undefined)) return;
    this.afterEdit();
  }

  travel(direction) {
    if (this.painting[direction]()) this.afterEdit();
  }

  afterEdit() {
    const [base, nodes] = [this.painting.base, this.node.base()];
    if (base !== null && nodes !== null && base !== nodes) this.node.chooseBase(base);
    this.render();
    this.node.changed();
  }

  clear(image) {
    const strokes = this.painting.strokes.filter((stroke) => stroke.k !== image);
    if (strokes.length < this.painting.strokes.length) this.edit({ strokes });
  }

  /** Also the way out of a text that cannot be read. */
  clearAll() {
    if (this.painting.error !== null) {
      this.painting.load("", this.node.base());
      this.afterEdit();
    } else if (this.painting.strokes.length) this.edit({ strokes: [] });
  }

  // ---- painting

  beginStroke(erasing) {
    if (!this.canPaint() || this.node.panning()) return null;
    return { k: this.view.image, r: this.view.radius, ...((erasing || this.view.erasing) && { e: 1 }) };
  }

  finishStroke({ k, r, p, e }) {
    const stroke = makeStroke(k, r, p, e);
    const own = this.painting.strokes.filter((other) => other.k === k);
    const { width, height } = this.canvas;
    if (e && !own.length) return this.render();
    const nothingLeft = e && !coverage([...own, stroke], width, height).mask.includes(1);
    if (nothingLeft) this.clear(k);
    else this.edit({ strokes: [...this.painting.strokes, stroke] });
  }

  canPaint() {
    return this.painting.error === null && !this.missing && this.view.image < this.pictures.names.length;
  }

  // ---- what is shown

  /** names: of the images' pictures, in order; size: [width, height]; regions: name of the last cut's picture. */
  showPictures({ names, size, regions = null }) {
    this.pictures = names.length && size ? { names, size, regions } : NO_PICTURES;
    this.render();
  }

  choose(image) {
    if (image >= 0 && image < this.count()) this.look({ image });
  }

  resizeBrush(factor) {
    this.look({ radius: Math.min(RADIUS.most, Math.max(RADIUS.least, this.view.radius * factor)) });
  }

  find(there) {
    if (this.missing === !there) return;
    this.missing = !there;
    this.render();
  }

  /** Images to choose from: those that came, and those that were painted when there were more. */
  count() {
    return Math.max(this.pictures.names.length, ...this.painting.images().map((image) => image + 1));
  }

  colourOf(image) {
    return this.colours[image % this.colours.length];
  }

  render() {
    if (this.released) return;
    this.painting.followBase(this.node.base());
    this.view.image = Math.max(0, Math.min(this.view.image, this.count() - 1));
    this.drawing.resize(this.pictures.size ?? this.painting.paintedOn.size ?? UNSEEN);
    if (!this.pen.stroke) this.drawing.show(this.painting.strokes, this.view.image, (image) => this.colourOf(image));
    this.renderImages();
    this.renderTools();
    this.renderStage();
    this.renderStatus();
  }

  renderImages() {
    const count = this.count();
    const painted = new Set(this.painting.images());
    const conflicting = new Set(this.drawing.conflicts.flat());
    fill(this.images, count, (image) => this.makeThumbnail(image));
    this.images.classList.toggle("many", count > MANY);
    [...this.images.children].forEach((thumbnail, image) => {
      const name = this.pictures.names[image];
      const chosen = image === this.view.image;
      const marks = [
        image === this.painting.base && (count > MANY ? "B" : "base"),
        painted.has(image) && "✎",
        conflicting.has(image) && "!",
      ];
      setAddress(thumbnail.firstChild, name && this.address(name, "thumbnail"));
      thumbnail.lastChild.textContent = marks.filter(Boolean).join(" ");
      if (chosen && thumbnail.ariaPressed === "false") this.reveal(thumbnail);
      thumbnail.ariaPressed = chosen;
    });
  }

  makeThumbnail(image) {
    const thumbnail = make(
      "button",
      { type: "button", className: "montage-image", tabIndex: -1, title: `Image ${image}` },
      make("img", { draggable: false, alt: "", loading: "lazy" }),
      make("span", { className: "montage-number", textContent: image }),
      make("span", { className: "montage-marks" }),
    );
    thumbnail.style.setProperty("--colour", this.colourOf(image));
    thumbnail.addEventListener("click", () => this.choose(image));
    return thumbnail;
  }

  renderTools() {
    const { painting, view, tools } = this;
    const fed = this.node.base() === null;
    tools.paint.ariaPressed = !view.erasing;
    tools.erase.ariaPressed = view.erasing;
    tools.radius.value = Math.log(view.radius);
    tools.undo.disabled = !painting.past.length;
    tools.redo.disabled = !painting.future.length;
    tools.clear.disabled = !painting.images().includes(view.image);
    tools.clearAll.disabled = !painting.strokes.length && painting.error === null;
    tools.base.disabled =
      fed || painting.error !== null || view.image >= this.pictures.names.length || view.image === painting.base;
    tools.base.title = fed
      ? "The base comes from another node"
      : "Make the chosen image the base: its prompt, noise and composition carry the result";
    tools.regions.disabled = !this.pictures.regions;
    tools.regions.ariaPressed = view.regions;
  }

  renderStage() {
    const { pictures, view } = this;
    const name = pictures.names[view.image];
    if (setAddress(this.picture, name && this.address(name, "picture"))) this.missing = false;
    setAddress(this.regions, pictures.regions && view.regions && this.address(pictures.regions, "regions"));
    this.picture.hidden ||= this.missing;
    this.stage.classList.toggle("ready", this.canPaint());
    this.ring.hidden ||= !this.canPaint();
    this.ring.classList.toggle("erasing", view.erasing);
    this.hint.textContent = !pictures.names.length
      ? "Queue once to see the images here."
      : !name
        ? `Image ${view.image} is no longer in the stack: clear its strokes, or connect it again.`
        : this.missing
          ? "The server no longer has this preview: queue to see it again. The strokes are kept."
          : "";
  }

  renderStatus() {
    const { painting, pictures } = this;
    const painted = painting.strokes.length > 0;
    const overlaps = this.drawing.conflicts.map((pair) => pair.join(" and ")).join(", ");
    const others = painting.paintedOn.names.join() !== pictures.names.join();
    const warning =
      painting.error !== null
        ? `The strokes cannot be read (${painting.error}). They are kept as they are; Clear all discards them.`
        : overlaps
          ? `Images ${overlaps} are both painted where it is hatched. Erase one of them there: a pixel is kept from one image only.`
          : painted && painting.paintedOn.names.length && pictures.names.length && others
            ? "The images have changed since these strokes were painted."
            : painting.text().length > LONG_TEXT
              ? `The strokes take ${Math.round(painting.text().length / 1000)} KB of the workflow. Fewer strokes keep it quick.`
              : "";
    this.status.classList.toggle("warning", warning !== "");
    this.status.textContent =
      warning ||
      (this.canPaint()
        ? `${this.view.erasing ? "Erase strokes of" : "Paint what to keep from"} image ${this.view.image}.`
        : "");
  }

  moveRing(event) {
    this.ring.hidden = !this.canPaint() || event.pointerType === "touch";
    if (this.ring.hidden) return;
    const { width, height } = this.canvas;
    const box = this.stage.getBoundingClientRect();
    const zoom = box.width / this.stage.offsetWidth || 1;
    const scale = Math.min(box.width / width, box.height / height) / zoom;
    const diameter = ((2 * this.view.radius) / UNIT) * Math.max(width, height) * scale;
    Object.assign(this.ring.style, {
      left: `${(event.clientX - box.left) / zoom}px`,
      top: `${(event.clientY - box.top) / zoom}px`,
      width: `${diameter}px`,
      height: `${diameter}px`,
    });
  }

  // ---- keys, wheel, and what is the graph's

  actionOf(key) {
    return /^\d$/.test(key)
      ? () => this.choose(Number(key))
      : {
          e: () => this.look({ erasing: !this.view.erasing }),
          "[": () => this.resizeBrush(1 / RADIUS.step),
          "]": () => this.resizeBrush(RADIUS.step),
          arrowleft: () => this.choose(this.view.image - 1),
          arrowright: () => this.choose(this.view.image + 1),
          escape: () => (this.pen.stroke ? this.pen.cancel() : this.keys.blur()),
        }[key];
  }

  wheel(event) {
    if (!(event.altKey && this.hasKeyboard())) return super.wheel(event);
    this.resizeBrush((event.deltaY || event.deltaX) < 0 ? RADIUS.step : 1 / RADIUS.step);
    claim(event);
  }

  release() {
    super.release();
    this.pen.cancel();
    this.pictures = NO_PICTURES;
    for (const image of [this.picture, this.regions]) image.removeAttribute("src");
    this.images.replaceChildren();
    this.drawing.release();
  }
}
