// The stroke document and its history. Pure state: no DOM, no ComfyUI.
//
// {"v": 1, "base": B, "size": [W, H], "img": [name, ...], "strokes": [{"k": image, "r": radius, "p": [x, y, ...], "e": 1 to erase}]}
// Coordinates are in UNITs of each axis and radii in UNITs of the long side, so the picture may change its size.
// `size` and `img` name the pictures that were painted on. An empty painting is the empty text.

import { t } from "./words.js";

export const UNIT = 10_000;
export const LONG_TEXT = 300_000; // characters: from here on redrawing, undo and drafts get slow
const MOST_IMAGES = 1000; // as many as the node's base may name
const REACH = 2 * UNIT; // how far outside the picture a point of a new stroke may lie
const FARTHEST = 10 * UNIT; // and of any: the node refuses more
const UNDO_STEPS = 100;
const POINTS_WANTED = 45; // of one stroke, so that 200 strokes stay under 100 KB

/** A document's {base, size, names, strokes}; base is null where the text does not say. Throws an Error with the reason. */
export function readDocument(text) {
  if (!text.trim()) return { base: null, size: null, names: [], strokes: [] };
  const read = JSON.parse(text);
  if (read?.v !== 1 || !Array.isArray(read.strokes)) throw new Error(t("they are not of version 1"));
  return {
    base: Number.isInteger(read.base) ? read.base : null,
    size: Array.isArray(read.size) && read.size.length === 2 && read.size.every((side) => side > 0) ? read.size : null,
    names: Array.isArray(read.img) ? read.img.map(String) : [],
    strokes: read.strokes.map(readStroke),
  };
}

function readStroke(stroke, number) {
  const { k, r, p, e } = stroke ?? {};
  const isPath =
    Array.isArray(p) &&
    p.length >= 2 &&
    p.length % 2 === 0 &&
    p.every((value) => Number.isFinite(value) && Math.abs(value) <= FARTHEST);
  const isPen = Number.isFinite(r) && r >= 0 && r <= UNIT;
  if (!(Number.isInteger(k) && k >= 0 && k < MOST_IMAGES) || !isPen || !isPath)
    throw new Error(t("stroke {number} is damaged", { number }));
  return e ? { k, r, p, e: 1 } : { k, r, p };
}

export function writeDocument({ base, size, names, strokes }) {
  if (!strokes.length) return "";
  return JSON.stringify({
    v: 1,
    ...(base !== null && { base }),
    ...(size && { size }),
    ...(names.length && { img: names }),
    strokes,
  });
}

/**
 * The strokes of one node with their undo history, and the text they are stored as.
 *
 * A text that was loaded is given back unchanged until something in it changes; one that cannot be read is never
 * rewritten, and `error` says why.
 */
export class Painting {
  constructor() {
    this.load("", 0);
  }

  /** base: the node's own, a number, or null while another node feeds it. */
  load(text, base) {
    this.error = null;
    this.past = [];
    this.future = [];
    let document;
    try {
      document = readDocument(text);
    } catch (error) {
      this.error = error.message;
      document = readDocument("");
    }
    this.stored = { text, base: document.base };
    this.paintedOn = { names: document.names, size: document.size };
    this.now = { strokes: document.strokes, base };
  }

  get strokes() {
    return this.now.strokes;
  }

  get base() {
    return this.now.base;
  }

  /** Python refuses a document whose base differs from the node's: a loaded text keeps its own only if they agree. */
  text() {
    const { base } = this;
    const outdated = this.stored === null || (this.stored.base !== null && this.stored.base !== base);
    if (outdated && this.error === null)
      this.stored = { text: writeDocument({ ...this.paintedOn, ...this.now }), base };
    return this.stored.text;
  }

  /** One step that undo takes back. paintedOn: the pictures on screen. Returns whether anything changed. */
  edit({ strokes = this.strokes, base = this.base }, paintedOn = this.paintedOn) {
    if (this.error !== null || (strokes === this.strokes && base === this.base)) return false;
    this.past.push(this.now);
    if (this.past.length > UNDO_STEPS) this.past.shift();
    this.future = [];
    this.paintedOn = paintedOn;
    this.become({ strokes, base });
    return true;
  }

  /** The node's base was changed elsewhere: a step for undo, unless there is none before it or another node took over. */
  followBase(base) {
    if (this.error !== null || base === this.base) return;
    const isStep = base !== null && this.base !== null && (this.past.length || this.future.length);
    if (isStep) this.edit({ base });
    else this.become({ ...this.now, base });
  }

  become(state) {
    this.now = state;
    this.stored = null;
  }

  undo() {
    return this.travel(this.past, this.future);
  }

  redo() {
    return this.travel(this.future, this.past);
  }

  travel(from, to) {
    if (!from.length) return false;
    to.push(this.now);
    this.become(from.pop());
    return true;
  }

  /** The images that have strokes, in order. */
  images() {
    return [...new Set(this.strokes.map((stroke) => stroke.k))].sort((a, b) => a - b);
  }
}

/** A new stroke from the points of a pen, thinned out so far that nobody sees it. */
export function makeStroke(image, radius, points, erasing) {
  const path = points.map((value) => Math.round(Math.min(REACH, Math.max(-UNIT, value))));
  let tolerance = Math.max(5, 0.04 * radius);
  let thinned = simplify(path, tolerance);
  while (thinned.length > 2 * POINTS_WANTED && tolerance < radius / 4) {
    tolerance *= 1.3;
    thinned = simplify(path, tolerance);
  }
  return { k: image, r: Math.round(radius), p: thinned, ...(erasing && { e: 1 }) };
}

/** Ramer-Douglas-Peucker on [x, y, x, y, ...]: no dropped point lies farther than `tolerance` from the path that is left. */
export function simplify(path, tolerance) {
  const count = path.length / 2;
  const kept = new Uint8Array(count);
  kept[0] = kept[count - 1] = 1;
  const open = [[0, count - 1]];
  while (open.length) {
    const [first, last] = open.pop();
    let farthest = -1;
    let distance = tolerance;
    for (let i = first + 1; i < last; i++) {
      const d = distanceToSegment(path, i, first, last);
      if (d > distance) [farthest, distance] = [i, d];
    }
    if (farthest >= 0) {
      kept[farthest] = 1;
      open.push([first, farthest], [farthest, last]);
    }
  }
  return path.filter((_, i) => kept[i >> 1]);
}

function distanceToSegment(path, point, from, to) {
  const ax = path[2 * from];
  const ay = path[2 * from + 1];
  const dx = path[2 * to] - ax;
  const dy = path[2 * to + 1] - ay;
  const px = path[2 * point] - ax;
  const py = path[2 * point + 1] - ay;
  const length2 = dx * dx + dy * dy;
  const t = length2 ? Math.min(1, Math.max(0, (px * dx + py * dy) / length2)) : 0;
  return Math.hypot(px - t * dx, py - t * dy);
}
