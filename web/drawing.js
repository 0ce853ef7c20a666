// Strokes on a canvas: the chosen image's strong and with an edge, the others' faint, and hatching where they conflict.
import { byImage, findConflicts, radiusSquared } from "./raster.js";
import { UNIT } from "./strokes.js";
import { canvasSize, clear } from "./widget.js";

const CHOSEN = 0.65; // opacities
const OTHERS = 0.35;
const EDGE = "#fff"; // of the chosen image's strokes: seen on a picture of their own colour

export class Drawing {
  constructor(canvas) {
    this.canvas = canvas;
    this.others = document.createElement("canvas");
    this.chosen = document.createElement("canvas");
    this.scratch = document.createElement("canvas");
    this.edge = document.createElement("canvas");
    this.size = [1, 1];
    this.hatching = null;
    this.conflicts = [];
    this.release();
  }

  layers() {
    return [this.canvas, this.others, this.chosen, this.scratch, this.edge];
  }

  /** size: the picture's [width, height]. */
  resize(size) {
    const [w, h] = canvasSize(size);
    if (this.canvas.width === w && this.canvas.height === h && this.size.join() === size.join()) return;
    this.size = size;
    for (const canvas of this.layers()) [canvas.width, canvas.height] = [w, h];
    this.strokes = null;
  }

  /** Brings the layers up to date and shows them. colourOf: image -> CSS colour. */
  show(strokes, image, colourOf) {
    const painted = strokes !== this.strokes;
    if (painted) {
      const { mask, pairs } = findConflicts(strokes, ...this.size); // where Python will look for them: in the picture's pixels
      this.hatching = mask && hatched(mask, this.size, this.canvas);
      this.conflicts = pairs;
    }
    if (painted || image !== this.image) {
      const groups = byImage(strokes);
      clear(this.others);
      for (const [other, own] of groups) {
        if (other === image) continue;
        const layer = own.some((stroke) => stroke.e) ? this.scratch : this.others; // erasing must not reach other images
        if (layer === this.scratch) clear(layer);
        drawStrokes(layer, own, colourOf(other));
        if (layer === this.scratch) this.others.getContext("2d").drawImage(layer, 0, 0);
      }
      clear(this.chosen);
      drawStrokes(this.chosen, groups.get(image) ?? [], colourOf(image));
      drawEdge(this.edge, this.chosen);
    }
    [this.strokes, this.image, this.colour] = [strokes, image, colourOf(image)];
    this.paint(null);
  }

  /** One frame. live: the stroke under the pen, or null. */
  paint(live) {
    const context = clear(this.canvas);
    context.globalAlpha = OTHERS;
    context.drawImage(this.others, 0, 0);
    context.globalAlpha = CHOSEN;
    clear(this.scratch).drawImage(this.chosen, 0, 0);
    if (live) drawStrokes(this.scratch, [live], this.colour);
    context.drawImage(this.scratch, 0, 0);
    context.globalAlpha = 1;
    context.drawImage(this.edge, 0, 0);
    if (this.hatching) context.drawImage(this.hatching, 0, 0);
  }

  /** Gives the pixels back; resize() and show() bring them up again. */
  release() {
    for (const canvas of this.layers()) canvas.width = canvas.height = 1;
    this.hatching = null;
    this.conflicts = [];
    this.strokes = null;
  }
}

function drawStrokes(canvas, strokes, colour) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  context.strokeStyle = context.fillStyle = colour;
  context.lineCap = context.lineJoin = "round";
  for (const { r, p, e } of strokes) {
    context.globalCompositeOperation = e ? "destination-out" : "source-over";
    const radius = Math.sqrt(radiusSquared(r, width, height));
    context.lineWidth = 2 * radius;
    context.beginPath();
    for (let i = 0; i < p.length; i += 2) context.lineTo((p[i] / UNIT) * width, (p[i + 1] / UNIT) * height);
    context.stroke();
    // A path that goes nowhere has no caps: its dot is drawn as one.
    context.beginPath();
    context.arc((p[0] / UNIT) * width, (p[1] / UNIT) * height, radius, 0, 2 * Math.PI);
    context.fill();
  }
  context.globalCompositeOperation = "source-over";
}

/** A line around what another canvas of this size shows. */
function drawEdge(canvas, shape) {
  const { width, height } = canvas;
  const context = clear(canvas);
  const wide = Math.max(1, Math.max(width, height) / 384);
  for (let turn = 0; turn < 2 * Math.PI; turn += Math.PI / 4)
    context.drawImage(shape, wide * Math.cos(turn), wide * Math.sin(turn));
  context.globalCompositeOperation = "source-in";
  context.fillStyle = EDGE;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(shape, 0, 0);
  context.globalCompositeOperation = "source-over";
}

/** Black and white stripes, seen on any picture, where a mask of the picture's pixels says. size: the picture's [width, height]. */
function hatched(mask, [across, down], { width, height }) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  const stripe = Math.max(2, Math.round(Math.max(width, height) / 128));
  for (let row = 0, i = 0; row < down; row++) {
    const y = Math.floor((row * height) / down);
    for (let column = 0; column < across; column++, i++) {
      if (!mask[i]) continue;
      const x = Math.floor((column * width) / across);
      words[y * width + x] = Math.floor((x + y) / stripe) % 2 ? 0xffffffff : 0xff000000;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
