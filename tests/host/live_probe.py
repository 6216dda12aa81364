"""Run inside ComfyUI's interpreter: `live_probe.py HOST BASE RESULT`. Live application on small FLUX models."""

import json
import os
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PACK / "tests" / "host"))
from in_host import Host, load_module

at = Host(sys.argv[1:4])

import comfy.model_management as management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.utils
import qr_lora_pack.nodes.host.application as application
import qr_lora_pack.nodes.host.live as live
import qr_lora_pack.nodes.host.live_store as live_store
import qr_lora_pack.nodes.host.patches as patches
import qr_lora_pack.nodes.host.steps as steps
import qr_lora_pack.qrlora_core as core
import torch

FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PROJ = "diffusion_model.double_blocks.0.img_attn.proj.weight"
weights = comfy.utils.load_torch_file(str(at.golden / "base_bfl.safetensors"))
tensors = comfy.utils.load_torch_file(str(at.golden / "tensors.safetensors"))
style, content, full_qr = (
    core.MergeRecipe.of(core.open_adapter(at.golden / f"official_{name}.safetensors"))
    for name in ("style", "content", "qr")
)
recipe = core.merge(style, 0.9, content, 1.0)
torch.manual_seed(0)
LATENT = torch.randn(1, 16, 8, 8)
EMBEDS = torch.randn(3, 6, tensors["input.encoder_hidden_states"].shape[-1])
POOLED = tensors["input.pooled_projections"][:1]


def model(kind="fp32", state=None):
    state = {key: value.clone() for key, value in (state or weights).items()}
    options = {"dtype": FP8[kind]} if kind in FP8 else {}
    if kind == "bf16":
        state = {key: value.bfloat16() for key, value in state.items()}
    if kind == "scaled_fp8":
        for key in [key for key in state if key.endswith(".weight") and "blocks" in key and state[key].ndim == 2]:
            scale = state[key].abs().max() / 448
            state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
            state[key.replace(".weight", ".scale_weight")] = scale.float()
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return comfy.sd.load_diffusion_model_state_dict(state, model_options=options)


QUANTISED = {
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {}),
    "int8": ("int8_tensorwise", {}),
    "int8_convrot": ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 64}),
}


