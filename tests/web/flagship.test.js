// The first hour, counted: from the flagship template to a photomontage with a checkpoint of one's own, by mouse alone.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, describe, test } from "node:test";
import { drag, launch, openComfy } from "./browser.js";

const modern = process.env.MONTAGE_RENDERER === "modern";
const NAME = "01 Photomontage";
const OWN = "my-model.safetensors"; // in the server's models/checkpoints
const MOST = 8; // actions

let browser;
let page;
let faults;

before(async () => {
  browser = await launch();
  ({ page, faults } = await openComfy(browser, { modern }));
});
after(() => browser?.close());

/** The template as it is shipped, but small and of few steps: a processor samples it. */
async function smaller(route) {
  const flow = JSON.parse(await readFile(new URL(`../../example_workflows/${NAME}.json`, import.meta.url)));
  const ofType = (type) => flow.nodes.find((node) => node.type === type);
  ofType("EmptyLatentImage").widgets_values = [64, 64, 4];
  ofType(flow.definitions.subgraphs[0].id).widgets_values[1] = 2; // steps
  await route.fulfill({ json: flow });
}

/** A place of a node on the page: of a widget, or of the button in the corner that opens a subgraph. */
const placeOn = (type, widget) =>
  page.evaluate(
    ([type, widget]) => {
      const { graph, canvas } = window.app;
      const node = graph.nodes.find((one) => one.type === type || one.title === type);
      const { y } = node.widgets.find(({ name }) => name === widget) ?? { y: null };
      const [dx, dy] = y === null ? [node.size[0] - 16, -16] : [node.size[0] / 2, y + 10];
      const { left, top } = canvas.canvas.getBoundingClientRect();
      const { scale, offset } = canvas.ds;
      return [left + (node.pos[0] + dx + offset[0]) * scale, top + (node.pos[1] + dy + offset[1]) * scale];
    },
    [type, widget],
  );

const ended = () =>
  page.evaluate(
    () =>
      new Promise((resolve) => {
        const { api } = window.comfyAPI.api;
        api.addEventListener("execution_success", () => resolve(null), { once: true });
        api.addEventListener("execution_error", ({ detail }) => resolve(detail.exception_message), { once: true });
      }),
  );

async function run() {
  const end = ended();
  await page.locator('[data-testid="queue-button"]').click();
  assert.equal(await end, null);
}

/** What the user does, in words, each with one click or one drag. */
const ACTIONS = {
  "open the template": () => page.getByText(NAME, { exact: true }).first().click(),
  "open the list of checkpoints": async () => {
    await page.waitForFunction(() => window.app.graph.nodes.some(({ type }) => type === "CheckpointLoaderSimple"));
    await page.waitForTimeout(1500); // until the view has been fitted
    if (modern) await page.locator('[data-node-id="1"] [role="combobox"]').click();
    else await page.mouse.click(...(await placeOn("CheckpointLoaderSimple", "ckpt_name")));
  },
  "choose one's own": () => page.locator(".litemenu-entry, [role=option]").filter({ hasText: OWN }).first().click(),
  "run: the images are recorded": run,
  "enter the subgraph": async () => {
    if (modern) await page.getByText("Enter subgraph").first().click();
    else await page.mouse.click(...(await placeOn("Photomontage")));
  },
  "choose an image": () => page.locator(".montage-image").nth(1).click(),
  "paint on it": () =>
    drag(page, [
      [0.3, 0.4],
      [0.7, 0.5],
      [0.3, 0.6],
    ]),
  "run: the composite": run,
};

describe(`the flagship, ${modern ? "Nodes 2.0" : "classic"}`, () => {
  test("lies first in the list of templates", async () => {
    await page.route(`**/workflow_templates/**/${encodeURIComponent(NAME)}.json`, smaller);
    await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.BrowseTemplates"));
    await page.getByText("montage", { exact: true }).first().click();
    await page.getByText(NAME, { exact: true }).first().waitFor();
    const cards = page.locator('[data-testid^="template-workflow-"]').filter({ hasText: /^\D*\d\d / });
    assert.match(await cards.first().innerText(), new RegExp(NAME));
  });

  test("leads to a photomontage of one's own in eight actions", async () => {
    assert.ok(Object.keys(ACTIONS).length <= MOST);
    for (const act of Object.values(ACTIONS)) await act();
    const { output } = await page.evaluate(() => window.app.graphToPrompt());
    const cut = Object.values(output).find(({ class_type: type }) => type === "GraphCutMontage");
    assert.equal(JSON.parse(cut.inputs.strokes).strokes[0].k, 1);
    assert.equal(Object.values(output).find(({ inputs }) => "ckpt_name" in inputs).inputs.ckpt_name, OWN);
    await page.waitForFunction(() =>
      Object.values(window.app.nodeOutputs).some(({ images }) => images?.some(({ type }) => type === "output")),
    );
    assert.deepEqual(faults, []);
  });
});
