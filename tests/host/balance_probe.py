"""Run inside ComfyUI's interpreter: `balance_probe.py HOST BASE RESULT`. Pairs measured on small models of families."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent))
from in_host import Host

host = Host(sys.argv[1:4])
sys.path.append(str(Path(__file__).parent))

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import qr_lora_pack.nodes.host.application as application
import qr_lora_pack.nodes.host.balance as balance
import qr_lora_pack.nodes.host.live as live
import qr_lora_pack.nodes.host.places as places
import qr_lora_pack.qrlora_core as core
import torch
from qr_lora_pack.nodes.balance import Balance
from small_models import POOLED, TEXT, model

FAMILIES = ("FLUX.1", "FLUX.2", "Z-Image", "Qwen-Image", "SD3.5", "SDXL")
PROMPTS = core.four_prompts("a <c> dog in <s> style", ["<s>"], ["<c>"])
# the host appends sizes of the picture, as features, to SDXL's pooled output
CHANGED = {"SDXL": {"adm_in_channels": 64 + 6 * 256}}
GRID = (0.5, 1.0)
HALF = torch.tensor([0.7, 0.3, 0.0])


class Clip:
    """A text encoder whose conditioning depends on the text, as far as these checks need one."""

    def __init__(self, name):
        self.name = name

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(sum(text.encode()))
        details = {"guidance": 3.5}
        if self.name in POOLED:
            details["pooled_output"] = torch.randn(1, 64, generator=generator)
        return [[torch.randn(1, 7, TEXT.get(self.name, 64), generator=generator), details]]


def recipe(patcher, seed, trigger):
    torch.manual_seed(seed)
    layers = {
        target.name: core.AdapterLayer(
            torch.linalg.qr(torch.randn(target.shape[0], 4)).Q, 0.5 * torch.randn(4, target.shape[1])
        )
        for target in places.published_layers(patcher)
    }
    return core.MergeRecipe.of(core.Adapter.from_tensors(f"{seed}", layers, 4, metadata={"qrlora.trigger": trigger}))


def pair_of(patcher):
    return balance.Pair(recipe(patcher, 1, "<s>"), recipe(patcher, 2, "<c>"), "stack")


def hooks(patcher):
    return sum(
        isinstance(hook, live._Hook) for module in patcher.model.modules() for hook in module._forward_hooks.values()
    )


def asked(acts=tuple(core.ACTS)):
    return core.needed(GRID, GRID, acts)


def denoised(patcher, clip, text, latent):
    """What the host's own sampler makes of noise in one step to zero, with this prompt."""
    noise = comfy.sample.prepare_noise(latent, 3)
    cond = clip.encode_from_tokens_scheduled(text)
    with torch.no_grad():
        made = comfy.sample.sample_custom(
            patcher, noise, 1.0, comfy.samplers.ksampler("euler"), HALF[[0, 2]], cond, cond, latent, disable_pbar=True
        )
    return patcher.model.process_latent_in(made)


def family(name):
    """The node's numbers against pictures of one step by the host's sampler, with weights that are patched."""
    patcher, clip = model(name, **CHANGED.get(name, {})), Clip(name)
    pair = pair_of(patcher)
    path = balance.Path(1, 64, 1, 3, HALF)
    points, count = balance.measure(patcher, clip, pair, PROMPTS, asked(), path)
    found = {"evaluations": count, "points": len(points), "hooks": hooks(patcher)}
    latent = balance._empty_latent(patcher, 64)
    base = {kind: denoised(patcher, clip, PROMPTS[kind], latent) for kind in ("both", "none")}
    gaps = []
    alone = {}
    for trial in (core.Trial(1.0, 0.0), core.Trial(0.0, 1.0), core.Trial(0.5, 1.0)):
        patched = application.apply_recipe(patcher, pair.at(trial), 1.0, None, "patch")[0]
        for kind in ("both", "none"):
            # one step of length sigma: denoised = x - sigma * v, so the change of v is the change of it over sigma
            effect = (base[kind] - denoised(patched, clip, PROMPTS[kind], latent)).double() / float(HALF[0])
            alone[trial, kind] = effect
            own = float((effect * effect).sum())
            gaps.append(abs(own - points[0].effects[trial, kind].own) / own)
            along = float((effect * alone[core.Trial(1.0, 0.0), kind]).sum())
            gaps.append(abs(along - points[0].effects[trial, kind].style) / own)
    found["gap"] = max(gaps)
    found["size"] = min(float(one.square().sum() / points[0].base["both"]) for one in alone.values())
    (cell,) = core.cells(points, [1.0], [1.0], ["always"])
    found["survival"] = [cell.style, cell.content]
    return found


def families():
    found = {}
    for name in FAMILIES:
        try:
            found[name] = family(name)
        except Exception as error:  # noqa: BLE001 - one family must not hide the others
            import traceback

            found[name] = {"error": f"{error!r}\n{traceback.format_exc()[-1500:]}"}
    return found


def repeated():
    """What is known is not measured again; anything else is."""
    patcher, clip = model("FLUX.1"), Clip("FLUX.1")
    pair, path = pair_of(patcher), balance.Path(2, 64, 1, 0)
    counts = []
    for more in ({}, {}, {"path": path._replace(seed=1)}, {"pair": pair._replace(style=pair.style.scaled(0.5))}):
        one = {"pair": pair, "path": path, **more}
        counts.append(balance.measure(patcher, clip, one["pair"], PROMPTS, asked(["by prompt"]), one["path"])[1])
    counts.append(balance.measure(patcher, clip, one["pair"], PROMPTS, asked(), one["path"])[1])
    counts.append(balance.measure(patcher, clip, one["pair"], PROMPTS, asked(["by prompt"]), one["path"])[1])
    return counts