def quantised(kind):
    """A model whose blocks are stored as the host's own quantised files are."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    name, more = QUANTISED[kind]
    state = {}
    for key, value in weights.items():
        if value.dim() != 2 or "_blocks." not in key:
            state[key] = value.clone()
            continue
        rows = {"per_channel": True} if "convrot" in more else {}
        packed = QuantizedTensor.from_float(value.float(), QUANT_ALGOS[name]["comfy_tensor_layout"], **more, **rows)
        for suffix, tensor in packed.state_dict(key).items():
            scales = getattr(torch, "float8_e8m0fnu", None)
            state[suffix] = (tensor.view(torch.uint8) if tensor.dtype == scales else tensor).contiguous()
        config = list(json.dumps({"format": name, **more}).encode())
        state[key.removesuffix("weight") + "comfy_quant"] = torch.tensor(config, dtype=torch.uint8)
    return comfy.sd.load_diffusion_model_state_dict(state)


def cond(index=0, prompt=None):
    mark = {} if prompt is None else {steps.PROMPT: prompt}
    return [[EMBEDS[index : index + 1], {"pooled_output": POOLED, "guidance": 3.5, **mark}]]


@torch.no_grad()
def sample(patcher, positive=None, negative=None, cfg=1.0, count=1, sampler="euler", callback=None):
    return comfy.sample.sample(
        patcher, LATENT, count, cfg, sampler, "simple", positive or cond(), negative or cond(1),
        torch.zeros_like(LATENT), disable_pbar=True, callback=callback,
    )  # fmt: skip


def apply(patcher, terms=recipe, strength=1.0, mode="live", residual=None):
    return application.apply_recipe(patcher, terms, strength, residual, mode)[0]


def gap(one, other):
    return float((one.double() - other.double()).abs().max())


def relative(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm())


def hooks(patcher):
    return sum(
        isinstance(hook, live._Hook) for module in patcher.model.modules() for hook in module._forward_hooks.values()
    )


def equal_to_patched():
    patcher, found = model(), {}
    base = sample(patcher)
    for alpha, beta in ((0.0, 1.0), (0.5, 0.25), (0.9, 1.0), (-0.7, 0.3)):
        terms = core.merge(style, alpha, content, beta)
        patched, alive = sample(apply(patcher, terms, mode="patch")), sample(apply(patcher, terms))
        found[f"{alpha} {beta}"] = gap(patched, alive) / gap(patched, base)
    turned = {
        name: core.AdapterLayer(torch.linalg.qr(torch.randn_like(layer.up)).Q, layer.down)
        for name in style.adapters[0].layers
        for layer in [style.adapters[0].layer(name)]
    }
    other = core.MergeRecipe.of(core.Adapter.from_tensors("other", turned, 16))
    scale = core.BlockScale(attention=0.5, feed_forward=2.0, single=-1.0)
    cases = {
        "two bases": core.merge(style, 0.9, other, 1.3),
        "full qr": full_qr,
        "full qr and style": core.merge(full_qr, 0.5, style, 1.0),
        "aligned": core.merge(style, 1.0, other, 1.0, "align"),
        "block scale": core.merge(style.block_scaled(scale), 1.0, content, 0.5),
    }
    for name, terms in cases.items():
        patched, alive = sample(apply(patcher, terms, mode="patch")), sample(apply(patcher, terms))
        found[name] = gap(patched, alive) / gap(patched, base)
    chained = apply(apply(patcher, style, 0.9), content, 1.0)
    found["two nodes"] = gap(sample(chained), sample(apply(patcher))) / gap(sample(apply(patcher)), base)
    found["strength"] = gap(sample(apply(patcher, strength=0.5)), sample(apply(patcher, recipe.scaled(0.5))))
    found["off"] = gap(sample(apply(patcher, core.merge(style, 0.0, content, 0.0))), base)
    return found


def storages():
    """Against the exact answer: the weights as the host computes them plus the exact update, all in float32."""
    found = {}
    try:
        import comfy.quant_ops

        more = list(QUANTISED) if hasattr(comfy.quant_ops, "QuantizedTensor") else []
    except ImportError:
        more = []
    for kind in ("fp32", "bf16", "fp8_e4m3fn", "fp8_e5m2", "scaled_fp8", *more):
        patcher = quantised(kind) if kind in QUANTISED else model(kind)
        read = dict(weights)
        for key in weights:
            try:
                weight = comfy.utils.get_attr(patcher.model, f"diffusion_model.{key}")
            except AttributeError:
                continue  # a norm that the model calls otherwise; it is stored as it is
            read[key] = (weight.dequantize() if "Quantized" in type(weight).__name__ else weight).detach().float()
        exact_base = model(state=read)
        exact, before = sample(apply(exact_base, mode="patch")), sample(exact_base)
        entry = {
            "live": relative(sample(apply(patcher)), exact),
            "patch": relative(sample(apply(patcher, mode="patch")), exact),
            "base": relative(sample(patcher), before),
            "effect": relative(before, exact),
        }
        entry["auto"] = application.apply_recipe(patcher, recipe, 1.0)[1]
        found[kind] = entry
    return found


def leaves_nothing():
    patcher, found = model(), {}
    state = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    clone = apply(patcher)
    base = sample(patcher)
    sample(clone)
    found["while loaded"] = hooks(patcher)
    found["modules"] = len(clone.get_attachment(live.KEY).store.layout)
    found["base again"] = gap(sample(patcher), base)
    found["after the base"] = hooks(patcher)
    sample(clone)
    for alpha in (0.1, 0.2, 0.3):
        clone = apply(patcher, core.merge(style, alpha, content, 1.0))  # the former clone dies while it is loaded
        sample(clone)
    found["after turning"] = hooks(patcher)
    found["turned"] = gap(sample(clone), sample(apply(patcher, core.merge(style, 0.3, content, 1.0), mode="patch")))
    later = clone.clone()
    later.model_options["transformer_options"]["another"] = True
    sample(later)
    found["after a clone"] = hooks(patcher)
    found["clone"] = gap(sample(later), sample(clone))

    def fail(*_):
        raise RuntimeError("in the middle of a sampling")

    try:
        sample(clone, count=3, callback=fail)
    except RuntimeError as error:
        found["raised"] = str(error)
    found["table after an error"] = len(clone.get_attachment(live.KEY).table)
    found["after an error"] = gap(sample(patcher), base)
    del clone, later
    management.unload_all_models()
    found["after unloading"] = hooks(patcher)
    found["forwards"] = sum("forward" in vars(module) for module in patcher.model.modules())
    found["weights untouched"] = all(
        torch.equal(state[key], value) for key, value in patcher.model.state_dict().items()
    )
    return found


def turning_alpha():
    """What a slider costs: no weight is loaded again, no factor is copied."""
    import gc

    patcher = model()
    first = apply(patcher, core.merge(style, 0.5, content, 1.0))
    sample(first)
    store, loads = first.get_attachment(live.KEY).store, []
    real = comfy.model_patcher.ModelPatcher.load

    def counted(self, *args, **kwargs):
        loads.append(type(self.model).__name__)
        return real(self, *args, **kwargs)

    comfy.model_patcher.ModelPatcher.load = counted
    try:
        second = apply(patcher, core.merge(style, 0.25, content, 0.75))
        sample(second)
    finally:
        comfy.model_patcher.ModelPatcher.load = real
    found = {"same factors": second.get_attachment(live.KEY).store is store, "loads": loads}
    found["patches"] = len(second.patches)
    found["uuid"] = second.patches_uuid == patcher.patches_uuid
    found["counted"] = store.patcher.model_size(), sum(p.nbytes for p in store.parameters())
    found["additional"] = len(second.get_additional_models())
    import weakref

    gone = weakref.ref(store)
    del first, second, store
    management.unload_all_models()
    gc.collect()
    found["factors freed"] = gone() is None
    return found


def composes():
    patcher, found = model(), {}
    file = {
        f"transformer.transformer_blocks.0.attn.to_q.lora_{half}.weight": 0.05 * torch.randn(shape)
        for half, shape in (("A", (4, 128)), ("B", (128, 4)))
    } | {
        f"transformer.transformer_blocks.0.attn.to_out.0.lora_{half}.weight": 0.05 * torch.randn(shape)
        for half, shape in (("A", (4, 128)), ("B", (128, 4)))
    }

    def stock(one):
        return comfy.sd.load_lora_for_models(one, None, file, 0.7, 0)[0]

    want = sample(stock(apply(patcher, mode="patch")))
    effect = gap(want, sample(apply(patcher, mode="patch")))
    found["stock before"] = gap(sample(apply(stock(patcher))), want) / effect
    found["stock after"] = gap(sample(stock(apply(patcher))), want) / effect
    found["patch and live"] = gap(
        sample(apply(apply(patcher, style, 0.9, "patch"), content, 1.0)), sample(apply(patcher))
    )
    bypass = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if bypass is not None:

        def beside(one):
            return bypass(one, None, file, 0.7, 0)[0]

        alone = sample(beside(apply(patcher, mode="patch")))
        found["bypass before"] = gap(sample(apply(beside(patcher))), alone)
        found["bypass after"] = gap(sample(beside(apply(patcher))), alone)
        sample(patcher)
        management.unload_all_models()
        found["hooks after bypass"] = hooks(patcher)

    class Sampling(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    shifted = apply(patcher).clone()
    other = Sampling(shifted.model.model_config)
    other.set_parameters(shift=2.0)
    shifted.add_object_patch("model_sampling", other)
    reference = apply(patcher, mode="patch").clone()
    reference.add_object_patch("model_sampling", other)
    found["model sampling"] = gap(sample(shifted, count=3), sample(reference, count=3))
    found["batch with cfg"] = gap(
        sample(apply(patcher), cfg=3.0, count=2), sample(apply(patcher, mode="patch"), cfg=3.0, count=2)
    )
    low = apply(patcher)
    management.unload_all_models()
    low.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    found["low vram hooks"] = hooks(patcher)
    low.unpatch_model(torch.device("cpu"))
    found["low vram hooks after"] = hooks(patcher)
    return found


def compiles():
    """Under the host's compile node, by the backend that runs what torch.compile sees as it is."""
    try:
        from comfy_api.torch_helpers import set_torch_compile_wrapper
    except ImportError:
        return {}
    import torch._dynamo

    patcher, found = model(), {}

    def compiled(one):
        clone = one.clone()
        names = {"guard_filter_fn": lambda entries: ["transformer_options" not in entry.name for entry in entries]}
        set_torch_compile_wrapper(model=clone, backend="eager", options=names)
        return clone

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    base = sample(patcher)
    found["base"] = gap(sample(compiled(patcher)), base)
    before, found["graphs"] = graphs(), graphs()
    for alpha in (0.9, 0.1):
        terms = core.merge(style, alpha, content, 1.0)
        want = sample(apply(patcher, terms))
        found[f"after {alpha}"] = gap(sample(compiled(apply(patcher, terms))), want)
        found[f"before {alpha}"] = gap(sample(apply(compiled(patcher), terms)), want)
        found["effect"] = gap(want, base)
    moving = apply(patcher, style.scheduled(core.parse_schedule("0: 1, 1: 0")), mode="auto")
    found["schedule"] = gap(sample(compiled(moving), count=4), sample(moving, count=4))
    found["compiled anew"] = graphs() - before
    found["base again"] = gap(sample(compiled(patcher)), base)
    for alpha in (0.9, 0.1):
        patched = apply(patcher, core.merge(style, alpha, content, 1.0), mode="patch")
        found[f"patch {alpha}"] = gap(sample(compiled(patched)), sample(patched))
    return found


