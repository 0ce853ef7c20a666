// Every example workflow opens in both renderers without a fault and converts to its API twin; the subgraph blueprints are served, open and run.
import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { after, before, describe, test } from "node:test";
import { COMFY, launch, openComfy, queue } from "./browser.js";

const folder = new URL("../../example_workflows/", import.meta.url);
const names = (await readdir(folder)).filter((name) => name.endsWith(".json"));

function plain(prompt) {
  const nodes = Object.entries(prompt).map(([id, { class_type, inputs }]) => [
    id,
    { class_type, inputs: Object.fromEntries(Object.entries(inputs).sort()) },
  ]);
  return Object.fromEntries(nodes.sort(([a], [b]) => a.localeCompare(b)));
}

/** The boxes of a workflow's nodes, with their titles, in the graph's units: as the page draws them. */
function boxes(page) {
  return page.evaluate(async () => {
    const { graph, canvas } = window.app;
    const drawn = (node) => document.querySelector(`[data-node-id="${node.id}"]`);
    const sizes = () => graph.nodes.map((node) => drawn(node)?.offsetHeight).join();
    for (let before; before !== (before = sizes());) await new Promise((resolve) => setTimeout(resolve, 300));
    return graph.nodes.map((node) => {
      const [x, y, width, height] = node.boundingRect;
      const box = drawn(node)?.getBoundingClientRect();
      const title = window.LiteGraph.NODE_TITLE_HEIGHT;
      return {
        name: `${node.type} ${node.id}`,
        left: node.pos[0],
        top: box ? node.pos[1] - title : y,
        right: box ? node.pos[0] + box.width / canvas.ds.scale : x + width,
        bottom: box ? node.pos[1] - title + box.height / canvas.ds.scale : y + height,
      };
    });
  });
}

const cover = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

test("there are workflows to check", () => assert.ok(names.length >= 2));

/** What goes into each blueprint to try it: {input: [node type, its output, its widgets]}. */
const demo = (output) => ["MontageDemoModel", output, {}];
const blueprints = {
  Photomontage: {
    model: demo(0),
    vae: demo(2),
    latent: ["EmptyLatentImage", 0, { width: 128, height: 128, batch_size: 2 }],
  },
  "Swap subject": {
    model: demo(0),
    vae: demo(2),
    subject: ["EmptyImage", 0, { width: 128, height: 128, color: 0xff0000 }],
    picture: ["EmptyImage", 0, { width: 128, height: 128 }],
    subject_mask: ["SolidMask", 0, { width: 128, height: 128 }],
    edit_mask: ["SolidMask", 0, { width: 128, height: 128 }],
  },
};

for (const modern of [false, true]) {
  describe(modern ? "Nodes 2.0" : "classic canvas", () => {
    let browser, comfy;
    before(async () => {
      browser = await launch();
      comfy = await openComfy(browser, { modern });
    });
    after(() => browser?.close());

    for (const name of names) {
      test(name, async () => {
        const flow = JSON.parse(await readFile(new URL(encodeURIComponent(name), folder)));
        const twin = JSON.parse(await readFile(new URL(`api/${encodeURIComponent(name)}`, folder)));
        const converted = await comfy.page.evaluate(async (flow) => {
          await window.app.loadGraphData(flow, true, true, null);
          return (await window.app.graphToPrompt()).output;
        }, flow);
        assert.deepEqual(plain(converted), plain(twin));
        const placed = await boxes(comfy.page);
        const groups = flow.groups.map(({ title, bounding: [left, top, width] }) => ({
          name: `the title of ${title}`,
          left,
          top,
          right: left + width,
          bottom: top + 40,
        }));
        const covered = placed.flatMap((a, index) =>
          [...placed.slice(index + 1), ...groups].filter((b) => cover(a, b)).map((b) => `${a.name} and ${b.name}`),
        );
        assert.deepEqual(covered, []);
        assert.deepEqual(comfy.faults, []);
      });
    }

    for (const [name, inputs] of Object.entries(blueprints)) {
      test(`the blueprint "${name}"`, async () => {
        const served = await (await comfy.context.request.get(`${COMFY}/global_subgraphs`)).json();
        const [id] = Object.entries(served).find(
          ([, entry]) => entry.name === name && entry.info.node_pack === "custom_nodes.montage",
        );
        const { data } = await (await comfy.context.request.get(`${COMFY}/global_subgraphs/${id}`)).json();
        await comfy.page.evaluate(
          async ([flow, inputs]) => {
            const { app, LiteGraph } = window;
            await app.loadGraphData(flow, true, true, null);
            const [host] = app.graph.nodes;
            const set = (node, values) =>
              Object.entries(values).forEach(
                ([name, value]) => (node.widgets.find((widget) => widget.name === name).value = value),
              );
            const add = (type, values) => {
              const node = LiteGraph.createNode(type);
              app.graph.add(node);
              set(node, values);
              return node;
            };
            const wire = (from, output, to, name) =>
              from.connect(
                output,
                to,
                to.inputs.findIndex((slot) => slot.name === name),
              );
            for (const [input, [type, output, values]] of Object.entries(inputs))
              wire(add(type, values), output, host, input);
            for (const input of ["positive", "negative"]) {
              const text = add("CLIPTextEncode", { text: "" });
              wire(add("MontageDemoModel", {}), 1, text, "clip");
              wire(text, 0, host, input);
            }
            set(host, { steps: 2, cfg: 3 });
            wire(host, 0, add("PreviewImage", {}), "images");
          },
          [JSON.parse(data), inputs],
        );
        const { outputs, error } = await queue(comfy.page);
        assert.equal(error, null);
        assert.ok(Object.values(outputs).some((output) => output?.images?.length));
        const prompt = (await comfy.page.evaluate(() => window.app.graphToPrompt())).output;
        const steps = Object.values(prompt).flatMap(({ inputs }) => ("steps" in inputs ? [inputs.steps] : []));
        assert.deepEqual(steps, [2, 2]);
        assert.deepEqual(comfy.faults, []);
      });
    }
  });
}
