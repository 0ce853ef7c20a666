// The editors in ComfyUI's page in another language.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, describe, test } from "node:test";
import { buildMontage, drag, launch, message, openComfy, queue } from "./browser.js";

const modern = process.env.MONTAGE_RENDERER === "modern";
const words = async (language) =>
  JSON.parse(await readFile(new URL(`../../locales/${language}/main.json`, import.meta.url), "utf8")).montage;

let browser;
let page;
let faults;
let ids;

before(async () => {
  browser = await launch();
  ({ page, faults } = await openComfy(browser, { modern, language: "zh" }));
});
after(() => browser?.close());

const textsOf = (selector) => page.locator(selector).evaluateAll((all) => all.map((one) => one.textContent));
const setLanguage = (language) =>
  page.evaluate((language) => window.app.extensionManager.setting.set("Comfy.Locale", language), language);

describe(`the editors' language, ${modern ? "Nodes 2.0" : "classic"}`, () => {
  test("the stroke editor speaks Chinese", async () => {
    const zh = await words("zh");
    ids = await buildMontage(page);
    await page.waitForSelector(".montage-hint");
    assert.deepEqual(await textsOf(".montage-hint"), [zh["Run once to see the images here."]]);
    const buttons = ["Paint", "Erase", "Undo", "Redo", "Large", "Fit"];
    buttons.push("Base", "Clear", "Clear all", "Image", "Regions", "Result");
    assert.deepEqual(
      await textsOf(".montage-tools button"),
      buttons.map((text) => zh[text]),
    );
    assert.equal((await queue(page)).error, null);
    await page.locator(".montage-image").nth(2).click();
    assert.match((await textsOf(".montage-status"))[0], /^涂出图像 2 中要保留的部分。/);
  });

  test("an error names its node", async () => {
    const path = [
      [0.1, 0.5],
      [0.9, 0.5],
    ];
    await drag(page, path);
    await page.locator(".montage-image").first().click();
    await drag(page, path);
    assert.match((await textsOf(".montage-status"))[0], /图像 0 和 2 /);
    assert.match((await queue(page)).error, /^Graph Cut Montage: /);
    const summary = `图割蒙太奇（节点 ${ids.montage}）`;
    assert.equal((await message(page, summary)).split("\n")[0], summary);
  });

  test("the layout editor follows the setting", async () => {
    const ja = await words("ja");
    await setLanguage("ja");
    await page.waitForFunction(
      (erase) => document.querySelector(".montage-tools")?.textContent.includes(erase),
      ja.Erase,
    );
    await page.evaluate(() => {
      const { app, LiteGraph } = window;
      app.graph.clear();
      const node = LiteGraph.createNode("CollageCanvas");
      node.pos = [800, 60];
      app.graph.add(node);
    });
    const buttons = ["Forward", "Back", "Reset", "Add", "Duplicate", "Flip", "Delete", "Undo", "Redo", "Large", "Fit"];
    await page.waitForSelector(".montage-layout");
    assert.deepEqual(
      await textsOf(".montage-tools button"),
      buttons.map((text) => ja[text]),
    );
    assert.deepEqual(await textsOf(".montage-hint"), [ja["Drop pictures here, or run once to see the collage."]]);
  });

  test("a language without translations has the English texts", async () => {
    await setLanguage("fr");
    await page.waitForFunction(() => document.querySelector(".montage-tools")?.textContent.includes("Undo"));
    await setLanguage("en");
    assert.deepEqual(faults, []);
  });
});
