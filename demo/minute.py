"""The template "QR-LoRA in a minute": two adapters, a merge, a sheet, on the toy FLUX that ships with the pack.

    python -m demo.minute    writes example_workflows/QR-LoRA in a minute.{json,jpg}, from a run in a real ComfyUI

Until it runs, its sheet shows the picture of that run.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from . import server as instance
from .concepts import ACT, ENLARGED, MERGED_PROMPT, PACK
from .golden import installed_host
from .graph import Graph, drawn, lane, node, prompt, with_defaults
from .page import Group, Note, View, page
from .toy.features import SIZE

NAME = "QR-LoRA in a minute"
FOLDER = PACK / "example_workflows"
THUMBNAIL = (360, 360)
GRID = "0, 0.5, 1"
SEED = 15  # chosen among 32, see `demo.noise`
PICTURE = "qr_lora_in_a_minute.jpg"  # in web/, where web/qrlora_example.js finds it
TEXT = """**No download, no settings: press Run** (some seconds on a CPU).

Two adapters for a toy FLUX come with this pack, each trained on *one* picture: a style (upright bars in orange and
violet) and a content (a heart).

- **alpha** turns the style, **beta** the content. Change them in *Merge*, press Run again.
- On the sheet every alpha meets every beta. It shows an earlier run until you press Run.
- **act** is *by prompt, one pass each*: the model is asked once for each adapter whose trigger stands in the prompt, so
  that neither draws over the other. *always* is the plain sum: try both with *a &lt;c&gt; in blue dotted style*.

With adapters of your own: the template *Merge style and content*. The orange nodes stand where Load Diffusion Model,
DualCLIPLoader, Load VAE and Load \u0394R Adapter stand there."""
TITLES = {
    "style": "Style <s>",
    "content": "Content <c>",
    "merge": "Merge: turn alpha and beta",
    "picture": "The merge",
    "sheet": "Every alpha and beta",
}
TOY = ("model", "clip", "vae", "style", "content")


def graph() -> Graph:
    """The workflow in API form."""
    nodes: Graph = {
        "model": node("QRLoRAToyModel"),
        "clip": node("QRLoRAToyTextEncoder"),
        "vae": node("QRLoRAToyVAE"),
        "style": node("QRLoRAToyAdapter", adapter="style"),
        "content": node("QRLoRAToyAdapter", adapter="content"),
        "prompt": prompt(MERGED_PROMPT, "merge"),
        "noise": node("EmptySD3LatentImage", width=SIZE * ENLARGED, height=SIZE * ENLARGED, batch_size=1),
        "merge": node("QRLoRAMerge", alpha=1.0, beta=1.0, on_basis_mismatch="stack", act=ACT, **both()),
        "sweep": node("QRLoRAScaleSweep", alphas=GRID, betas=GRID, on_basis_mismatch="stack", act=ACT, **both()),
        **drawn("merge", SEED),
        **drawn("sweep", SEED),
    }
    nodes["picture"] = node("PreviewImage", images=["merge_decode", 0])
    nodes["sheet"] = node(
        "QRLoRAContactSheet",
        images=["sweep_decode", 0],
        labels=["sweep", 1],
        columns=0,
        max_size=512,
        title=["sweep", 2],
        filename_prefix="qr-lora-in-a-minute",
    )
    return nodes


def both() -> dict[str, Any]:
    return {"delta_r_style": ["style", 0], "delta_r_content": ["content", 0]}


def template(object_info: dict[str, Any]) -> dict[str, Any]:
    """The page."""
    groups = [
        Group("1. A model and two adapters", [["style", "content", "model"], ["clip", "vae", "noise"]]),
        Group("2. Merge: turn alpha and beta, press Run", lane("merge", "picture", "prompt")),
        Group("3. Every alpha and beta on one sheet", lane("sweep", "sheet"), below=True),
    ]
    note = Note(TEXT, 0, (360, 420))
    made = page(graph(), object_info, groups, TITLES, note, View(0.52, 0))
    for name, one in zip(graph(), made["nodes"]):
        if name in TOY:
            one |= {"color": "#5a3d1e", "bgcolor": "#6f4c26"}
        if name == "sheet":
            one["properties"]["qrlora_example"] = PICTURE
    return made


def main() -> int:
    host = installed_host()
    if host is None:
        print(instance.HOW_TO, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="qr-lora-minute-", ignore_cleanup_errors=True) as scratch:
        with instance.Server(host, instance.make_base(Path(scratch) / "base")) as server:
            info = server.get("/object_info")
            entry = server.queue(with_defaults(graph(), info))
            saved = entry["outputs"]["sheet"]["images"][0]
            sheet = Image.open(server.base / "output" / saved["subfolder"] / saved["filename"]).convert("RGB")
        made = template(info)
    (FOLDER / f"{NAME}.json").write_text(json.dumps(made, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    sheet.thumbnail(THUMBNAIL)
    sheet.save(FOLDER / f"{NAME}.jpg", quality=62, optimize=True, progressive=True)
    sheet.thumbnail((320, 320))
    sheet.save(PACK / "web" / PICTURE, quality=62, optimize=True, progressive=True)
    print(FOLDER / f"{NAME}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
