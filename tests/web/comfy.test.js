// The editors in ComfyUI's own page, on a real server that really samples; MONTAGE_RENDERER says in which renderer.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { after, before, describe, test } from "node:test";
import { COMFY, buildMontage, drag, launch, message, openComfy, queue, ready } from "./browser.js";
import { testLayout } from "./collage.js";

const modern = process.env.MONTAGE_RENDERER === "modern";
const ACROSS_TOP = [
  [0.1, 0.25],
  [0.9, 0.25],
];
const ACROSS_BOTTOM = [
  [0.1, 0.75],
  [0.9, 0.75],
];
const DOWN = [
  [0.5, 0.1],
  [0.5, 0.9],
];

let browser;
let page;
let faults;
let ids;

before(async () => {
  browser = await launch();
  ({ page, faults } = await openComfy(browser, { modern, theme: modern ? "light" : "dark" }));
});
after(() => browser?.close());

const onNode = (id, action, argument) =>
  page.evaluate(
    ([id, action, argument]) => {
      const find = (graph) =>
        graph.nodes.find((node) => String(node.id) === String(id)) ??
        graph.nodes.map((node) => node.subgraph && find(node.subgraph)).find(Boolean);
      const node = find(window.app.graph.rootGraph ?? window.app.graph);
      const widget = (name) => node.widgets.find((one) => one.name === name);
      return new Function("node", "widget", "argument", `return (${action})`)(node, widget, argument);
    },
    [id, action, argument],
  );

const value = (id = ids.montage) => onNode(id, 'widget("strokes").value');
const strokes = async (id) => JSON.parse((await value(id)) || '{"strokes":[]}').strokes;
const prompt = async (id = ids.montage) => (await page.evaluate(() => window.app.graphToPrompt())).output[id].inputs;

/** The editor of a node on the page, whichever element shows it. */
async function editor(id = ids.montage) {
  const root = (
    await page.evaluateHandle((id) => {
      const { app } = window;
      const graph = app.canvas.graph;
      return graph.getNodeById(id).widgets.find((one) => one.name === "strokes").element;
    }, id)
  ).asElement();
  await page.waitForFunction((root) => root.isConnected && root.getBoundingClientRect().width > 0, root);
  return root;
}

async function paint(points, { image, id } = {}) {
  const root = await editor(id);
  if (image !== undefined) await (await root.$(`.montage-image >> nth=${image}`)).click();
  await drag(page, points, await root.$(".montage-stage > canvas"));
}

const press = async (text, id) => (await (await editor(id)).$(`button:text-is("${text}")`)).click();
const status = async (id) => (await (await editor(id)).$(".montage-status")).textContent();
const shown = async (count, id) =>
  page.waitForFunction(
    ([root, count]) => {
      const picture = root.querySelector(".montage-stage > img");
      return root.querySelectorAll(".montage-image").length === count && picture.complete && picture.naturalWidth > 0;
    },
    [await editor(id), count],
  );

async function succeed() {
  const { outputs, error } = await queue(page);
  assert.equal(error, null);
  return outputs;
}

/** The content of the picture that a preview node shows. */
async function content(outputs, id) {
  const { filename, subfolder, type } = outputs[id].images[0];
  const answer = await page
    .context()
    .request.get(`${COMFY}/view?${new URLSearchParams({ filename, subfolder, type })}`);
  return createHash("sha1")
    .update(await answer.body())
    .digest("hex");
}

/** Takes the keyboard away from the editor, so that keys are the graph's. */
const leave = () => page.evaluate(() => document.activeElement.blur());

const settled = () =>
  page.waitForFunction(
    () =>
      !window.app.configuringGraph &&
      !window.app.extensionManager.workflow.activeWorkflow?.changeTracker?._restoringState,
  );

async function graphUndo(key = "Control+z") {
  await leave();
  await page.keyboard.press(key);
  await settled();
  await page.waitForTimeout(200);
}

const still = () => page.waitForTimeout(250);

/** What part of the graph is shown: [scale, x, y]. */
const view = () => page.evaluate(() => [window.app.canvas.ds.scale, ...window.app.canvas.ds.offset]);