def alone():
    """One adapter against itself at full strength; and a model that another node has made live already."""
    patcher, clip = model("FLUX.1"), Clip("FLUX.1")
    pair = pair_of(patcher)._replace(content=core.NOTHING)
    points, _ = balance.measure(
        patcher, clip, pair, PROMPTS, core.needed([1.0], [1.0], ["always"]), balance.Path(2, 64, 1, 0)
    )
    (cell,) = core.cells(points, [1.0], [1.0], ["always"])
    found = {"style": cell.style, "purity": cell.style_purity, "content": cell.content}
    found["rounding"] = [rounding(patcher, clip, pair), rounding(patcher, clip, pair._replace(style=core.NOTHING))]
    earlier = recipe(patcher, 7, "<x>")
    changed = application.apply_recipe(patcher, earlier, 0.8, None, "live")[0]
    folded = application.apply_recipe(patcher, earlier, 0.8, None, "patch")[0]
    gaps = []
    for one, other in zip(*(balance.measure(m, clip, pair_of(patcher), PROMPTS, asked(), balance.Path(2, 64, 1, 0))[0]
                            for m in (changed, folded))):  # fmt: skip
        gaps += [abs(one.base[kind] - other.base[kind]) / other.base[kind] for kind in core.ASKED]
        gaps += [abs(one.effects[key].own - part.own) / part.own for key, part in other.effects.items()]
    found["after another live node"] = max(gaps)
    return found


def rounding(patcher, clip, pair):
    """Survival of each on a model whose predictions differ a little from call to call, as in batches of other sizes."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs) * (1 + 1e-4 * len(calls))

    clone = patcher.clone()
    clone.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
    questions = core.needed([1.0], [1.0], ["always"])
    points, _ = balance.measure(clone, clip, pair, PROMPTS, questions, balance.Path(2, 64, 1, 0))
    (cell,) = core.cells(points, [1.0], [1.0], ["always"])
    return [cell.style is None, cell.content is None]


def not_finite(executor, *args, **kwargs):
    return executor(*args, **kwargs) * float("nan")


def stopped():
    """Cancel, and a model that fails, in the middle: nothing stays behind, and the next measurement is whole."""
    patcher, clip = model("FLUX.1"), Clip("FLUX.1")
    found, pair, path = {}, pair_of(patcher), balance.Path(2, 64, 1, 0)
    latent = balance._empty_latent(patcher, 64)
    base = denoised(patcher, clip, "a dog", latent)

    def failing(kind):
        calls = []

        def wrapper(executor, *args, **kwargs):
            calls.append(1)
            if len(calls) == 7:
                if kind == "cancel":
                    comfy.model_management.interrupt_current_processing(True)
                else:
                    raise RuntimeError("in the middle")
            return executor(*args, **kwargs)

        clone = patcher.clone()
        clone.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, wrapper)
        return clone, calls

    for kind in ("cancel", "error"):
        clone, calls = failing(kind)
        try:
            balance.measure(clone, clip, pair, PROMPTS, asked(), path)
        except BaseException as error:  # noqa: BLE001 - the host's is no Exception
            found[kind] = type(error).__name__
        found[f"{kind} calls"] = len(calls)
        found[f"{kind} hooks"] = hooks(patcher)
        found[f"{kind} pending"] = comfy.model_management.processing_interrupted()
        found[f"{kind} base"] = float((denoised(patcher, clip, "a dog", latent) - base).abs().max())
        found[f"{kind} again"] = balance.measure(clone, clip, pair, PROMPTS, asked(), path)[1]
    return found


def refused():
    """What cannot be measured says why."""
    patcher, clip = model("FLUX.1"), Clip("FLUX.1")
    found = {}
    try:
        balance.measure(patcher, clip, pair_of(patcher), PROMPTS, asked(), balance.Path(3, 64, 1, 0, HALF))
    except core.QRLoRAError as error:
        found["sigmas"] = str(error)
    black = patcher.clone()
    black.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, not_finite)
    path = balance.Path(1, 64, 1, 0)
    one = ("balanced", "by prompt, content first", 1.0, 1.0, 2, 0.5, 1.0, 1, 64, 1, 0, "stack")
    pair = pair_of(patcher)
    for kind, ask in {
        "black": lambda: balance.measure(black, clip, pair, PROMPTS, asked(), path),
        "one point": lambda: Balance.execute(patcher, clip, *one, delta_r_style=pair[0], delta_r_content=pair[1]),
    }.items():
        try:
            ask()
        except core.QRLoRAError as error:
            found[kind] = str(error)
    untold = recipe(patcher, 3, "")
    settings = ("balanced", "by prompt", 1.0, 1.0, 2, 0.5, 1.0, 1, 64, 1, 0, "stack")
    try:
        Balance.execute(patcher, clip, *settings, delta_r_style=untold, delta_r_content=untold)
    except core.QRLoRAError as error:
        found["no trigger"] = str(error)
    node = Balance.execute(patcher, clip, *settings)
    found["nothing"] = [len(node.args[0].terms), *node.args[1:3], node.args[4], node.ui["text"][0]]
    return found


if __name__ == "__main__":
    host.write([families, repeated, alone, stopped, refused])
