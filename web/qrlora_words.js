// What the nodes say in the page, in the language of ComfyUI's own settings; English where a language lacks it.
import { app } from "../../scripts/app.js";

let words = {}; // language -> English -> that language; {name} stands for a value
let reports = {}; // the same of lines that the server writes

const patterns = new Map(); // language -> [{line, sentence}, ...], the longest first

// Awaited before the first node is made.
export async function loadWords() {
  const read = async (name) => (await fetch(new URL(name, import.meta.url))).json();
  try {
    [words, reports] = await Promise.all([read("qrlora_words.json"), read("qrlora_reports.json")]);
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

function filled(sentence, values) {
  return sentence.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export function translated(english, values = {}) {
  return filled(words[language()]?.[english] ?? english, values);
}

// "{count} layers" as an expression that finds the value.
function expression(english) {
  const parts = english.split(/\{(\w+)\}/).map((part, place) => {
    return place % 2 ? `(?<${part}>.+?)` : part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  });
  return new RegExp(`^${parts.join("")}$`);
}

function known(locale) {
  if (!patterns.has(locale)) {
    const literal = (english) => english.replace(/\{\w+\}/g, "").length;
    const sorted = Object.entries(reports[locale] ?? {}).sort(([one], [other]) => literal(other) - literal(one));
    patterns.set(
      locale,
      sorted.map(([english, sentence]) => ({ line: expression(english), sentence })),
    );
  }
  return patterns.get(locale);
}

// What the server says of a run, line by line; a line that is none of the known ones stays as it is.
export function translatedReport(text) {
  const locale = language();
  if (!locale) return text;
  return String(text)
    .split("\n")
    .map((line) => {
      for (const { line: pattern, sentence } of known(locale)) {
        const found = pattern.exec(line);
        if (found) return filled(sentence, found.groups ?? {});
      }
      return line;
    })
    .join("\n");
}
