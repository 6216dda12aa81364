"""Run inside ComfyUI's interpreter: `lora_probe.py HOST BASE RESULT`. Ordinary LoRAs on a small model of each family,
through this pack and through the stock loader."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

host, base, result = map(Path, sys.argv[1:4])
wanted = sys.argv[4:]
sys.argv = ["main.py", "--cpu", "--base-directory", str(base)]
sys.path[0:1] = [str(host), str(Path(__file__).parent)]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file
from small_models import model

PACK = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "qr_lora_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
)
pack = importlib.util.module_from_spec(spec)
sys.modules["qr_lora_pack"] = pack
spec.loader.exec_module(pack)
asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())

import qr_lora_pack.nodes.host.application as application
import qr_lora_pack.nodes.host.places as places
import qr_lora_pack.nodes.load_lora as load_lora
import qr_lora_pack.qrlora_core as core
from qr_lora_pack.qrlora_core.families import FAMILIES, find, native_place

BY_NAME = {family.name: family for family in FAMILIES}


def weights(patcher):
    """Every patched weight, computed as the host computes it."""
    state = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, state[key].clone(), key) for key, patches in patcher.patches.items()
    }


def stock(patcher, file, strength):
    return comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(file)), strength, 0)[0]


def opened(file):
    return core.MergeRecipe.of(core.open_lora(file, other_parts="leave out").adapter)


def worst(ours, theirs):
    """The largest relative difference of any weight's change, and how many weights both changed."""
    state = None
    if ours.patches.keys() != theirs.patches.keys():
        odd = sorted(map(str, ours.patches.keys() ^ theirs.patches.keys()))
        raise AssertionError(f"only one of the two patches {odd[:5]}")
    state, one, two = theirs.model.state_dict(), weights(ours), weights(theirs)
    gaps = [float((one[key] - two[key]).norm() / (two[key] - state[key]).norm()) for key in one]
    return max(gaps), len(gaps)


def entries(patcher, name, dialect):
    """Key of a module in a dialect -> (rows, columns...) of what it changes, for every layer that the family lists."""
    family, state = BY_NAME[name], patcher.model.state_dict()
    table = comfy.lora.model_lora_keys_unet(patcher.model, {})
    found = {}
    prefixes = {
        "diffusers": "unet." if name == "SDXL" else "transformer.",
        "native": "diffusion_model.",
        "kohya": "lora_unet_",
        "onetrainer": "lora_transformer_",
        "simpletuner": "lycoris_",
        "peft": "base_model.model.",
    }
    taken = set()
    for key, entry in table.items():
        prefix = prefixes[dialect]
        if not key.startswith(prefix):
            continue
        plain = key.removeprefix(prefix).replace(".processor.to_", ".to_")
        hit = find(family, plain)
        target, rows, function = (*entry, None, None)[:3] if isinstance(entry, tuple) else (entry, None, None)
        if "linear1_qkv" in key or hit is None or function is not None or target not in state or state[target].ndim < 2:
            continue
        native = dialect in ("native", "kohya")
        if native and name != "Qwen-Image" and not hit.native and key.replace(".", "_") != target.replace(".", "_"):
            continue
        if hit.native != native and not native and name != "Qwen-Image" and hit.module != hit.name(hit.layers[0]):
            continue
        place = (target, str(rows))
        if place in taken:
            continue
        taken.add(place)
        shape = tuple(state[target].shape)
        found[key] = (rows[2] if rows else shape[0], *shape[1:])
    return found


def write(path, modules, ends, seed, dtype=torch.float32, alpha=None, rank=3):
    """A random LoRA of these modules."""
    torch.manual_seed(seed)
    tensors = {}
    for key, (out, *rest) in modules.items():
        up, down = 0.1 * torch.randn(out, rank), 0.1 * torch.randn(rank, *rest)
        if len(rest) > 1:
            up = up[:, :, None, None]
        tensors[f"{key}.{ends[0]}"], tensors[f"{key}.{ends[1]}"] = up.to(dtype), down.to(dtype)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


PEFT, KOHYA = ("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")
DIALECTS = {
    "diffusers": {"ends": PEFT},
    "native": {"ends": PEFT, "dtype": torch.bfloat16},
    "kohya": {"ends": KOHYA, "alpha": 1.5, "dtype": torch.float16},
    "onetrainer": {"ends": KOHYA, "alpha": 2, "dtype": torch.float8_e4m3fn},
    "simpletuner": {"ends": KOHYA, "alpha": 3},
    "peft": {"ends": PEFT},
}


