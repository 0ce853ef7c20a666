// The templates in their order: ComfyUI lists them as the disk does, and the first is the one to begin with.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));
const list = api.getWorkflowTemplates;

api.getWorkflowTemplates = async function () {
  const packs = await list.call(this);
  packs[PACK]?.sort();
  return packs;
};
