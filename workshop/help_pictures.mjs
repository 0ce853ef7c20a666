// Pictures the nodes for their help pages, as Nodes 2.0 shows them: each alone, to be read in the narrow panel.
//
//     MONTAGE_COMFY=http://127.0.0.1:8188 MONTAGE_PLAYWRIGHT=.../index.mjs MONTAGE_CHROMIUM=/usr/bin/chromium \
//         node workshop/help_pictures.mjs [NODE ...]
import { readFile, readdir } from "node:fs/promises";
import { drag, launch, openComfy, queue } from "../tests/web/browser.js";

const WORKFLOWS = new URL("../example_workflows/", import.meta.url);
const DOCS = new URL("../web/docs/", import.meta.url);
const ALONE = [
  "AdaptiveMaskBlend",
  "CollaborativeAttention",
  "CollageControl",
  "CollageCrossAttn",
  "CollageLayer",
  "CollageNoise",
  "CompositeAttentionInject",
  "FeatureRecorder",
  "InvertImage",
  "LearnLayerToken",
  "LoadRecording",
  "MontageDemoCutout",
  "MontageDemoModel",
  "MontageDemoSubject",
  "MultiSourceSwap",
  "SaveRecording",
  "StepBlendSampler",
  "SubjectLocalizeLoader",
  "TokenAttentionMap",
];
const CONFLICT = [
  // [image, points as fractions of the picture]
  [1, [[0.2, 0.6], [0.3, 0.75], [0.4, 0.6]]],
  [2, [[0.25, 0.7], [0.7, 0.3]]],
]; // prettier-ignore
const LEFT_TOP = [120, 140]; // pixels of the page, clear of its menus
const SCALE = 1.5;
const AROUND = 14; // pixels
const SIZE = { width: 1200, height: 2000 };

const flows = [];
for (const name of (await readdir(WORKFLOWS)).filter((name) => name.endsWith(".json")).sort())
  flows.push({ name, ...JSON.parse(await readFile(new URL(encodeURIComponent(name), WORKFLOWS))) });
const named = process.argv.slice(2);
const wanted = (name) => !named.length || named.includes(name);
const browser = await launch();

/** Opens the first workflow from `number` on that has a node of this type, and brings it to its place. Returns its id. */
async function show(page, type, number = "") {
  const flow = flows.find(({ name, nodes }) => name >= number && nodes.some((node) => node.type === type));
  await page.evaluate((flow) => window.app.loadGraphData(flow, true, true, null), flow);
  const id = flow.nodes.find((node) => node.type === type).id;
  await page.evaluate(
    ([id, scale, [x, y], asItIs]) => {
      const { graph, canvas } = window.app;
      const node = graph.getNodeById(id);
      const { pos } = node;
      if (!asItIs) node.setSize([node.size[0], 60]); // it takes what its inputs need
      Object.assign(canvas.ds, { scale, offset: [x / scale - pos[0], y / scale - pos[1]] });
      canvas.setDirty(true, true);
    },
    [id, SCALE, LEFT_TOP, Boolean(number)],
  );
  await page.waitForTimeout(1500);
  return id;
}

/** A picture of a node of the graph, with its title. */
async function picture(page, id, name) {
  const [width, height] = await page.evaluate((id) => {
    const node = document.querySelector(`[data-node-id="${id}"]`)?.getBoundingClientRect();
    const { boundingRect } = window.app.graph.getNodeById(id);
    const { scale } = window.app.canvas.ds;
    return node ? [node.width, node.height] : [boundingRect[2] * scale, boundingRect[3] * scale];
  }, id);
  const [left, top] = [LEFT_TOP[0] - AROUND, LEFT_TOP[1] - 30 * SCALE - AROUND];
  const clip = { x: left, y: top, width: width + 2 * AROUND, height: height + 2 * AROUND };
  await page.screenshot({ path: new URL(`${name}.jpg`, DOCS).pathname, type: "jpeg", quality: 85, clip });
  console.log(name, Math.round(clip.width), Math.round(clip.height));
}

const { page } = await openComfy(browser, { modern: true, viewport: SIZE });
for (const type of ALONE.filter(wanted)) await picture(page, await show(page, type), type);

if (wanted("CollageCanvas")) {
  const id = await show(page, "CollageCanvas", "06");
  console.log((await queue(page)).error ?? "the collage");
  await page.locator(".montage-layer", { hasText: "star" }).click();
  await page.waitForTimeout(500);
  await picture(page, id, "CollageCanvas-editor");
}
await page.context().close();

if (wanted("GraphCutMontage")) {
  const { page } = await openComfy(browser, { modern: false, viewport: SIZE });
  const id = await show(page, "GraphCutMontage", "04");
  console.log((await queue(page, [String(id)])).error ?? "the cut");
  const editor = await page.evaluateHandle(
    (id) => window.app.graph.getNodeById(id).widgets.find(({ name }) => name === "strokes").element,
    id,
  );
  const part = (selector) => editor.waitForSelector(selector);
  await (await part('button:text-is("Clear all")')).click();
  for (const [image, points] of CONFLICT) {
    await (await part(`.montage-image >> nth=${image}`)).click();
    await drag(page, points, await part(".montage-stage > canvas"));
  }
  await page.waitForTimeout(500);
  await picture(page, id, "GraphCutMontage-classic");
}
await browser.close();