def memory_ends():
    """Memory that runs out in a step, while factors are laid out, and while weights are patched."""
    patcher, found = model(), {}
    base, clone = sample(patcher), apply(patcher)
    want = sample(clone)

    class Failing:
        """Stands for a function, and fails at the n-th call from now."""

        def __init__(self, owner, name, error, at):
            self.owner, self.name, self.real, self.error, self.left = owner, name, getattr(owner, name), error, at

        def __enter__(self):
            def act(*args, **kwargs):
                self.left -= 1
                if self.left == 0:
                    raise self.error
                return self.real(*args, **kwargs)

            setattr(self.owner, self.name, act)

        def __exit__(self, *_):
            setattr(self.owner, self.name, self.real)

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        kind = type(error).__name__
        for title, owner, name, mode in (
            ("step", live._Hook, "_add", "live"),
            ("layout", live_store, "term_products", "live"),
            ("patch", patches.RecipePatch, "change", "patch"),
        ):
            terms = core.merge(style, 0.9, content, 1.0 + (title == "layout"))
            with Failing(owner, name, error, 5):
                try:
                    if title == "layout":
                        live_store._stores.pop(patcher.model, None)
                    sample(apply(patcher, terms, mode=mode))
                    found[f"{kind} {title} raised"] = False
                except (torch.OutOfMemoryError, MemoryError):
                    found[f"{kind} {title} raised"] = True
            found[f"{kind} {title} base"] = gap(sample(patcher), base)
            found[f"{kind} {title} hooks"] = hooks(patcher)
            found[f"{kind} {title} again"] = gap(sample(apply(patcher)), want)
            sample(patcher)
    found["table"] = len(clone.get_attachment(live.KEY).table)
    return found


