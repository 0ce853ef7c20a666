// The stroke document and its history, and what strokes cover: pure state, tested without a browser.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { describe, test } from "node:test";
import { byImage, coverage, findConflicts } from "../../web/raster.js";
import { Painting, UNIT, makeStroke, readDocument, simplify, writeDocument } from "../../web/strokes.js";

const line = (k, y, more = {}) => ({ k, r: 250, p: [1000, y, 9000, y], ...more });
const pictures = { names: ["aa", "bb"], size: [64, 48] };

/** A generator of its own, so that a failing case comes back. */
function random(seed) {
  return () => (seed = (seed * 16807) % 2147483647) / 2147483647;
}

function scribble(next, samples, stride = 30) {
  const points = [next() * UNIT, next() * UNIT];
  for (let i = 1, angle = next() * 6; i < samples; i++) {
    angle += (next() - 0.5) * 0.6;
    points.push(points.at(-2) + Math.cos(angle) * stride, points.at(-2) + Math.sin(angle) * stride);
  }
  return points;
}

describe("the document", () => {
  test("is the agreed one", () => {
    const painting = new Painting();
    painting.edit({ strokes: [line(1, 5000), line(1, 6000, { e: 1 })], base: 1 }, pictures);
    assert.deepEqual(JSON.parse(painting.text()), {
      v: 1,
      base: 1,
      size: [64, 48],
      img: ["aa", "bb"],
      strokes: [
        { k: 1, r: 250, p: [1000, 5000, 9000, 5000] },
        { k: 1, r: 250, p: [1000, 6000, 9000, 6000], e: 1 },
      ],
    });
  });

  test("is empty without strokes, whatever the base", () => {
    const painting = new Painting();
    painting.edit({ base: 3 }, pictures);
    assert.equal(painting.text(), "");
    assert.equal(painting.base, 3);
  });

  test("comes back as it was written", () => {
    const document = { base: 2, size: [10, 20], names: ["x"], strokes: [line(0, 1), line(2, 2, { e: 1 })] };
    assert.deepEqual(readDocument(writeDocument(document)), document);
  });

  test("leaves the base out while another node feeds it", () => {
    const painting = new Painting();
    painting.load("", null);
    painting.edit({ strokes: [line(0, 1)] }, pictures);
    assert.equal("base" in JSON.parse(painting.text()), false);
  });

  test("is given back character by character until something changes", () => {
    const text = '{ "v": 1,\n "strokes": [{"k": 0, "r": 9.5, "p": [1.25, 2]}] }';
    const painting = new Painting();
    painting.load(text, 0);
    assert.equal(painting.text(), text);
    painting.edit({ strokes: [...painting.strokes, line(0, 7)] });
    assert.equal(JSON.parse(painting.text()).strokes.length, 2);
  });

  test("of a base that is not the node's is rewritten", () => {
    const painting = new Painting();
    painting.load('{"v":1,"base":2,"strokes":[{"k":0,"r":9,"p":[1,2]}]}', 1);
    assert.equal(JSON.parse(painting.text()).base, 1);
  });

  for (const text of [
    "{",
    "[]",
    "null",
    "7",
    '{"v":2,"strokes":[]}',
    '{"v":1}',
    '{"v":1,"strokes":[{"k":0,"r":1}]}',
    '{"v":1,"strokes":[null]}',
    '{"v":1,"strokes":[{"k":-1,"r":1,"p":[1,2]}]}',
    '{"v":1,"strokes":[{"k":1e9,"r":1,"p":[1,2]}]}',
    '{"v":1,"strokes":[{"k":0,"r":1,"p":[1,2,3]}]}',
    '{"v":1,"strokes":[{"k":0,"r":1,"p":[1,"2"]}]}',
    '{"v":1,"strokes":[{"k":0,"r":-1,"p":[1,2]}]}',
    '{"v":1,"strokes":[{"k":0,"r":10001,"p":[1,2]}]}',
    '{"v":1,"strokes":[{"k":0,"r":1,"p":[1,100001]}]}',
  ]) {
    test(`that cannot be read is kept and never edited: ${text}`, () => {
      const painting = new Painting();
      painting.load(text, 0);
      assert.ok(painting.error);
      assert.equal(painting.edit({ strokes: [line(0, 1)] }, pictures), false);
      painting.followBase(1);
      assert.equal(painting.text(), text);
    });
  }
});

