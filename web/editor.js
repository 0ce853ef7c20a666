// The stroke editor: thumbnails, tools, the chosen image to paint on. Knows the DOM, but not ComfyUI.
import { Drawing } from "./drawing.js";
import { LiveCut, crc32 } from "./live_cut.js";
import { Pen } from "./pen.js";
import { pictureBox } from "./pointer.js";
import { CutPreview } from "./preview.js";
import { coverage } from "./raster.js";
import { LONG_TEXT, Painting, UNIT, makeStroke } from "./strokes.js";
import { NodeEditor, button, claim, fill, make, setAddress, toolbar } from "./widget.js";
import { t } from "./words.js";

const RADIUS = { least: 20, most: 1500, first: 250, step: 1.2 };
const MANY = 12; // images, from which on the thumbnails are small
const NO_PICTURES = { names: [], size: null, regions: null, cut: null, base: null, strokes: null };
const UNSEEN = [512, 512]; // fine enough that strokes of different images do not meet before their size is known

export class StrokeEditor extends NodeEditor {
  /**
   * colours: CSS colours of the images, in order.
   * address(name, kind): the URL of a picture; kind is "picture", "thumbnail" or "regions".
   * node: what the editor needs of its node, besides what a NodeEditor does:
   *   base(): number of the base image, null while another node feeds it; chooseBase(image);
   *   changed(): called after each edit;
   *   unpainted(): where unpainted areas come from: "base", "strokes" (around them), "auto" (the base where it has no strokes
   *   of its own), null where other inputs hold strokes as well;
   *   warning(): what is wrong in the graph around the node, or "".
   */
  constructor({ colours, address, node }) {
    super(node, t("Strokes: 0 to 9 and arrows select an image, E erases, [ and ] change the brush size"));
    Object.assign(this, { colours, address });
    this.painting = new Painting();
    this.pictures = NO_PICTURES;
    this.missing = false; // the chosen picture's file is gone from the server
    this.result = null; // address of the composite's picture
    this.photographs = []; // the images, once they are to be pasted
    this.view = { image: 0, radius: RADIUS.first, erasing: false, shown: "image" };
    this.build();
    this.preview = new CutPreview(this.cutCanvas);
    this.live = new LiveCut(() => this.renderCut());
    this.drawing = new Drawing(this.canvas);
    this.pen = new Pen(this.canvas, {
      start: (erasing) => this.beginStroke(erasing),
      draw: (stroke) => {
        this.drawing.paint(stroke);
        this.cutAgain();
      },
      finish: (stroke) => this.finishStroke(stroke),
    });
    this.listen();
    this.render();
  }

