// Elements on nodes that are only looked at: never part of the workflow, neither a widget value nor an input of the
// prompt.

// What the canvas keeps free around such an element; without it a picture below would begin under a text.
const MARGIN = 10;

// Put an element below a node's widgets. `label`: what the page's list of parameters calls it; `height`: of the element,
// in pixels; `options`: more of the host's addDOMWidget.
export function addElement(node, { name, label, element, height, margin = MARGIN, ...options }) {
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    margin,
    getMinHeight: () => height + 2 * margin,
    getMaxHeight: () => height + 2 * margin,
    ...options,
  });
  widget.serialize = false;
  widget.label = label;
  // That list writes the width of its own column here, and the classic renderer would then draw the element as wide.
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {}, configurable: true });
  return widget;
}

// Make room on the node for what it holds now; it may be larger already.
export function makeRoom(node, least = 0) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, least), Math.max(node.size[1], height)]);
}
