"""Run inside ComfyUI's interpreter: `forward_probe.py HOST BASE RESULT`. What a small model of each family computes
with LoRAs by this pack and by the stock loader, with a residual, and with an exported adapter."""

import sys
import traceback
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))
from in_host import Host

wanted = sys.argv[4:]
host = Host(sys.argv[1:4])
sys.path.append(str(Path(__file__).parent))

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import qr_lora_pack.nodes.create_hook as create_hook
import qr_lora_pack.nodes.host.application as application
import qr_lora_pack.nodes.host.places as places
import qr_lora_pack.nodes.load as load
import qr_lora_pack.nodes.load_lora as load_lora
import qr_lora_pack.nodes.save as save
import qr_lora_pack.nodes.save_residual as save_residual
import qr_lora_pack.nodes.sweep as sweep
import qr_lora_pack.qrlora_core as core
import torch
from qr_lora_pack.qrlora_core.families import cut, find, layer_kind
from safetensors.torch import save_file
from small_models import MODELS, forward, model

LORAS = host.base / "models" / "loras"
RANK = 4
UNKNOWN = "AuraFlow"


def result(node):
    """What a node gave on its first socket, and the text that it shows."""
    return (node.args[0] if hasattr(node, "args") else node.result[0]), node.ui["text"][0]


