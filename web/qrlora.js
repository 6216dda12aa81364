// Colours for our sockets, and what of this pack every node of it has: a report, its errors, its language.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { followChoice } from "./qrlora_chosen.js";
import { refreshLists } from "./qrlora_lists.js";
import { addStyle, reportWidget, show } from "./qrlora_report.js";
import { began, executed, failed, restore, succeeded } from "./qrlora_runs.js";
import { loadWords } from "./qrlora_words.js";

// Hues that none of ComfyUI's own types beside them in a FLUX graph has. Two of our types have an older name as well, and a
// link between two such sockets has both.
const COLORS = { QRLORA_TRAIN_OPTIONS: "#8FA3BF" };
for (const [name, color] of Object.entries({ DELTA_R: "#1FBFA8", RESIDUAL: "#B07D52" })) {
  for (const type of [name, `QRLORA_${name}`, `QRLORA_${name},${name}`]) COLORS[type] = color;
}
// Those that report, which have their box from the start: what a run shows must not make a node grow.
const REPORTS = [
  ...["Apply", "Balance", "BlockScale", "ContactSheet", "CreateHook", "ExportLoRA", "LoadDeltaR", "LoadResidual", "Merge"],
  ...["FromLoRAStack", "LoadLoRA", "Prompt", "SaveDeltaR", "SaveResidual", "ScaleSweep", "Schedule", "Similarity", "ToyAdapter"],
].map((name) => `QRLoRA${name}`);

function paint() {
  Object.assign(app.canvas?.default_connection_color_byType ?? {}, COLORS);
  Object.assign(window.LGraphCanvas?.link_type_colors ?? {}, COLORS);
  for (const [type, color] of Object.entries(COLORS)) {
    // for the new renderer, which reads a list as its first name with the rest to fall back on
    if (!type.includes(",")) document.documentElement.style.setProperty(`--color-datatype-${type}`, color);
  }
  app.canvas?.setDirty(true, true);
}

app.registerExtension({
  name: "QR-LoRA",
  aboutPageBadges: [{ label: "QR-LoRA", url: "https://github.com/qr-lora/comfyui-qr-lora", icon: "pi pi-github" }],
  init: loadWords,
  setup() {
    addStyle();
    paint();
    // A change of the palette clears the colours of types that it does not know.
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(paint, 0));
    api.addEventListener("execution_error", failed);
    api.addEventListener("execution_start", began);
    api.addEventListener("execution_success", succeeded);
  },
  afterConfigureGraph() {
    paint(); // the first palette is applied after setup; a workflow is loaded after that
    setTimeout(restore, 0); // the outputs of a tab come back just after its graph
  },
  nodeCreated(node) {
    if (REPORTS.includes(node.comfyClass)) reportWidget(node);
    followChoice(node);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("QRLoRA")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      executed(this);
      show(this, output);
      if (output?.qrlora_saved?.some(Boolean)) refreshLists();
    };
  },
});
