// This machine's choices in ComfyUI's settings: what "auto" means on a node, and where new nodes write.
import { app } from "../../scripts/app.js";

const MODE = "QRLoRA.ApplyMode";
const PRESET = "QRLoRA.MemoryPreset";
const FOLDER = "QRLoRA.Folder";
const AUTO = "auto";
// node -> [widget, setting]. A graph keeps "auto", so that it suits every machine; what is queued says what this one means.
const MEANT = { QRLoRAApply: ["mode", MODE], QRLoRATrainOptions: ["preset", PRESET] };
const NEW = { QRLoRATrain: ["folder", FOLDER] };

function chosen(id) {
  return app.extensionManager?.setting?.get?.(id) ?? app.ui?.settings?.getSettingValue?.(id);
}

// What the node itself would take: a setting may be of another version of this pack.
function allowed(widget, value) {
  const values = widget.options?.values;
  return Array.isArray(values) && values.includes(value);
}

function follow(node) {
  const [name, id] = MEANT[node.comfyClass] ?? [];
  const widget = node.widgets?.find((one) => one.name === name);
  if (!widget) return;
  const { serializeValue } = widget;
  widget.serializeValue = async function (...args) {
    const value = serializeValue ? await serializeValue.apply(this, args) : widget.value;
    const meant = value === AUTO ? chosen(id) : value;
    return allowed(widget, meant) ? meant : value;
  };
}

// A graph that is opened puts its own value over this one.
function begin(node) {
  const [name, id] = NEW[node.comfyClass] ?? [];
  const widget = node.widgets?.find((one) => one.name === name);
  if (widget && allowed(widget, chosen(id))) widget.value = chosen(id);
}

app.registerExtension({
  name: "QR-LoRA.settings",
  settings: [
    {
      id: MODE,
      category: ["QR-LoRA", "Apply", "Mode"],
      name: "What 'auto' of Apply QR-LoRA means here",
      tooltip: "For all graphs, from the next run on. auto: live where weights are quantised or the model does not fit, else patch.",
      type: "combo",
      options: [AUTO, "patch", "live"],
      defaultValue: AUTO,
    },
    {
      id: PRESET,
      category: ["QR-LoRA", "Train", "Memory preset"],
      name: "What preset 'auto' of Train \u0394R Options means here",
      tooltip: "For all graphs, from the next run on. auto: as exact as the memory that is free allows.",
      type: "combo",
      options: [AUTO, "12 GB", "16 GB", "24 GB", "more than 24 GB"],
      defaultValue: AUTO,
    },
    {
      id: FOLDER,
      category: ["QR-LoRA", "Train", "Folder"],
      name: "Folder that new Train \u0394R nodes write to",
      tooltip: "Nodes that are added from now on; those in a graph keep theirs.",
      type: "combo",
      options: ["output/qrlora", "models/qrlora", "models/loras"],
      defaultValue: "output/qrlora",
    },
  ],
  nodeCreated(node) {
    follow(node);
    begin(node);
  },
});