def stock(patcher, name, strength):
    file = comfy.utils.load_torch_file(str(LORAS / name), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


def block_layers(patcher):
    """Every layer of attention and feed-forward in every block, of all kinds of blocks that the family has."""
    of, found = places.model_family(patcher), []
    for key, weight in patcher.model.diffusion_model.state_dict().items():
        hit = find(of, key.removesuffix(".weight")) if key.endswith(".weight") and weight.ndim > 1 else None
        if hit is None:
            continue
        columns = weight[0].numel()
        pieces = cut(hit, (weight.shape[0], columns)) if len(hit.layers) > 1 else None
        pieces = pieces or {hit.name(hit.layers[0]): (0, weight.shape[0])}
        for name, (_, rows) in pieces.items():
            kind = layer_kind(name, of)
            if kind.block != "other" and kind.part in ("attention", "feed_forward"):
                found.append(core.LayerTarget(name, (rows, columns)))
    return found


def draw_lora(patcher, layers, name, seed, prefix):
    """A LoRA of these layers under diffusers' names."""
    torch.manual_seed(seed)
    tensors, mapped, state = {}, places.place_layers(patcher, layers), patcher.model.state_dict()
    for target in layers:
        module = prefix + (target.name.replace(".", "_") if prefix.endswith("_") else target.name)
        tensors[f"{module}.lora_up.weight"] = 0.3 * torch.randn(target.shape[0], RANK)
        down = 0.1 * torch.randn(RANK, target.shape[1])
        kernel = state[f"diffusion_model.{mapped[target.name].key}"].shape[2:]
        if kernel:  # a convolution
            down = down.reshape(RANK, -1, *kernel)
            tensors[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"][:, :, None, None]
        tensors[f"{module}.lora_down.weight"] = down
    save_file(tensors, LORAS / name)
    return name


def distance(one, other, base):
    """How far apart two outputs are, relative to what the change changes; None when it changes nothing."""
    moved = float((other - base).norm())
    return float((one - other).norm()) / moved if moved > 1e-3 * float(base.norm()) else None


def family(name):
    patcher = model(name)
    layers = places.published_layers(patcher)
    prefix = places.model_family(patcher).portable
    everything = block_layers(patcher)
    files = [draw_lora(patcher, everything, f"{name} {seed}.safetensors", seed, prefix) for seed in (1, 2)]
    recipes = [result(load_lora.LoadLoRA.execute(file))[0] for file in files]
    base = forward(patcher, name)
    theirs = forward(stock(patcher, files[0], 0.8), name)
    found = {"size": float(base.abs().max()), "layers": len(everything), "published": len(layers)}
    for mode in ("patch", "live"):
        ours = forward(application.apply_recipe(patcher, recipes[0], 0.8, None, mode)[0], name)
        found[mode] = distance(ours, theirs, base)
    merged = core.merge(recipes[0], 0.7, recipes[1], -0.4)
    chained = forward(stock(stock(patcher, files[0], 0.7), files[1], -0.4), name)
    found["merge"] = distance(forward(application.apply_recipe(patcher, merged, 1.0)[0], name), chained, base)
    exported = result(save.ExportLoRA.execute(merged, f"{name} merged", dtype="float32"))[0]
    found["export"] = distance(forward(stock(patcher, exported, 1.0), name), chained, base)
    assert torch.equal(forward(patcher, name), base), "the model itself is as it was"
    found |= more_ways(patcher, name, recipes, base)
    return found | residual(patcher, name, layers, base) | scaled(patcher, name, recipes[0], base)


def more_ways(patcher, name, recipes, base):
    """A hook against Apply, the cells of a sweep against merges, a LoRA compared with itself and with another."""
    hooks = result(create_hook.CreateHook.execute(0.8, recipes[0]))[0]
    applied = forward(application.apply_recipe(patcher, recipes[0], 0.8, None, "patch")[0], name)
    hooked = forward(patcher.clone(), name, hooks)
    assert torch.equal(forward(patcher, name), base), "a hook leaves nothing behind"
    cells = sweep.ScaleSweep.execute("0, 0.7", "-0.4", "stack", *recipes)
    gaps = []
    for recipe, alpha in zip((cells.args if hasattr(cells, "args") else cells.result)[0], (0.0, 0.7), strict=True):
        merged = core.merge(recipes[0], alpha, recipes[1], -0.4)
        two = [forward(application.apply_recipe(patcher, one, 1.0, None, "patch")[0], name) for one in (recipe, merged)]
        gaps.append(distance(*two, base))
    own, other = (core.similarity_report(recipes[0].adapters[0], one.adapters[0]) for one in recipes)
    of = places.model_family(patcher)
    return {
        "hook": distance(hooked, applied, base),
        "sweep": max(gaps),
        "compared": len(own["layers"]),
        "with itself": own["summary"]["update"]["min"],
        "with another": other["summary"]["update"]["max"],
        "kinds compared": sorted({core.layer_kind(one["name"], of).block for one in own["layers"]}) if of else [],
    }


def unknown(name):
    """A model of no family here: its LoRAs in, merged, applied, hooked, exported; a residual with an adapter."""
    patcher = model(name)
    assert places.model_family(patcher) is None, "choose another model for this test"
    state = patcher.model.diffusion_model.state_dict()
    torch.manual_seed(9)
    files = []
    for number in (1, 2):
        tensors = {}
        for key, weight in state.items():
            if key.endswith(".weight") and weight.ndim == 2 and "layers." in key:
                module = f"diffusion_model.{key.removesuffix('.weight')}"
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], RANK)
                tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(RANK, weight.shape[1])
        save_file(tensors, LORAS / f"{name} {number}.safetensors")
        files.append(f"{name} {number}.safetensors")
    loaded = [load_lora.LoadLoRA.execute(file) for file in files]
    recipes, base = [result(one)[0] for one in loaded], forward(patcher, name)
    theirs = forward(stock(patcher, files[0], 0.8), name)
    found = {"size": float(base.abs().max()), "layers": len(recipes[0].layer_names), "told": result(loaded[0])[1]}
    for mode in ("patch", "live"):
        ours = forward(application.apply_recipe(patcher, recipes[0], 0.8, None, mode)[0], name)
        found[mode] = distance(ours, theirs, base)
    merged = core.merge(recipes[0], 0.7, recipes[1], -0.4)
    chained = forward(stock(stock(patcher, files[0], 0.7), files[1], -0.4), name)
    found["merge"] = distance(forward(application.apply_recipe(patcher, merged, 1.0)[0], name), chained, base)
    exported = result(save.ExportLoRA.execute(merged, f"{name} merged", dtype="float32"))[0]
    found["export"] = distance(forward(stock(patcher, exported, 1.0), name), chained, base)
    found |= more_ways(patcher, name, recipes, base)
    forward(patcher, name)  # whose weights these are, and not those of a patched clone
    layers = {}
    targets = list(recipes[0].adapters[0].targets)[:8]
    mapped = places.place_layers(patcher, targets)
    for target in targets:
        basis = core.decompose(state[mapped[target.name].key], RANK, method="exact")
        layers[target.name] = core.AdapterLayer(basis.q, 0.3 * torch.randn(RANK, target.shape[1]))
    recipe = core.MergeRecipe.of(core.Adapter.from_tensors(name, layers, RANK))
    file, _ = result(save_residual.SaveResidual.execute(patcher, RANK, "float32", f"{name} residual", recipe))
    rest, _ = result(load.LoadResidual.execute(file))
    plain, whole = (forward(application.apply_recipe(patcher, recipe, 1.0, one)[0], name) for one in (None, rest))
    return found | {"residual": distance(whole, plain, base)}