async function show([scale, ...offset]) {
  await page.evaluate(
    ([scale, offset]) => {
      Object.assign(window.app.canvas.ds, { scale, offset });
      window.app.canvas.setDirty(true, true);
    },
    [scale, offset],
  );
  await still();
}

describe(`ComfyUI, ${modern ? "Nodes 2.0" : "classic"}`, () => {
  test("the node shows the images it received", async () => {
    ids = await buildMontage(page);
    const outputs = await succeed();
    await shown(3);
    assert.equal(outputs[ids.montage].montage_images.length, 3);
    assert.equal(await value(), "");
  });

  test("no tooltip covers the editor", async () => {
    const { x, y } = await (await (await editor()).$(".montage-stage")).boundingBox();
    await page.mouse.move(x - 200, y + 40);
    await page.mouse.move(x + 40, y + 40, { steps: 5 });
    await page.waitForTimeout(1500);
    assert.equal(await page.locator('[role="tooltip"]:visible').filter({ hasText: "painted in the node" }).count(), 0);
  });

  test("what the mouse paints reaches the prompt, and changes the labels and the composite", async () => {
    const plain = await succeed();
    await paint(ACROSS_TOP);
    await paint(ACROSS_BOTTOM, { image: 1 });
    const [first, second] = await strokes();
    assert.deepEqual([first.k, second.k], [0, 1]);
    for (const [stroke, y] of [
      [first, 2500],
      [second, 7500],
    ]) {
      assert.ok(Math.abs(stroke.p[0] - 1000) < 60 && Math.abs(stroke.p[1] - y) < 60, `${stroke.p}`);
    }
    assert.equal((await prompt()).strokes, await value());
    const painted = await succeed();
    for (const role of ["labels", "shown"])
      assert.notEqual(await content(painted, ids[role]), await content(plain, ids[role]), role);
    await press("Regions");
    await page.waitForFunction((root) => root.querySelector(".montage-cut > canvas").width > 1, await editor());
    await press("Image");
  });

  test("keys: the editor's undo is its own, and Delete does not reach the node", async () => {
    const before = await value();
    await paint(DOWN, { image: 2 });
    await page.keyboard.press("Delete");
    await page.keyboard.press("Backspace");
    for (const key of ["r", "w", "q", "h", ".", "p"]) await page.keyboard.press(key);
    assert.equal((await strokes()).length, 3);
    const alive = await editor();
    await page.keyboard.press("Control+z");
    assert.equal(await value(), before);
    assert.equal(await alive.evaluate((element) => element.isConnected), true);
    await page.keyboard.press("Control+y");
    assert.equal((await strokes()).length, 3);
  });

  test("a conflict is marked before queueing, Python names the same images, and erasing ends it", async () => {
    assert.match(await status(), /Images 0 and 2, 1 and 2 /);
    const { error } = await queue(page);
    assert.match(error, /images 0 and 2/);
    assert.match(await message(page, "painted for several images"), /^Graph Cut Montage \(node \d+\)/);
    await press("Erase");
    await onNode(
      ids.montage,
      'widget("strokes").element.querySelector("input[type=range]").value = Math.log(600), widget("strokes").element.querySelector("input[type=range]").dispatchEvent(new Event("input"))',
    );
    await paint([[0.5, 0.25]]);
    await paint([[0.5, 0.75]]);
    assert.doesNotMatch(await status(), /Images/);
    assert.equal((await strokes()).filter((stroke) => stroke.e).length, 2);
    await press("Paint");
    await succeed();
  });

  test("the graph's undo brings strokes back, and the editor stays alive", async () => {
    await press("Clear");
    const two = await value();
    assert.equal((await strokes()).length, 2);
    await press("Clear all");
    for (let i = 0; i < 4 && (await value()) !== two; i++) await graphUndo(); // ComfyUI may put an entry of its own on top
    assert.equal(await value(), two);
    await shown(3);
    await paint(DOWN, { image: 2 });
    assert.equal((await strokes()).length, 3);
    assert.equal((await prompt()).strokes, await value());
    await press("Undo");
    assert.equal(await value(), two);
  });

  test("the base: chosen in the editor, on the node, by another node", async () => {
    await (await (await editor()).$(".montage-image >> nth=1")).click();
    await press("Base");
    assert.equal((await prompt()).base, 1);
    assert.equal(JSON.parse((await prompt()).strokes).base, 1);
    await succeed();
    await onNode(ids.montage, 'widget("base").value = 2, widget("base").callback(2)');
    assert.equal(JSON.parse((await prompt()).strokes).base, 2);
    assert.match(await (await (await editor()).$(".montage-image >> nth=2")).textContent(), /base/);
    await succeed();
    const number = await page.evaluate((id) => {
      const { app, LiteGraph } = window;
      const number = LiteGraph.createNode("PrimitiveInt");
      app.graph.add(number);
      number.widgets[0].value = 1;
      const node = app.graph.getNodeById(id);
      number.connect(
        0,
        node,
        node.inputs.findIndex((slot) => slot.name === "base"),
      );
      return number.id;
    }, ids.montage);
    assert.equal("base" in JSON.parse((await prompt()).strokes), false);
    await succeed();
    await page.evaluate((id) => window.app.graph.remove(window.app.graph.getNodeById(id)), number);
    await onNode(ids.montage, 'widget("base").value = 0');
    assert.equal(JSON.parse((await prompt()).strokes).base, 0);
  });

  test("the composite follows the cut's base, and a base of its own that differs is told in the editor", async () => {
    const inject = await page.evaluate(
      () => window.app.graph.nodes.find((node) => node.type === "CompositeAttentionInject").id,
    );
    assert.deepEqual((await prompt(inject)).cut_base, [String(ids.montage), 3]); // wired along with the masks
    const slot = await onNode(inject, 'node.inputs.findIndex(({ name }) => name === "cut_base")');
    await onNode(inject, "node.disconnectInput(argument)", slot);
    await onNode(inject, 'widget("base").value = 1, widget("base").callback(1)');
    await still();
    assert.match(await status(), /has base 1, and here it is 0: connect this node's output base/);
    await onNode(inject, 'widget("base").value = 0, widget("base").callback(0)');
    await still();
    assert.doesNotMatch(await status(), /has base/);
    await page.evaluate(
      ([from, to, slot]) => window.app.graph.getNodeById(from).connect(3, window.app.graph.getNodeById(to), slot),
      [ids.montage, inject, slot],
    );
  });

  test("the editor's own cut is the server's, and the composite comes back into the node", async () => {
    await succeed();
    await press("Regions");
    const root = await editor();
    await page.waitForFunction((root) => root.querySelector(".montage-cut > canvas").width > 1, root);
    const different = await page.evaluate(async (root) => {
      const id = Number(root.closest("[data-node-id]")?.dataset.nodeId) || null;
      const node = window.app.graph.nodes.find(
        (one) => one.id === id || one.widgets?.some(({ element }) => element === root),
      );
      const name = window.app.nodeOutputs[node.id].montage_regions[0];
      const image = new Image();
      image.src = `/api/view?filename=${name}.png&subfolder=montage&type=temp`;
      await image.decode();
      const own = root.querySelector(".montage-cut > canvas");
      const canvas = Object.assign(document.createElement("canvas"), { width: own.width, height: own.height });
      canvas.getContext("2d").drawImage(image, 0, 0, own.width, own.height);
      const [a, b] = [own, canvas].map((one) => one.getContext("2d").getImageData(0, 0, one.width, one.height).data);
      return a.filter((value, i) => Math.abs(value - b[i]) > 2).length;
    }, root);
    assert.equal(different, 0);
    await press("Result");
    await page.waitForFunction((root) => {
      const image = root.querySelector(".montage-result");
      return !image.hidden && image.complete && image.naturalWidth > 0;
    }, root);
    assert.match(await status(), /the composite of the last run/);
    await paint([[0.2, 0.5]], { image: 2 });
    assert.match(await status(), /pasted, not yet composed/);
    await press("Undo");
    assert.match(await status(), /the composite of the last run/);
    await press("Image");
  });

  test("what a workflow saved before an input means is kept, and a new node has the new default", async () => {
    const unmarked = (id = ids.montage) => onNode(id, 'widget("unmarked").value');
    assert.equal(await unmarked(), "auto");
    const saved = await page.evaluate(() => window.app.graph.serialize());
    const { output } = await page.evaluate(() => window.app.graphToPrompt());
    const older = structuredClone(saved);
    const cut = older.nodes.find(({ id }) => String(id) === String(ids.montage));
    cut.widgets_values.pop();
    if (cut.widgets_values_named) delete cut.widgets_values_named.unmarked; // of frontends since 1.58
    await page.evaluate((older) => window.app.loadGraphData(older, true, true, null), older);
    assert.equal(await unmarked(), "as unmarked_is_base");
    delete output[ids.montage].inputs.unmarked;
    await page.evaluate((output) => window.app.loadApiJson(output, "older"), output);
    assert.equal(await unmarked(), "as unmarked_is_base");
    await page.evaluate((saved) => window.app.loadGraphData(saved, true, true, null), saved);
    assert.equal(await unmarked(), "auto");
    await shown(3);
  });

  test("wheel and middle button over the editor zoom and pan as they do beside it", async () => {
    const start = await view();
    const box = await (await (await editor()).$(".montage-stage")).boundingBox();
    const [over, beside] = [
      [box.x + box.width / 2, box.y + box.height / 2],
      [box.x + box.width / 2, 985],
    ];
    const zoomAt = async (place) => {
      await page.mouse.move(...place);
      await page.mouse.wheel(0, -100);
      await still();
      const zoom = (await view())[0] / start[0];
      await show(start);
      return zoom;
    };
    await leave();
    const zooms = [await zoomAt(beside), await zoomAt(over)];
    await press("Paint"); // now the editor has the keyboard
    zooms.push(await zoomAt(over));
    assert.ok(
      zooms.every((zoom) => zoom > 1.01 && Math.abs(zoom - zooms[0]) < 0.01),
      `${zooms}`,
    );
    await page.keyboard.down("Alt");
    assert.equal(await zoomAt(over), 1);
    await page.keyboard.up("Alt");
    const before = await value();
    await page.mouse.move(box.x + 100, box.y + 60);
    await page.mouse.down({ button: "middle" });
    await page.mouse.move(box.x + 140, box.y + 90, { steps: 4 });
    await page.mouse.up({ button: "middle" });
    await still();
    const [, x, y] = await view();
    assert.ok(
      Math.abs((x - start[1]) * start[0] - 40) < 6 && Math.abs((y - start[2]) * start[0] - 30) < 6,
      `${[x - start[1], y - start[2]]}`,
    );
    await show(start);
    assert.equal(await value(), before);
  });

  test("a zoomed graph paints at the same place", async () => {
    const start = await view();
    for (const scale of [0.5, 1.2]) {
      await show([scale, ...start.slice(1)]);
      const { x, y } = await (await editor()).boundingBox();
      await show([scale, start[1] + (400 - x) / scale, start[2] + (120 - y) / scale]);
      await paint(
        [
          [0.2, 0.5],
          [0.4, 0.5],
        ],
        { image: 0 },
      );
      const { p } = (await strokes()).at(-1);
      assert.ok(
        [2000, 5000, 4000, 5000].every((wanted, i) => Math.abs(p[i] - wanted) < 120),
        `${scale}: ${p}`,
      );
      await press("Undo");
    }
    await show(start);
  });

  test("copies carry the strokes and go their own way", async () => {
    const before = await value();
    const copy = await page.evaluate((id) => {
      const { canvas, graph } = window.app;
      canvas.deselectAll();
      canvas.select(graph.getNodeById(id));
      canvas.copyToClipboard();
      canvas.pasteFromClipboard({ position: [700, 900] });
      return graph.nodes.at(-1).id;
    }, ids.montage);
    assert.notEqual(copy, ids.montage);
    assert.equal(await value(copy), before);
    await onNode(copy, 'widget("strokes").value = ""');
    assert.equal(await value(), before);
    const freed = await page.evaluateHandle((id) => {
      const { graph } = window.app;
      const { element } = graph.getNodeById(id).widgets.find((one) => one.name === "strokes");
      graph.remove(graph.getNodeById(id));
      return element;
    }, copy);
    assert.deepEqual(
      await freed.evaluate((element) => [
        element.querySelector("canvas").width,
        element.querySelectorAll("img[src]").length,
      ]),
      [1, 0],
    );
  });

  test("a saved workflow and a reloaded page still have them", async () => {
    const before = await value();
    const saved = await page.evaluate(() => window.app.graph.serialize());
    await buildMontage(page);
    assert.equal(await value(), "");
    await page.evaluate((saved) => window.app.loadGraphData(saved, true, true, null), saved);
    assert.equal(await value(), before);
    await shown(3);
    await page.waitForFunction(
      (text) =>
        Object.values(localStorage)
          .concat(Object.values(sessionStorage))
          .some(
            (draft) =>
              draft.includes(JSON.stringify(text).slice(1, -1)) ||
              draft.includes(JSON.stringify(JSON.stringify(text)).slice(3, -3)),
          ),
      before,
    );
    await page.reload({ waitUntil: "domcontentloaded" });
    await ready(page);
    await page.waitForFunction(
      (id) => window.app.graph.getNodeById(id)?.widgets?.some((one) => one.name === "strokes" && one.value),
      ids.montage,
    );
    assert.equal(await value(), before);
    await shown(3);
    assert.equal(await (await (await editor()).$('button:text-is("Regions")')).isDisabled(), true);
    await succeed(); // all cached, and yet the pictures are sent again
    await page.waitForFunction(
      (root) =>
        [...root.querySelectorAll("button")].some((button) => button.textContent === "Regions" && !button.disabled),
      await editor(),
    );
  });

  test("inside a subgraph: paint, queue, save, load", async () => {
    await page.evaluate((id) => {
      const { canvas, graph } = window.app;
      canvas.deselectAll();
      canvas.select(graph.getNodeById(id));
      const { node } = graph.convertToSubgraph(new Set([graph.getNodeById(id)]));
      canvas.openSubgraph ? canvas.openSubgraph(node.subgraph, node) : canvas.setGraph(node.subgraph);
    }, ids.montage);
    await page.waitForTimeout(500);
    const inner = await page.evaluate(
      () => window.app.canvas.graph.nodes.find((node) => node.type === "GraphCutMontage").id,
    );
    await shown(3, inner);
    const count = (await strokes(inner)).length;
    await paint(
      [
        [0.8, 0.5],
        [0.95, 0.5],
      ],
      { image: 0, id: inner },
    );
    assert.equal((await strokes(inner)).length, count + 1);
    const before = await value(inner);
    const { output } = await page.evaluate(() => window.app.graphToPrompt());
    assert.equal(Object.values(output).find((node) => node.class_type === "GraphCutMontage").inputs.strokes, before);
    await succeed();
    await shown(3, inner);
    const saved = await page.evaluate(() => window.app.rootGraph?.serialize() ?? window.app.graph.serialize());
    await page.evaluate((saved) => window.app.loadGraphData(saved, true, true, null), saved);
    assert.equal(await value(inner), before);
  });

  test("thirty images", async () => {
    ids = await buildMontage(page, { images: 30, side: 64, steps: 1 });
    await succeed();
    await shown(30);
    const began = Date.now();
    await paint(ACROSS_TOP, { image: 29 });
    assert.ok(Date.now() - began < 5000);
    assert.equal((await strokes())[0].k, 29);
    await succeed();
  });

  testLayout({ page: () => page, onNode, settled, still, modern });

  test("R refreshes Load Recording's list", async () => {
    const file = "recordings/new.recording.safetensors [output]";
    await page.route("**/object_info", async (route) => {
      const response = await route.fetch();
      const nodes = await response.json();
      nodes.LoadRecording.input.required.file[1].options = [file];
      await route.fulfill({ response, json: nodes });
    });
    const listed = await page.evaluate(async () => {
      const { app, LiteGraph } = window;
      const node = LiteGraph.createNode("LoadRecording");
      app.graph.add(node);
      await app.refreshComboInNodes();
      const { values } = node.widgets.find(({ name }) => name === "file").options;
      app.graph.remove(node);
      return values;
    });
    await page.unroute("**/object_info");
    assert.deepEqual(listed, [file]);
  });

  test("nothing went wrong in the page", () => assert.deepEqual(faults, []));
});
