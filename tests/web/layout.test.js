// The layout editor on a bare page, driven by mouse, touch, pen and keys as a person would.
import assert from "node:assert/strict";
import { after, before, beforeEach, describe, test } from "node:test";
import { barePage, drag, launch } from "./browser.js";

let browser;
let page;
const faults = [];

before(async () => {
  browser = await launch();
  page = await barePage(browser, { hasTouch: true });
  page.on("pageerror", (error) => faults.push(error.message));
});
after(() => browser?.close());

/** A fresh editor on a canvas of 300x200 with three plain layers: red behind, then green, then blue, which is a ring. */
async function mount({ size = [300, 200], layers = {}, run = true } = {}) {
  await page.evaluate(
    async ({ size: [width, height], layers, run }) => {
      const { LayoutEditor } = await import("/layout.js");
      const { settled } = await import("/layers.js");
      const paint = (colour, hole) => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 60, height: 40 });
        const context = canvas.getContext("2d");
        context.fillStyle = colour;
        context.fillRect(0, 0, 60, 40);
        if (hole) context.clearRect(15, 10, 30, 20);
        return canvas.toDataURL();
      };
      const urls = {
        red: paint("#f00"),
        green: paint("#0f0"),
        blue: paint("#00f", true),
        back: paint("#888"),
        gone: "/gone.png",
      };
      const layer = (id, x, y, more) => ({
        id,
        picture: id,
        width: 60,
        height: 40,
        text: `a ${id} box`,
        fed: [],
        defaults: { x: 0.5, y: 0.5, scale: 0.5, rotation: 0, depth: 0 },
        depths: [-999, 999],
        values: { x, y, scale: 0.3, rotation: 0, depth: 0, ...more?.values },
        ...Object.fromEntries(Object.entries(more ?? {}).filter(([name]) => name !== "values")),
      });
      const rounds = { x: 0.001, y: 0.001, scale: 0.001, rotation: 0.1, depth: 1 };
      Object.assign(window, { commits: [], writes: 0, travels: [], forwarded: [], panning: false });
      window.collage = !run
        ? null
        : {
            width,
            height,
            background: "#808080",
            outdated: false,
            layers: [
              layer("red", 0.3, 0.5, layers.red),
              layer("green", 0.5, 0.5, layers.green),
              layer("blue", 0.75, 0.5, layers.blue),
            ],
          };
      window.editor = new LayoutEditor({
        address: (name) => urls[name],
        node: {
          collage: () => window.collage && structuredClone(window.collage),
          write(id, values) {
            const { values: now, fed } = window.collage.layers.find((one) => one.id === id);
            for (const [name, value] of Object.entries(values))
              if (!fed.includes(name)) now[name] = settled(value, { round: rounds[name] });
            window.writes++;
          },
          commit: () => window.commits.push(structuredClone(window.collage.layers.map((one) => one.values))),
          travel: (direction) => window.travels.push(direction),
          panning: () => window.panning,
          forward: (event) => window.forwarded.push(event.type),
        },
      });
      document.querySelector("#node").replaceChildren(window.editor.element);
    },
    { size, layers, run },
  );
  await page.waitForFunction(() =>
    [...document.styleSheets].some(({ href, cssRules }) => href?.endsWith("/editor.css") && cssRules.length),
  ); // or it moves when that comes
  if (run)
    await page.waitForFunction(() =>
      [...window.editor.pictures.values()].every(({ image, missing }) => missing || image.naturalWidth),
    );
}

const values = (id) => page.evaluate((id) => window.collage.layers.find((one) => one.id === id).values, id);
const chosen = () => page.evaluate(() => window.editor.view.layer);
const commits = () => page.evaluate(() => window.commits.length);
const order = () => page.evaluate(() => window.editor.layers.map((one) => one.id).join(" "));
const status = () => page.locator(".montage-status").textContent();
const row = (text) => page.locator(".montage-layer", { hasText: text });
const press = (text) => page.getByRole("button", { name: text, exact: true }).click();
const near = (actual, expected, slack) =>
  actual.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) <= slack, `${actual} is not ${expected}`));

