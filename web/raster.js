// Which pixels strokes cover, as the node will see them: a pixel may be painted for one image only. Pure, no DOM.
// kernels/strokes.py draws the same pixels with the same arithmetic; tests/data/stroke_masks.json holds both to it.
import { UNIT } from "./strokes.js";

const LEAST_RADIUS_SQUARED = 0.5; // in pixels
const SLACK = 1e-6; // pixels: more than rounding can move the outline of a stroke

/** One image's strokes, in order: {mask, top, bottom}, mask 1 where painted, all of it in the rows top..bottom-1. */
export function coverage(strokes, width, height) {
  const area = { mask: new Uint8Array(width * height), width, height, top: height, bottom: 0 };
  for (const stroke of strokes) fillStroke(area, stroke);
  return area;
}

/** Pixels painted for several images: {mask or null, pairs: [[image, image], ...]}. */
export function findConflicts(strokes, width, height) {
  const groups = [...byImage(strokes)];
  const owner = new Uint16Array(width * height); // number of the group + 1
  const met = new Uint8Array((groups.length + 1) * groups.length); // by owner and group
  let mask = null;
  groups.forEach(([, own], group) => {
    const area = coverage(own, width, height);
    for (let i = area.top * width; i < area.bottom * width; i++) {
      if (!area.mask[i]) continue;
      if (owner[i]) {
        mask ??= new Uint8Array(width * height);
        mask[i] = 1;
        met[owner[i] * groups.length + group] = 1;
      } else owner[i] = group + 1;
    }
  });
  const pairs = [];
  met.forEach(
    (yes, i) => yes && pairs.push([groups[Math.floor(i / groups.length) - 1][0], groups[i % groups.length][0]]),
  );
  return { mask, pairs };
}

/** Map of image -> its strokes, images ascending. */
export function byImage(strokes) {
  const groups = new Map([...new Set(strokes.map((stroke) => stroke.k))].sort((a, b) => a - b).map((k) => [k, []]));
  for (const stroke of strokes) groups.get(stroke.k).push(stroke);
  return groups;
}

/** A stroke's radius in pixels, squared: at least so much that a disc of it reaches a pixel's centre wherever it lies. */
export function radiusSquared(r, width, height) {
  const radius = (r / UNIT) * Math.max(width, height);
  return Math.max(LEAST_RADIUS_SQUARED, radius * radius);
}

function fillStroke(area, { r, p, e }) {
  const radius2 = radiusSquared(r, area.width, area.height);
  const ink = e ? 0 : 1;
  for (let i = 0; i < p.length; i += 2) {
    const before = Math.max(0, i - 2); // the first segment is the first point
    fillSegment(
      area,
      (p[before] / UNIT) * area.width,
      (p[before + 1] / UNIT) * area.height,
      (p[i] / UNIT) * area.width,
      (p[i + 1] / UNIT) * area.height,
      radius2,
      ink,
    );
  }
}

/**
 * All pixels whose centre is within the radius of the segment a-b. The outline is convex, so each row has one run of them:
 * about from the leftmost to the rightmost crossing with the two discs and the two long edges, and exactly by `within`.
 */
function fillSegment(area, ax, ay, bx, by, radius2, ink) {
  const reach = Math.sqrt(radius2) + SLACK;
  const reach2 = reach * reach;
  const top = Math.max(0, Math.ceil(Math.min(ay, by) - reach - 0.5));
  const bottom = Math.min(area.height, Math.floor(Math.max(ay, by) + reach + 0.5));
  const length = Math.hypot(bx - ax, by - ay) || 1;
  const nx = ((ay - by) / length) * reach;
  const ny = ((bx - ax) / length) * reach;
  const slope = (bx - ax) / (by - ay); // unused where the edges are level: no row crosses them
  for (let row = top; row < bottom; row++) {
    const y = row + 0.5;
    let left = Infinity;
    let right = -Infinity;
    const halfA = reach2 - (y - ay) * (y - ay);
    if (halfA >= 0) {
      const half = Math.sqrt(halfA);
      left = ax - half;
      right = ax + half;
    }
    const halfB = reach2 - (y - by) * (y - by);
    if (halfB >= 0) {
      const half = Math.sqrt(halfB);
      if (bx - half < left) left = bx - half;
      if (bx + half > right) right = bx + half;
    }
    if (ay + ny > y !== by + ny > y) {
      const x = ax + nx + (y - ay - ny) * slope;
      if (x < left) left = x;
      if (x > right) right = x;
    }
    if (ay - ny > y !== by - ny > y) {
      const x = ax - nx + (y - ay + ny) * slope;
      if (x < left) left = x;
      if (x > right) right = x;
    }
    let start = Math.max(0, Math.ceil(left - 0.5));
    let end = Math.min(area.width - 1, Math.floor(right - 0.5));
    while (start <= end && !within(ax, ay, bx, by, start + 0.5, y, radius2)) start++;
    while (start <= end && !within(ax, ay, bx, by, end + 0.5, y, radius2)) end--;
    if (start <= end) area.mask.fill(ink, row * area.width + start, row * area.width + end + 1);
  }
  area.top = Math.min(area.top, top);
  area.bottom = Math.max(area.bottom, bottom);
}

/** Whether a place is within the radius of a segment: no roots, no quotients, so that every language rounds alike. */
function within(ax, ay, bx, by, x, y, radius2) {
  const px = x - ax;
  const py = y - ay;
  const dx = bx - ax;
  const dy = by - ay;
  const along = px * dx + py * dy;
  if (along <= 0) return px * px + py * py <= radius2;
  const length2 = dx * dx + dy * dy;
  if (along >= length2) return (x - bx) * (x - bx) + (y - by) * (y - by) <= radius2;
  const across = px * dy - py * dx;
  return across * across <= radius2 * length2;
}
