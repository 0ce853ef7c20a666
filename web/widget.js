// What the editors share: an element in a node that has the keyboard when it should, and gives the graph what is the graph's.
import { LEFT, MIDDLE } from "./pointer.js";

export class NodeEditor {
  /**
   * keys: what the keyboard does, for screen readers.
   * node: what every editor needs of its node:
   *   panning(): whether the pen moves the graph now; forward(event): a wheel or pointer event that is the graph's.
   */
  constructor(node, keys) {
    linkStyle();
    this.node = node;
    this.movingGraph = false;
    this.released = false;
    this.view = {}; // the tools and what is chosen: outlives the editor when undo makes its node anew
    // ComfyUI leaves keys alone while an input has the focus, so that Delete does not delete the node, nor Ctrl+Z undo the graph.
    this.keys = make("input", { className: "montage-keys", type: "text", readOnly: true, ariaLabel: keys });
  }

  /** The editor's element. scroller: the part of it that scrolls by itself. */
  assemble(scroller, ...parts) {
    this.scroller = scroller;
    this.element = make("div", { className: "montage-editor" }, ...parts, this.keys);
    const isSlider = (event) => event.target.type === "range";
    this.element.addEventListener("pointerdown", (event) => isSlider(event) || this.takeKeyboard());
    // Not of pointerdown: that would also take the mouse events away which ComfyUI's own undo history waits for.
    this.element.addEventListener("mousedown", (event) => isSlider(event) || event.preventDefault());
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    for (const type of ["pointerdown", "pointermove", "pointerup"])
      this.element.addEventListener(type, (event) => this.moveGraph(event));
  }

  /** A change of the tools or of what is chosen, which is no change of the value. */
  look(change) {
    Object.assign(this.view, change);
    this.render();
  }

  takeKeyboard() {
    this.keys.focus({ preventScroll: true });
  }

  hasKeyboard() {
    return this.element.contains(document.activeElement);
  }

  key(event) {
    const isAltGr = event.getModifierState("AltGraph"); // types [ and ] on many keyboards
    const command = (event.ctrlKey || event.metaKey) && !isAltGr;
    const key = event.key.toLowerCase();
    const action = command
      ? { z: () => this.travel(event.shiftKey ? "redo" : "undo"), y: () => this.travel("redo") }[key]
      : (event.altKey && !isAltGr) || event.target !== this.keys
        ? null
        : this.actionOf(key, event);
    if (!action) return;
    claim(event);
    action();
  }

  wheel(event) {
    const { scroller } = this;
    if (scroller.contains(event.target) && scroller.scrollHeight > scroller.clientHeight && !event.ctrlKey)
      return event.stopPropagation();
    this.node.forward(event);
    claim(event);
  }

  moveGraph(event) {
    const { type, button, buttons } = event;
    if (type === "pointerdown") this.movingGraph = button === MIDDLE || (button === LEFT && this.node.panning());
    if (this.movingGraph && (buttons || type === "pointerup")) this.node.forward(event);
    if (type === "pointerup") this.movingGraph = false;
  }

  /** Scrolls to a part of the scroller. Not scrollIntoView: that would also scroll the page's hidden overflow. */
  reveal({ offsetTop: top, offsetHeight: height }) {
    const { scroller } = this;
    scroller.scrollTop = Math.min(top, Math.max(scroller.scrollTop, top + height - scroller.clientHeight));
  }

  /** Frees all pixels of a removed node, which ComfyUI itself may keep, until resume(). */
  release() {
    this.released = true;
  }

  resume() {
    this.released = false;
    this.render();
  }
}

/** Keeps an event from the browser and from ComfyUI. */
export function claim(event) {
  event.preventDefault();
  event.stopPropagation();
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function button(text, title, action) {
  const element = make("button", { type: "button", textContent: text, title, tabIndex: -1 });
  element.addEventListener("click", action);
  return element;
}

export function toolbar(tools) {
  return make("div", { className: "montage-tools" }, ...Object.values(tools));
}

/** Brings an element to `count` children, made by `makeChild` of their number. */
export function fill(element, count, makeChild) {
  while (element.childElementCount > count) element.lastChild.remove();
  while (element.childElementCount < count) element.append(makeChild(element.childElementCount));
}

/** Shows an image, or hides it without an address. Returns whether it is another one now. */
export function setAddress(image, address) {
  image.hidden = !address;
  if ((image.getAttribute("src") ?? "") === (address || "")) return false;
  if (address) image.src = address;
  else image.removeAttribute("src");
  return true;
}

/** The size of a canvas that shows a picture of [width, height]; the page scales it. */
export function canvasSize([width, height], longSide = 1024) {
  const scale = Math.min(1, longSide / Math.max(width, height));
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}

export function clear(canvas) {
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.globalAlpha = 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  return context;
}

function linkStyle() {
  const href = new URL("./editor.css", import.meta.url).href;
  if (
    ![...document.styleSheets].some((sheet) => sheet.href === href) &&
    !document.querySelector(`link[href="${href}"]`)
  ) {
    document.head.append(make("link", { rel: "stylesheet", href }));
  }
}
