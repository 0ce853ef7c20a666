// The editor's cut on problems that Python made (MONTAGE_CUTS): the same cells, the same labels.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { cellsOf, cut } from "../../web/cut.js";

const { MONTAGE_CUTS } = process.env;
const problems = MONTAGE_CUTS ? JSON.parse(readFileSync(MONTAGE_CUTS, "utf8")) : [];

test("there are problems", { skip: !MONTAGE_CUTS }, () => assert.ok(problems.length));

for (const { name, strokes, size, expectedCells, expected, ...problem } of problems) {
  test(name, (context) => {
    const cells = strokes ? cellsOf(strokes, size, problem.grid) : Int32Array.from(problem.cells);
    if (expectedCells) assert.deepEqual([...cells], expectedCells);
    const began = performance.now();
    const labels = cut({ ...problem, cells, weights: Uint32Array.from(problem.weights) });
    context.diagnostic(`${Math.round(performance.now() - began)} ms`);
    const different = expected.filter((label, cell) => label !== labels[cell]).length;
    assert.equal(different, 0, `${different} of ${expected.length} labels differ`);
  });
}
