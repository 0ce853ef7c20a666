// What the editors share: an element in a node that has the keyboard when it should, and gives the graph what is the graph's.
import { LEFT, MIDDLE } from "./pointer.js";
import { t } from "./words.js";

const MOST_ZOOM = 16;
const ZOOM_STEP = 1.2; // of the wheel
const FRAMES = 60; // to wait for an element to come onto the page

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
    this.zoom = { scale: 1, left: 0, top: 0 }; // of the stage, in the large view
    this.margin = 0; // CSS pixels around the picture on its stage
    this.spaceHeld = false;
    this.viewTools = {
      large: button(t("Large"), t("Use the whole window, with zoom by the wheel (F; Escape closes it)"), () =>
        this.toggleLarge(),
      ),
      fit: button(t("Fit"), t("Reset the zoom: show the whole picture"), () =>
        this.zoomTo({ scale: 1, left: 0, top: 0 }),
      ),
    };
    this.viewTools.large.hidden = !HTMLElement.prototype.showPopover;
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
    this.element.addEventListener("keyup", (event) => event.key === " " && (this.spaceHeld = false));
    this.element.addEventListener("mouseenter", () => this.endTooltip());
    scroller.addEventListener("scroll", () => this.hintAtMore());
    new ResizeObserver(() => this.hintAtMore()).observe(scroller);
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

  /** Nodes 2.0 would show the input's tooltip over the editor while one works in it. */
  endTooltip() {
    this.element.closest('[data-pd-tooltip="true"]')?.dispatchEvent(new MouseEvent("mouseleave"));
    this.element.closest("[data-grace-area-trigger]")?.dispatchEvent(new PointerEvent("pointerleave")); // since 1.58
  }

  /** Fades the scroller's end where more is below: many systems show a scrollbar only while one scrolls. */
  hintAtMore() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.scroller.classList.toggle("more", scrollTop + clientHeight < scrollHeight - 1);
  }

  // ---- the large view: above everything on the page, where the element is

  isLarge() {
    return this.element.hasAttribute("popover");
  }

  toggleLarge() {
    this.view.large = !this.isLarge();
    this.showLarge();
    this.takeKeyboard();
    this.render();
  }

  /** Brings the element to the size that `view` says. */
  showLarge(frames = FRAMES) {
    const { element, view } = this;
    if (Boolean(view.large) === this.isLarge()) return;
    if (view.large && !element.isConnected) {
      if (frames) requestAnimationFrame(() => this.showLarge(frames - 1));
    } else if (view.large) {
      element.popover = "manual";
      element.showPopover();
    } else {
      element.hidePopover();
      element.removeAttribute("popover");
      this.zoomTo({ scale: 1, left: 0, top: 0 });
    }
  }

  /** What Escape does when nothing is under way. */
  leave() {
    if (this.isLarge()) this.toggleLarge();
    else this.keys.blur();
  }

  panning() {
    return this.isLarge() ? this.spaceHeld : this.node.panning();
  }

  zoomBy(factor, { clientX, clientY }) {
    const box = this.stage.getBoundingClientRect();
    const scale = Math.min(MOST_ZOOM, Math.max(1, this.zoom.scale * factor));
    const keep = (at, offset) => at - ((at - offset) * scale) / this.zoom.scale;
    const [x, y] = [clientX - box.left - this.margin, clientY - box.top - this.margin];
    this.zoomTo({ scale, left: keep(x, this.zoom.left), top: keep(y, this.zoom.top) });
  }

  zoomTo({ scale, left, top }) {
    const { stage, margin } = this;
    const within = (offset, side) => Math.min(0, Math.max((side - 2 * margin) * (1 - scale), offset));
    this.zoom = { scale, left: within(left, stage.offsetWidth), top: within(top, stage.offsetHeight) };
    stage.style.setProperty("--zoom", scale);
    stage.style.setProperty("--left", `${this.zoom.left}px`);
    stage.style.setProperty("--top", `${this.zoom.top}px`);
    this.render();
  }

  renderView() {
    this.viewTools.large.ariaPressed = this.isLarge();
    this.viewTools.fit.hidden = this.zoom.scale === 1;
    this.hintAtMore();
  }

  // ---- keys, wheel, and what is the graph's

  key(event) {
    if (event.key === " " && this.isLarge()) {
      this.spaceHeld = true;
      return claim(event);
    }
    const isAltGr = event.getModifierState("AltGraph"); // types [ and ] on many keyboards
    const command = (event.ctrlKey || event.metaKey) && !isAltGr;
    const key = event.key.toLowerCase();
    const action = command
      ? { z: () => this.travel(event.shiftKey ? "redo" : "undo"), y: () => this.travel("redo") }[key]
      : (event.altKey && !isAltGr) || event.target !== this.keys
        ? null
        : (this.actionOf(key, event) ?? { f: () => this.toggleLarge() }[key]);
    if (!action) return;
    claim(event);
    action();
  }

  wheel(event) {
    const { scroller } = this;
    if (scroller.contains(event.target) && scroller.scrollHeight > scroller.clientHeight && !event.ctrlKey)
      return event.stopPropagation();
    if (!this.isLarge()) this.node.forward(event);
    else if (this.stage.contains(event.target))
      this.zoomBy((event.deltaY || event.deltaX) < 0 ? ZOOM_STEP : 1 / ZOOM_STEP, event);
    claim(event);
  }

  moveGraph(event) {
    const { type, button, buttons } = event;
    if (type === "pointerdown") this.movingGraph = button === MIDDLE || (button === LEFT && this.panning());
    if (this.movingGraph && (buttons || type === "pointerup")) {
      if (this.isLarge()) this.pan(event);
      else this.node.forward(event);
    }
    if (type === "pointerup") this.movingGraph = false;
  }

  pan({ type, clientX, clientY }) {
    const { scale, left, top } = this.zoom;
    if (type === "pointermove")
      this.zoomTo({ scale, left: left + clientX - this.grabbed.x, top: top + clientY - this.grabbed.y });
    this.grabbed = { x: clientX, y: clientY };
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
    this.showLarge();
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
    // Once for all editors: a pack has no other way to give ComfyUI a stylesheet of its own.
    document.head.append(make("link", { rel: "stylesheet", href }));
  }
}
