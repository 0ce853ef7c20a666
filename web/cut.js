// The graph cut of kernels/graphcut.py, cell for cell: strokes on a grid, and the labels of least energy. Pure, no DOM.
//
// E(L) = sum_p U(p, L_p) + sum over neighbours p, q of w(p, q) [L_p != L_q]
//
// Minimised by alpha-expansion from all zeros, in the same order as there. Of all minimum cuts of an expansion both take
// the one with the fewest cells on the source's side, which every maximum flow gives; so the labels are the same.
import { byImage, coverage } from "./raster.js";

const STROKE_COST = 1_000_000; // U where another label than the stroke's is chosen
const CYCLES = 100; // at most; it converges after two or three

/**
 * The cell of each stroke, as labels.pool does: a cell belongs to the image that covers most of it, -1 where none does.
 *
 * size: the pictures' [width, height], grid: [h, w]. Returns an Int32Array of h * w.
 */
export function cellsOf(strokes, [width, height], [h, w]) {
  const cells = new Int32Array(h * w).fill(-1);
  const most = new Float64Array(h * w);
  const columns = cellRanges(width, w);
  for (const [image, own] of byImage(strokes)) {
    const { mask, top, bottom } = coverage(own, width, height);
    cellRanges(height, h).forEach(([y0, y1], row) => {
      if (y1 <= top || y0 >= bottom) return;
      columns.forEach(([x0, x1], column) => {
        let count = 0;
        for (let y = y0; y < y1; y++) for (let i = y * width + x0; i < y * width + x1; i++) count += mask[i];
        const cell = row * w + column;
        if (count <= most[cell]) return; // of equals the first image
        most[cell] = count;
        cells[cell] = image;
      });
    });
  }
  return cells;
}

/** [from, to) of each cell along an axis; cells overlap where the pixels are no multiple of them. */
function cellRanges(pixels, cells) {
  return Array.from({ length: cells }, (_, i) => [
    Math.floor((i * pixels) / cells),
    Math.ceil(((i + 1) * pixels) / cells),
  ]);
}

/**
 * The label of each cell, Uint16Array of h * w.
 *
 * grid: [h, w]; weights: right [h, w-1], then down [h-1, w], as one array of integers; cells: from cellsOf; count: of
 * labels; base: all of it where nothing is painted; preference: what an unpainted cell pays for another label than
 * the base, 0 for nothing.
 */
export function cut({ grid, weights, cells, count, base, preference }) {
  if (!cells.some((image) => image >= 0)) return new Uint16Array(cells.length).fill(base);
  const cost = (cell, label) =>
    cells[cell] >= 0 ? (cells[cell] === label ? 0 : STROKE_COST) : preference && label !== base ? preference : 0;
  const problem = { grid, right: weights.subarray(0, grid[0] * (grid[1] - 1)), cost };
  problem.down = weights.subarray(problem.right.length);
  let labels = new Uint16Array(cells.length);
  let best = energy(problem, labels);
  let unchanged = 0;
  const graph = new GridFlow(grid);
  for (let turn = 0; turn < CYCLES * count && unchanged < count; turn++) {
    const expanded = expand(problem, graph, labels, turn % count);
    const value = expanded ? energy(problem, expanded) : best;
    unchanged = value < best ? 0 : unchanged + 1;
    if (value < best) [labels, best] = [expanded, value];
  }
  return labels;
}

export function energy({ grid: [h, w], right, down, cost }, labels) {
  let sum = 0;
  for (let y = 0, p = 0; y < h; y++) {
    for (let x = 0; x < w; x++, p++) {
      sum += cost(p, labels[p]);
      if (x + 1 < w && labels[p] !== labels[p + 1]) sum += right[p - y];
      if (y + 1 < h && labels[p] !== labels[p + w]) sum += down[p];
    }
  }
  return sum;
}