def family(name):
    patcher = model(name)
    found = {"recognised": places.model_family(patcher).name, "dialects": {}}
    files = {}
    for number, (dialect, how) in enumerate(DIALECTS.items()):
        modules = entries(patcher, name, dialect)
        if not modules:
            continue
        path = base / "models" / "loras" / f"{name} {dialect}.safetensors"
        files[dialect] = write(path, modules, seed=number, rank=3 + number, **how)
        node = load_lora.LoadLoRA.execute(path.name)
        recipe = node.args[0] if hasattr(node, "args") else node.result[0]
        gap, count = worst(application.patch_model(patcher, recipe, 0.8)[0], stock(patcher, path, 0.8))
        opens = core.open_lora(path)
        known = [layer for layer in recipe.layer_names if find(BY_NAME[name], layer) is not None]
        found["dialects"][dialect] = {
            "gap": gap,
            "weights": count,
            "modules": len(modules),
            "layers": len(recipe.layer_names),
            "known": len(known),
            "family": core.lora_text(opens)[0],
        }
    one, two = list(files)[:1] + list(files)[-1:]
    merged = core.merge(opened(files[one]), 0.7, opened(files[two]), -0.4)
    found["merge"] = worst(
        application.patch_model(patcher, merged, 1.0)[0],
        stock(stock(patcher, files[one], 0.7), files[two], -0.4),
    )[0]
    exported = core.save_adapter(core.merged_adapter(merged), base / "models" / "loras" / f"{name} export.safetensors")
    found["export"] = worst(application.patch_model(patcher, merged, 1.0)[0], stock(patcher, exported, 1.0))[0]
    targets = places.published_layers(patcher)
    found["published"] = len(targets)
    mapped = places.place_layers(patcher, targets)
    found["rows"] = all(native_place(BY_NAME[name], t.name, t.shape) == mapped[t.name] for t in targets)
    state = patcher.model.state_dict()
    target = (
        next(target for target in targets if mapped[target.name].start)
        if any(mapped[target.name].start for target in targets)
        else targets[0]
    )
    weight, _ = places.own_weight(patcher, mapped[target.name])
    place = mapped[target.name]
    start = place.start or 0
    found["own weight"] = torch.equal(
        weight, state["diffusion_model." + place.key].flatten(1)[start : start + target.shape[0]]
    )
    basis = core.decompose(weight, 4)
    found["residual"] = float(
        (core.residual_weight(weight, basis, 1.0) + basis.q @ basis.r - weight).norm() / weight.norm()
    )
    return found


LARGE = {"depth": 19, "depth_single_blocks": 38}  # by its last blocks the host tells some dialects
XLABS = {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv"}
XLABS |= {"proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj"}


def flux_dialects():
    """What only FLUX.1 has: XLabs' names, with single blocks (USO) and without, and BFL's Canny and Depth LoRAs."""
    patcher = model("FLUX.1", **LARGE)
    state = patcher.model.diffusion_model.state_dict()
    double = {
        f"double_blocks.{block}.processor.{theirs}": f"double_blocks.{block}.{ours}"
        for block in range(19)
        for theirs, ours in XLABS.items()
    }
    single = {f"single_blocks.{block}.processor.qkv_lora": f"single_blocks.{block}.linear1_qkv" for block in range(38)}
    single |= {f"single_blocks.{block}.processor.proj_lora": f"single_blocks.{block}.linear2" for block in range(38)}
    shapes = {}
    for theirs, ours in (double | single).items():
        out, columns = state[f"{ours.replace('_qkv', '')}.weight"].shape
        shapes[theirs] = (3 * columns if ours.endswith("linear1_qkv") else out, columns)
    ends = ("up.weight", "down.weight")
    uso = write(base / "models" / "loras" / "uso.safetensors", shapes, ends, seed=21)
    found = {"uso": worst(application.patch_model(patcher, opened(uso), 0.8)[0], stock(patcher, uso, 0.8))}
    only = {theirs: shapes[theirs] for theirs in double}
    xlabs = write(base / "models" / "loras" / "xlabs.safetensors", only, ends, seed=22)
    native = {f"diffusion_model.{double[theirs]}": shape for theirs, shape in only.items()}
    same = write(base / "models" / "loras" / "xlabs native.safetensors", native, KOHYA, seed=22)
    found["xlabs"] = worst(application.patch_model(patcher, opened(xlabs), 0.8)[0], stock(patcher, same, 0.8))
    found["xlabs in the host"] = len(stock(patcher, xlabs, 0.8).patches)
    return found | control(patcher, state)


def control(patcher, state):
    """BFL's: low-rank changes of every linear layer, with biases, norms, and an img_in of twice the width."""
    torch.manual_seed(23)
    tensors, kept = {}, 0
    for key, weight in state.items():
        name, _, end = key.rpartition(".")
        if end == "weight" and weight.ndim == 2:
            out, columns = weight.shape
            columns *= 2 if name == "img_in" else 1
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(3, columns)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, 3)
            tensors[f"{name}.lora_B.bias"] = 0.1 * torch.randn(out)
            kept += name != "img_in"
        elif "_norm." in key:
            tensors[f"{name}.scale"] = torch.ones(weight.shape)
    file = base / "models" / "loras" / "control.safetensors"
    save_file(tensors, file)
    try:
        core.open_lora(file)
        refused = ""
    except core.FileFormatError as error:
        refused = str(error)
    ours = application.patch_model(patcher, opened(file), 0.8)[0]
    theirs = stock(patcher, file, 0.8)
    whole = theirs.model.state_dict()
    one = weights(ours)
    two = {key: comfy.lora.calculate_weight(theirs.patches[key], whole[key].clone(), key) for key in one}
    more = theirs.patches.keys() - ours.patches.keys()
    return {
        "control": [max(float((one[key] - two[key]).norm() / (two[key] - whole[key]).norm()) for key in one), len(one)],
        "control kept": kept,
        "control left": sorted({key.rpartition(".")[2] if "img_in" not in key else "img_in" for key in more}),
        "control refused": refused,
        "control told": core.lora_text(core.open_lora(file, other_parts="leave out")),
    }


def checked(name):
    try:
        return flux_dialects() if name == "dialects" else family(name)
    except Exception as error:  # noqa: BLE001 - one family must not hide the others
        import traceback

        return {"error": f"{error!r}\n{traceback.format_exc()[-1500:]}"}


result.write_text(json.dumps({name: checked(name) for name in wanted or [*BY_NAME, "dialects"]}, indent=1))
