"""Blueprints for the host's library of subgraphs: `subgraphs/*.json`, each one node that holds several of this pack.

python -m demo.blueprints    writes them, by the nodes of a real ComfyUI
"""

import json
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import server as instance
from .concepts import ACT, PACK
from .golden import installed_host
from .graph import Graph, node, with_defaults
from .workflow import editable, input_specs, is_widget

FOLDER = PACK / "subgraphs"
NAMES = uuid.UUID("6f5b1a0e-7c1d-4f0a-9a55-0a2f6c1d9e10")  # so that ids are the same each time
ROW = 20


class Blueprint(NamedTuple):
    """What a blueprint is made of.

    Attributes:
        description: what the library says.
        graph: API form; an input that comes from outside is left out.
        inputs: socket outside -> (node, input) pairs inside.
        outputs: socket outside -> (node, slot).
        shown: (node, widget) pairs that stand on the outside.
        titles: node -> title.
    """

    description: str
    graph: Graph
    inputs: Mapping[str, Sequence[tuple[str, str]]]
    outputs: Mapping[str, tuple[str, int]]
    shown: Sequence[tuple[str, str]]
    titles: Mapping[str, str]


def blueprints() -> dict[str, Blueprint]:
    """Name -> blueprint."""
    both = {"delta_r_style": ["style", 0], "delta_r_content": ["content", 0]}
    merged: Graph = {
        "style": node("QRLoRALoadDeltaR", delta_r_name="style.safetensors"),
        "content": node("QRLoRALoadDeltaR", delta_r_name="content.safetensors"),
        "merge": node("QRLoRAMerge", alpha=0.9, beta=1.0, on_basis_mismatch="stack", **both),
    }
    files = [("style", "delta_r_name"), ("content", "delta_r_name"), ("merge", "alpha"), ("merge", "beta")]
    titles = {"style": "Style", "content": "Content"}
    return {
        "Merge style and content": Blueprint(
            "Two adapters on one model, with a slider for each: alpha for the style, beta for the content. Each acts "
            "where its trigger stands in the prompt, in a pass of its own: up to 3 times the work in a step. Encode "
            "with QR-LoRA Prompt, or connect the text.",
            {
                **merged,
                "merge": {**merged["merge"], "inputs": {**merged["merge"]["inputs"], "alpha": 1.0, "act": ACT}},
                "apply": node("QRLoRAApply", delta_r=["merge", 0], strength=1.0),
            },
            {"model": [("apply", "model")], "prompt": [("merge", "prompt")]},
            {"model": ("apply", 0)},
            [*files, ("merge", "act")],
            titles,
        ),
        "Merge two LoRAs": Blueprint(
            "Any two ordinary LoRAs of one model, of any ranks, with a strength for each.",
            {
                "first": node("QRLoRALoadLoRA", lora_name="first_lora.safetensors"),
                "second": node("QRLoRALoadLoRA", lora_name="second_lora.safetensors"),
                "merge": node(
                    "QRLoRAMerge",
                    alpha=0.8,
                    beta=0.8,
                    delta_r_style=["first", 0],
                    delta_r_content=["second", 0],
                    on_basis_mismatch="stack",
                ),
                "apply": node("QRLoRAApply", delta_r=["merge", 0], strength=1.0),
            },
            {"model": [("apply", "model")]},
            {"model": ("apply", 0)},
            [("first", "lora_name"), ("second", "lora_name"), ("merge", "alpha"), ("merge", "beta")],
            {"first": "First", "second": "Second"},
        ),
        "Merge two adapters into a LoRA": Blueprint(
            "Two adapters and their strengths as one standard LoRA in models/loras, which works without this pack.",
            {**merged, "export": node("QRLoRAExportLoRA", delta_r=["merge", 0], filename="merged")},
            {},
            {"delta_r": ("merge", 0)},
            [*files, ("export", "filename")],
            titles,
        ),
        "Train style and content": Blueprint(
            "A style from one picture and a content from another, one after the other.",
            {
                "options": node("QRLoRATrainOptions"),
                "style": train("a cat in <s> style", "<s>", "style"),
                "content": train("a photo of a <c> dog", "<c>", "content"),
            },
            {
                "clip": [("style", "clip"), ("content", "clip")],
                "vae": [("style", "vae"), ("content", "vae")],
                "style_images": [("style", "images")],
                "content_images": [("content", "images")],
            },
            {"style": ("style", 0), "content": ("content", 0)},
            [(name, widget) for name in titles for widget in ("model_name", "instance_prompt", "steps", "output_name")],
            titles,
        ),
    }