/** The best labelling in which every cell keeps its label or takes alpha: one minimum cut; null where all keep. */
function expand({ grid: [h, w], right, down, cost }, graph, labels, alpha) {
  graph.clear();
  const { pull, capacity } = graph;
  const couple = (p, q, weight, towards) => {
    const [pFree, qFree] = [labels[p] !== alpha, labels[q] !== alpha];
    if (pFree && qFree) {
      capacity[4 * p + towards] = weight; // p keeps, q takes alpha
      if (labels[p] === labels[q]) capacity[4 * q + (towards ^ 1)] = weight;
      else pull[q] -= weight; // if q takes alpha as well, the seam that is there now ends
    } else if (pFree) pull[p] -= weight;
    else if (qFree) pull[q] -= weight;
  };
  for (let y = 0, p = 0; y < h; y++) {
    for (let x = 0; x < w; x++, p++) {
      if (labels[p] !== alpha) pull[p] += cost(p, alpha) - cost(p, labels[p]); // of taking alpha over keeping
      if (x + 1 < w) couple(p, p + 1, right[p - y], RIGHT);
      if (y + 1 < h) couple(p, p + w, down[p], DOWN);
    }
  }
  graph.maximise();
  const expanded = labels.slice();
  let changed = false;
  for (let p = 0; p < labels.length; p++) {
    if (labels[p] === alpha || graph.isKept(p)) continue;
    expanded[p] = alpha;
    changed = true;
  }
  return changed ? expanded : null;
}

const [RIGHT, DOWN] = [0, 2]; // of a cell's four arcs; the arc back is the number with its last bit turned
const [TERMINAL, ORPHAN, NONE] = [4, 5, 6]; // parents that are no arc
const [FREE, SOURCE, SINK] = [0, 1, 2]; // trees

/**
 * Maximum flow on a grid of four neighbours by two search trees that are kept from path to path (Boykov and Kolmogorov
 * 2004, with their marks of time and distance). In the end the source's tree is all that the source still reaches.
 */
class GridFlow {
  constructor([h, w]) {
    const size = h * w;
    this.neighbours = new Int32Array(4 * size).fill(-1);
    for (let p = 0; p < size; p++) {
      if ((p % w) + 1 < w) [this.neighbours[4 * p], this.neighbours[4 * (p + 1) + 1]] = [p + 1, p];
      if (p + w < size) [this.neighbours[4 * p + 2], this.neighbours[4 * (p + w) + 3]] = [p + w, p];
    }
    this.capacity = new Int32Array(4 * size); // of the arc from a cell to each neighbour
    this.pull = new Int32Array(size); // above 0: capacity from the source; below: to the sink
    this.tree = new Uint8Array(size);
    this.parent = new Uint8Array(size); // the arc to it
    this.time = new Int32Array(size);
    this.distance = new Int32Array(size);
    this.queue = new Int32Array(size + 1); // a ring: every cell is in it once at most
    this.queued = new Uint8Array(size);
  }

  clear() {
    for (const array of [this.capacity, this.pull, this.tree, this.time, this.queued]) array.fill(0);
    this.parent.fill(NONE);
    this.now = 1;
    [this.first, this.end] = [0, 0];
    this.orphans = [];
  }

  isKept(p) {
    return this.tree[p] === SOURCE;
  }

  activate(p) {
    if (this.queued[p]) return;
    this.queued[p] = 1;
    this.queue[this.end] = p;
    this.end = (this.end + 1) % this.queue.length;
  }

  next() {
    while (this.first !== this.end) {
      const p = this.queue[this.first];
      this.first = (this.first + 1) % this.queue.length;
      this.queued[p] = 0;
      if (this.tree[p] !== FREE) return p;
    }
    return -1;
  }

  maximise() {
    const { pull, tree } = this;
    for (let p = 0; p < pull.length; p++) {
      if (!pull[p]) continue;
      this.place(p, pull[p] > 0 ? SOURCE : SINK, TERMINAL, 1);
    }
    for (let p = this.next(); p >= 0; p = this.next()) {
      while (tree[p] !== FREE) {
        const arc = this.grow(p);
        this.now++;
        if (arc < 0) break;
        this.augment(arc);
        for (let i = 0; i < this.orphans.length; i++) this.adopt(this.orphans[i]);
        this.orphans.length = 0;
      }
    }
  }

  place(p, tree, parent, distance) {
    this.tree[p] = tree;
    this.parent[p] = parent;
    this.time[p] = this.now;
    this.distance[p] = distance;
    this.activate(p);
  }