/** Where a point of the canvas, in fractions, is on the page. */
const onPage = ([x, y]) =>
  page.evaluate(
    async ([x, y]) => {
      const { pictureBox } = await import("/pointer.js");
      const { canvas } = window.editor;
      const { scale, left, top } = pictureBox(canvas);
      return [left + x * canvas.width * scale, top + y * canvas.height * scale];
    },
    [x, y],
  );

/** A handle of the chosen layer in fractions of the canvas: a corner from top left, clockwise, or "turn". */
const handle = (which) =>
  page.evaluate((which) => {
    const { collage } = window.editor;
    const { corners, handle } = window.editor.handles();
    const [x, y] = which === "turn" ? handle : corners[which];
    return [x / collage.width, y / collage.height];
  }, which);

/** The canvas's colour at a place, as "red", "green", "blue", or "" for the background. */
const colour = (x, y) =>
  page.evaluate(
    ([x, y]) => {
      const { canvas } = window.editor;
      const pixel = canvas
        .getContext("2d")
        .getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data;
      return ["red", "green", "blue"].find((_, i) => pixel[i] > 250 && pixel[(i + 1) % 3] < 5) ?? "";
    },
    [x, y],
  );

async function dragFrom(from, to, options = {}) {
  const [start, end] = [await onPage(from), await onPage(to)];
  await page.mouse.move(...start);
  await page.mouse.down();
  for (const key of options.hold ?? []) await page.keyboard.down(key);
  await page.mouse.move(...end, { steps: 4 });
  await options.meanwhile?.();
  await page.mouse.up();
  for (const key of options.hold ?? []) await page.keyboard.up(key);
}

