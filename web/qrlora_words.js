// What the nodes say in the page, in the language of ComfyUI's own settings; English where a language lacks it.
import { app } from "../../scripts/app.js";

let words = {}; // language -> English -> that language; {name} stands for a value

// Awaited before the first node is made.
export async function loadWords() {
  try {
    words = await (await fetch(new URL("qrlora_words.json", import.meta.url))).json();
  } catch (error) {
    console.warn("QR-LoRA: the translations could not be read", error);
  }
}

// "zh", "ja", or "" for English. Traditional Chinese gets the simplified words.
function language() {
  const settings = app.extensionManager?.setting;
  const locale = String(settings?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "");
  return Object.keys(words).find((known) => locale.startsWith(known)) ?? "";
}

export function translated(english, values = {}) {
  const sentence = words[language()]?.[english] ?? english;
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
