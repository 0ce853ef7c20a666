// The layers' geometry and order: pure state, tested without a browser.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { describe, test } from "node:test";
import {
  centreOf,
  cornersOf,
  handleOf,
  isInside,
  matrixOf,
  moved,
  pointIn,
  restack,
  rotated,
  scaled,
  settled,
  stack,
} from "../../web/layers.js";

const canvas = { width: 300, height: 200 };
const layer = (values = {}, [width, height] = [60, 40]) => ({
  width,
  height,
  values: { x: 0.5, y: 0.5, scale: 0.5, rotation: 0, depth: 0, ...values },
});
const near = (actual, expected, slack = 1e-6) =>
  actual
    .flat()
    .forEach((value, i) => assert.ok(Math.abs(value - expected.flat()[i]) <= slack, `${actual} is not ${expected}`));

describe("geometry", () => {
  test("is the backend's: the same places as in its test", async () => {
    const places = JSON.parse(await readFile(new URL("../data/collage_places.json", import.meta.url)));
    assert.ok(places.length >= 5);
    for (const {
      canvas: [width, height],
      layer: size,
      corners,
      ...values
    } of places) {
      near(cornersOf(layer(values, size), { width, height }), corners, 1e-3);
    }
  });

  test("the matrix takes the picture's corners to those of the frame, and a point back into the picture", () => {
    const one = layer({ x: 0.3, y: 0.7, scale: 0.8, rotation: 33 });
    const [a, b, c, d, e, f] = matrixOf(one, canvas);
    const corners = [
      [-30, -20],
      [30, -20],
      [30, 20],
      [-30, 20],
    ].map(([x, y]) => [a * x + c * y + e, b * x + d * y + f]);
    near(cornersOf(one, canvas), corners);
    near(
      corners.map((corner) => pointIn(one, canvas, corner)),
      [
        [0, 0],
        [1, 0],
        [1, 1],
        [0, 1],
      ],
    );
    near(pointIn(one, canvas, centreOf(one, canvas)), [0.5, 0.5]);
    assert.equal(isInside([0.5, 0.999]), true);
    for (const outside of [
      [-0.01, 0.5],
      [0.5, 1],
    ])
      assert.equal(isInside(outside), false);
  });

  test("small layers get a frame that can be held, and the handle is above it, whatever way that is", () => {
    const small = layer({ scale: 0.01, rotation: 90 });
    near(cornersOf(small, canvas, 10), [
      [160, 90],
      [160, 110],
      [140, 110],
      [140, 90],
    ]);
    near(handleOf(small, canvas, 25, 10), [185, 100]);
    near(handleOf(layer(), canvas, 25), [150, 100 - 50 - 25]);
  });
});

describe("drags", () => {
  test("move by the pointer's way, or along the longer axis of it", () => {
    near(Object.values(moved(layer(), canvas, [10, 10], [40, 20])), [0.6, 0.55]);
    assert.deepEqual(moved(layer(), canvas, [10, 10], [40, 20], true), { x: 0.6, y: 0.5 });
    assert.deepEqual(moved(layer(), canvas, [10, 10], [20, -10], true), { x: 0.5, y: 0.4 });
  });

  test("a corner that is dragged stays under the pointer", () => {
    const one = layer({ rotation: 25 });
    const corner = cornersOf(one, canvas)[2];
    const to = corner.map((value, axis) => value + 0.5 * (value - centreOf(one, canvas)[axis]));
    const { scale } = scaled(one, canvas, corner, to);
    near([scale], [0.75]);
    near(cornersOf(layer({ rotation: 25, scale }), canvas)[2], to);
  });

  test("turning follows the pointer around the centre, clockwise, in steps when asked", () => {
    const above = [150, 50];
    near([rotated(layer(), canvas, above, [200, 100]).rotation], [90]);
    near([rotated(layer({ rotation: 170 }), canvas, above, [200, 100]).rotation], [-100]);
    near([rotated(layer({ rotation: 350 }), canvas, above, above).rotation], [-10]);
    near([rotated(layer({ rotation: -200 }), canvas, above, above).rotation], [160]);
    assert.equal(rotated(layer({ rotation: 7 }), canvas, above, [180, 55], true).rotation, 45);
    assert.equal(rotated(layer({ rotation: 180 }), canvas, above, above, true).rotation, 180);
  });

  test("a press on the centre itself divides by nothing", () => {
    assert.ok(Number.isFinite(scaled(layer(), canvas, [150, 100], [160, 100]).scale));
  });
});

describe("the order", () => {
  const chain = (...depths) => depths.map((depth, i) => ({ ...layer({ depth }), name: "abcdefg"[i] }));
  const names = (layers) => layers.map((one) => one.name).join("");
  const LIMITS = [-999, 999];
  const none = () => false;

  test("is that of the depths, and of the chain where they are equal", () => {
    assert.equal(names(stack(chain(0, 0, 0))), "abc");
    assert.equal(names(stack(chain(2, 0, 2, -1))), "dbac");
  });

  test("every move is reached, from any depths, and one depth is changed where one is enough", () => {
    for (let code = 0; code < 3 ** 4; code++) {
      const layers = chain(...[0, 1, 2, 3].map((digit) => Math.floor(code / 3 ** digit) % 3));
      for (const moving of layers) {
        for (let to = 0; to < 4; to++) {
          const wanted = stack(layers).filter((other) => other !== moving);
          wanted.splice(to, 0, moving);
          const depths = restack(layers, moving, to, none, LIMITS);
          const then = layers.map((one) => ({ ...one, values: { depth: depths.get(one) ?? one.values.depth } }));
          assert.equal(names(stack(then)), names(wanted));
          const alone = [-1, 0, 1, 2, 3].some(
            (depth) =>
              names(stack(layers.map((one) => (one === moving ? { ...one, values: { depth } } : one)))) ===
              names(wanted),
          );
          assert.equal(depths.size === 1, alone, `${layers.map((one) => one.values.depth)}: ${moving.name} to ${to}`);
        }
      }
    }
  });

  test("a layer that is where it should be keeps its depth", () => {
    const layers = chain(0, 5, 9);
    assert.deepEqual([...restack(layers, layers[1], 1, none, LIMITS).values()], [5]);
  });

  test("depths that are fed stay, and make some orders impossible", () => {
    const layers = chain(0, 0, 0);
    assert.equal(
      restack(layers, layers[0], 2, (one) => one === layers[0], LIMITS),
      null,
    );
    assert.equal(
      restack(layers, layers[0], 1, (one) => one === layers[2], LIMITS),
      null,
    );
    assert.deepEqual([...restack(layers, layers[0], 2, (one) => one !== layers[0], LIMITS).values()], [1]);
  });

  test("limits are kept", () => {
    const layers = chain(999, 999, 999);
    const depths = restack(layers, layers[0], 2, none, LIMITS);
    assert.deepEqual([...depths.values()], [0, 1, 2]);
    assert.deepEqual([...restack(layers, layers[2], 0, none, LIMITS).values()], [998]);
  });
});

test("numbers are rounded and limited as their widgets do it", () => {
  assert.equal(settled(0.123456, { min: -2, max: 3, round: 0.001 }), 0.123);
  assert.equal(settled(33.3333, { round: 0.1 }), 33.3);
  assert.equal(settled(7, { min: -2, max: 3, round: 0.001 }), 3);
  assert.equal(settled(0.1 + 0.2, {}), 0.1 + 0.2);
});
