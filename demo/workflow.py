"""A workflow in API form as the browser's own form: nodes with places, sockets and widgets, and links."""

from typing import Any

from qrlora_core import __version__

HOST_VERSION = "0.33.0"  # of the ComfyUI that pages were made with
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
COLUMN, ROW = 360, 60
LINE, LINES = 26, 70  # height of a socket or widget, and what a field of several lines needs more
SHOWN = 280  # height of a picture that a node shows
# What these nodes show below their widgets, once they have run
TALLER = {
    "QRLoRATrain": 330,
    "QRLoRAMerge": 170,
    "QRLoRAPrompt": 110,
    "QRLoRAApply": 110,
    "QRLoRALoadDeltaR": 110,
    "QRLoRAToyAdapter": 110,
    "QRLoRAScaleSweep": 110,
    "QRLoRAContactSheet": SHOWN + 110,
    "LoadImage": SHOWN,
    "SaveImage": SHOWN,
    "PreviewImage": SHOWN,
}


def input_specs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """Input name -> [type, options] of one node of /object_info, in the node's own order."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def is_widget(spec: list[Any]) -> bool:
    """Whether the browser draws a widget for this input; old hosts give a combo as a bare list."""
    forced = len(spec) > 1 and spec[1].get("forceInput")
    return not forced and (isinstance(spec[0], list) or spec[0] in WIDGETS)


def editable(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Make a workflow that the browser opens and edits.

    Args:
        workflow: API form: node id -> class_type and inputs.
        object_info: the host's /object_info.

    Raises:
        KeyError: a node that the host does not have.
    """
    ids = {name: number for number, name in enumerate(workflow, 1)}
    nodes = {name: _node(ids[name], one, object_info[one["class_type"]]) for name, one in workflow.items()}
    links: list[list[Any]] = []
    for name, one in workflow.items():
        for place, socket in enumerate(nodes[name]["inputs"]):
            source, slot = one["inputs"][socket["name"]]
            number = len(links) + 1
            links.append([number, ids[source], slot, ids[name], place, socket["type"]])
            socket["link"] = number
            nodes[source]["outputs"][slot]["links"].append(number)
    _arrange(workflow, nodes)
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(number: int, one: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    specs = input_specs(info)
    values: list[Any] = []
    for name, spec in specs.items():
        if is_widget(spec):
            options = spec[1] if len(spec) > 1 else {}
            given = one["inputs"].get(name)
            values.append(options.get("default") if given is None or isinstance(given, list) else given)
            if options.get("control_after_generate"):
                values.append("fixed")
    linked = [name for name in specs if isinstance(one["inputs"].get(name), list)]
    several = sum(len(spec) > 1 and bool(spec[1].get("multiline")) for spec in specs.values())
    rows = max(len(linked), len(info["output"])) + len(values)
    return {
        "id": number,
        "type": one["class_type"],
        "size": [COLUMN - 40, ROW + LINE * rows + LINES * several + TALLER.get(one["class_type"], 0)],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [{"name": name, "type": specs[name][0], "link": None} for name in linked],
        "outputs": [
            {"name": name, "type": kind, "links": [], "slot_index": index}
            for index, (name, kind) in enumerate(zip(info["output_name"], info["output"]))
        ],
        "properties": {"Node name for S&R": one["class_type"], **origin(one["class_type"])},
        "widgets_values": values,
    }


def origin(class_type: str) -> dict[str, str]:
    """The pack that a node comes from, as the registry knows it: a page that lacks it can offer to install it."""
    if class_type.startswith("QRLoRA"):
        return {"cnr_id": "qr-lora", "ver": __version__}
    return {"cnr_id": "comfy-core", "ver": HOST_VERSION}


def prompt_of(page: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API form of a page without subgraphs, as the browser would send it; the inverse of `editable`."""
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    prompt = {}
    for one in page["nodes"]:
        if one["type"] not in object_info:  # a note
            continue
        values, inputs = iter(one.get("widgets_values") or []), {}
        for name, spec in input_specs(object_info[one["type"]]).items():
            if is_widget(spec):
                inputs[name] = next(values)
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    next(values)
        linked = {socket["name"]: socket["link"] for socket in one.get("inputs", []) if socket.get("link") is not None}
        inputs |= {name: links[link] for name, link in linked.items()}
        prompt[str(one["id"])] = {"class_type": one["type"], "inputs": inputs}
    return prompt


def _arrange(workflow: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
    """Columns from left to right by the longest way from a loader, each filled from top to bottom."""

    def depth(name: str) -> int:
        sources = [value[0] for value in workflow[name]["inputs"].values() if isinstance(value, list)]
        return 1 + max(map(depth, sources)) if sources else 0

    bottom: dict[int, int] = {}
    for name, node in nodes.items():
        column = depth(name)
        top = bottom.get(column, 0)
        node["pos"] = [column * COLUMN, top]
        bottom[column] = top + node["size"][1] + ROW
