// What is in the adapter that was chosen, and the picture beside its file: before anything runs.
import { api } from "../../scripts/api.js";
import { ERROR_TEXT, put } from "./qrlora_report.js";
import { translated, translatedReport } from "./qrlora_words.js";

const NODE = "QRLoRALoadDeltaR";
const WIDGET = "delta_r_name";

export async function showChosen(node) {
  const chosen = () => node.widgets?.find((widget) => widget.name === WIDGET)?.value;
  const name = chosen();
  if (node.type !== NODE || typeof name !== "string" || !name) return;
  const query = `name=${encodeURIComponent(name)}`;
  try {
    const answer = await api.fetchApi(`/qrlora/adapter?${query}`);
    const { text, picture, error } = await answer.json();
    if (chosen() !== name) return; // another one meanwhile
    node.qrloraPicture = picture ? pictureOf(name, api.apiURL(`/qrlora/adapter/picture?${query}`)) : null;
    if (text) put(node, translatedReport(text));
    else put(node, String(error ?? ""), ERROR_TEXT);
  } catch (error) {
    console.warn("QR-LoRA: the adapter that was chosen could not be asked about", error);
  }
}

function pictureOf(name, address) {
  const image = document.createElement("img");
  Object.assign(image, { src: address, alt: translated("Picture of {name}", { name }), draggable: false });
  return image;
}

// Now, and whenever another file is chosen.
export function followChoice(node) {
  const widget = node.widgets?.find((input) => input.name === WIDGET);
  if (node.comfyClass !== NODE || !widget) return;
  const { callback } = widget;
  widget.callback = function (...args) {
    const result = callback?.apply(this, args);
    showChosen(node);
    return result;
  };
  showChosen(node);
}