  build() {
    this.images = make("div", { className: "montage-images" });
    const pen = {
      paint: button(t("Paint"), t("Paint what to keep from the selected image"), () => this.look({ erasing: false })),
      erase: button(t("Erase"), t("Erase strokes of the selected image (E)"), () => this.look({ erasing: true })),
      radius: make("input", {
        type: "range",
        title: t("Brush size ([ and ], or Alt and the wheel)"),
        min: Math.log(RADIUS.least),
        max: Math.log(RADIUS.most),
        step: 0.01,
      }),
      undo: button(t("Undo"), t("Undo (Ctrl+Z)"), () => this.travel("undo")),
      redo: button(t("Redo"), t("Redo (Ctrl+Y)"), () => this.travel("redo")),
    };
    const actions = {
      base: button(t("Base"), "", () => this.edit({ base: this.view.image })),
      clear: button(t("Clear"), t("Remove the strokes of the selected image"), () => this.clear(this.view.image)),
      clearAll: button(t("Clear all"), t("Remove the strokes of all images"), () => this.clearAll()),
    };
    const views = {
      image: button(t("Image"), t("Show the selected image"), () => this.look({ shown: "image" })),
      regions: button(t("Regions"), t("Show which image each region comes from"), () =>
        this.look({ shown: "regions" }),
      ),
      result: button(
        t("Result"),
        t("Show the composite of the last run; while you paint, the images pasted along the seams"),
        () => this.look({ shown: "result" }),
      ),
    };
    Object.assign(pen, this.viewTools);
    this.tools = { ...pen, ...actions, ...views };
    this.picture = make("img", { draggable: false, alt: "" });
    this.regions = make("img", { className: "montage-regions", draggable: false, alt: "" });
    this.composite = make("img", { className: "montage-result", draggable: false, alt: "" });
    this.cutCanvas = make("canvas");
    this.cutLayer = make("div", { className: "montage-cut" }, this.cutCanvas);
    this.canvas = make("canvas");
    this.ring = make("div", { className: "montage-ring", hidden: true });
    this.hint = make("div", { className: "montage-hint" });
    this.stage = make(
      "div",
      { className: "montage-stage" },
      this.picture,
      this.regions,
      this.cutLayer,
      this.composite,
      this.canvas,
      this.ring,
      this.hint,
    );
    this.status = make("div", { className: "montage-status" });
    this.assemble(this.images, this.images, toolbar(pen), toolbar({ ...actions, ...views }), this.stage, this.status);
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
    if (!this.canPaint() || this.panning()) return null;
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

  /**
   * What a run sent. names: of the images' pictures, in order; size: [width, height]; regions: name of its cut's picture;
   * cut: {grid, weights: name, preference} to cut again, null where that cannot be done here; base and strokes (their CRC-32):
   * what the run was made of.
   */
  showPictures({ names, size, ...others }) {
    this.pictures = names.length && size ? { ...NO_PICTURES, names, size, ...others } : NO_PICTURES;
    this.render();
  }

  /** address: of the picture that the last run has composed, or null. */
  showResult(address) {
    if (this.result === address) return;
    this.result = address;
    this.render();
  }

  /** Whether the composite is one of the strokes as they are. */
  isResultCurrent() {
    const { painting, pictures, result } = this;
    const isBase = painting.base === null || pictures.base === null || painting.base === pictures.base;
    return result !== null && isBase && pictures.strokes === crc32(painting.text());
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
    this.cutAgain();
    this.renderCut();
    this.renderStatus();
  }

  // ---- the cut

  /** Has the cut made again where the strokes have changed, the one under the pen among them. */
  cutAgain() {
    const { painting, pictures } = this;
    const { stroke } = this.pen;
    const unpainted = this.node.unpainted();
    const cuttable = pictures.cut && unpainted && painting.error === null && !this.drawing.conflicts.length;
    const strokes = stroke ? [...painting.strokes, stroke] : painting.strokes;
    const count = pictures.names.length;
    this.live.ask(
      cuttable && strokes.every(({ k }) => k < count)
        ? {
            weights: this.address(pictures.cut.weights, "weights"),
            grid: pictures.cut.grid,
            preference: pictures.cut.preference,
            size: pictures.size,
            base: painting.base ?? pictures.base ?? 0,
            strokes,
            count,
            unpainted,
          }
        : null,
    );
  }

  renderCut() {
    const { live, pictures, view } = this;
    const pasting = view.shown === "result" && !(this.isResultCurrent() && !this.pen.stroke);
    const labels = this.isCut() ? live.labels : null;
    this.composite.hidden = view.shown !== "result" || (pasting && labels !== null) || !this.result;
    setAddress(this.composite, this.composite.hidden ? "" : this.result);
    this.cutLayer.hidden = !labels || view.shown === "image" || !(view.shown === "regions" || pasting);
    this.cutLayer.classList.toggle("regions", view.shown === "regions");
    setAddress(
      this.regions,
      view.shown === "regions" && !labels && pictures.regions && this.address(pictures.regions, "regions"),
    );
    if (this.cutLayer.hidden) return;
    if (view.shown === "regions") this.preview.showRegions(labels, live.grid, pictures.size, this.colours);
    else {
      this.loadPhotographs();
      this.preview.showPaste(labels, live.grid, pictures.size, this.photographs);
    }
  }

  isCut() {
    return this.live.problem !== null && this.live.labels !== null;
  }

  loadPhotographs() {
    const { names } = this.pictures;
    if (this.photographs.names?.join() === names.join()) return;
    this.photographs = names.map((name) => {
      const photograph = new Image();
      photograph.onload = () => this.renderCut();
      photograph.src = this.address(name, "picture");
      return photograph;
    });
    this.photographs.names = names;
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
        image === this.painting.base && (count > MANY ? t("B") : t("base")),
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
      { type: "button", className: "montage-image", tabIndex: -1, title: t("Image {image}", { image }) },
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
      ? t("The base comes from another node")
      : t("Make the selected image the base: the result takes its prompt, noise and composition");
    tools.regions.disabled = !this.pictures.regions && !this.pictures.cut;
    tools.result.disabled = !this.pictures.cut && !this.result;
    for (const shown of ["image", "regions", "result"]) tools[shown].ariaPressed = view.shown === shown;
    this.renderView();
  }

  renderStage() {
    const { pictures, view } = this;
    const name = pictures.names[view.image];
    if (setAddress(this.picture, name && this.address(name, "picture"))) this.missing = false;
    this.picture.hidden ||= this.missing;
    this.stage.classList.toggle("ready", this.canPaint());
    this.stage.classList.toggle("result", view.shown === "result");
    this.ring.hidden ||= !this.canPaint();
    this.ring.classList.toggle("erasing", view.erasing);
    this.hint.textContent = !pictures.names.length
      ? t("Run once to see the images here.")
      : !name
        ? t("Image {image} is no longer connected: clear its strokes, or connect it again.", { image: view.image })
        : this.missing
          ? t("The server no longer has this preview: run to see it again. The strokes are kept.")
          : "";
  }

  renderStatus() {
    const { painting, pictures } = this;
    const painted = painting.strokes.length > 0;
    const overlaps = this.drawing.conflicts.map((pair) => t("{a} and {b}", { a: pair[0], b: pair[1] })).join(", ");
    const others = painting.paintedOn.names.join() !== pictures.names.join();
    const warning =
      painting.error !== null
        ? t("The strokes cannot be read ({reason}). They are kept as they are; Clear all discards them.", {
            reason: painting.error,
          })
        : overlaps
          ? t(
              "Images {pairs} are both painted in the hatched area. Erase one of them there: a pixel can be kept from one image only.",
              { pairs: overlaps },
            )
          : painted && painting.paintedOn.names.length && pictures.names.length && others
            ? t("The images have changed since these strokes were painted.")
            : painting.text().length > LONG_TEXT
              ? t("The strokes take {size} KB of the workflow. Fewer strokes keep it fast.", {
                  size: Math.round(painting.text().length / 1000),
                })
              : this.warnOfTheUnpainted() || this.node.warning();
    this.status.classList.toggle("warning", warning !== "");
    this.status.textContent =
      warning ||
      (this.canPaint()
        ? [
            this.view.erasing
              ? t("Erase strokes of image {image}.", this.view)
              : t("Paint what to keep from image {image}.", this.view),
            this.describeView(),
            this.describeTheUnpainted(),
          ]
            .filter(Boolean)
            .join(" ")
        : "");
  }

  describeView() {
    if (this.view.shown === "image") return "";
    if (this.live.lost) return t("The server no longer has this cut: run to see it again.");
    if (this.view.shown === "regions") return "";
    if (this.isResultCurrent()) return t("Shown: the composite of the last run.");
    if (this.isCut()) return t("Shown: pasted, not yet composed. Run to compose.");
    return this.result ? t("Shown: the composite of an earlier run.") : "";
  }

  describeTheUnpainted() {
    const painted = this.painting.images();
    const base = this.painting.base ?? this.pictures.base;
    const rule = this.node.unpainted();
    if (rule === null || base === null) return "";
    if (!painted.length) return t("Nothing is painted: everything comes from image {base}, the base.", { base });
    const fromBase = rule === "base" || (rule === "auto" && !painted.includes(base));
    return fromBase ? t("Unpainted areas come from image {base}, the base.", { base }) : "";
  }

  warnOfTheUnpainted() {
    const painted = this.painting.images();
    const rule = this.node.unpainted();
    const base = this.painting.base ?? this.pictures.base;
    const coversAll = painted.length === 1 && painted[0] !== base && rule === "strokes";
    return coversAll
      ? t(
          "Only image {image} is painted, so it covers the whole picture. Paint on another image too, or turn on unmarked_is_base.",
          { image: painted[0] },
        )
      : "";
  }

  moveRing(event) {
    this.ring.hidden = !this.canPaint() || event.pointerType === "touch";
    if (this.ring.hidden) return;
    const { width, height } = this.canvas;
    const box = this.stage.getBoundingClientRect();
    const zoom = box.width / this.stage.offsetWidth || 1;
    const diameter = ((2 * this.view.radius) / UNIT) * Math.max(width, height) * (pictureBox(this.canvas).scale / zoom);
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
          escape: () => (this.pen.stroke ? this.pen.cancel() : this.leave()),
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
    this.photographs = [];
    this.live.ask(null);
    for (const image of [this.picture, this.regions, this.composite]) image.removeAttribute("src");
    this.preview.release();
    this.images.replaceChildren();
    this.drawing.release();
  }
}