describe("history", () => {
  test("undo and redo walk through the strokes and the base", () => {
    const painting = new Painting();
    const texts = [painting.text()];
    const steps = [
      { strokes: [line(0, 1)] },
      { strokes: [line(0, 1), line(1, 5)] },
      { base: 1 },
      { strokes: [line(1, 5)] },
    ];
    for (const step of steps) {
      assert.equal(painting.edit(step, pictures), true);
      texts.push(painting.text());
    }
    for (const text of texts.slice(0, -1).reverse()) {
      assert.equal(painting.undo(), true);
      assert.equal(painting.text(), text);
    }
    assert.equal(painting.undo(), false);
    for (const text of texts.slice(1)) {
      assert.equal(painting.redo(), true);
      assert.equal(painting.text(), text);
    }
    assert.equal(painting.redo(), false);
  });

  test("a new edit forgets what was undone, and no edit is no step", () => {
    const painting = new Painting();
    painting.edit({ strokes: [line(0, 1)] }, pictures);
    painting.undo();
    painting.edit({ strokes: [line(0, 2)] }, pictures);
    assert.equal(painting.redo(), false);
    assert.equal(painting.edit({ base: 0 }, pictures), false);
    assert.equal(painting.past.length, 1);
  });

  test("is bounded", () => {
    const painting = new Painting();
    for (let i = 0; i < 500; i++) painting.edit({ strokes: [line(0, i)] }, pictures);
    assert.ok(painting.past.length <= 100);
  });

  test("a base changed on the node is a step, but not the first one", () => {
    const painting = new Painting();
    painting.followBase(2);
    assert.equal(painting.past.length, 0);
    painting.edit({ strokes: [line(0, 1)] }, pictures);
    painting.followBase(1);
    assert.equal(JSON.parse(painting.text()).base, 1);
    painting.undo();
    assert.equal(JSON.parse(painting.text()).base, 2);
  });
});

describe("simplifying", () => {
  test("keeps the ends, drops what lies on the way", () => {
    assert.deepEqual(simplify([0, 0, 10, 1, 20, 0, 30, -1, 40, 0], 5), [0, 0, 40, 0]);
    assert.deepEqual(simplify([0, 0, 10, 30, 20, 0], 5), [0, 0, 10, 30, 20, 0]);
    assert.deepEqual(simplify([3, 4], 5), [3, 4]);
  });

  test("no dropped point is farther away than the tolerance", () => {
    const next = random(7);
    for (let round = 0; round < 20; round++) {
      const points = scribble(next, 200);
      const left = simplify(points, 20);
      for (let i = 0; i < points.length; i += 2) {
        let nearest = Infinity;
        for (let j = 2; j < left.length; j += 2)
          nearest = Math.min(nearest, distance(points.slice(i, i + 2), left.slice(j - 2, j + 2)));
        assert.ok(nearest <= 20 + 1e-9, `${nearest}`);
      }
    }
  });

  test("200 strokes of a hand stay under 100 KB", () => {
    const next = random(1);
    const strokes = Array.from({ length: 200 }, (_, i) => makeStroke(i % 4, 250, scribble(next, 375)));
    const text = writeDocument({ base: 0, size: [1024, 1024], names: ["0123456789abcdef0123"], strokes });
    assert.ok(text.length < 100_000, `${text.length}`);
  });

  test("a stroke keeps its shape: what it covers changes by a hair", () => {
    const next = random(3);
    for (let round = 0; round < 5; round++) {
      const points = scribble(next, 375);
      const [exact, thinned] = [{ k: 0, r: 250, p: points }, makeStroke(0, 250, points)].map(
        (stroke) => coverage([stroke], 512, 512).mask,
      );
      let both = 0;
      let either = 0;
      exact.forEach((inside, i) => {
        both += inside & thinned[i];
        either += inside | thinned[i];
      });
      assert.ok(both / either > 0.9, `${both / either}`);
    }
  });
});

function distance([px, py], [ax, ay, bx, by]) {
  const length2 = (bx - ax) ** 2 + (by - ay) ** 2;
  const t = length2 ? Math.min(1, Math.max(0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / length2)) : 0;
  return Math.hypot(px - ax - t * (bx - ax), py - ay - t * (by - ay));
}

