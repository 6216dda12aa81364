"""The demo in a real ComfyUI: the main job over HTTP, a table against the published numbers, and a page to look at.

python -m demo.golden_in_comfyui [--no-wait]

COMFYUI_PATH says where ComfyUI is, COMFYUI_PYTHON which interpreter runs it.

Everything happens in a scratch folder: the user's own models, workflows and settings are not touched.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from demo import server as instance
from demo.in_comfyui import keep
from demo.server import GOLDEN, PACK, Server
from demo.workflow import editable

WORKFLOW = PACK / "tests" / "workflows" / "merge_api.json"
EXAMPLES = PACK / "example_workflows"
RESIDUAL = "official_residual_fp32.safetensors"
TOLERANCE = 1e-4
LOG = Path("demo_results") / "comfyui.log"  # it stays
ALPHA_BETA = ((0.9, 1.0), (0.0, 0.0), (0.5, 0.25), (1.0, 1.0))
PAGE = "golden_merge"  # the small workflow, and the pack in the scratch folder that offers it as a template
PAGE_PACK = "qrlora_demo"


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when every output equals the published one to 1e-4, 1 when one does not, 2 without a host."""
    parser = argparse.ArgumentParser(prog="demo", description="The main job in a real ComfyUI.")
    parser.add_argument("--no-wait", action="store_true", help="end after the table instead of keeping the server")
    args = parser.parse_args(argv)
    host = instance.find_host()
    if host is None:
        print(instance.HOW_TO, file=sys.stderr)
        return 2
    LOG.parent.mkdir(exist_ok=True)
    wait = not args.no_wait and sys.stdin.isatty()
    with tempfile.TemporaryDirectory(prefix="qr-lora-demo-", ignore_cleanup_errors=True) as scratch:
        base = instance.make_base(Path(scratch) / "base")
        add_page_pack(base)
        server = Server(host, base, log=LOG)
        address = f"{server.url}/?template={PAGE}&source={PAGE_PACK}"
        print(f"page     {address}\n         answers in some ten seconds\nlog      {server.log}")
        print(f"starting ComfyUI from {host}", flush=True)
        with server:
            put_workflows(server)
            worst = print_table(server)
            print(f"\n{'equal' if worst <= TOLERANCE else 'NOT EQUAL'} to the published outputs within {TOLERANCE:g}")
            if wait:
                webbrowser.open(address)
                keep(server)
            else:
                print("ComfyUI ends now, and the page with it", flush=True)
    return int(worst > TOLERANCE)


def add_page_pack(base: Path) -> None:
    """A pack without nodes, so that the address of the page can name the small workflow as a template."""
    folder = base / "custom_nodes" / PAGE_PACK
    (folder / "example_workflows").mkdir(parents=True)
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n", encoding="utf-8")


def put_workflows(server: Server) -> None:
    """The small workflow and the examples, where the browser's workflow list looks."""
    folder = server.base / "user" / "default" / "workflows"
    for path in EXAMPLES.glob("*.json"):
        shutil.copy(path, folder)
    small = editable(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.get("/object_info"))
    for place in (folder, server.base / "custom_nodes" / PAGE_PACK / "example_workflows"):
        (place / f"{PAGE}.json").write_text(json.dumps(small, indent=1), encoding="utf-8")


def print_table(server: Server) -> float:
    """Queue every job, print its largest difference to what the published code computed; the worst of them."""
    golden = load_file(GOLDEN / "tensors.safetensors")
    print(f"\n{'job':<34} {'difference':>11} {'what it changes':>16}")
    worst, picture = 0.0, ""
    for title, workflow, expected in jobs():
        entry = server.queue(workflow)
        picture = picture or entry["outputs"]["11"]["images"][0]["filename"]
        output = load_file(server.base / "output" / "out.safetensors")["out"]
        difference = float((output - golden[expected]).abs().max())
        effect = float((golden[expected] - golden["base.out"]).abs().max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)  # max() would drop a NaN
        print(f"{title:<34} {difference:>11.2e} {effect:>16.2e}", flush=True)
    print(f"\npicture  {server.url}/view?filename={picture}&type=output")
    return worst


def jobs() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(title, workflow, name of the published output): both routes for each alpha and beta, then full QR."""
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for residual in (None, RESIDUAL):
        route = "with residual" if residual else "low rank"
        for alpha, beta in ALPHA_BETA:
            graph = with_residual(workflow, residual)
            graph["4"]["inputs"].update(alpha=alpha, beta=beta)
            yield f"alpha {alpha:g}, beta {beta:g}, {route}", graph, f"merged.{alpha}.{beta}.out"
        graph = with_residual(workflow, residual)
        graph["2"]["inputs"]["delta_r_name"] = "official_qr.safetensors"
        graph["5"]["inputs"]["delta_r"] = ["2", 0]
        yield f"full QR, {route}", graph, "qr.out3"


def with_residual(workflow: dict[str, Any], residual: str | None) -> dict[str, Any]:
    """A copy of the main job, with a residual connected to Apply where one is named."""
    graph = copy.deepcopy(workflow)
    if residual:
        graph["residual"] = {"class_type": "QRLoRALoadResidual", "inputs": {"residual_name": residual}}
        graph["5"]["inputs"]["residual"] = ["residual", 0]
    return graph


if __name__ == "__main__":
    sys.exit(main())
