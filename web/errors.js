// Our errors where one looks: ComfyUI's own message only says that a node threw one. The sentence begins with the display
// name of the node to edit, which need not be the one that was running.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allPaths, idOf } from "./paths.js";
import { t } from "./words.js";

const LIFE = 30_000; // milliseconds
const MODULE = `custom_nodes.${decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2))}`;

/** {node type: its English display name, as errors say it} of this pack's nodes in the graph. The page has names and categories translated. */
async function namesInGraph() {
  const nodes = [...allPaths()].map((path) => path.at(-1));
  const types = new Set(
    nodes.filter(({ constructor }) => constructor.nodeData?.python_module === MODULE).map((node) => node.comfyClass),
  );
  const infos = await Promise.all(
    [...types].map((type) => api.fetchApi(`/object_info/${type}`).then((it) => it.json())),
  );
  return Object.fromEntries(infos.flatMap((info) => Object.entries(info)).map(([type, it]) => [type, it.display_name]));
}

async function showError({ detail: { exception_message: message = "" } }) {
  const named = Object.entries(await namesInGraph()).find(([, name]) => message.startsWith(`${name}:`));
  if (!named) return;
  const [type, english] = named;
  const nodes = [...allPaths()].filter((path) => path.at(-1).comfyClass === type);
  const name = nodes[0].at(-1).constructor.nodeData.display_name;
  app.extensionManager.toast.add({
    severity: "error",
    summary: nodes.length === 1 ? t("{name} (node {id})", { name, id: idOf(nodes[0]) }) : name,
    detail: message.slice(english.length + 1).trim(),
    life: LIFE,
  });
}

app.registerExtension({ name: "montage.errors", setup: () => api.addEventListener("execution_error", showError) });