describe("coverage", () => {
  test("is every pixel whose centre is within the radius of the path", () => {
    const next = random(11);
    for (let round = 0; round < 40; round++) {
      const [width, height] = [16 + Math.floor(next() * 40), 16 + Math.floor(next() * 40)];
      const stroke = {
        k: 0,
        r: 200 + next() * 1500,
        p: Array.from({ length: 2 + 2 * Math.floor(next() * 4) }, () => next() * 14000 - 2000),
      };
      const { mask } = coverage([stroke], width, height);
      const radius = (stroke.r / UNIT) * Math.max(width, height);
      for (let i = 0; i < mask.length; i++) {
        const centre = [(i % width) + 0.5, Math.floor(i / width) + 0.5];
        let nearest = Infinity;
        for (let j = 0; j < stroke.p.length; j += 2) {
          const ends = [...stroke.p.slice(Math.max(0, j - 2), Math.max(0, j - 2) + 2), ...stroke.p.slice(j, j + 2)];
          nearest = Math.min(
            nearest,
            distance(
              centre,
              ends.map((value, axis) => (value / UNIT) * (axis % 2 ? height : width)),
            ),
          );
        }
        const reach = Math.max(Math.SQRT1_2, radius);
        if (Math.abs(nearest - reach) > 1e-6)
          assert.equal(mask[i], nearest < reach ? 1 : 0, `pixel ${centre}, ${nearest} of ${reach}`);
      }
    }
  });

  test("erasing takes away what came before it, and nothing after", () => {
    const erased = coverage([line(0, 5000), { ...line(0, 5000), r: 400, e: 1 }], 64, 64);
    assert.equal(erased.mask.includes(1), false);
    const again = coverage([line(0, 5000), { ...line(0, 5000), r: 400, e: 1 }, line(0, 5000)], 64, 64);
    assert.equal(again.mask.includes(1), true);
  });
});

/** tests/test_strokes.py's random_document: the same generator, the same draws. */
function randomDocument(seed) {
  let state = seed + 1;
  const below = (limit) => (state = (state * 16807) % 2147483647) % limit;
  const [images, height, width] = [1 + below(4), 1 + below(72), 1 + below(96)];
  const strokes = Array.from({ length: 1 + below(6) }, () => {
    const stroke = { k: below(images), r: below([60, 60, 400, 2000][below(4)]) / 4, p: [] };
    const values = 2 * (1 + below(5));
    for (let i = 0; i < values; i++) {
      const place = below(8);
      stroke.p.push(place < 2 ? [0, 10_000][place] : below(48_000) / 4 - 1000);
    }
    return below(5) === 0 ? { ...stroke, e: 1 } : stroke;
  });
  return { images, height, width, strokes };
}

test("random documents cover the pixels that Python draws, and conflict where Python refuses them", () => {
  const expected = JSON.parse(readFileSync(new URL("../data/stroke_masks.json", import.meta.url), "utf8"));
  assert.equal(expected.length, 500);
  const found = expected.map((_, seed) => {
    const { images, height, width, strokes } = randomDocument(seed);
    const groups = byImage(strokes);
    const hash = createHash("sha256");
    for (let image = 0; image < images; image++) hash.update(coverage(groups.get(image) ?? [], width, height).mask);
    const { mask, pairs } = findConflicts(strokes, width, height);
    assert.equal(mask !== null, pairs.length > 0);
    return `${hash.digest("hex").slice(0, 12)} ${mask ? mask.filter(Boolean).length : 0}`;
  });
  assert.deepEqual(found, expected);
});

describe("conflicts", () => {
  const down = (k, more = {}) => ({ k, r: 250, p: [5000, 1000, 5000, 9000], ...more });

  test("are the pixels painted for two images, and name both", () => {
    const { mask, pairs } = findConflicts([line(4, 5000), down(1), line(2, 500)], 100, 100);
    assert.deepEqual(pairs, [[1, 4]]);
    assert.equal(mask[50 * 100 + 50], 1);
    assert.equal(mask[50 * 100 + 20], 0);
  });

  test("of one image with itself are none, and erasing one ends them", () => {
    assert.deepEqual(findConflicts([line(0, 5000), down(0)], 100, 100), { mask: null, pairs: [] });
    const erased = findConflicts([line(0, 5000), down(1), { k: 1, r: 600, p: [5000, 5000], e: 1 }], 100, 100);
    assert.deepEqual(erased, { mask: null, pairs: [] });
    const others = findConflicts([line(0, 5000), down(1), { k: 2, r: 600, p: [5000, 5000], e: 1 }], 100, 100);
    assert.deepEqual(others.pairs, [[0, 1]]);
  });

  test("of no strokes are none", () => assert.deepEqual(findConflicts([], 10, 10), { mask: null, pairs: [] }));
});