def fits():
    """`auto` takes live where the model does not fit on the card; the card is played, by its size alone."""
    patcher = model()
    size, real = patcher.model_size(), management.get_total_memory
    found = {"processor": application.apply_recipe(patcher, recipe, 1.0)[1]}
    patcher.load_device = torch.device("cuda", 0)  # asked for its kind; nothing is moved
    for title, total in (("small", size - 1), ("large", size + 1)):
        management.get_total_memory = lambda *_, total=total, **__: total
        try:
            found[title] = application._reason_for_live(patcher, recipe, application._places(patcher, recipe), "auto")
        finally:
            management.get_total_memory = real
    return found


def refused():
    patcher, residual = model(), core.Residual(at.golden / "official_residual_fp32.safetensors")
    foreign = {"transformer_blocks.7.attn.to_q": style.adapters[0].layer("transformer_blocks.0.attn.to_q")}
    moving = style.scheduled(core.parse_schedule("0: 1, 1: 0"))
    cases = {
        "residual": lambda: apply(patcher, style, residual=residual),
        "residual and schedule": lambda: apply(patcher, moving, residual=residual, mode="auto"),
        "patch and schedule": lambda: apply(patcher, moving, mode="patch"),
        "foreign layer": lambda: apply(patcher, core.MergeRecipe.of(core.Adapter.from_tensors("x", foreign, 8))),
    }
    found = {}
    for name, act in cases.items():
        try:
            act()
            found[name] = ""
        except core.QRLoRAError as error:
            found[name] = str(error)
    found["auto keeps the residual"] = application.apply_recipe(patcher, style, 1.0, residual)[1]
    found["auto follows the schedule"] = application.apply_recipe(patcher, moving, 1.0)[1]
    return found


