"""Inside ComfyUI: another pack's node merges LoRA files into a model, and what it changed is written layer by layer.

    COMFYUI_PYTHON -m benchmarks.fusion.in_host TASK.json

A task names the model, the pack's folder, the layers by diffusers' names, and jobs: LoRA files in, one update out.
Started by `benchmarks.fusion.optimizer`.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.comfy import start_host

_NODE = "LoRAOptimizer"
# All else is as the node has it. FLUX layers by diffusers' names are taken for Qwen-Image's and renamed until nothing
# of them fits, unless its renaming is off; the preset is the one that it has for FLUX.
_SETTINGS = {"normalize_keys": "disabled", "architecture_preset": "dit"}


def main(task_file: str) -> int:
    task = json.loads(Path(task_file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as base:
        start_host(Path(base))
        node_class = _pack(Path(task["pack"])).NODE_CLASS_MAPPINGS[_NODE]
        import comfy.sd
        import comfy.utils
        import torch
        from safetensors.torch import save_file

        for job in task["jobs"]:
            model = comfy.sd.load_diffusion_model(task["model"])
            stack = [
                {"name": Path(file).name, "lora": comfy.utils.load_torch_file(file, safe_load=True), "strength": 1.0}
                for file in job["loras"]
            ]
            with torch.no_grad():
                merged, _, said, *_ = getattr(node_class(), node_class.FUNCTION)(model, stack, 1.0, **_SETTINGS)
                if not merged.patches:
                    sys.exit(f"the pack changed nothing: {said}")
                plain = model
                for lora in stack:
                    plain, _ = comfy.sd.load_lora_for_models(plain, None, lora["lora"], 1.0, 0.0)
                changes, sums = (_changes(one, task["layers"]) for one in (merged, plain))
            size, summed = (sum(float(change.square().sum()) for change in part.values()) for part in (changes, sums))
            output = Path(job["output"])
            print(f"merged {output.stem}: size {(size / summed) ** 0.5:.2f} of the sum's")
            tensors = {}
            for name, change in changes.items():
                tensors |= {f"{name}.up": change, f"{name}.down": torch.eye(change.shape[1])}
            partial = output.with_suffix(".partial")
            save_file(tensors, partial)
            partial.replace(output)
    return 0


def _pack(folder: Path) -> Any:
    """A node pack, imported as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(
        "other_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["other_pack"] = module
    spec.loader.exec_module(module)
    return module


def _changes(patcher: Any, layers: list[str]) -> dict[str, Any]:
    """How much a patched model's weights differ from its own, float32, a part of a fused weight for each layer."""
    import comfy.lora
    import comfy.utils

    places = comfy.lora.model_lora_keys_unet(patcher.model, {})
    whole: dict[str, Any] = {}
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(patcher.model, key).float()
        whole[key] = comfy.lora.calculate_weight(patches, weight.clone(), key) - weight
    changes = {}
    for name in layers:
        place = places[f"transformer.{name}"]
        key, rows = (place, None) if isinstance(place, str) else place
        if key not in whole:
            weight = comfy.utils.get_attr(patcher.model, key).float()
            whole[key] = weight * 0
        changes[name] = (whole[key] if rows is None else whole[key].narrow(*rows)).contiguous()
    return changes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