describe("layers on the canvas", () => {
  beforeEach(() => mount());

  test("are drawn where their numbers say, over the background, back to front", async () => {
    assert.deepEqual(
      await Promise.all(
        [
          [0.2, 0.5],
          [0.5, 0.5],
          [0.65, 0.5],
          [0.75, 0.5],
          [0.05, 0.05],
        ].map((at) => colour(...at)),
      ),
      ["red", "green", "blue", "", ""],
    );
    assert.equal(await colour(0.36, 0.5), "green"); // over red
    await page.evaluate(() => {
      window.collage.layers[0].values.depth = 1;
      window.editor.render();
    });
    assert.equal(await colour(0.36, 0.5), "red");
    await page.evaluate(() => {
      Object.assign(window.collage.layers[0].values, { x: 0.1, y: 0.1, scale: 0.1, rotation: 90 });
      window.editor.render();
    });
    assert.equal(await colour(0.1, 0.1), "red");
    assert.equal(await colour(0.14, 0.1), ""); // upright now
    assert.equal(await colour(0.1, 0.16), "red");
  });

  test("a drag moves one, and is one change; on the way the numbers follow and nothing is committed", async () => {
    await dragFrom([0.2, 0.5], [0.3, 0.7], {
      meanwhile: async () => {
        await page.waitForFunction(() => window.writes > 0);
        assert.equal(await commits(), 0);
      },
    });
    assert.equal(await chosen(), "red");
    const { x, y, ...others } = await values("red");
    near([x, y], [0.4, 0.7], 0.004);
    assert.deepEqual(
      [x, y],
      [x, y].map((value) => Number(value.toFixed(3))),
    );
    assert.deepEqual(others, { scale: 0.3, rotation: 0, depth: 0 });
    assert.equal(await commits(), 1);
    assert.match(await status(), new RegExp(`x ${x}, y ${y}, scale 0.3`));
  });

  test("shift keeps a move on its axis", async () => {
    await dragFrom([0.2, 0.5], [0.4, 0.55], { hold: ["Shift"] });
    const { x, y } = await values("red");
    near([x, y], [0.5, 0.5], 0.004);
    assert.equal(y, 0.5);
  });

  test("a click chooses what is seen there: the front one, by its alpha; beside all, none; and changes nothing", async () => {
    for (const [at, id] of [
      [[0.2, 0.5], "red"],
      [[0.36, 0.5], "green"],
      [[0.65, 0.5], "blue"],
      [[0.98, 0.02], null],
      [[0.75, 0.5], null],
    ]) {
      await page.mouse.click(...(await onPage(at)));
      assert.equal(await chosen(), id);
    }
    assert.equal(await commits(), 0);
  });

  test("the chosen one is held by its transparent middle too, and with Alt under others", async () => {
    await row("blue").click();
    await dragFrom([0.75, 0.5], [0.75, 0.6]);
    near([(await values("blue")).y], [0.6], 0.004);
    await row("red").click();
    await dragFrom([0.36, 0.5], [0.36, 0.6], { hold: [] });
    assert.equal(await chosen(), "green");
    await row("red").click();
    await page.keyboard.down("Alt");
    await dragFrom([0.36, 0.5], [0.36, 0.4]);
    await page.keyboard.up("Alt");
    near([(await values("red")).y], [0.4], 0.004);
  });

  test("corners scale around the centre, and stay under the pointer", async () => {
    await row("green").click();
    await dragFrom(await handle(2), [0.8, 0.8]);
    const { x, y, scale } = await values("green");
    assert.deepEqual([x, y], [0.5, 0.5]);
    near([scale], [0.6], 0.01); // of 300x200: half sides 90 and 60
    near(await handle(2), [0.8, 0.8], 0.01);
    assert.equal(await commits(), 1);
  });

  test("the handle above turns, in steps of 15 degrees with shift", async () => {
    await row("green").click();
    const [x, y] = await handle("turn");
    assert.ok(x > 0.499 && x < 0.501 && y < 0.35);
    await dragFrom([x, y], [0.7, 0.5]);
    near([(await values("green")).rotation], [90], 0.5);
    await dragFrom(await handle("turn"), [0.7, 0.55], { hold: ["Shift"] });
    assert.equal((await values("green")).rotation, 105);
    assert.equal(await commits(), 2);
  });

  test("handles of a layer beyond the canvas stay in reach", async () => {
    await mount({ layers: { green: { values: { scale: 3 } } } });
    await row("green").click();
    const stage = await page.locator(".montage-stage").boundingBox();
    for (const which of [0, 1, 2, 3, "turn"]) {
      const [x, y] = await onPage(await handle(which));
      assert.ok(x > stage.x && x < stage.x + stage.width && y > stage.y && y < stage.y + stage.height);
    }
    const from = await handle(2);
    await dragFrom(
      from,
      from.map((value) => 0.5 + (value - 0.5) / 2),
    );
    near([(await values("green")).scale], [1.5], 0.02);
  });

  test("a tiny layer can still be moved between its handles", async () => {
    await mount({ layers: { green: { values: { scale: 0.01 } } } });
    await row("green").click();
    await dragFrom([0.5, 0.5], [0.6, 0.5]);
    near([(await values("green")).x], [0.6], 0.01);
  });

  test("a double-click and the button put a layer back", async () => {
    await dragFrom([0.2, 0.5], [0.2, 0.7]);
    await page.mouse.dblclick(...(await onPage([0.2, 0.7])));
    assert.deepEqual(await values("red"), { x: 0.5, y: 0.5, scale: 0.5, rotation: 0, depth: 0 });
    await row("blue").click();
    await press("Reset");
    assert.deepEqual(await values("blue"), { x: 0.5, y: 0.5, scale: 0.5, rotation: 0, depth: 0 });
    assert.equal(await commits(), 3);
  });

  test("Escape takes a drag back, and then gives the keyboard back", async () => {
    await dragFrom([0.2, 0.5], [0.4, 0.7], { meanwhile: () => page.keyboard.press("Escape") });
    assert.deepEqual(await values("red"), { x: 0.3, y: 0.5, scale: 0.3, rotation: 0, depth: 0 });
    assert.equal(await commits(), 0);
    await page.keyboard.press("Escape");
    assert.equal(await page.evaluate(() => document.activeElement.tagName), "BODY");
  });

  test("is where the pointer is, at any size, density and zoom", async () => {
    const first = page;
    page = await barePage(browser, { deviceScaleFactor: 1.5, viewport: { width: 1000, height: 1100 } });
    try {
      for (const [size, zoom] of [
        [[96, 400], 0.5],
        [[2000, 1000], 1.7],
      ]) {
        await page.evaluate(
          (zoom) =>
            Object.assign(document.querySelector("#node").style, {
              transform: `scale(${zoom})`,
              transformOrigin: "0 0",
            }),
          zoom,
        );
        await mount({ size });
        await dragFrom([0.5, 0.5], [0.6, 0.75]);
        near(Object.values(await values("green")).slice(0, 2), [0.6, 0.75], 0.02);
        await dragFrom(await handle("turn"), [0.6, 0.95]);
        near([Math.abs((await values("green")).rotation)], [180], 3); // just beyond is -180
      }
    } finally {
      await page.close();
      page = first;
    }
  });

  test("values that other nodes feed are shown and stay", async () => {
    await mount({ layers: { green: { fed: ["x", "rotation"] } } });
    await dragFrom([0.5, 0.5], [0.6, 0.6]);
    const { x, y } = await values("green");
    assert.equal(x, 0.5);
    near([y], [0.6], 0.004);
    assert.match(await status(), /Set by other nodes, so it can only be changed there: x, rotation/);
    assert.equal(await page.evaluate(() => window.editor.handles().handle), null);
    await mount({ layers: { green: { fed: ["scale"] } } });
    await row("green").click();
    assert.deepEqual(await page.evaluate(() => window.editor.handles().corners), []);
  });

  test("twenty layers follow the pointer quickly", async () => {
    const took = await page.evaluate(() => {
      const [one] = window.collage.layers;
      window.collage.layers = Array.from({ length: 20 }, (_, i) => ({
        ...structuredClone(one),
        id: `layer${i}`,
        picture: ["red", "green", "blue"][i % 3],
      }));
      window.editor.render();
      const start = performance.now();
      for (let i = 0; i < 10; i++) {
        window.collage.layers[7].values.rotation = i;
        window.editor.render();
      }
      window.editor.canvas.getContext("2d").getImageData(0, 0, 1, 1);
      return (performance.now() - start) / 10;
    });
    assert.equal(await page.locator(".montage-layer").count(), 20);
    assert.ok(took < 150, `${took} ms`); // without a graphics card, on a shared core
  });
});