def schedules():
    """Each evaluation of a sampling against the model at the strength that the schedule has there."""
    patcher, found = model(), {}
    schedule = core.parse_schedule("0: 1, 0.25: 1, 0.5: 0.2, 0.75: 0.2, 0.75: 0")
    clone = apply(patcher, core.merge(style.scheduled(schedule), 0.8, content, 1.0), mode="auto")
    seen = []
    state = clone.get_attachment(live.KEY)
    real = state.reader.factors

    def noted(options, sigmas):
        table = real(options, sigmas)
        seen.append((float(sigmas.max()), [round(one, 5) for one in table[0]]))
        return table

    state.reader.factors = noted
    sample(clone, count=4)
    found["seen"] = list(seen)
    seen.clear()
    sample(clone, count=4, sampler="heun")
    found["heun"] = list(seen)
    early = sample(apply(patcher, style.scheduled(core.parse_schedule(core.PRESETS["early"])), mode="auto"), count=2)

    # by hand: the adapter in the first of two steps, the base in the second
    def by_hand(first, second):
        half = comfy.sample.sample(
            first, LATENT, 2, 1.0, "euler", "simple", cond(), cond(1), torch.zeros_like(LATENT),
            last_step=1, force_full_denoise=False, disable_pbar=True,
        )  # fmt: skip
        return comfy.sample.sample(
            second, torch.zeros_like(LATENT), 2, 1.0, "euler", "simple", cond(), cond(1), half,
            start_step=1, disable_noise=True, disable_pbar=True,
        )  # fmt: skip

    with torch.no_grad():
        want = by_hand(apply(patcher, style, mode="patch"), patcher)
    found["early"] = gap(early, want)
    found["early differs"] = gap(early, sample(apply(patcher, style, mode="patch"), count=2))
    return found