  /** Grows a tree from one of its cells. Returns the arc, from the source's tree, where it meets the other; or -1. */
  grow(p) {
    const { neighbours, capacity, tree, time, distance } = this;
    const fromSource = tree[p] === SOURCE;
    for (let arc = 4 * p; arc < 4 * p + 4; arc++) {
      const q = neighbours[arc];
      if (q < 0) continue;
      const back = 4 * q + ((arc & 3) ^ 1);
      if (!capacity[fromSource ? arc : back]) continue;
      if (tree[q] === FREE) {
        this.place(q, tree[p], back & 3, distance[p] + 1);
        time[q] = time[p];
      } else if (tree[q] !== tree[p]) return fromSource ? arc : back;
      else if (time[q] <= time[p] && distance[q] > distance[p]) {
        this.parent[q] = back & 3;
        time[q] = time[p];
        distance[q] = distance[p] + 1;
      }
    }
    return -1;
  }

  augment(arc) {
    const { neighbours, capacity, pull, parent } = this;
    const [start, goal] = [arc >> 2, neighbours[arc]];
    let flow = capacity[arc];
    let p = start;
    for (; parent[p] !== TERMINAL; p = neighbours[4 * p + parent[p]])
      flow = Math.min(flow, capacity[4 * neighbours[4 * p + parent[p]] + (parent[p] ^ 1)]);
    flow = Math.min(flow, pull[p]);
    for (p = goal; parent[p] !== TERMINAL; p = neighbours[4 * p + parent[p]])
      flow = Math.min(flow, capacity[4 * p + parent[p]]);
    flow = Math.min(flow, -pull[p]);

    capacity[arc] -= flow;
    capacity[4 * goal + ((arc & 3) ^ 1)] += flow;
    for (p = start; parent[p] !== TERMINAL;) {
      const above = neighbours[4 * p + parent[p]];
      capacity[4 * p + parent[p]] += flow;
      const left = (capacity[4 * above + (parent[p] ^ 1)] -= flow);
      if (!left) this.orphan(p);
      p = above;
    }
    if (!(pull[p] -= flow)) this.orphan(p);
    for (p = goal; parent[p] !== TERMINAL;) {
      const above = neighbours[4 * p + parent[p]];
      capacity[4 * above + (parent[p] ^ 1)] += flow;
      const left = (capacity[4 * p + parent[p]] -= flow);
      if (!left) this.orphan(p);
      p = above;
    }
    if (!(pull[p] += flow)) this.orphan(p);
  }

  orphan(p) {
    this.parent[p] = ORPHAN;
    this.orphans.push(p);
  }

  /** Gives a cell whose way to its terminal is full another parent, or leaves it and makes its children orphans. */
  adopt(p) {
    const { neighbours, capacity, tree, parent, time, distance } = this;
    const fromSource = tree[p] === SOURCE;
    let [nearest, shortest] = [-1, Infinity];
    for (let arc = 4 * p; arc < 4 * p + 4; arc++) {
      const q = neighbours[arc];
      if (q < 0 || tree[q] !== tree[p] || !capacity[fromSource ? 4 * q + ((arc & 3) ^ 1) : arc]) continue;
      let length = this.lengthFrom(q);
      if (length === Infinity) continue;
      if (length < shortest) [nearest, shortest] = [arc & 3, length];
      for (let r = q; time[r] !== this.now; r = neighbours[4 * r + parent[r]]) {
        time[r] = this.now;
        distance[r] = length--;
      }
    }
    if (nearest >= 0) {
      parent[p] = nearest;
      time[p] = this.now;
      distance[p] = shortest + 1;
      return;
    }
    for (let arc = 4 * p; arc < 4 * p + 4; arc++) {
      const q = neighbours[arc];
      if (q < 0 || tree[q] !== tree[p]) continue;
      if (capacity[fromSource ? 4 * q + ((arc & 3) ^ 1) : arc]) this.activate(q);
      if (parent[q] < TERMINAL && neighbours[4 * q + parent[q]] === p) this.orphan(q);
    }
    tree[p] = FREE;
    parent[p] = NONE;
  }

  /** Arcs from a cell to its terminal, or Infinity where the way ends at an orphan. */
  lengthFrom(p) {
    const { neighbours, parent, time, distance } = this;
    for (let length = 0; ; p = neighbours[4 * p + parent[p]]) {
      if (time[p] === this.now) return length + distance[p];
      length++;
      if (parent[p] === TERMINAL) {
        time[p] = this.now;
        distance[p] = 1;
        return length;
      }
      if (parent[p] > TERMINAL) return Infinity;
    }
  }
}
