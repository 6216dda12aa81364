"""Puts into every template what a page needs to know before it runs: each node's pack, and where each file goes.

python -m demo.templates    rewrites example_workflows/*.json where something is missing
"""

import json
from typing import Any

from .concepts import PACK
from .workflow import origin

FOLDER = PACK / "example_workflows"
NOTES = ("MarkdownNote", "Note")
HUB = "https://huggingface.co"
FILES = {  # name -> (folder, address)
    "flux1-dev.safetensors": ("diffusion_models", f"{HUB}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    "clip_l.safetensors": (
        "text_encoders",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors",
    ),
    "t5xxl_fp16.safetensors": (
        "text_encoders",
        f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors",
    ),
    "z_image_turbo_bf16.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/diffusion_models/z_image_turbo_bf16.safetensors",
    ),
    "qwen_3_4b.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors",
    ),
    "flux1-dev-kontext_fp8_scaled.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-kontext-dev_ComfyUI/resolve/main/split_files/diffusion_models/"
        "flux1-dev-kontext_fp8_scaled.safetensors",
    ),
    "qwen_image_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/diffusion_models/"
        "qwen_image_fp8_e4m3fn.safetensors",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/"
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "qwen_image_vae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors",
    ),
    "flux-2-klein-4b.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux2-klein/resolve/main/split_files/diffusion_models/flux-2-klein-4b.safetensors",
    ),
    "flux2-vae.safetensors": ("vae", f"{HUB}/Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors"),
    "ae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors",
    ),
}


def completed(page: dict[str, Any]) -> dict[str, Any]:
    """The page with packs, addresses, and a list of files at the end of its note."""
    wanted: dict[str, str] = {}
    for node in page["nodes"]:
        if node["type"] in NOTES:
            continue
        properties = node.setdefault("properties", {})
        properties.update(origin(node["type"]))
        files = [value for value in node.get("widgets_values") or [] if isinstance(value, str) and value in FILES]
        if files and not node["type"].startswith("QRLoRA"):
            properties["models"] = [
                {"name": name, "url": FILES[name][1], "directory": FILES[name][0]} for name in files
            ]
            wanted.update({name: f"- [{name}]({FILES[name][1]}) in *models/{FILES[name][0]}*" for name in files})
    notes = [node for node in page["nodes"] if node["type"] in NOTES]
    if notes and wanted:
        text = notes[0]["widgets_values"][0].split("\n\n**Files**\n")[0].rstrip()
        notes[0]["widgets_values"][0] = text + "\n\n**Files**\n" + "\n".join(wanted.values())
    return page


def main() -> None:
    for path in sorted(FOLDER.glob("*.json")):
        before = path.read_text(encoding="utf-8")
        page = completed(json.loads(before))
        if page != json.loads(before):
            indent = 1 if before.startswith('{\n "') else 2
            path.write_text(json.dumps(page, indent=indent, ensure_ascii=before.isascii()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
