// A mouse button, a finger or a pen held down on an element.

export const [LEFT, MIDDLE] = [0, 1]; // mouse buttons
const TAP = { mouse: 3, pen: 6, touch: 10 }; // CSS pixels that a press may tremble without being a drag

/**
 * A point of the page as [x, y] in fractions of a canvas's picture, which `object-fit: contain` centres in its box.
 * Works at any zoom of the graph, which the box on the page holds.
 */
export function placeIn(canvas, event) {
  const { scale, left, top } = pictureBox(canvas);
  return [(event.clientX - left) / (canvas.width * scale), (event.clientY - top) / (canvas.height * scale)];
}

/** Where a canvas's picture lies on the page: {scale: page pixels per pixel of the canvas, left, top}. */
export function pictureBox(canvas) {
  const { width, height } = canvas;
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(box.width / width, box.height / height);
  return { scale, left: box.left + (box.width - width * scale) / 2, top: box.top + (box.height - height * scale) / 2 };
}

export class Drag {
  /** begin(event): what this press becomes, {move(event), end(), cancel()}, or null for nothing. */
  constructor(element, begin) {
    this.element = element;
    this.begin = begin;
    this.gesture = null;
    this.pointer = null;
    element.addEventListener("pointerdown", (event) => this.down(event));
    element.addEventListener("pointermove", (event) => this.isMine(event) && this.gesture.move(event));
    element.addEventListener("pointerup", (event) => this.isMine(event) && this.finish("end"));
    element.addEventListener("pointercancel", (event) => this.isMine(event) && this.finish("cancel"));
  }

  isMine(event) {
    return this.gesture !== null && event.pointerId === this.pointer.id;
  }

  down(event) {
    const { pointerId: id, pointerType: type } = event;
    if (this.gesture) {
      if (type === "touch" && this.pointer.type === "touch") this.cancel(); // two fingers are no drag
      return;
    }
    this.gesture = this.begin(event);
    if (!this.gesture) return;
    this.element.setPointerCapture(id);
    this.pointer = { id, type };
  }

  cancel() {
    if (this.gesture) this.finish("cancel");
  }

  finish(how) {
    const { gesture } = this;
    this.gesture = null;
    gesture[how]();
  }
}

/** Whether the pointer has left the place of its press, event by event. */
export function hasMoved(press, event) {
  return (
    Math.hypot(event.clientX - press.clientX, event.clientY - press.clientY) > (TAP[press.pointerType] ?? TAP.mouse)
  );
}
