// Mouse, touch and pen on a canvas, as strokes.
import { UNIT } from "./strokes.js";

const LEFT = 0;
const PEN_ERASER = 5; // the other end of a pen, as a button

export class Pen {
  /**
   * host.start(erasing): the stroke that begins, {k, r, e?}, or null where nothing can be painted.
   * host.draw(stroke or null): show it as it grows. host.finish(stroke): it is complete.
   */
  constructor(canvas, host) {
    this.canvas = canvas;
    this.host = host;
    this.stroke = null; // {k, r, p, e?} while the pen is down
    this.pointer = null;
    this.frame = 0;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.isMine(event) && this.cancel());
  }

  /** A point of the page in UNITs of the picture, which `object-fit: contain` centres in the canvas's box. */
  place(event) {
    const { width, height } = this.canvas;
    const box = this.canvas.getBoundingClientRect(); // holds the graph's zoom
    const scale = Math.min(box.width / width, box.height / height);
    const x = (event.clientX - box.left - (box.width - width * scale) / 2) / (width * scale);
    const y = (event.clientY - box.top - (box.height - height * scale) / 2) / (height * scale);
    return [x * UNIT, y * UNIT];
  }

  isMine(event) {
    return this.stroke !== null && event.pointerId === this.pointer.id;
  }

  down(event) {
    const { pointerId: id, pointerType: type, button } = event;
    if (this.stroke) {
      if (type === "touch" && this.pointer.type === "touch") this.cancel(); // two fingers are no stroke
      return;
    }
    if (button !== LEFT && button !== PEN_ERASER) return;
    const begun = this.host.start(button === PEN_ERASER);
    if (!begun) return;
    this.canvas.setPointerCapture(id);
    this.pointer = { id, type };
    this.stroke = { ...begun, p: this.place(event) };
    this.host.draw(this.stroke);
  }

  move(event) {
    if (!this.isMine(event)) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const sample of passed.length ? passed : [event]) this.stroke.p.push(...this.place(sample));
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (this.stroke) this.host.draw(this.stroke);
    });
  }

  up(event) {
    if (!this.isMine(event)) return;
    const stroke = this.stroke;
    this.stroke = null;
    this.host.finish(stroke);
  }

  cancel() {
    this.stroke = null;
    this.host.draw(null);
  }
}
