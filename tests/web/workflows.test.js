// Every example workflow opens in both renderers without a fault and converts to its API twin.
import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { after, before, describe, test } from "node:test";
import { launch, openComfy } from "./browser.js";

const folder = new URL("../../example_workflows/", import.meta.url);
const names = (await readdir(folder)).filter((name) => name.endsWith(".json"));

function plain(prompt) {
  const nodes = Object.entries(prompt).map(([id, { class_type, inputs }]) => [id, { class_type, inputs: Object.fromEntries(Object.entries(inputs).sort()) }]);
  return Object.fromEntries(nodes.sort(([a], [b]) => a.localeCompare(b)));
}

test("there are workflows to check", () => assert.ok(names.length >= 2));

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
        assert.deepEqual(comfy.faults, []);
      });
    }
  });
}