def gates():
    """Conditioned and unconditioned passes, each by its own text."""
    patcher, found = model(), {}
    gate = core.style_gate(("<s>",), (), None)
    gated = apply(patcher, style.gated(lambda _: gate), mode="auto")
    everywhere = apply(patcher, style, mode="patch")
    base = {index: sample(patcher, cond(index)) for index in (0, 1)}
    on = {index: sample(everywhere, cond(index)) for index in (0, 1)}
    mixed = sample(gated, cond(0, "a cat in <S> style"), cond(1, "blurry"), cfg=3.0)
    found["positive only"] = gap(mixed, base[1] + 3.0 * (on[0] - base[1])) / gap(on[0], base[0])
    swapped = sample(gated, cond(0, "a cat"), cond(1, "(<s>:1.2)"), cfg=3.0)
    found["negative only"] = gap(swapped, on[1] + 3.0 * (base[0] - on[1])) / gap(on[0], base[0])
    found["neither is the base"] = gap(sample(gated, cond(0, "a cat"), cond(1, ""), cfg=3.0), sample(patcher, cfg=3.0))
    unmarked = sample(gated, cond(0), cond(1), cfg=3.0)
    found["unmarked acts"] = gap(unmarked, sample(everywhere, cfg=3.0))
    whole = core.style_gate(("<s>",), (), None, "a cat in <s> style")
    told = apply(patcher, style.gated(lambda _: whole), mode="auto")
    found["told for the graph"] = gap(sample(told, cond(0), cond(1), cfg=3.0), mixed)

    # two pictures at once, conditioned and unconditioned in one batch of four
    pair = torch.cat([LATENT, LATENT.flip(-1)])
    with torch.no_grad():
        batch = comfy.sample.sample(
            gated, pair, 1, 3.0, "euler", "simple", cond(0, "a cat in <S> style"), cond(1, "blurry"),
            torch.zeros_like(pair), disable_pbar=True,
        )  # fmt: skip
    found["two pictures"] = gap(batch[:1], mixed)

    # two clones of one model in turn, as two samplers of one graph use them
    other = apply(patcher, content, mode="live")
    alone = sample(other)
    sample(gated, cond(0, "<s>"))
    found["in turn"] = gap(sample(other), alone)

    # two prompts of one batch, each on a half of the picture, and only one of them asks for the style
    def areas(first, second):
        left = [[one[0], {**one[1], "area": (8, 4, 0, 0), "strength": 1.0}] for one in first]
        right = [[one[0], {**one[1], "area": (8, 4, 0, 4), "strength": 1.0}] for one in second]
        return left + right

    two = sample(gated, areas(cond(0, "<s>"), cond(2, "plain")), cond(1, ""))
    left, right = sample(everywhere, areas(cond(0), cond(2))), sample(patcher, areas(cond(0), cond(2)))
    found["regional left"] = gap(two[..., :4], left[..., :4])
    found["regional right"] = gap(two[..., 4:], right[..., 4:])
    return found


