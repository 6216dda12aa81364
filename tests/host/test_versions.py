"""A server of each older ComfyUI that is at hand: the pack is found as that version finds packs, and does the job."""

import copy
import json

import pytest
from safetensors.torch import load_file

from demo import server as instance
from demo.server import GOLDEN, PACK, ran
from tests.host.test_patching import NODES, older_hosts
from tests.host.test_socket_types import through_a_foreign_node

WORKFLOW = json.loads((PACK / "tests" / "workflows" / "merge_api.json").read_text(encoding="utf-8"))
HELPERS = "QRLoRATest"  # how the names of the helper pack's nodes begin


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """An environment in which a host finds the folder of templates that its version expects.

    Older hosts run with the newest host's packages here, whose template package is laid out differently.
    """
    folder = tmp_path_factory.mktemp("packages")
    (folder / "comfyui_workflow_templates" / "templates").mkdir(parents=True)
    (folder / "comfyui_workflow_templates" / "__init__.py").touch()
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("host", older_hosts())
def test_main_job_on_older_servers(host, templates, tmp_path):
    base = instance.make_base(tmp_path / "base")
    golden = load_file(GOLDEN / "tensors.safetensors")
    with instance.Server(host, base, templates) as running:
        assert "IMPORT FAILED" not in running.log.read_text()
        info = running.get("/object_info")
        own = {name for name in info if name.startswith("QRLoRA") and not name.startswith(HELPERS)}
        assert own == {f"QRLoRA{x}" for x in NODES.split()}
        entry = running.queue(WORKFLOW)
        assert (base / "output" / entry["outputs"]["11"]["images"][0]["filename"]).stat().st_size > 100
        output = load_file(base / "output" / "out.safetensors")["out"]
        assert float((output - golden["merged.0.9.1.0.out"]).abs().max()) < 1e-4
        graph = copy.deepcopy(WORKFLOW)
        graph["4"]["inputs"]["alpha"] = 0.5
        again = ran(running.queue(graph))
        assert {"4", "5"} <= again and not again & {"1", "2", "3"}
        running.queue(through_a_foreign_node())