describe("touch and pen", () => {
  beforeEach(() => mount());

  let client;
  const touch = async (type, points) => {
    client ??= await page.context().newCDPSession(page);
    await client.send("Input.dispatchTouchEvent", { type, touchPoints: points.map(([x, y], id) => ({ x, y, id })) });
  };

  test("a finger moves a layer, and its grip in the list reorders it", async () => {
    const [x, y] = await onPage([0.2, 0.5]);
    await touch("touchStart", [[x, y]]);
    for (let by = 10; by <= 40; by += 10) await touch("touchMove", [[x, y + by]]);
    await touch("touchEnd", []);
    assert.ok((await values("red")).y > 0.55);
    assert.equal(await commits(), 1);
    const grip = await row("red").locator(".montage-grip").boundingBox();
    const goal = await row("blue").boundingBox();
    await touch("touchStart", [[grip.x + 5, grip.y + 10]]);
    for (const part of [0.3, 0.6, 1])
      await touch("touchMove", [[grip.x + 5, grip.y + 10 + part * (goal.y + 2 - grip.y - 10)]]);
    await touch("touchEnd", []);
    assert.equal(await order(), "green blue red");
  });

  test("a second finger ends it, and nothing is changed", async () => {
    const [x, y] = await onPage([0.2, 0.5]);
    await touch("touchStart", [[x, y]]);
    await touch("touchMove", [[x + 40, y]]);
    await touch("touchStart", [
      [x + 40, y],
      [x + 90, y],
    ]);
    await touch("touchMove", [
      [x, y],
      [x + 120, y],
    ]);
    await touch("touchEnd", []);
    assert.equal((await values("red")).x, 0.3);
    assert.equal(await commits(), 0);
  });

  test("a pen turns by the handle", async () => {
    await row("green").click();
    const [from, to] = [await onPage(await handle("turn")), await onPage([0.7, 0.5])];
    await page.evaluate(
      ([from, to]) => {
        const { stage } = window.editor;
        stage.setPointerCapture = () => {}; // an invented pointer cannot be captured
        for (const [type, [clientX, clientY], button, buttons] of [
          ["pointerdown", from, 0, 1],
          ["pointermove", to, -1, 1],
          ["pointerup", to, 0, 0],
        ]) {
          stage.dispatchEvent(
            new PointerEvent(type, {
              pointerId: 9,
              pointerType: "pen",
              clientX,
              clientY,
              button,
              buttons,
              bubbles: true,
              cancelable: true,
            }),
          );
        }
      },
      [from, to],
    );
    near([(await values("green")).rotation], [90], 0.5);
  });
});