def residual(patcher, name, layers, base):
    """Decomposed, saved, loaded, restored; an adapter on that basis with it, without it, and by the stock loader."""
    file, _ = result(save_residual.SaveResidual.execute(patcher, RANK, "float32", f"{name} residual"))
    rest, _ = result(load.LoadResidual.execute(file))
    assert torch.equal(forward(patcher, name), base)  # until here a patched clone was loaded, and was not what counts
    mapped, state = places.place_layers(patcher, layers), patcher.model.state_dict()
    rows, tensors = [], {}
    torch.manual_seed(3)
    for target in layers:
        place = mapped[target.name]
        start = place.start or 0
        weight = state[f"diffusion_model.{place.key}"].flatten(1)[start : start + target.shape[0]]
        basis = core.decompose(weight, RANK, method="exact")
        whole = rest.weight(target.name).float() + basis.q @ basis.r
        rows.append(float(((whole - weight).norm(dim=1) / weight.norm(dim=1)).max()))
        tensors[target.name] = core.AdapterLayer(basis.q, 0.3 * torch.randn(RANK, target.shape[1]))
    adapter = core.Adapter.from_tensors(name, tensors, RANK)
    node = save.SaveDeltaR.execute(core.MergeRecipe.of(adapter), f"{name} own", "portable", folder="models/loras")
    saved, _ = result(node)
    by_stock = forward(stock(patcher, saved, 1.0), name)
    again = result(load_lora.LoadLoRA.execute(saved))[0]
    with_residual = forward(application.apply_recipe(patcher, core.MergeRecipe.of(adapter), 1.0, rest)[0], name)
    restored = forward(application.apply_recipe(patcher, core.MergeRecipe.of(adapter), 0.0, rest)[0], name)
    plain = forward(application.apply_recipe(patcher, again, 1.0)[0], name)
    return {
        "rows": max(rows),
        "restored": float((restored - base).norm() / base.norm()),
        "adapter": distance(plain, by_stock, base),
        "residual": distance(with_residual, by_stock, base),
    }


def scaled(patcher, name, recipe, base):
    """Every kind of block alone: together they change what all of them change, and layers outside of blocks nothing."""
    kinds = {}
    targets = [target for adapter in recipe.adapters for target in adapter.targets]
    of = core.family_of_targets(targets)
    for target in targets:
        kinds.setdefault(core.layer_kind(target.name, of).block, []).append(target.name)
    changed = {}
    for kind in kinds:
        others = [one for one in kinds if one != kind]
        scale = core.BlockScale(
            other_ranges=core.parse_kind_ranges(", ".join(f"{one}: 0" for one in others), "other_ranges"), family=of
        )
        out = forward(application.apply_recipe(patcher, recipe.block_scaled(scale), 1.0)[0], name)
        changed[kind] = float((out - base).norm() / base.norm())
    return {"kinds": changed}


def checked(name):
    try:
        return unknown(name) if name == UNKNOWN else family(name)
    except Exception as error:  # noqa: BLE001 - one family must not hide the others
        return {"error": f"{error!r}\n{traceback.format_exc()[-1500:]}"}


if __name__ == "__main__":
    import json

    host.result.write_text(json.dumps({name: checked(name) for name in wanted or MODELS}, indent=1))
