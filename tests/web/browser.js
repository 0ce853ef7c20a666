// Chromium, and a ComfyUI page in it, for the tests beside this file.
import { readFile } from "node:fs/promises";

const { MONTAGE_PLAYWRIGHT, MONTAGE_CHROMIUM, MONTAGE_COMFY } = process.env;
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

export const inBrowser = Boolean(MONTAGE_PLAYWRIGHT && MONTAGE_CHROMIUM);
export const COMFY = MONTAGE_COMFY;

export async function launch() {
  const { chromium } = await import(MONTAGE_PLAYWRIGHT);
  return chromium.launch({ executablePath: MONTAGE_CHROMIUM, args: FLAGS });
}

/** A page with nothing on it but the files of web/. */
export async function barePage(browser, options = {}) {
  const page = await browser.newPage({ viewport: { width: 700, height: 700 }, ...options });
  const web = new URL("../../web/", import.meta.url);
  await page.route("http://bare.test/**", async (route) => {
    const name = new URL(route.request().url()).pathname.slice(1);
    if (!name)
      return route.fulfill({
        contentType: "text/html",
        body: '<!doctype html><body style="margin:0"><div id="node" style="width:420px;height:560px"></div>',
      });
    const contentType = name.endsWith(".css") ? "text/css" : "text/javascript";
    const body = await readFile(new URL(name, web), "utf8").catch(() => null);
    return route.fulfill(body === null ? { status: 404 } : { contentType, body });
  });
  await page.goto("http://bare.test/");
  return page;
}

/** ComfyUI's page, ready. modern: Nodes 2.0 instead of the classic canvas. `faults` collects what goes wrong in it. */
export async function openComfy(browser, { modern, theme = "dark", language = "en", ...options }) {
  const context = await browser.newContext({ viewport: { width: 1500, height: 1000 }, ...options });
  await context.route(
    (url) => !url.href.startsWith(COMFY) && url.protocol.startsWith("http"),
    (route) => route.abort(),
  );
  const settings = {
    "Comfy.VueNodes.Enabled": modern,
    "Comfy.ColorPalette": theme,
    "Comfy.Locale": language,
    "Comfy.TutorialCompleted": true,
    "Comfy.UseNewMenu": "Top",
    "Comfy.RightSidePanel.IsOpen": false,
    "Comfy.Release.Status": "skipped",
    "Comfy.Workflow.WarnBlueprintOverwrite": false,
  };
  await context.request.post(`${COMFY}/api/settings`, { data: settings });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  const faults = [];
  // Frontend 1.58 throws this when any node with growing inputs is removed, ComfyUI's own as well.
  page.on(
    "pageerror",
    (error) => /autogrowInputDisconnected/.test(error.stack) || faults.push(`${error.message}\n${error.stack}`),
  );
  page.on(
    "console",
    (message) =>
      /error|warning/.test(message.type()) &&
      /montage/i.test(message.text() + message.location().url) &&
      faults.push(message.text()),
  );
  await page.goto(COMFY, { waitUntil: "domcontentloaded" });
  await ready(page);
  return { context, page, faults };
}

export async function ready(page) {
  await page.waitForFunction(
    () =>
      window.app?.vueAppReady &&
      window.app.extensionManager?.workflow &&
      !document.querySelector("#splash-loader") &&
      !document.querySelector('.p-blockui[aria-busy="true"]'),
    null,
    { timeout: 90_000 },
  );
}

/** The text of the page's message that holds `wanted`, once it is there. Frontend 1.58 has messages of another make. */
export async function message(page, wanted) {
  const found = page.locator('.p-toast-message, [data-testid="toast"]').filter({ hasText: wanted });
  return found.first().innerText();
}

