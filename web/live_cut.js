// Cuts in a thread of its own, so that the pen stays quick. This module is the thread as well: ComfyUI's page imports every
// file here, and in the page it only offers cutAside().
import { cellsOf, cut } from "./cut.js";

const MOST_WEIGHTS = 8; // files that the thread keeps
const isThread = "WorkerGlobalScope" in globalThis;

let thread = null;
let asked = 0;
const waiting = new Map(); // number of a question -> who waits for its answer

/**
 * The label of each cell under strokes, Uint16Array of h * w; null where the weights are no longer on the server.
 *
 * problem: {weights: address of the file, grid: [h, w], size: the pictures' [width, height], strokes, count: of images, base,
 * preference, unpainted: "base", "strokes", or "auto" for the base where it has no strokes of its own}.
 */
export function cutAside(problem) {
  if (!thread) {
    thread = new Worker(new URL(import.meta.url), { type: "module" });
    thread.onmessage = ({ data: { number, labels } }) => {
      waiting.get(number)(labels);
      waiting.delete(number);
    };
  }
  return new Promise((resolve) => {
    waiting.set(++asked, resolve);
    thread.postMessage({
      number: asked,
      problem: { ...problem, weights: new URL(problem.weights, location.href).href },
    });
  });
}

/** The cut of one editor: of all that is asked while one is made, only the last is made next. */
export class LiveCut {
  /** show(): there are other labels. */
  constructor(show) {
    this.show = show;
    this.problem = null; // as of cutAside
    this.busy = false;
    this.clear();
  }

  clear() {
    this.labels = null;
    this.grid = null;
    this.lost = false; // the weights are no longer on the server
  }

  /** problem: as of cutAside, or null where nothing can be cut. */
  ask(problem) {
    if (isSame(problem, this.problem)) return;
    if (problem?.weights !== this.problem?.weights) this.clear();
    this.problem = problem;
    if (problem && !this.busy) this.solve();
  }

  async solve() {
    this.busy = true;
    const { problem } = this;
    const began = performance.now();
    const labels = await cutAside(problem);
    this.busy = false;
    if (problem.weights === this.problem?.weights) {
      [this.labels, this.grid, this.lost] = [labels, problem.grid, labels === null];
      this.milliseconds = performance.now() - began;
      this.show();
    }
    if (this.problem && this.problem !== problem) this.solve();
  }
}

function isSame(a, b) {
  if (!a || !b) return a === b;
  return a.strokes === b.strokes && Object.keys(a).every((key) => String(a[key]) === String(b[key]));
}

// ---- in the thread

const weights = new Map(); // address -> Promise of Uint32Array

function weightsAt(address) {
  if (!weights.has(address)) {
    weights.set(address, fetchWeights(address));
    if (weights.size > MOST_WEIGHTS) weights.delete(weights.keys().next().value);
  }
  return weights.get(address);
}

async function fetchWeights(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${answer.status}`);
  return new Uint32Array(await answer.arrayBuffer());
}

async function solve({ weights: address, size, strokes, unpainted, ...problem }) {
  const cells = cellsOf(strokes, size, problem.grid);
  const fromBase = unpainted === "base" || (unpainted === "auto" && !cells.includes(problem.base));
  const preference = fromBase ? problem.preference : 0;
  return cut({ ...problem, cells, preference, weights: await weightsAt(address) });
}

if (isThread) {
  self.onmessage = async ({ data: { number, problem } }) => {
    const labels = await solve(problem).catch(() => {
      weights.delete(problem.weights);
      return null;
    });
    self.postMessage({ number, labels }, labels ? [labels.buffer] : []);
  };
}

/** The CRC-32 of a text in UTF-8, as zlib's: a short name for strokes. */
export function crc32(text) {
  let crc = -1;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 && 0xedb88320);
  }
  return ~crc >>> 0;
}