class Clip:
    """A text encoder whose conditioning depends on the text, as far as these checks need one."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return cond(len(text) % 3)


def by_prompt_nodes():
    """The nodes as a graph would call them: prompt, merge by prompt, apply."""
    from qr_lora_pack.nodes.apply import Apply
    from qr_lora_pack.nodes.merge import ACTS, Merge
    from qr_lora_pack.nodes.prompt import PromptNode
    from qr_lora_pack.nodes.schedule import ScheduleNode

    patcher, found = model(), {}

    def merged(act, **more):
        words = {"style_trigger": "<s>", "content_trigger": "<c>"}
        node = Merge.execute(0.9, 1.0, "stack", style, content, act=act, **{**words, **more})
        found[f"merge {act} {sorted(more)}"] = node.ui["text"][0]
        return Apply.execute(patcher, 1.0, node.args[0])

    def prompt(text, **more):
        node = PromptNode.execute(Clip(), text, more.get("insert", False), more.get("terms", core.NOTHING))
        found[f"prompt {text}"] = node.ui["text"][0]
        return node.args

    everywhere, gated, first, apart, _ = (merged(act).args[0] for act in ACTS)
    both, _ = prompt("a <c> dog in <s> style")
    plain, _ = prompt("a dog")
    only, _ = prompt("a <C> dog")
    base = sample(patcher, plain)
    found["both by prompt"] = gap(sample(gated, both), sample(everywhere, both))
    found["plain by prompt"] = gap(sample(gated, plain), base)
    content_alone = apply(patcher, core.merge(core.NOTHING, 0.9, content, 1.0), mode="patch")
    found["content by prompt"] = gap(sample(gated, only), sample(content_alone, only))
    found["effect"] = gap(sample(everywhere, both), sample(patcher, both))
    style_half, content_half = (
        ScheduleNode.execute(preset, "0: 1", "steps", 0.5, one).args[0]
        for preset, one in (("style second", style), ("content first", content))
    )
    by_hand = Apply.execute(patcher, 1.0, core.merge(style_half, 0.9, content_half, 1.0)).args[0]
    found["content first"] = gap(sample(first, both, count=4), sample(by_hand, both, count=4))
    found["content in its pass"] = gap(sample(apart, only), sample(content_alone, only))
    found["plain in passes"] = gap(sample(apart, plain), base)
    found["both in passes"] = gap(sample(apart, both), sample(gated, both))
    told = merged("by prompt", prompt="a <c> dog in <s> style").args[0]
    found["told"] = gap(
        sample(told, cond(0), cond(1), cfg=2.0), sample(gated, both_as(cond(0)), plain_as(cond(1)), cfg=2.0)
    )
    named = core.Adapter.from_tensors(
        "named",
        {name: content.adapters[0].layer(name) for name in content.adapters[0].layers},
        8,
        metadata={"qrlora.trigger": "<c>"},
    )
    _, inserted = prompt("a dog again", insert=True, terms=core.MergeRecipe.of(named))
    found["inserted"] = inserted
    prompt("a cat", terms=core.MergeRecipe.of(named))
    Merge.execute(1.0, 1.0, "stack", style, core.MergeRecipe.of(named), act="by prompt")
    untold = Merge.execute(1.0, 1.0, "stack", style, core.MergeRecipe.of(named), act="by prompt")
    found["untold"] = untold.ui["text"][0]
    return found


def passes():
    """One pass each: predictions composed by hand from models with one adapter, evaluation by evaluation."""
    patcher, found = model(), {}
    separate = core.merge(style.in_own_pass(), 0.6, content.in_own_pass(), 1.5)
    composed = apply(patcher, separate)
    predictions = {}

    def first_step(patcher, name, **more):
        seen = []
        sample(patcher, callback=lambda step, denoised, x, total: seen.append(denoised.clone()), **more)
        predictions[name] = seen[0]

    first_step(patcher, "base")
    for name, one in (("style", style), ("content", content)):
        first_step(apply(patcher, one, mode="patch"), name)
    calls = []

    def counting(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    counted = composed.clone()
    counted.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, counting)
    first_step(counted, "composed", count=2)
    base, *alone = (predictions[name] for name in ("base", "style", "content"))
    expected = base + 0.6 * (alone[0] - base) + 1.5 * (alone[1] - base)
    found["composed"] = relative(predictions["composed"] - base, expected - base)
    found["evaluations"] = len(calls)
    first_step(apply(patcher, core.merge(style, 0.6, content, 1.5)), "weights summed")
    found["not the sum of weights"] = relative(predictions["weights summed"] - base, expected - base)
    # an adapter without a pass of its own, from an earlier node, is part of every pass
    both = apply(apply(patcher, full_qr), separate)
    together = {name: apply(apply(patcher, full_qr, mode="patch"), one, mode="patch") for name, one in
                (("style", style), ("content", content))}  # fmt: skip
    first_step(apply(patcher, full_qr, mode="patch"), "base")
    for name, one in together.items():
        first_step(one, name)
    first_step(both, "composed")
    base, *alone = (predictions[name] for name in ("base", "style", "content"))
    expected = base + 0.6 * (alone[0] - base) + 1.5 * (alone[1] - base)
    found["beside others"] = relative(predictions["composed"] - base, expected - base)
    # a batch of a positive and a negative prompt: each composed
    first_step(composed, "cfg", cfg=2.0)
    for name, one in (("base", patcher), ("style", apply(patcher, style)), ("content", apply(patcher, content))):
        first_step(one, name, cfg=2.0)
    base, *alone = (predictions[name] for name in ("base", "style", "content"))
    expected = base + 0.6 * (alone[0] - base) + 1.5 * (alone[1] - base)
    found["with guidance"] = relative(predictions["cfg"] - base, expected - base)
    # a cache of steps that keeps what it knows by the ids of conditionings, so careful that it skips none
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    plain = sample(composed, count=8)
    for name, kind in (("cached", EasyCacheNode), ("lazily cached", LazyCacheNode)):
        found[name] = gap(sample(kind.execute(composed, 1e-9, 0.0, 1.0, False).args[0], count=8), plain)
    # and a bold one, which skips whole steps: all of their passes
    ran = []
    watch = patcher.model.diffusion_model.img_in.register_forward_pre_hook(lambda *_: ran.append(1))
    skipping = sample(EasyCacheNode.execute(composed, 0.5, 0.0, 1.0, False).args[0], count=8)
    watch.remove()
    found["boldly cached"] = [len(ran), relative(skipping, plain)]
    patched = apply(patcher, core.merge(style, 0.6, content, 1.5), mode="patch")
    bold = sample(EasyCacheNode.execute(patched, 0.5, 0.0, 1.0, False).args[0], count=8)
    found["boldly cached"].append(relative(bold, sample(patched, count=8)))
    # a control whose lists are emptied by the model, as UNets do
    state = composed.get_attachment(live.KEY)
    left = []

    def emptying(x, t, c_concat, c_crossattn, control, options, **kwargs):
        left.append(len(control["output"]))
        control["output"].clear()
        return x

    control = {"output": [LATENT, LATENT]}
    sigma = torch.ones(1)
    live._Steps(state)(emptying, LATENT, sigma, None, None, control, {})
    found["control"] = [left, len(control["output"])]
    return found


def both_as(conditioning):
    return [[one[0], {**one[1], steps.PROMPT: "a <c> dog in <s> style"}] for one in conditioning]


def plain_as(conditioning):
    return [[one[0], {**one[1], steps.PROMPT: ""}] for one in conditioning]


def gguf_pack():
    """ComfyUI-GGUF, named by COMFYUI_GGUF or among the host's own packs; None without it or its package."""
    named = os.environ.get("COMFYUI_GGUF")
    folder = Path(named) if named else Path(sys.path[0]) / "custom_nodes" / "ComfyUI-GGUF"
    if not (folder / "loader.py").is_file():
        return None
    try:
        import gguf  # noqa: F401 - the pack's own requirement
    except ImportError:
        return None
    return load_module("gguf_pack", folder)