/** Builds the montage workflow in the page: `images` of the demo model, cut, composed, shown. Returns {role: node id}. */
export function buildMontage(page, { images = 3, side = 128, steps = 4 } = {}) {
  return page.evaluate(
    async ({ images, side, steps }) => {
      const { app, LiteGraph } = window;
      await app.loadGraphData(
        { version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {} },
        true,
        true,
        null,
      );
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
      const sampling = {
        seed: 1,
        control_after_generate: "fixed",
        steps,
        cfg: 3,
        sampler_name: "euler",
        scheduler: "normal",
        denoise: 1,
      };

      const demo = add("MontageDemoModel", [20, 60]);
      const prompt = add("CLIPTextEncode", [20, 220], { text: "a red striped ball and a blue star on grass" });
      const nothing = add("CLIPTextEncode", [20, 460], { text: "" });
      const empty = add("EmptyLatentImage", [20, 700], { width: side, height: side, batch_size: images });
      const recorder = add("FeatureRecorder", [440, 60]);
      const sampler = add("KSampler", [440, 240], sampling);
      const decoder = add("VAEDecode", [440, 560]);
      const montage = add("GraphCutMontage", [800, 60], { sigma: 0 });
      const inject = add("CompositeAttentionInject", [1260, 60]);
      const composer = add("KSampler", [1260, 420], sampling);
      const composed = add("VAEDecode", [1260, 740]);
      const shown = add("PreviewImage", [1600, 60]);
      const labels = add("PreviewImage", [1600, 420]);

      for (const encode of [prompt, nothing]) wire(demo, 1, encode, "clip");
      wire(demo, 0, recorder, "model");
      wire(empty, 0, recorder, "latent");
      for (const [from, one] of [
        [recorder, sampler],
        [inject, composer],
      ]) {
        wire(from, 0, one, "model");
        wire(from, 1, one, "latent_image");
        wire(prompt, 0, one, "positive");
        wire(nothing, 0, one, "negative");
      }
      for (const [from, one] of [
        [sampler, decoder],
        [composer, composed],
      ]) {
        wire(from, 0, one, "samples");
        wire(demo, 2, one, "vae");
      }
      wire(sampler, 0, montage, "latents.latent0");
      wire(decoder, 0, montage, "images.image0");
      wire(demo, 0, inject, "model");
      wire(sampler, 0, inject, "latents.latent0");
      wire(montage, 0, inject, "masks");
      wire(composed, 0, shown, "images");
      wire(montage, 1, labels, "images");
      app.canvas.ds.scale = 0.8;
      app.canvas.ds.offset = [-640, 40];
      app.graph.setDirtyCanvas(true, true);
      return { montage: montage.id, shown: shown.id, labels: labels.id, sampler: sampler.id };
    },
    { images, side, steps },
  );
}

/** Queues the workflow and waits for its end: {outputs: {node id: output}, error or null}. */
export function queue(page, only) {
  return page.evaluate(
    (only) =>
      new Promise((resolve, reject) => {
        const { api } = window.comfyAPI.api;
        const outputs = {};
        const heard = {
          executed: ({ detail }) => (outputs[detail.node] = detail.output),
          execution_success: () => finish({ outputs, error: null }),
          execution_error: ({ detail }) => finish({ outputs, error: detail.exception_message }),
        };
        const timer = setTimeout(() => finish({ outputs, error: "no end within 60 s" }), 60_000);
        function finish(result) {
          clearTimeout(timer);
          for (const [name, listener] of Object.entries(heard)) api.removeEventListener(name, listener);
          resolve(result);
        }
        for (const [name, listener] of Object.entries(heard)) api.addEventListener(name, listener);
        window.app
          .queuePrompt(0, 1, only)
          .then(
            (accepted) => accepted || finish({ outputs, error: JSON.stringify(window.app.lastNodeErrors) }),
            reject,
          );
      }),
    only,
  );
}

/** Drags the mouse over an editor's canvas, through points given as fractions of the picture. */
export async function drag(page, points, canvas = page.locator(".montage-stage > canvas")) {
  const places = await canvas.evaluate((element, points) => {
    const box = element.getBoundingClientRect();
    const scale = Math.min(box.width / element.width, box.height / element.height);
    const [w, h] = [element.width * scale, element.height * scale];
    return points.map(([x, y]) => [box.left + (box.width - w) / 2 + x * w, box.top + (box.height - h) / 2 + y * h]);
  }, points);
  await page.mouse.move(...places[0]);
  await page.mouse.down();
  for (const place of places.slice(1)) await page.mouse.move(...place, { steps: 4 });
  await page.mouse.up();
}
