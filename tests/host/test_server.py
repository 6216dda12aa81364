"""Through a real server, over HTTP, as a browser would: the main job, files, refusals, schemas."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from demo.server import GOLDEN, PACK, WorkflowError, ran
from demo.workflow import is_widget

WORKFLOW = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text())
SNAPSHOT = PACK / "tests" / "host" / "object_info.json"


def workflow(alpha=0.9, beta=1.0, **extra):
    graph = copy.deepcopy(WORKFLOW)
    graph["4"]["inputs"].update(alpha=alpha, beta=beta)
    return graph | extra


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def output(server, name="out"):
    return load_file(server.base / "output" / f"{name}.safetensors")["out"]


def gap(one, other):
    return float((one - other).abs().max())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.mark.parametrize("alpha,beta", [(0.9, 1.0), (0.0, 0.0), (0.5, 0.25), (1.0, 1.0)])
@pytest.mark.parametrize("route", ["low_rank", "residual"])
def test_main_job(server, golden, alpha, beta, route):
    graph = workflow(alpha, beta)
    if route == "residual":
        graph["20"] = node("QRLoRALoadResidual", residual_name="official_residual_fp32.safetensors")
        graph["5"]["inputs"]["residual"] = ["20", 0]
    told = (alpha, beta, route) == (0.9, 1.0, "low_rank")
    if told:  # by a file of its own: a node from the server's cache says nothing again
        folder = server.base / "models" / "qrlora"
        shutil.copy(folder / "official_style.safetensors", folder / "not yet read.safetensors")
        graph["2"]["inputs"]["delta_r_name"] = "not yet read.safetensors"
    entry = server.queue(graph)
    picture = entry["outputs"]["11"]["images"][0]
    assert (server.base / "output" / picture["filename"]).stat().st_size > 100
    assert gap(output(server), golden[f"merged.{alpha}.{beta}.out"]) < 1e-4
    if told:
        assert "15 layers" in entry["outputs"]["5"]["text"][0] and "one basis" in entry["outputs"]["4"]["text"][0]
        assert "rank 8" in entry["outputs"]["2"]["text"][0] and "basis " in entry["outputs"]["2"]["text"][0]


@pytest.mark.parametrize("residual", [None, "official_residual_fp32.safetensors", "official_residual_fp16.safetensors"])
def test_full_qr(server, golden, residual):
    graph = workflow()
    graph["2"]["inputs"]["delta_r_name"] = "official_qr.safetensors"
    graph["5"]["inputs"]["delta_r"] = ["2", 0]
    if residual:
        graph["20"] = node("QRLoRALoadResidual", residual_name=residual)
        graph["5"]["inputs"]["residual"] = ["20", 0]
    server.queue(graph)
    assert gap(output(server), golden["qr.out3"]) < 1e-4


def test_turning_alpha_runs_merge_and_apply_only(server):
    server.queue(workflow(0.31, 0.41))
    again = ran(server.queue(workflow(0.32, 0.41)))
    assert {"4", "5"} <= again and not again & {"1", "2", "3", "6", "7", "9"}


def test_saved_and_exported_files(server, golden):
    graph = workflow(
        save=node("QRLoRASaveDeltaR", delta_r=["4", 0], filename="sub/mine", format="portable"),
        public=node("QRLoRASaveDeltaR", delta_r=["4", 0], filename="public", format="published"),
        export=node("QRLoRAExportLoRA", delta_r=["4", 0], filename="mine", dtype="float32"),
        rest=node("QRLoRASaveResidual", model=["1", 0], rank=8, delta_r=["2", 0], dtype="float32", filename="rest"),
        exact=node("QRLoRASaveResidual", model=["1", 0], rank=8, dtype="float32", filename="exact"),
    )
    server.queue(graph)
    live = output(server)
    listed = server.get("/object_info/QRLoRALoadDeltaR")["QRLoRALoadDeltaR"]["input"]["required"]["delta_r_name"]
    names = str(listed).replace("\\\\", "/")
    assert "sub/mine.safetensors" in names and "public.safetensors" in names and "rest.safetensors" not in names
    published = load_file(GOLDEN / "official_residual_fp32.safetensors")
    for name in ("rest", "exact"):
        ours = load_file(server.base / "models" / "qrlora" / f"{name}.safetensors")
        assert ours.keys() == published.keys()
        assert max(gap(ours[key], published[key]) for key in ours) < 1e-5
    stock = workflow(lora=node("LoraLoaderModelOnly", model=["1", 0], lora_name="mine.safetensors", strength_model=1.0))
    stock["12"]["inputs"].update(model=["lora", 0], output="stock")
    server.queue(stock)
    assert torch.equal(output(server, "stock"), live)
    for name in ("sub/mine.safetensors", "public.safetensors"):
        again = workflow()
        again["2"]["inputs"]["delta_r_name"] = name
        again["5"]["inputs"]["delta_r"] = ["2", 0]
        again["12"]["inputs"]["output"] = "again"
        server.queue(again)
        assert torch.equal(output(server, "again"), live), name
    assert gap(live, golden["merged.0.9.1.0.out"]) < 1e-4
    assert not list(server.base.rglob("*.tmp"))


def test_a_name_that_is_taken_gets_a_number_unless_the_file_is_the_same(server):
    said = []
    for strength in (0.2, 0.3, 0.2):
        entry = server.queue(workflow(strength, out=node("QRLoRAExportLoRA", delta_r=["4", 0], filename="taken")))
        said.append(entry["outputs"]["out"]["text"][0])
    assert {path.name for path in (server.base / "models" / "loras").glob("taken*")} == {
        "taken.safetensors",
        "taken_00002.safetensors",
    }
    assert said[0].startswith("saved models/loras/taken.safetensors (") and said[0].endswith("lists of files have it")
    assert said[2] == "models/loras/taken.safetensors holds this already: nothing is written"


def test_many_files_of_a_name_are_told(server):
    for strength in (0.21, 0.22, 0.23, 0.24):
        save = node("QRLoRASaveDeltaR", delta_r=["4", 0], filename="turned", format="portable")
        said = server.queue(workflow(strength, save=save))["outputs"]["save"]["text"][0]
    assert said.startswith("saved models/qrlora/turned_00004.safetensors")
    assert "4 files have this name by now; bypass this node while you turn strengths" in said


@pytest.mark.parametrize("name", ["../vae/test_vae.safetensors", "/etc/passwd", "..\\x", "absent.safetensors"])
def test_names_outside_are_refused(server, name):
    graph = workflow()
    graph["2"]["inputs"]["delta_r_name"] = name
    with pytest.raises(WorkflowError, match="refused|is not in models"):
        server.queue(graph)
    graph = workflow(rest=node("QRLoRALoadResidual", residual_name=name))
    graph["5"]["inputs"]["residual"] = ["rest", 0]
    with pytest.raises(WorkflowError, match="refused|is not in models"):
        server.queue(graph)


def test_an_empty_folder_says_so(server):
    """In the drop-down, and when that is what is queued."""
    away = server.base / "away"
    places = [server.base / "models" / name for name in ("qrlora", "diffusion_models")]
    places.append(server.base / "output" / "qrlora")
    moved = [(folder, away / f"{number}") for number, folder in enumerate(places) if folder.is_dir()]
    away.mkdir()
    for folder, target in moved:
        folder.rename(target)
        folder.mkdir()
    try:
        info = server.get("/object_info")
        for kind, name, words in (
            ("QRLoRALoadDeltaR", "delta_r_name", "none: put adapters into models/qrlora, press R"),
            ("QRLoRALoadResidual", "residual_name", "none: put a residual into models/qrlora, press R"),
            ("QRLoRATrain", "model_name", "none: put a model into models/diffusion_models, press R"),
        ):
            spec = info[kind]["input"]["required"][name]
            assert (spec[1].get("options") or spec[0]) == [words]
        graph = workflow()
        graph["2"]["inputs"]["delta_r_name"] = "none: put adapters into models/qrlora, press R"
        with pytest.raises(
            WorkflowError, match="nothing is chosen.*put adapters into models/qrlora, press R, choose it"
        ):
            server.queue(
                {key: graph[key] for key in ("2",)}
                | {"save": node("QRLoRASaveDeltaR", delta_r=["2", 0], filename="x", format="portable")}
            )
    finally:
        for folder, target in moved:
            folder.rmdir()
            target.rename(folder)
        away.rmdir()
    assert "official_style.safetensors" in str(server.get("/object_info/QRLoRALoadDeltaR"))


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../b", "nul"])
def test_saving_outside_is_refused(server, name):
    before = sorted(server.base.rglob("*.safetensors"))
    for kind in ("QRLoRASaveDeltaR", "QRLoRAExportLoRA"):
        extra = {"format": "portable"} if kind == "QRLoRASaveDeltaR" else {}
        with pytest.raises(WorkflowError, match="refused"):
            server.queue(workflow(save=node(kind, delta_r=["4", 0], filename=name, **extra)))
    assert sorted(server.base.rglob("*.safetensors")) == before


@pytest.mark.parametrize("alpha", [4.5, -5, "nan"])
def test_numbers_out_of_range_are_refused(server, alpha):
    with pytest.raises(WorkflowError):
        server.queue(workflow(alpha))


def test_bad_files_fail_with_the_reason_and_leave_the_server_usable(server, golden):
    folder = server.base / "models" / "qrlora"
    good = (folder / "official_style.safetensors").read_bytes()
    (folder / "damaged.safetensors").write_bytes(good[:5000])
    (folder / "lora.safetensors").write_bytes((server.base / "models" / "vae" / "test_vae.safetensors").read_bytes())
    for name, words in (("damaged", "not a readable safetensors"), ("lora", "is not an adapter")):
        graph = workflow()
        graph["2"]["inputs"]["delta_r_name"] = f"{name}.safetensors"
        with pytest.raises(WorkflowError, match=words):
            server.queue(graph)
    server.queue(workflow(0.5, 0.25))
    assert gap(output(server), golden["merged.0.5.0.25.out"]) < 1e-4


def test_schema_snapshot(server):
    """Ids and input names are contracts. To renew it after a deliberate change, delete the file and run once."""
    live = {}
    for name, info in sorted(server.get("/object_info").items()):
        if name.startswith("QRLoRA") and "Test" not in name:
            inputs = {
                group: {key: value[0] if isinstance(value[0], str) else "COMBO" for key, value in items.items()}
                for group, items in info["input"].items()
                if group != "hidden"
            }
            live[name] = {"inputs": inputs, "outputs": info["output"], "category": info["category"]}
            shown = [value for group in ("required", "optional") for value in info["input"].get(group, {}).values()]
            assert all(value[1].get("tooltip") for value in shown), name
            assert info["description"] and info["display_name"]
    if not SNAPSHOT.is_file():
        SNAPSHOT.write_text(json.dumps(live, indent=1, sort_keys=True) + "\n")
        pytest.fail("the snapshot was missing and has been written; look at it and commit it")
    assert live == json.loads(SNAPSHOT.read_text())


WORKFLOWS = sorted([*PACK.glob("example_workflows/*.json"), *PACK.glob("tests/workflows/*.json")])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_files_fit_the_live_nodes(server, path):
    info = server.get("/object_info")
    graph = json.loads(path.read_text(encoding="utf-8"))
    if "nodes" not in graph:
        for one in graph.values():
            required = info[one["class_type"]]["input"]["required"]
            assert required.keys() <= one["inputs"].keys(), one
        return
    types = {one["id"]: one["type"] for one in graph["nodes"]}
    for one in graph["nodes"]:
        if one["type"] in ("Note", "MarkdownNote"):
            continue
        spec = info[one["type"]]["input"]
        inputs = {**spec.get("required", {}), **spec.get("optional", {})}
        assert {socket["name"] for socket in one.get("inputs", [])} <= inputs.keys(), one["type"]
        widgets = [name for name, value in inputs.items() if is_widget(value)]
        extra = sum(bool(len(v) > 1 and v[1].get("control_after_generate")) for v in inputs.values())
        assert len(one.get("widgets_values", [])) == len(widgets) + extra, one["type"]
    for _, source, slot, target, socket, kind in graph["links"]:
        outputs = info[types[source]]["output"]
        assert outputs[slot] == kind
        wanted = next(one for one in graph["nodes"] if one["id"] == target)["inputs"][socket]
        assert wanted["type"] in (kind, "*") and wanted["link"] is not None


def test_web_files_are_served(server):
    assert any("qr-lora/qrlora.js" in name for name in server.get("/extensions"))


def test_loads_without_diffusers_and_accelerate(bare_server):
    """The trainer's libraries are not needed to use the nodes."""
    bare_server.queue(workflow())
    assert "IMPORT FAILED" not in bare_server.log.read_text()


def test_translations_cover_every_node_and_input(server):
    """English repeats the schema, for tools that read only the files; the others must have the same keys."""
    info = {name: one for name, one in server.get("/object_info").items() if name in json.loads(SNAPSHOT.read_text())}
    english = json.loads((PACK / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, one in info.items():
        inputs = {**one["input"].get("required", {}), **one["input"].get("optional", {})}
        assert english[name]["display_name"] == one["display_name"]
        assert english[name]["description"] == one["description"]
        assert {key: value["tooltip"] for key, value in english[name]["inputs"].items()} == {
            key: value[1]["tooltip"] for key, value in inputs.items()
        }
        assert (PACK / "web" / "docs" / f"{name}.md").is_file()
    for path in PACK.glob("locales/*/nodeDefs.json"):
        other = json.loads(path.read_text(encoding="utf-8"))
        assert {name: one["inputs"].keys() for name, one in other.items()} == {
            name: one["inputs"].keys() for name, one in english.items()
        }
    assert "zh" in server.get("/i18n")