def gguf_files():
    """Models of the real GGUF loader against the same numbers in float32 plus the exact update."""
    pack = gguf_pack()
    if pack is None:
        return {}
    import folder_paths
    import gguf
    from gguf_pack.dequant import dequantize_tensor

    found = {}
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Q8_0", "Q5_1", "Q4_0"):
        kind = gguf.GGMLQuantizationType[name]
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "flux")
        for key, weight in weights.items():
            if weight.dim() == 2 and "_blocks." in key and key.endswith(".weight"):
                writer.add_tensor(key, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(key, weight.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (patcher,) = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(f"{name}.gguf")
        read = dict(weights)
        for key in weights:
            try:
                weight = comfy.utils.get_attr(patcher.model, f"diffusion_model.{key}")
            except AttributeError:
                continue
            if hasattr(weight, "tensor_type"):
                read[key] = torch.Tensor(dequantize_tensor(weight, torch.float32)).float()
        exact_base = model(state=read)
        exact, before = sample(apply(exact_base, mode="patch")), sample(exact_base)
        applied, told = application.apply_recipe(patcher, recipe, 1.0)
        entry = {"auto": told, "live": relative(sample(applied), exact), "hooks": hooks(applied)}
        entry["base"] = relative(sample(patcher), before)
        entry["stored"] = relative(before, sample(model()))
        entry["effect"] = relative(before, exact)
        entry["patch"] = relative(sample(apply(patcher, mode="patch")), exact)
        entry["hooks after"] = (sample(patcher), hooks(patcher))[1]
        try:
            application.apply_recipe(
                patcher, style, 1.0, core.Residual(at.golden / "official_residual_fp32.safetensors")
            )
            entry["residual"] = "taken"
        except core.QRLoRAError as error:
            entry["residual"] = str(error)
        found[name] = entry
    return found


CHECKS = [by_prompt_nodes, passes, equal_to_patched, storages, leaves_nothing, turning_alpha, composes, refused]
at.write([*CHECKS, schedules, gates, memory_ends, fits, compiles, gguf_files])
