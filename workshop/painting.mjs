// Paints a photomontage in a real page and keeps what the editor shows: PNG frames for workshop/animate.py.
//
//     MONTAGE_COMFY=http://127.0.0.1:8188 MONTAGE_PLAYWRIGHT=.../index.mjs MONTAGE_CHROMIUM=/usr/bin/chromium \
//         node workshop/painting.mjs FOLDER
import { mkdir, readFile } from "node:fs/promises";
import { launch, openComfy, queue } from "../tests/web/browser.js";

const [folder] = process.argv.slice(2);
const WORKFLOW = new URL("../example_workflows/04 Photomontage (demo).json", import.meta.url);
const CUT = 40; // its Graph Cut Montage
const STROKES = [
  // [image, points as fractions of the picture]
  [1, [[0.22, 0.6], [0.3, 0.72], [0.36, 0.62]]],
  [2, [[0.66, 0.3], [0.74, 0.36], [0.8, 0.28]]],
  [0, [[0.08, 0.08], [0.42, 0.08]]],
  [0, [[0.62, 0.92], [0.92, 0.92], [0.92, 0.68]]],
]; // prettier-ignore

await mkdir(folder, { recursive: true });
const flow = JSON.parse(await readFile(WORKFLOW, "utf8"));
const cut = flow.nodes.find(({ id }) => id === CUT);
cut.widgets_values[6] = "";
cut.size = [470, 900];

const browser = await launch();
const { page } = await openComfy(browser, { modern: false, viewport: { width: 900, height: 1300 } });
await page.evaluate(
    async ([flow, id]) => {
        const { app } = window;
        await app.loadGraphData(flow, true, true, null);
        const node = app.graph.getNodeById(id);
        app.canvas.ds.scale = 1.2;
        app.canvas.ds.offset = [-node.pos[0] + 60, -node.pos[1] + 60];
        app.canvas.setDirty(true, true);
    },
    [flow, CUT],
);
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const editor = page.locator(".montage-editor", { has: page.locator(".montage-images") });
const canvas = editor.locator(".montage-stage > canvas");
const view = (name) => editor.locator("button", { hasText: new RegExp(`^${name}$`) }).first();
let number = 0;

async function frame(milliseconds) {
    const name = `${String(number++).padStart(3, "0")}-${milliseconds}.png`;
    await editor.screenshot({ path: `${folder}/${name}` });
}

async function place([x, y]) {
    const box = await canvas.boundingBox();
    const side = Math.min(box.width, box.height);
    return [box.x + (box.width - side) / 2 + x * side, box.y + (box.height - side) / 2 + y * side];
}

console.log((await queue(page)).error ?? "recorded");
await wait(1500);
await frame(900);
for (const [image, points] of STROKES) {
    await page.locator(".montage-image").nth(image).click();
    await wait(250);
    await frame(500);
    const places = await Promise.all(points.map(place));
    await page.mouse.move(...places[0]);
    await page.mouse.down();
    for (let next = 1; next < places.length; next++)
        for (const part of [0.33, 0.66, 1]) {
            const [from, to] = [places[next - 1], places[next]];
            await page.mouse.move(from[0] + part * (to[0] - from[0]), from[1] + part * (to[1] - from[1]));
            await frame(110);
        }
    await page.mouse.up();
    await wait(500);
    await frame(500);
    for (const name of ["Result", "Image"]) {
        // the images, pasted along the seams of a cut that the page makes while one paints
        const button = view(name);
        if (!(await button.count())) continue;
        await button.click();
        await wait(600);
        if (name === "Result") await frame(800);
    }
}
for (const name of ["Regions", "Result"]) {
    if (name === "Regions") console.log((await queue(page)).error ?? "composed");
    await wait(1000);
    const button = view(name);
    if (!(await button.count())) continue;
    await button.click();
    await wait(700);
    await frame(name === "Regions" ? 1300 : 2600);
}
await browser.close();
process.exit(0);
