// Load Recording's list, refreshed with R. ComfyUI's page does it for inputs of type COMBO alone, and this one also takes a link.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "montage.recordings",
  nodeCreated(node) {
    if (node.comfyClass !== "LoadRecording") return;
    node.refreshComboInNode = ({ LoadRecording }) => {
      const widget = node.widgets.find(({ name }) => name === "file");
      widget.options.values = LoadRecording.input.required.file[1].options;
    };
  },
});
