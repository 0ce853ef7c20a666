// Layers on a canvas: where they lie, what lies above what, and how a drag changes that. Pure, no DOM; the same geometry
// as kernels/collage.py.
//
// A layer is {width, height, values}: its picture's size and {x, y, scale, rotation, depth}. x and y are its centre in
// fractions of the canvas, a scale of 1 is as large as the canvas contains it upright, rotation is in degrees, clockwise.
// Points are [x, y] in pixels of the canvas, {width, height}.

const SNAP = 15; // degrees
const CORNERS = [
  [-1, -1],
  [1, -1],
  [1, 1],
  [-1, 1],
]; // from top left, clockwise

/** Pixels of the canvas for one of the layer's picture. */
function factorOf({ width, height, values }, canvas) {
  return values.scale * Math.min(canvas.width / width, canvas.height / height);
}

export function centreOf({ values }, canvas) {
  return [values.x * canvas.width, values.y * canvas.height];
}

/** The canvas's [a, b, c, d, e, f] with which the layer's picture is drawn around the origin. */
export function matrixOf(layer, canvas) {
  const factor = factorOf(layer, canvas);
  const turn = (layer.values.rotation / 180) * Math.PI;
  const [cos, sin] = [Math.cos(turn) * factor, Math.sin(turn) * factor];
  return [cos, sin, -sin, cos, ...centreOf(layer, canvas)];
}

/** The corners from its top left one, clockwise. least: half sides that a frame around a small layer has at least. */
export function cornersOf(layer, canvas, least = 0) {
  return CORNERS.map(([x, y]) => outline(layer, canvas, least)(x, y));
}

/** The point above the layer at a distance, by which it is turned. */
export function handleOf(layer, canvas, distance, least = 0) {
  return outline(layer, canvas, least)(0, -1, distance);
}

function outline(layer, canvas, least) {
  const [a, b, , , x0, y0] = matrixOf(layer, canvas);
  const factor = Math.hypot(a, b);
  const [cos, sin] = [a / factor, b / factor];
  const [w, h] = [layer.width, layer.height].map((side) => Math.max(least, (side / 2) * factor));
  return (x, y, beyond = 0) => {
    const [u, v] = [x * w, y * (h + beyond)];
    return [x0 + u * cos - v * sin, y0 + u * sin + v * cos];
  };
}

/** A point in fractions of the layer's picture: inside where both are in [0, 1). */
export function pointIn(layer, canvas, [x, y]) {
  const [a, b, , , x0, y0] = matrixOf(layer, canvas);
  const factor2 = a * a + b * b;
  const [dx, dy] = [x - x0, y - y0];
  return [(dx * a + dy * b) / factor2 / layer.width + 0.5, (dy * a - dx * b) / factor2 / layer.height + 0.5];
}

/** Whether nothing of a layer lies on the canvas: some side of one of the two parts them. */
export function isOffCanvas(layer, canvas) {
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  const parted = (points, [width, height]) =>
    [width, height].some((most, axis) => {
      const [least, greatest] = ends(points.map((point) => point[axis]));
      return greatest <= 0 || least >= most;
    });
  const { width, height } = canvas;
  const corners = [
    [0, 0],
    [width, 0],
    [width, height],
    [0, height],
  ];
  return (
    parted(cornersOf(layer, canvas), [width, height]) ||
    parted(
      corners.map((corner) => pointIn(layer, canvas, corner)),
      [1, 1],
    )
  );
}

export function isInside([u, v]) {
  return u >= 0 && u < 1 && v >= 0 && v < 1;
}

// ---- drags: the values that change, from the layer and the points at the press and now

/** straight: along one axis. */
export function moved({ values }, canvas, [x0, y0], [x1, y1], straight) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const level = Math.abs(dx) >= Math.abs(dy);
  return {
    x: values.x + (straight && !level ? 0 : dx / canvas.width),
    y: values.y + (straight && level ? 0 : dy / canvas.height),
  };
}

export function scaled(layer, canvas, from, to) {
  const centre = centreOf(layer, canvas);
  return { scale: layer.values.scale * (distance(centre, to) / distance(centre, from)) };
}

/** snapping: to whole steps of 15 degrees. */
export function rotated(layer, canvas, from, to, snapping) {
  const centre = centreOf(layer, canvas);
  const rotation = layer.values.rotation + ((angle(centre, to) - angle(centre, from)) / Math.PI) * 180;
  return { rotation: wrap(snapping ? Math.round(rotation / SNAP) * SNAP : rotation) };
}

function wrap(degrees) {
  return degrees - 360 * Math.ceil((degrees - 180) / 360); // in (-180, 180]
}

function distance([ax, ay], [bx, by]) {
  return Math.max(1e-6, Math.hypot(bx - ax, by - ay));
}

function angle([ax, ay], [bx, by]) {
  return Math.atan2(by - ay, bx - ax);
}

// ---- who lies above whom

/** Back to front: by depth, and equal ones as they came. */
export function stack(layers) {
  return [...layers].sort((a, b) => a.values.depth - b.values.depth); // sort is stable
}

/**
 * The depths that bring one layer to another place of the stack, back to front: of that layer alone where this is
 * enough, otherwise of all, counted from the least. Map of layer -> depth; null where a depth that is fed is in the way.
 *
 * chain: the layers as they came. isFed(layer): whether its depth is not to be changed. [least, most]: of a depth.
 */
export function restack(chain, layer, to, isFed, [least, most]) {
  const wanted = stack(chain).filter((other) => other !== layer);
  const [behind, before] = [wanted[to - 1], wanted[to]].map((other) => other?.values.depth);
  wanted.splice(to, 0, layer);
  if (isFed(layer)) return null;
  const { depth } = layer.values;
  const candidates = [depth, behind, behind + 1, before, before - 1].filter((value) => value >= least && value <= most);
  candidates.sort((a, b) => Math.abs(a - depth) - Math.abs(b - depth));
  const alone = candidates.find((value) => isStacked(chain, wanted, new Map([[layer, value]])));
  if (alone !== undefined) return new Map([[layer, alone]]);
  const first = Math.max(0, least);
  const all = new Map(wanted.map((other, place) => [other, first + place]).filter(([other]) => !isFed(other)));
  return isStacked(chain, wanted, all) ? all : null;
}

function isStacked(chain, wanted, depths) {
  const depthOf = (layer) => depths.get(layer) ?? layer.values.depth;
  return wanted.every((layer, place) => {
    const behind = wanted[place - 1];
    const ahead = behind && depthOf(layer) - depthOf(behind);
    return !behind || ahead > 0 || (ahead === 0 && chain.indexOf(behind) < chain.indexOf(layer));
  });
}

// ---- numbers as a widget keeps them

/** A value rounded and kept in its limits. */
export function settled(value, { min = -Infinity, max = Infinity, round = 0 }) {
  const rounded = round ? Number((Math.round(value / round) * round).toFixed(6)) : value;
  return Math.min(max, Math.max(min, rounded));
}
