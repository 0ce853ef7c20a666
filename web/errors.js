// Our errors where one looks: ComfyUI's own message only says that a node threw one. The sentence begins with the display
// name of the node to edit, which need not be the one that was running.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { allPaths, idOf } from "./paths.js";
import { t } from "./words.js";

const LIFE = 30_000; // milliseconds

/** The type of the node of this pack whose display name a message begins with, or null. */
function typeNamed(message) {
  for (const [type, { nodeData }] of Object.entries(window.LiteGraph.registered_node_types))
    if (nodeData?.category?.startsWith("montage") && message.startsWith(`${nodeData.display_name}:`)) return type;
  return null;
}

function showError({ detail: { exception_message: message = "" } }) {
  const type = typeNamed(message);
  if (!type) return;
  const ids = [...allPaths()].filter((path) => path.at(-1).comfyClass === type).map(idOf);
  const colon = message.indexOf(":");
  const name = message.slice(0, colon);
  app.extensionManager.toast.add({
    severity: "error",
    summary: ids.length === 1 ? t("{name} (node {id})", { name, id: ids[0] }) : name,
    detail: message.slice(colon + 1).trim(),
    life: LIFE,
  });
}

app.registerExtension({ name: "montage.errors", setup: () => api.addEventListener("execution_error", showError) });
