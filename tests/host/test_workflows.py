"""Every value and link of the workflow files against the live nodes, and the page that the demo opens."""

import json
import os

import pytest

from demo.server import PACK, WorkflowError
from demo.workflow import editable, input_specs, is_widget

FILES = sorted([*PACK.glob("example_workflows/*.json"), *PACK.glob("tests/workflows/*.json")])
MERGE = PACK / "tests" / "workflows" / "merge_api.json"
NUMBERS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
FILE_NAME = (".safetensors", ".sft", ".gguf", ".png", ".jpg")  # on the user's disk, not on this one


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def check_value(spec, value, where):
    """A widget's value: of its type, in its range, one of its options (file names aside)."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None:
        assert value in choices or str(value).endswith(FILE_NAME), f"{where}: {value!r} is not in {choices[:5]}"
        return
    assert isinstance(value, NUMBERS[kind]), f"{where}: {value!r} is not {kind}"
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), f"{where}: {value} is out of range"


def check_api(graph, info):
    for name, node in graph.items():
        specs = input_specs(info[node["class_type"]])
        required = info[node["class_type"]]["input"].get("required", {})
        assert required.keys() <= node["inputs"].keys() <= specs.keys(), name
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                made = info[graph[value[0]]["class_type"]]["output"][value[1]]
                assert specs[key][0] in (made, "*"), f"{name}.{key} is {specs[key][0]}, its link {made}"
            else:
                assert is_widget(specs[key]), f"{name}.{key} needs a link"
                check_value(specs[key], value, f"{name}.{key}")


def check_editable(graph, info):
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] >= max(nodes)
    for link, source, slot, target, place, kind in graph["links"]:
        assert link in nodes[source]["outputs"][slot]["links"], f"link {link} does not leave node {source}"
        assert nodes[target]["inputs"][place]["link"] == link, f"link {link} does not reach node {target}"
        assert info[nodes[source]["type"]]["output"][slot] == kind
        assert input_specs(info[nodes[target]["type"]])[nodes[target]["inputs"][place]["name"]][0] in (kind, "*")
    for node in graph["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        specs = input_specs(info[node["type"]])
        linked = {socket["name"] for socket in node.get("inputs", []) if socket.get("link") is not None}
        needed = info[node["type"]]["input"].get("required", {})
        assert {name for name, spec in needed.items() if not is_widget(spec)} <= linked, f"{node['type']} lacks a link"
        values = iter(node.get("widgets_values") or [])
        for name, spec in specs.items():
            if is_widget(spec):
                check_value(spec, next(values), f"{node['type']}.{name}")
                if len(spec) > 1 and spec[1].get("control_after_generate"):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert next(values, None) is None, f"{node['type']} has a value too many"


def test_there_is_an_example():
    assert [path for path in FILES if path.parent.name == "example_workflows"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_workflow_file(info, path):
    graph = read(path)
    (check_editable if "nodes" in graph else check_api)(graph, info)


def test_the_demo_page_is_the_main_job(info):
    graph, page = read(MERGE), editable(read(MERGE), info)
    check_editable(page, info)
    assert len(page["links"]) == sum(isinstance(v, list) for node in graph.values() for v in node["inputs"].values())


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_out_of_the_folder_is_refused(server):
    outside = server.base / "models" / "vae" / "outside.safetensors"
    outside.write_bytes((server.base / "models" / "qrlora" / "official_style.safetensors").read_bytes())
    (server.base / "models" / "qrlora" / "inside.safetensors").symlink_to(outside)
    graph = read(MERGE)
    graph["2"]["inputs"]["delta_r_name"] = "inside.safetensors"
    with pytest.raises(WorkflowError, match="a link leads out of the folder"):
        server.queue(graph)


def test_a_wrong_file_is_found(info):
    """The checks above can fail: a link of another type, a number out of range, a node that is not there."""
    for change in ({"alpha": 9.0}, {"alpha": "much"}, {"delta_r_style": ["1", 0]}, {"more": 1}):
        graph = read(MERGE)
        graph["4"]["inputs"].update(change)
        with pytest.raises(AssertionError):
            check_api(graph, info)
        if "more" not in change and "delta_r_style" not in change:
            with pytest.raises(AssertionError):
                check_editable(editable(graph, info), info)
