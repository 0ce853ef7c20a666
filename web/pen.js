// Mouse, touch and pen on a canvas, as strokes.
import { Drag, LEFT, placeIn } from "./pointer.js";
import { UNIT } from "./strokes.js";

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
    this.frame = 0;
    this.drag = new Drag(canvas, (event) => this.begin(event));
  }

  place(event) {
    return placeIn(this.canvas, event).map((fraction) => fraction * UNIT);
  }

  begin(event) {
    const erasing = event.button === PEN_ERASER;
    const begun = (erasing || event.button === LEFT) && this.host.start(erasing);
    if (!begun) return null;
    this.stroke = { ...begun, p: this.place(event) };
    this.host.draw(this.stroke);
    return {
      move: (moved) => this.grow(moved),
      end: () => this.host.finish(this.take()),
      cancel: () => {
        this.take();
        this.host.draw(null);
      },
    };
  }

  grow(event) {
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const sample of passed.length ? passed : [event]) this.stroke.p.push(...this.place(sample));
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      if (this.stroke) this.host.draw(this.stroke);
    });
  }

  /** The stroke, which is no longer under the pen. */
  take() {
    const { stroke } = this;
    this.stroke = null;
    return stroke;
  }

  cancel() {
    this.drag.cancel();
  }
}