describe("the list", () => {
  beforeEach(() => mount());

  test("shows the layers front to back, and chooses", async () => {
    assert.deepEqual(await page.locator(".montage-text").allTextContents(), ["a blue box", "a green box", "a red box"]);
    await row("green").click();
    assert.equal(await chosen(), "green");
    assert.equal(await row("green").getAttribute("aria-selected"), "true");
  });

  test("names its numbers, and fades at its end while more is below", async () => {
    assert.match(await row("green").innerText(), /depth 0$/);
    const fades = () => page.locator(".montage-layers").evaluate((list) => list.classList.contains("more"));
    assert.equal(await fades(), false);
    await page.evaluate(() => {
      const [one] = window.collage.layers;
      window.collage.layers = Array.from({ length: 12 }, (_, i) => ({ ...structuredClone(one), id: `layer${i}` }));
      window.editor.render();
    });
    assert.equal(await fades(), true);
    await page.locator(".montage-layers").evaluate((list) => list.scrollTo(0, list.scrollHeight));
    await page.waitForFunction(() => !document.querySelector(".montage-layers").classList.contains("more"));
  });

  test("reorders by drag, by button and by key", async () => {
    const rowDrag = async (from, to, part) => {
      const [a, b] = [await row(from).boundingBox(), await row(to).boundingBox()];
      await page.mouse.move(a.x + 80, a.y + a.height / 2);
      await page.mouse.down();
      await page.mouse.move(b.x + 80, b.y + b.height * part, { steps: 4 });
      await page.mouse.up();
    };
    await rowDrag("red", "blue", 0.2);
    assert.equal(await order(), "green blue red");
    await rowDrag("red", "blue", 0.8);
    assert.equal(await order(), "green red blue");
    await rowDrag("blue", "green", 0.9);
    assert.equal(await order(), "blue green red");
    assert.equal(await commits(), 3);
    await rowDrag("blue", "blue", 0.9);
    assert.equal(await commits(), 3);
    await press("Forward");
    assert.equal(await order(), "green blue red");
    await page.keyboard.press("]");
    assert.equal(await order(), "green red blue");
    await page.keyboard.press("PageDown");
    await press("Back");
    assert.equal(await order(), "blue green red");
    assert.equal(await page.getByRole("button", { name: "Back", exact: true }).isDisabled(), true);
    assert.equal(await commits(), 7);
    assert.equal(await page.locator(".above, .below").count(), 0);
  });

  test("an order against fed depths is refused with the reason", async () => {
    await mount({ layers: { blue: { fed: ["depth"], values: { depth: 999 } }, green: { fed: ["depth"] } } });
    await row("blue").click();
    await press("Back");
    assert.match(await status(), /those are set by other nodes/);
    assert.equal(await commits(), 0);
    await row("red").click();
    await press("Forward");
    assert.equal(await order(), "green red blue");
    assert.doesNotMatch(await status(), /depths that come/);
  });
});

