// Which pixels strokes cover, as the node will see them: a pixel may be painted for one image only. Pure, no DOM.
import { UNIT } from "./strokes.js";

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

function fillStroke(area, { r, p, e }) {
  const radius = Math.max(0.5, (r / UNIT) * Math.max(area.width, area.height));
  const ink = e ? 0 : 1;
  for (let i = 0; i < p.length; i += 2) {
    const before = Math.max(0, i - 2); // a single point is a segment of no length
    fillCapsule(
      area,
      (p[before] / UNIT) * area.width,
      (p[before + 1] / UNIT) * area.height,
      (p[i] / UNIT) * area.width,
      (p[i + 1] / UNIT) * area.height,
      radius,
      ink,
    );
  }
}

/**
 * All pixels whose centre is within `radius` of the segment a-b. The outline is convex, so each row has one run of them:
 * from the leftmost to the rightmost crossing with the two discs and the two long edges.
 */
function fillCapsule(area, ax, ay, bx, by, radius, ink) {
  const top = Math.max(0, Math.ceil(Math.min(ay, by) - radius - 0.5));
  const bottom = Math.min(area.height, Math.floor(Math.max(ay, by) + radius + 0.5));
  const length = Math.hypot(bx - ax, by - ay) || 1;
  const nx = ((ay - by) / length) * radius;
  const ny = ((bx - ax) / length) * radius;
  const slope = (bx - ax) / (by - ay); // unused where the edges are level: no row crosses them
  for (let row = top; row < bottom; row++) {
    const y = row + 0.5;
    let low = Infinity;
    let high = -Infinity;
    const halfA = radius * radius - (y - ay) * (y - ay);
    if (halfA >= 0) {
      const half = Math.sqrt(halfA);
      low = ax - half;
      high = ax + half;
    }
    const halfB = radius * radius - (y - by) * (y - by);
    if (halfB >= 0) {
      const half = Math.sqrt(halfB);
      if (bx - half < low) low = bx - half;
      if (bx + half > high) high = bx + half;
    }
    if (ay + ny > y !== by + ny > y) {
      const x = ax + nx + (y - ay - ny) * slope;
      if (x < low) low = x;
      if (x > high) high = x;
    }
    if (ay - ny > y !== by - ny > y) {
      const x = ax - nx + (y - ay + ny) * slope;
      if (x < low) low = x;
      if (x > high) high = x;
    }
    const from = Math.max(0, Math.ceil(low - 0.5));
    const to = Math.min(area.width, Math.floor(high - 0.5) + 1);
    if (from < to) area.mask.fill(ink, row * area.width + from, row * area.width + to);
  }
  area.top = Math.min(area.top, top);
  area.bottom = Math.max(area.bottom, bottom);
}
