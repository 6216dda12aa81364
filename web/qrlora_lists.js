// Drop-downs of files, made anew when a node has written one: what R does, without its messages.
import { app } from "../../scripts/app.js";

const PAUSE = 400; // a sweep saves many

let waiting = 0;

export function refreshLists() {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    try {
      await (app.reloadNodeDefs ? app.reloadNodeDefs() : app.refreshComboInNodes?.());
    } catch (error) {
      console.warn("QR-LoRA: the lists of files could not be read anew; press R", error);
    }
  }, PAUSE);
}
