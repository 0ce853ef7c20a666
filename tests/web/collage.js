// The layout editor in ComfyUI's own page; comfy.test.js runs these tests in its page.
import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { COMFY, drag, queue, ready } from "./browser.js";

const EMPTY = {
  version: 0.4,
  last_node_id: 0,
  last_link_id: 0,
  nodes: [],
  links: [],
  groups: [],
  config: {},
  extra: {},
};

/** Builds a collage of plain boxes on a canvas of 384x256. Returns {canvas, image, layers: [ids, back to front]}. */
function buildCollage(page) {
  return page.evaluate(async (empty) => {
    const { app, LiteGraph } = window;
    await app.loadGraphData(empty, true, true, null);
    const add = (type, pos, values = {}) => {
      const node = LiteGraph.createNode(type);
      node.pos = pos;
      app.graph.add(node);
      for (const [name, value] of Object.entries(values))
        node.widgets.find((widget) => widget.name === name).value = value;
      return node;
    };
    const wire = (from, output, to, input) =>
      from.connect(
        output,
        to,
        to.inputs.findIndex((slot) => slot.name === input),
      );
    const layers = [
      ["a red bar", { width: 120, height: 40, color: 0xff0000 }, { x: 0.3, y: 0.3, scale: 0.4, rotation: 20 }],
      ["a green box", { width: 64, height: 64, color: 0x00ff00 }, { x: 0.5, y: 0.5, scale: 0.3 }],
      ["a blue post", { width: 40, height: 96, color: 0x0000ff }, { x: 0.8, y: 0.6, scale: 0.5 }],
    ].map(([text, picture, place], i) => {
      const layer = add("CollageLayer", [330, 60 + i * 560], { text, ...place });
      wire(add("EmptyImage", [20, 60 + i * 560], picture), 0, layer, "image");
      return layer;
    });
    layers.slice(1).forEach((layer, i) => wire(layers[i], 0, layer, "collage"));
    const canvas = add("CollageCanvas", [680, 60], { width: 384, height: 256 });
    wire(layers.at(-1), 0, canvas, "collage");
    const image = add("PreviewImage", [1120, 60]);
    wire(canvas, 1, image, "images");
    Object.assign(app.canvas.ds, { scale: 0.8, offset: [-100, 20] });
    app.graph.setDirtyCanvas(true, true);
    return { canvas: canvas.id, image: image.id, layers: layers.map((layer) => layer.id) };
  }, EMPTY);
}