def train(prompt: str, trigger: str, name: str) -> dict[str, Any]:
    return node(
        "QRLoRATrain",
        model_name="flux1-dev.safetensors",
        dataset="none",
        instance_prompt=prompt,
        trigger=trigger,
        output_name=name,
        options=["options", 0],
    )


def made(name: str, one: Blueprint, info: dict[str, Any]) -> dict[str, Any]:
    """The file: a page with one node, and what is inside of it."""
    page = editable(with_defaults(one.graph, info), info)
    nodes = dict(zip(one.graph, page["nodes"]))
    for inner, title in one.titles.items():
        nodes[inner]["title"] = title
    links = [
        dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
        for link in page["links"]
    ]
    inputs, outputs = [], []

    def link(origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        number = len(links) + 1
        ends = {"origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0], "target_slot": target[1]}
        links.append({"id": number, **ends, "type": kind})
        return number

    for place, (socket, targets) in enumerate(one.inputs.items()):
        numbers = []
        for inner, key in targets:
            kind = input_specs(info[one.graph[inner]["class_type"]])[key][0]
            numbers.append(link((-10, place), (nodes[inner]["id"], len(nodes[inner]["inputs"])), kind))
            nodes[inner]["inputs"].append({"name": key, "type": kind, "link": numbers[-1]})
        inputs.append({"id": identity(name, "in", socket), "name": socket, "type": kind, "linkIds": numbers})
    for place, (socket, (inner, slot)) in enumerate(one.outputs.items()):
        output = nodes[inner]["outputs"][slot]
        number = link((nodes[inner]["id"], slot), (-20, place), output["type"])
        output["links"].append(number)
        outputs.append(
            {"id": identity(name, "out", socket), "name": socket, "type": output["type"], "linkIds": [number]}
        )
    right = max(each["pos"][0] + each["size"][0] for each in page["nodes"])
    for sockets, left in ((inputs, -160), (outputs, right + 80)):
        for row, socket in enumerate(sockets):
            socket["pos"] = [left + 100, ROW * (row + 1)]
    definition = {
        "id": identity(name, "graph"),
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": name,
        "category": "QR-LoRA",
        "description": one.description,
        "inputNode": {"id": -10, "bounding": [-160, 0, 120, ROW * (len(inputs) + 2)]},
        "outputNode": {"id": -20, "bounding": [right + 80, 0, 120, ROW * (len(outputs) + 2)]},
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": page["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
    }
    return {
        "revision": 0,
        "last_node_id": len(nodes) + 1,
        "last_link_id": 0,
        "nodes": [outside(name, one, definition, nodes, info)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {},
    }


def outside(
    name: str, one: Blueprint, definition: dict[str, Any], nodes: dict[str, Any], info: dict[str, Any]
) -> dict[str, Any]:
    """The node that stands for the whole."""
    for inner, widget in one.shown:
        assert is_widget(input_specs(info[one.graph[inner]["class_type"]])[widget]), f"{inner}.{widget} is no widget"
    return {
        "id": len(nodes) + 1,
        "type": definition["id"],
        "title": name,
        "pos": [0, 0],
        "size": [340, 60 + 26 * (len(one.shown) + max(len(one.inputs), len(one.outputs)))],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": each["name"], "type": each["type"], "link": None} for each in definition["inputs"]],
        "outputs": [{"name": each["name"], "type": each["type"], "links": []} for each in definition["outputs"]],
        "properties": {"proxyWidgets": [[str(nodes[inner]["id"]), widget] for inner, widget in one.shown]},
        "widgets_values": [],
    }


def identity(*names: str) -> str:
    return str(uuid.uuid5(NAMES, "/".join(names)))


def main() -> int:
    host = installed_host()
    if host is None:
        print(instance.HOW_TO, file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="qr-lora-blueprints-", ignore_cleanup_errors=True) as scratch,
        instance.Server(host, instance.make_base(Path(scratch) / "base")) as server,
    ):
        info = server.get("/object_info")
    FOLDER.mkdir(exist_ok=True)
    for name, one in blueprints().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(made(name, one, info), indent=1) + "\n", encoding="utf-8")
        print(FOLDER / f"{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
