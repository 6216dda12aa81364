"""Runs in ComfyUI's own Python: a family's small model with an adapter on it, through the host's stock LoRA loader.

`python host_families.py COMFYUI_PATH` takes a JSON object a line, until there are no more, and answers each with a
line: the class of `comfy.supported_models`, its configuration, the files, and whether the model takes a dimension for
frames. Writes the file that the object calls `outputs`.
"""

import json
import sys

sys.path.insert(0, sys.argv[1])
sys.argv[1:] = ["--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
CPU = torch.device("cpu")


def main() -> None:
    for line in sys.stdin:
        work = json.loads(line)
        save_file(computed(work), work["outputs"])
        print("written", flush=True)


def computed(work):
    """What the model gives with and without the adapter, and how many weights are patched."""
    config = getattr(comfy.supported_models, work["class"])(work["config"])
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=CPU)
    state = config.process_unet_state_dict(load_file(work["model"]))
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    patcher = ModelPatcher(model, load_device=CPU, offload_device=CPU)
    given = load_file(work["inputs"])
    adapter = comfy.utils.load_torch_file(work["adapter"], safe_load=True)
    adapted, _ = comfy.sd.load_lora_for_models(patcher, None, adapter, 1.0, 0.0)
    patched = {key if isinstance(key, str) else key[0] for key in adapted.patches}
    return {
        "base": output(patcher, work, given),
        "adapted": output(adapted, work, given),
        "patched": torch.tensor(len(patched)),
    }


def output(patcher, work, given):
    latents = given["latents"].unsqueeze(2) if work["frames"] else given["latents"]
    patcher.patch_model(device_to=CPU)
    try:
        with torch.no_grad():
            model = patcher.model
            height, width = (8 * side for side in given["latents"].shape[2:])
            size = {"height": height, "width": width}
            more = {"y": model.encode_adm(pooled_output=given["pooled"], **size)} if "pooled" in given else {}
            more |= {"guidance": torch.ones(1)} if work["guided"] else {}
            beside = model.concat_cond(noise=latents, device=CPU)
            seen = latents if beside is None else torch.cat([latents, beside], dim=1)
            found = model.diffusion_model(
                seen,
                given["sigmas"] * work["steps"],
                context=given["embeds"],
                num_tokens=given["embeds"].shape[1],
                **more,
            )
    finally:
        patcher.unpatch_model(CPU)
    return found.reshape(given["latents"].shape).contiguous()


main()