/** comfy: what comfy.test.js has at hand, {page(), onNode, graphUndo, still, modern}. */
export function testLayout(comfy) {
  const { onNode, still, modern } = comfy;
  let ids;

  const editor = async (id = ids.canvas) => {
    const root = (
      await comfy
        .page()
        .evaluateHandle(
          (id) => window.app.canvas.graph.getNodeById(id).widgets.find((one) => one.name === "layout").element,
          id,
        )
    ).asElement();
    await comfy.page().waitForFunction((root) => root.isConnected && root.getBoundingClientRect().width > 0, root);
    return root;
  };
  const stage = async (id) => (await editor(id)).$(".montage-stage > canvas");
  const row = async (text, id) => (await editor(id)).$(`.montage-layer:has-text("${text}")`);
  const status = async (id) => (await (await editor(id)).$(".montage-status")).textContent();
  const texts = async (id) => (await editor(id)).$$eval(".montage-text", (rows) => rows.map((one) => one.textContent));
  const shown = (count, id = ids.canvas) =>
    comfy.page().waitForFunction(
      ([id, count]) => {
        const root = window.app.canvas.graph?.getNodeById(id)?.widgets?.find((one) => one.name === "layout")?.element;
        const images = [...(root?.querySelectorAll(".montage-layer img") ?? [])];
        return images.length === count && images.every((image) => image.complete && image.naturalWidth > 0);
      },
      [id, count],
    );
  const values = (id) =>
    onNode(
      id,
      'Object.fromEntries(["x", "y", "scale", "rotation", "depth"].map((name) => [name, widget(name).value]))',
    );
  const undoSteps = () =>
    comfy.page().evaluate(() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length);
  const near = (actual, expected, slack = 0.01) =>
    actual.forEach((value, i) => assert.ok(Math.abs(value - expected[i]) <= slack, `${actual} is not ${expected}`));

  /** The chosen layer's handles in fractions of the canvas: corners from top left, clockwise, and the one that turns. */
  const handles = async () =>
    (await editor()).$eval(".montage-frame", (svg) => {
      const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
      return svg
        .querySelector(".inner")
        .getAttribute("d")
        .split("M")
        .slice(1)
        .map((part) => part.split(",").map(parseFloat))
        .map(([x, y]) => [x / width, y / height]);
    });

  /** The editor's picture, and how far it is from the node's own composite on average, of 255. */
  async function difference(outputs) {
    const { filename, subfolder, type } = outputs[ids.image].images[0];
    return (await stage()).evaluate(
      async (canvas, url) => {
        const image = new Image();
        image.src = url;
        await image.decode();
        const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
        copy.getContext("2d").drawImage(image, 0, 0);
        const [here, there] = [canvas, copy].map(
          (one) => one.getContext("2d").getImageData(0, 0, one.width, one.height).data,
        );
        return here.reduce((sum, value, i) => sum + Math.abs(value - there[i]), 0) / here.length;
      },
      `${COMFY}/view?${new URLSearchParams({ filename, subfolder, type })}`,
    );
  }

  /** Connects a number to a value of a layer. Returns the id of the node that gives it. */
  const feed = (id, name, value) =>
    comfy.page().evaluate(
      ([id, name, value]) => {
        const { app, LiteGraph } = window;
        const number = LiteGraph.createNode("PrimitiveFloat");
        app.graph.add(number);
        number.widgets[0].value = value;
        const node = app.graph.getNodeById(id);
        number.connect(
          0,
          node,
          node.inputs.findIndex((slot) => slot.name === name),
        );
        return number.id;
      },
      [id, name, value],
    );

  async function succeed() {
    const { outputs, error } = await queue(comfy.page());
    assert.equal(error, null);
    return outputs;
  }

  describe("a collage", () => {
    test("asks for a run, and then shows its layers as the node composites them", async () => {
      ids = await buildCollage(comfy.page());
      assert.match(await (await editor()).textContent(), /run once/i);
      const outputs = await succeed();
      await shown(3);
      assert.deepEqual(await texts(), ["a blue post", "a green box", "a red bar"]);
      assert.ok((await difference(outputs)) < 2);
      const { workflow, output } = await comfy.page().evaluate(() => window.app.graphToPrompt());
      assert.equal("layout" in output[ids.canvas].inputs, false);
      assert.deepEqual(workflow.nodes.find((node) => node.type === "CollageCanvas").widgets_values, [
        384,
        256,
        "",
        "#969696",
        0.8,
        10,
      ]);
    });

    test("moved, scaled, turned and reordered, the numbers follow: one step of undo each, and the node agrees", async () => {
      const [red, green] = ids.layers;
      const steps = [await undoSteps()];
      const act = async (action) => {
        await action();
        await still();
        steps.push(await undoSteps());
      };
      await act(async () =>
        drag(
          comfy.page(),
          [
            [0.45, 0.5],
            [0.55, 0.6],
          ],
          await stage(),
        ),
      );
      near(Object.values(await values(green)).slice(0, 2), [0.6, 0.6]);
      await act(async () => drag(comfy.page(), [(await handles())[2], [0.8, 0.9]], await stage()));
      near([(await values(green)).scale], [0.6], 0.02);
      await act(async () => drag(comfy.page(), [(await handles())[4], [0.9, 0.6]], await stage()));
      near([(await values(green)).rotation], [90], 1);
      await (await row("red")).click();
      await act(() => comfy.page().keyboard.press("]"));
      assert.deepEqual(await texts(), ["a blue post", "a red bar", "a green box"]);
      await act(() => comfy.page().keyboard.press("ArrowRight"));
      near([(await values(red)).x], [0.303], 1e-6);
      assert.deepEqual(
        steps,
        steps.map((_, i) => steps[0] + i),
      );
      const { output } = await comfy.page().evaluate(() => window.app.graphToPrompt());
      for (const id of ids.layers)
        for (const [name, value] of Object.entries(await values(id))) assert.equal(output[id].inputs[name], value);
      const outputs = await succeed();
      await shown(3);
      assert.ok((await difference(outputs)) < 2);
    });

    test("a taller node is for the picture, and not for the prompt's box", async () => {
      const heights = async () => {
        const { height } = await (await (await editor()).$(".montage-stage")).boundingBox();
        const box = modern ? `[data-node-id="${ids.canvas}"] textarea` : "textarea";
        return [
          height,
          ...(await comfy
            .page()
            .locator(box)
            .evaluateAll((all) => all.map((one) => one.offsetHeight))),
        ];
      };
      const before = await heights();
      await onNode(ids.canvas, "node.setSize([node.size[0], node.size[1] + 200]), node.setDirtyCanvas(true, true)");
      await still();
      const after = await heights();
      await onNode(ids.canvas, "node.setSize([node.size[0], node.size[1] - 200]), node.setDirtyCanvas(true, true)");
      assert.ok(after[0] > before[0] + 100, `${before}, then ${after}`);
      assert.deepEqual(after.slice(1), before.slice(1));
    });

    test("a number that is typed shows at once", async () => {
      const [, , blue] = ids.layers;
      await (await row("blue")).click();
      const before = await handles();
      if (modern) {
        const input = comfy.page().locator(`[data-node-id="${blue}"] input`).first();
        await input.fill("0.5");
        await input.press("Enter");
      } else await onNode(blue, 'widget("x").setValue(0.5, { e: null, node, canvas: window.app.canvas })'); // as its dialog does
      await still();
      const after = await handles();
      near(after[0], [before[0][0] - 0.3, before[0][1]]);
      assert.match(await status(), /x 0.5,/);
      await onNode(ids.canvas, 'widget("width").value = 256, widget("width").callback(256)');
      await still();
      assert.deepEqual(await (await stage()).evaluate((canvas) => [canvas.width, canvas.height]), [256, 256]);
      await onNode(ids.canvas, 'widget("width").value = 384, widget("width").callback(384)');
    });

    test("Ctrl+Z in the editor is the graph's undo, after which it is alive and has the keyboard", async () => {
      const [, green] = ids.layers;
      const before = await values(green);
      await (await row("green")).click();
      await comfy.page().keyboard.press("Shift+ArrowUp");
      await still();
      const raised = await values(green);
      assert.ok(raised.y < before.y);
      for (let i = 0; i < 5 && (await values(green)).y !== before.y; i++) {
        await comfy.page().keyboard.press("Control+z");
        await comfy.settled();
        await comfy.page().waitForFunction(
          (id) =>
            window.app.canvas.graph
              .getNodeById(id)
              .widgets.find((one) => one.name === "layout")
              .element.contains(document.activeElement),
          ids.canvas,
        );
      }
      assert.deepEqual(await values(green), before);
      await shown(3);
      assert.equal(await (await row("green")).getAttribute("aria-selected"), "true");
      await comfy.page().keyboard.press("Control+y");
      await comfy.settled();
      await still();
      assert.ok((await values(green)).y < before.y);
      await drag(
        comfy.page(),
        [
          [0.6, 0.6],
          [0.5, 0.5],
        ],
        await stage(),
      );
      assert.notEqual((await values(green)).y, raised.y);
      assert.ok((await difference(await succeed())) < 2);
    });

    test("a value that another node feeds is shown and stays", async () => {
      const number = await feed(ids.layers[1], "x", 0.25);
      await (await row("green")).click();
      await still();
      assert.match(await status(), /x 0.25,.* Set by other nodes, so it can only be changed there: x\./);
      await comfy.page().keyboard.press("ArrowRight");
      await comfy.page().keyboard.press("ArrowDown");
      assert.match(await status(), /x 0.25,/);
      assert.equal((await comfy.page().evaluate(() => window.app.graphToPrompt())).output[number].inputs.value, 0.25);
      await comfy.page().evaluate((id) => window.app.graph.remove(window.app.graph.getNodeById(id)), number);
      await still();
      assert.doesNotMatch(await status(), /From other nodes/);
    });

    test("a layer that is added asks for another run", async () => {
      const added = await comfy.page().evaluate(
        ([canvasId, last]) => {
          const { app, LiteGraph } = window;
          const [image, layer] = ["EmptyImage", "CollageLayer"].map((type) => LiteGraph.createNode(type));
          for (const node of [image, layer]) app.graph.add(node);
          const slot = (node, name) => node.inputs.findIndex((input) => input.name === name);
          image.connect(0, layer, slot(layer, "image"));
          app.graph.getNodeById(last).connect(0, layer, slot(layer, "collage"));
          const canvas = app.graph.getNodeById(canvasId);
          layer.connect(0, canvas, slot(canvas, "collage"));
          layer.widgets.find((widget) => widget.name === "text").value = "a black box";
          return [image.id, layer.id];
        },
        [ids.canvas, ids.layers.at(-1)],
      );
      await still();
      assert.match(await status(), /run again/);
      await shown(3);
      await succeed();
      await shown(4);
      assert.doesNotMatch(await status(), /run again/);
      await onNode(added[1], "node.mode = 4"); // bypassed
      await (await row("black")).click();
      assert.match(await status(), /run again/);
      await comfy
        .page()
        .evaluate((added) => added.forEach((id) => window.app.graph.remove(window.app.graph.getNodeById(id))), added);
      await still();
      assert.deepEqual(await texts(), []); // nothing is connected
      await comfy.page().evaluate(
        ([canvasId, last]) => {
          const { graph } = window.app;
          graph.getNodeById(last).connect(0, graph.getNodeById(canvasId), 0);
        },
        [ids.canvas, ids.layers.at(-1)],
      );
      await shown(3);
    });

    test("a copy asks for its own run, and frees its pixels when it is removed", async () => {
      const copy = await comfy.page().evaluate((id) => {
        const { canvas, graph } = window.app;
        canvas.deselectAll();
        canvas.select(graph.getNodeById(id));
        canvas.copyToClipboard();
        canvas.pasteFromClipboard({ position: [1120, 500] });
        return graph.nodes.at(-1).id;
      }, ids.canvas);
      assert.match(await (await editor(copy)).textContent(), /run once/i);
      const freed = await comfy.page().evaluateHandle((id) => {
        const { graph } = window.app;
        const { element } = graph.getNodeById(id).widgets.find((one) => one.name === "layout");
        graph.remove(graph.getNodeById(id));
        return element;
      }, copy);
      assert.deepEqual(
        await freed.evaluate((element) => [
          element.querySelector("canvas").width,
          element.querySelectorAll("img").length,
        ]),
        [1, 0],
      );
      await shown(3);
    });

    test("another tab and back still shows it", async () => {
      const before = await values(ids.layers[1]);
      await comfy.page().evaluate((empty) => window.app.loadGraphData(empty, true, true, null), EMPTY);
      await comfy
        .page()
        .evaluate(() => window.app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow"));
      await shown(3);
      assert.deepEqual(await values(ids.layers[1]), before);
    });

    test(
      "a reload of the page still shows it",
      { skip: modern && "costs seconds, and is the same in both renderers" },
      async () => {
        const before = await values(ids.layers[1]);
        await comfy.page().waitForTimeout(1000); // until the draft is kept
        await comfy.page().reload({ waitUntil: "domcontentloaded" });
        await ready(comfy.page());
        await shown(3);
        assert.deepEqual(await values(ids.layers[1]), before);
      },
    );

    test("dropped pictures are layers at once, wired and cut out; copied, mirrored and deleted; one step of undo each", async () => {
      const page = comfy.page();
      const root = await editor();
      const before = await texts();
      const oneStep = async (act) => {
        await still(); // a run may have resized Load Image, which is a step of its own
        const steps = await undoSteps();
        await act();
        assert.equal(await undoSteps(), steps + 1);
      };
      const press = async (text) => (await (await editor()).$(`button:text-is("${text}")`)).click();
      const nodes = () => page.evaluate(() => window.app.graph.nodes.length);
      const began = await nodes();
      await oneStep(async () => {
        await root.evaluate(async (root) => {
          const picture = Object.assign(document.createElement("canvas"), { width: 80, height: 60 });
          const pen = picture.getContext("2d");
          pen.fillStyle = "#ff8000";
          pen.fillRect(20, 20, 40, 20);
          const blob = await new Promise((resolve) => picture.toBlob(resolve));
          const data = new DataTransfer();
          data.items.add(new File([blob], "orange.png", { type: "image/png" }));
          const box = root.querySelector(".montage-stage > canvas").getBoundingClientRect();
          const place = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
          root
            .querySelector(".montage-stage")
            .dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true, ...place }));
        });
        await shown(before.length + 1);
      });
      assert.equal(await nodes(), began + 2);
      const added = await page.evaluate(
        () => window.app.graph.nodes.filter(({ type }) => type === "CollageLayer").at(-1).id,
      );
      near(Object.values(await values(added)).slice(0, 2), [0.5, 0.5]);
      assert.doesNotMatch(await status(), /run again/);
      const outputs = await succeed(); // Load Image's MASK as it comes
      await still();
      assert.ok((await difference(outputs)) < 2);

      await (await row("(no text)")).click();
      await oneStep(async () => {
        await press("Duplicate");
        await shown(before.length + 2);
      });
      await oneStep(() => press("Flip"));
      assert.ok((await difference(await succeed())) < 2);
      for (let left = 1; left >= 0; left--) {
        await (await row("(no text)")).click();
        await oneStep(async () => {
          await press("Delete");
          await shown(before.length + left);
        });
      }
      assert.deepEqual(await texts(), before);
      await succeed();
    });

    test("a layer off the canvas is told", async () => {
      const [red] = ids.layers;
      const { x } = await values(red);
      await onNode(red, 'widget("x").value = -1, widget("x").callback(-1)');
      await still();
      assert.match(await status(), /Outside the canvas, so not visible: “a red bar” \(node/);
      await onNode(red, 'widget("x").value = argument, widget("x").callback(argument)', x);
      await still();
      assert.doesNotMatch(await status(), /Off the canvas/);
    });

    test("inside a subgraph, fed from outside of it: run, move, queue", async () => {
      await feed(ids.layers[1], "x", 0.25);
      await comfy.page().evaluate(
        ([canvasId, ...layers]) => {
          const { canvas, graph } = window.app;
          canvas.deselectAll();
          const inside = [canvasId, ...layers].map((id) => graph.getNodeById(id));
          inside.forEach((node) => canvas.select(node));
          const { node } = graph.convertToSubgraph(new Set(inside));
          canvas.openSubgraph ? canvas.openSubgraph(node.subgraph, node) : canvas.setGraph(node.subgraph);
        },
        [ids.canvas, ...ids.layers],
      );
      await comfy.page().waitForTimeout(500);
      const inner = await comfy
        .page()
        .evaluate(() => window.app.canvas.graph.nodes.find((node) => node.comfyClass === "CollageCanvas").id);
      const [back] = await comfy
        .page()
        .evaluate(() =>
          window.app.canvas.graph.nodes.filter((node) => node.comfyClass === "CollageLayer").map((node) => node.id),
        );
      await onNode(back, 'widget("y").value = 0.4'); // so that no layer is one of the last run, with its id of then
      await succeed();
      await shown(3, inner);
      assert.deepEqual((await texts(inner)).toSorted(), ["a blue post", "a green box", "a red bar"]);
      await (await row("green", inner)).click();
      await comfy.page().keyboard.press("Shift+ArrowUp");
      await still();
      assert.match(await status(inner), /x 0.25,.* changed there: x\./);
      const moved = await comfy
        .page()
        .evaluate(() =>
          window.app.canvas.graph.nodes
            .filter((node) => node.comfyClass === "CollageLayer")
            .map((node) => node.widgets.find((one) => one.name === "y").value),
        );
      const { output } = await comfy.page().evaluate(() => window.app.graphToPrompt());
      const sent = Object.values(output)
        .filter((node) => node.class_type === "CollageLayer")
        .map((node) => node.inputs.y);
      assert.deepEqual(sent.toSorted(), moved.toSorted());
      await succeed();
    });
  });
}