describe("keys, wheel and the graph", () => {
  beforeEach(() => mount());

  test("arrows move by pixels of the canvas, and a key that is held is one change", async () => {
    await row("green").click();
    await page.keyboard.press("ArrowRight");
    near([(await values("green")).x], [0.5 + 1 / 300], 0.0006);
    await page.keyboard.press("Shift+ArrowUp");
    near([(await values("green")).y], [0.45], 0.0006);
    assert.equal(await commits(), 2);
    for (let i = 0; i < 5; i++) await page.keyboard.down("ArrowLeft");
    assert.equal(await commits(), 2);
    await page.keyboard.up("ArrowLeft");
    assert.equal(await commits(), 3);
  });

  test("Tab goes through the layers, Ctrl+Z and Ctrl+Y through the graph's history", async () => {
    await page.locator(".montage-stage").click({ position: { x: 5, y: 5 } });
    for (const [key, id] of [
      ["Tab", "blue"],
      ["Tab", "green"],
      ["Tab", "red"],
      ["Tab", "blue"],
      ["Shift+Tab", "red"],
    ]) {
      await page.keyboard.press(key);
      assert.equal(await chosen(), id);
    }
    for (const key of ["Control+z", "Control+Shift+z", "Control+y"]) await page.keyboard.press(key);
    assert.deepEqual(await page.evaluate(() => window.travels), ["undo", "redo", "redo"]);
  });

  test("the wheel and the middle button are the graph's, and the left one while it pans", async () => {
    await page.mouse.move(...(await onPage([0.2, 0.5])));
    await page.mouse.wheel(0, 100);
    await page.mouse.down({ button: "middle" });
    await page.mouse.move(...(await onPage([0.4, 0.5])));
    await page.mouse.up({ button: "middle" });
    await page.evaluate(() => (window.panning = true));
    await dragFrom([0.2, 0.5], [0.4, 0.7]);
    const forwarded = await page.evaluate(() => window.forwarded);
    assert.equal(forwarded[0], "wheel");
    assert.equal(forwarded.filter((type) => type === "pointerdown").length, 2);
    assert.equal((await values("red")).x, 0.3);
    assert.equal(await commits(), 0);
  });

  test("keys that are not the editor's pass through", async () => {
    await page.evaluate(() => {
      window.heard = [];
      window.addEventListener("keydown", (event) => window.heard.push(event.key));
    });
    await row("green").click();
    for (const key of ["[", "ArrowLeft", "q", "Control+Enter"]) await page.keyboard.press(key);
    assert.deepEqual(await page.evaluate(() => window.heard), ["q", "Control", "Enter"]);
  });
});

describe("what is not as it should be", () => {
  test("before the first run there is a sentence, and nothing to hold", async () => {
    await mount({ run: false });
    assert.match(await page.locator(".montage-hint").textContent(), /run once/i);
    await drag(page, [
      [0.2, 0.2],
      [0.8, 0.8],
    ]);
    for (const key of ["Tab", "ArrowLeft", "[", "Escape"]) await page.keyboard.press(key);
    await page.evaluate(() => window.editor.element.dispatchEvent(new KeyboardEvent("keyup")));
  });

  test("layers that changed since the run ask for another", async () => {
    await mount();
    await page.evaluate(() => {
      window.collage.outdated = true;
      window.collage.layers.pop();
      window.editor.render();
    });
    assert.match(await status(), /run again/);
    assert.equal(await page.locator(".montage-layer").count(), 2);
  });

  test("a picture that the server has lost says so, and the others can be moved", async () => {
    await mount({ layers: { blue: { picture: "gone" } } });
    await page.waitForFunction(() => window.editor.pictures.get("gone").missing);
    assert.match(await status(), /no longer has/);
    await dragFrom([0.2, 0.5], [0.2, 0.7]);
    assert.equal(await commits(), 1);
  });

  test("a picture as background covers the canvas", async () => {
    await mount({ size: [200, 200] });
    await page.evaluate(() => {
      window.collage.background = "red";
      window.collage.layers = window.collage.layers.slice(1, 2);
      window.editor.render();
    });
    await page.waitForFunction(() => window.editor.pictures.get("red").image.naturalWidth);
    for (const at of [
      [0.01, 0.01],
      [0.99, 0.99],
    ])
      assert.equal(await colour(...at), "red");
  });

  test("a released editor holds no pixels, and comes back", async () => {
    await mount();
    await page.evaluate(() => (window.editor.release(), window.editor.render()));
    assert.deepEqual(
      await page.evaluate(() => [
        window.editor.canvas.width,
        window.editor.pictures.size,
        window.editor.element.querySelectorAll("img").length,
      ]),
      [1, 0, 0],
    );
    await page.evaluate(() => window.editor.resume());
    await page.waitForFunction(() => window.editor.pictures.get("red")?.image.naturalWidth);
    assert.equal(await colour(0.2, 0.5), "red");
  });

  test("nothing threw", () => assert.deepEqual(faults, []));
});
