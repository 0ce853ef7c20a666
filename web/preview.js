// Pictures of a cut on a canvas: the regions in their colours, or the images pasted along the seams.
import { canvasSize, clear } from "./widget.js";

export class CutPreview {
  constructor(canvas) {
    this.canvas = canvas;
    this.cells = document.createElement("canvas"); // one pixel for each cell
    this.scratch = document.createElement("canvas");
    this.release();
  }

  /** size: the pictures' [width, height]. colours: CSS colours of the labels. */
  showRegions(labels, grid, size, colours) {
    this.resize(grid, size);
    const used = [...new Set(labels)];
    const context = clear(this.canvas);
    for (const label of used)
      this.fill(context, labels, label, (scratch, w, h) => {
        scratch.fillStyle = colours[label % colours.length];
        scratch.fillRect(0, 0, w, h);
      });
  }

  /** photographs: images of the labels, loaded or not yet. */
  showPaste(labels, grid, size, photographs) {
    this.resize(grid, size);
    const context = clear(this.canvas);
    context.imageSmoothingQuality = "high";
    for (const label of new Set(labels)) {
      const photograph = photographs[label];
      if (photograph?.naturalWidth)
        this.fill(context, labels, label, (scratch, w, h) => scratch.drawImage(photograph, 0, 0, w, h));
    }
  }

  resize([h, w], size) {
    const [width, height] = canvasSize(size);
    for (const [canvas, ...sides] of [
      [this.canvas, width, height],
      [this.scratch, width, height],
      [this.cells, w, h],
    ])
      if (canvas.width !== sides[0] || canvas.height !== sides[1]) [canvas.width, canvas.height] = sides;
  }

  /** Draws where one label is. */
  fill(context, labels, label, draw) {
    const { cells, scratch } = this;
    const { width, height } = scratch;
    const mask = new ImageData(cells.width, cells.height);
    for (let i = 0; i < labels.length; i++) mask.data[4 * i + 3] = labels[i] === label ? 255 : 0;
    cells.getContext("2d").putImageData(mask, 0, 0);
    const pen = clear(scratch);
    pen.globalCompositeOperation = "source-over";
    pen.imageSmoothingEnabled = false;
    pen.drawImage(cells, 0, 0, width, height);
    pen.imageSmoothingEnabled = true;
    pen.globalCompositeOperation = "source-in";
    draw(pen, width, height);
    pen.globalCompositeOperation = "source-over";
    context.drawImage(scratch, 0, 0);
  }

  release() {
    for (const canvas of [this.canvas, this.cells, this.scratch]) canvas.width = canvas.height = 1;
  }
}
