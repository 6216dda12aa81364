"""Run inside ComfyUI's interpreter: `probe.py HOST BASE RESULT`. Patches small FLUX models and writes what it saw."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

host, base, result = map(Path, sys.argv[1:4])
sys.argv = ["main.py", "--cpu", "--base-directory", str(base)]
sys.path[0] = str(host)

import comfy.options

comfy.options.enable_args_parsing()
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
import utils.extra_config  # noqa: F401 - as main.py does: older hosts put a module utils before it later

PACK = Path(__file__).resolve().parents[2]
GOLDEN = PACK / "tests" / "golden"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
PROJ = "diffusion_model.double_blocks.0.img_attn.proj.weight"
LINEAR1 = "diffusion_model.single_blocks.0.linear1.weight"
FP8 = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def load_module(name, path):
    """Load a pack as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pack = load_module("qr_lora_pack", PACK)
helpers = load_module("qr_lora_helpers", PACK / "tests" / "host" / "helper_pack")
extension = asyncio.run(pack.comfy_entrypoint())
node_ids = [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]

import qr_lora_pack.nodes.host.application as apply
import qr_lora_pack.nodes.host.places as host_room
import qr_lora_pack.qrlora_core as core

weights = comfy.utils.load_torch_file(str(GOLDEN / "base_bfl.safetensors"))
tensors = comfy.utils.load_torch_file(str(GOLDEN / "tensors.safetensors"))
published = comfy.utils.load_torch_file(str(GOLDEN / "official_merged_a0.9_b1.0.safetensors"))
style, content, full_qr = (
    core.MergeRecipe.of(core.open_adapter(GOLDEN / f"official_{name}.safetensors"))
    for name in ("style", "content", "qr")
)
residual = core.Residual(GOLDEN / "official_residual_fp32.safetensors")
recipe = core.merge(style, 0.9, content, 1.0)
exported = core.save_adapter(core.merged_adapter(recipe), base / "models" / "loras" / "export.safetensors")
lora = comfy.utils.load_torch_file(str(exported))
torch.manual_seed(0)
other_lora = {
    f"transformer.{name}.lora_{half}.weight": 0.05 * torch.randn(shape)
    for name, out in (("transformer_blocks.0.attn.to_q", 128), ("single_transformer_blocks.0.proj_mlp", 512))
    for half, shape in (("A", (4, 128)), ("B", (out, 4)))
}


def model(kind="fp32"):
    state = {key: value.clone() for key, value in weights.items()}
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


def stock(patcher, file, strength=1.0):
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


def ours(patcher, terms=recipe, strength=1.0, rest=None):
    return apply.patch_model(patcher, terms, strength, rest)[0]


def output(patcher):
    return helpers.forward(patcher, tensors)


def numbers(patcher, key):
    weight = comfy.utils.get_attr(patcher.model, key).detach()
    return (
        (weight.dequantize() if hasattr(weight, "qdata") or "Quantized" in type(weight).__name__ else weight)
        .float()
        .clone()
    )


def bits(patcher):
    return {key: numbers(patcher, key) for key in (QKV, PROJ, LINEAR1)}


def same_bits(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def gap(one, other):
    return float((one.double() - other.double()).abs().max())


def relative(one, other):
    return float((one - other).norm() / other.norm())


def golden_outputs():
    found = {}
    patcher = model()
    for name, rest in (("low_rank", None), ("residual", residual)):
        for alpha, beta in ((0.0, 0.0), (0.5, 0.25), (0.9, 1.0), (1.0, 1.0)):
            out = output(ours(patcher, core.merge(style, alpha, content, beta), rest=rest))
            found[f"{name} {alpha} {beta}"] = gap(out, tensors[f"merged.{alpha}.{beta}.out"])
        found[f"{name} qr"] = gap(output(ours(patcher, full_qr, rest=rest)), tensors["qr.out3"])
    found["effect"] = gap(tensors["merged.0.9.1.0.out"], tensors["base.out"])
    return found


def rows():
    patcher = model()
    before = bits(patcher)
    only_v = core.Adapter.from_tensors(
        "v", {n: style.adapters[0].layer(n) for n in ("transformer_blocks.0.attn.to_v",)}, 8
    )
    all_of_single = core.Adapter.from_tensors(
        "s", {n: style.adapters[0].layer(n) for n in style.adapters[0].layers if n.startswith("single")}, 8
    )
    found = {}
    output(ours(patcher, core.MergeRecipe.of(only_v)))
    after = bits(patcher)
    found["v changed"] = gap(after[QKV][256:], before[QKV][256:])
    found["q, k kept"] = torch.equal(after[QKV][:256], before[QKV][:256])
    found["others kept"] = torch.equal(after[PROJ], before[PROJ]) and torch.equal(after[LINEAR1], before[LINEAR1])
    for rest in (None, residual):
        output(ours(patcher, core.MergeRecipe.of(all_of_single), rest=rest))
        after = bits(patcher)
        found[f"single q, k, v changed {rest is not None}"] = gap(after[LINEAR1][:384], before[LINEAR1][:384])
        found[f"mlp rows kept {rest is not None}"] = torch.equal(after[LINEAR1][384:], before[LINEAR1][384:])
    return found


def order():
    found = {}
    for kind in ("fp32", "bf16"):
        patcher = model(kind)
        for name, rest in (("low_rank", None), ("residual", residual)):
            first = output(ours(stock(patcher, other_lora, 0.7), rest=rest))
            last = output(stock(ours(patcher, rest=rest), other_lora, 0.7))
            found[f"{kind} {name}"] = gap(first, last)
            found[f"{kind} {name} effect"] = gap(first, output(ours(patcher, rest=rest)))
    two = ours(ours(model(), style, 0.9, residual), content, 1.0, residual)
    found["two applies"] = gap(output(two), tensors["merged.0.9.1.0.out"])
    halves = ours(ours(model(), full_qr, 0.5, residual), full_qr, 0.5, residual)
    found["two half qr applies"] = gap(output(halves), tensors["qr.out3"])
    return found


def quantised():
    found = {}
    for kind in ("fp32", "bf16", "fp8_e4m3fn", "fp8_e5m2", "scaled_fp8"):
        patcher = model(kind)
        before = bits(patcher)
        want, wanted_weight = tensors["merged.0.9.1.0.out"], published["transformer_blocks.0.attn.to_out.0.weight"]
        entry = {"stock": relative(output(stock(patcher, lora)), want)}
        entry["stock weight"] = relative(numbers(patcher, PROJ), wanted_weight)
        entry["ours"] = relative(output(ours(patcher)), want)
        entry["ours weight"] = relative(numbers(patcher, PROJ), wanted_weight)
        entry["residual"] = relative(output(ours(patcher, rest=residual)), want)
        entry["residual weight"] = relative(numbers(patcher, PROJ), wanted_weight)
        zero = core.merge(style, 0.0, content, 0.0)
        plain = output(patcher)
        entry["restored"] = same_bits(bits(patcher), before)
        entry["zero is nothing"] = torch.equal(output(ours(patcher, zero)), plain) and same_bits(bits(patcher), before)
        entry["strength 0 is nothing"] = torch.equal(output(ours(patcher, recipe, 0.0)), plain)
        entry["dtype restored"] = str(patcher.model.state_dict()[PROJ].dtype)
        found[kind] = entry
    return found


def same_as_export():
    patcher = model()
    live, loaded = ours(patcher), stock(patcher, lora)
    found = {"output": torch.equal(output(live), output(loaded))}
    output(live)
    one = bits(patcher)
    output(loaded)
    found["weights"] = same_bits(one, bits(patcher))
    return found


def low_vram():
    """The host's other way: weights stay where they are and patches run on a copy, in the compute dtype."""
    found = {}
    for name, rest in (("low_rank", None), ("residual", residual)):
        patched = ours(model(), rest=rest)
        call = comfy.model_patcher.LowVramPatch(PROJ, patched.patches)
        weight = call(numbers(patched, PROJ))
        found[name] = relative(weight, published["transformer_blocks.0.attn.to_out.0.weight"])
        half = call(numbers(patched, PROJ).bfloat16())
        found[f"{name} bf16"] = relative(half.float(), published["transformer_blocks.0.attn.to_out.0.weight"])
    return found


def partial_load():
    """A model that does not fit: weights are patched in place or by a function at every use, or some so, some so."""
    found = {}
    for kind in ("fp32", "bf16", "fp8_e4m3fn"):
        patcher = model(kind)
        before = bits(patcher)
        for name, rest in (("low_rank", None), ("residual", residual)):
            whole = relative(output(ours(patcher, rest=rest)), tensors["merged.0.9.1.0.out"])
            for share in (0.0, 0.55):
                comfy.model_management.unload_all_models()
                patched = ours(patcher, rest=rest)
                patched.patch_model(torch.device("cpu"), lowvram_model_memory=1 + int(share * patcher.model_size()))
                entry = {"in place": len(patched.backup), "whole": whole}
                entry["by function"] = sum(bool(getattr(m, "weight_function", None)) for m in patched.model.modules())
                entry["error"] = relative(helpers.run(patched, tensors), tensors["merged.0.9.1.0.out"])
                patched.unpatch_model(torch.device("cpu"))
                entry["restored"] = same_bits(bits(patcher), before)
                found[f"{kind} {name} {share}"] = entry
    return found


def refused():
    """Everything that must stop before the model changes: what was said."""
    patcher = model()
    before, plain = bits(patcher), output(patcher)
    adapter = style.adapters[0]
    layers = {name: adapter.layer(name) for name in adapter.layers}
    first = next(iter(layers))
    nan = layers[first].down.clone()
    nan[0, 0] = float("nan")
    moved = layers | {"transformer_blocks.7.attn.to_q": layers[first]}
    wide = core.AdapterLayer(torch.zeros(256, 8), torch.zeros(8, 256))
    other = core.Adapter.from_tensors(
        "other",
        {n: core.AdapterLayer(torch.linalg.qr(torch.randn_like(x.up)).Q, x.down) for n, x in layers.items()},
        8,
    )
    wrong_r = {n: x._replace(initial=core.Basis(x.up, x.initial.r.flip(1))) for n, x in layers.items()}

    def of(tensors):
        return core.MergeRecipe.of(core.Adapter.from_tensors("bad", tensors, 8))

    cases = {
        "nan": (of(layers | {first: layers[first]._replace(down=nan)}), None),
        "foreign layer": (of(moved), None),
        "wrong shape": (of(layers | {first: wide}), None),
        "foreign residual": (core.MergeRecipe.of(other), residual),
        "foreign R": (of(wrong_r), residual),
    }
    found = {}
    for name, (terms, rest) in cases.items():
        try:
            ours(patcher, terms, rest=rest)
            found[name] = ""
        except core.QRLoRAError as error:
            found[name] = str(error)
    try:
        swapped = {"norm_out.linear": core.AdapterLayer(torch.zeros(256, 8), torch.zeros(8, 128))}
        ours(patcher, of(swapped))
        found["rearranged"] = ""
    except core.QRLoRAError as error:
        found["rearranged"] = str(error)
    found["family"] = host_room.model_family(patcher).name
    found["published"] = sorted(target.name for target in host_room.published_layers(patcher)) == sorted(layers)
    found["unchanged"] = (
        not patcher.patches and torch.equal(output(patcher), plain) and same_bits(bits(patcher), before)
    )
    table = comfy.lora.model_lora_keys_unet(patcher.model, {})
    places = host_room.place_layers(patcher, adapter.targets)
    found["host table"] = all(
        table[f"transformer.{name}"] == host_room.patch_key(place) for name, place in places.items()
    )
    return found


def full_qr_portable():
    """Our own full-QR file holds the initial Q and R too, so any LoRA loader adds the right difference."""
    adapter, patcher = full_qr.adapters[0], model()
    places = host_room.place_layers(patcher, adapter.targets)
    layers = {}
    for name, info in adapter.layers.items():
        up, down, _ = adapter.layer(name)
        initial = core.decompose(host_room.own_weight(patcher, places[name])[0], info.rank)
        layers[name] = core.AdapterLayer(up, down, initial)
    whole = core.Adapter.from_tensors("whole", layers, 8, method="qr")
    path = core.save_adapter(whole, base / "models" / "loras" / "whole.safetensors")
    terms = core.MergeRecipe.of(core.open_adapter(path))
    return {
        "method": terms.adapters[0].method,
        "ours": gap(output(ours(patcher, terms)), tensors["qr.out3"]),
        "with residual": gap(output(ours(patcher, terms, rest=residual)), tensors["qr.out3"]),
        "stock": gap(output(stock(patcher, comfy.utils.load_torch_file(str(path)))), tensors["qr.out3"]),
    }


def cancelled():
    """Cancel in the middle of Save FLUX Residual: which files are left, and what the exception was."""
    import comfy.model_management as management
    from qr_lora_pack.nodes.save_residual import SaveResidual

    calls, real = [], management.throw_exception_if_processing_interrupted

    def cancel_at_the_fifth_layer():
        calls.append(1)
        if len(calls) == 5:
            raise management.InterruptProcessingException()

    management.throw_exception_if_processing_interrupted = cancel_at_the_fifth_layer
    before = sorted(path.name for path in (base / "models" / "qrlora").iterdir())
    try:
        SaveResidual.execute(model(), 8, "float32", "cancelled", style)
        said = ""
    except management.InterruptProcessingException as error:
        said = type(error).__name__
    finally:
        management.throw_exception_if_processing_interrupted = real
    after = sorted(path.name for path in (base / "models" / "qrlora").iterdir())
    patched = stock(model(), other_lora)
    try:
        SaveResidual.execute(patched, 8, "float32", "patched", style)
        refused_patched = ""
    except core.QRLoRAError as error:
        refused_patched = str(error)
    return {"exception": said, "layers": len(calls), "left": after == before, "patched": refused_patched}


def nothing_connected():
    """Every adapter bypassed: the model stays as it is, and the node says so."""
    patcher = model()
    clone, said = apply.patch_model(patcher, core.NOTHING, 1.0)
    one_left = core.merge(core.NOTHING, 0.9, content, 1.0)
    return {
        "same": torch.equal(output(clone), output(patcher)) and not clone.patches,
        "said": said,
        "one left": gap(output(ours(patcher, one_left)), output(ours(patcher, content))),
    }


def exports():
    """bf16 and fewer columns, through the stock loader."""
    import qr_lora_pack.nodes.save as save_room

    patcher, found = model(), {}
    whole = output(ours(patcher))
    effect = gap(whole, output(patcher))
    for name, settings in (("bfloat16", {}), ("float32", {"dtype": "float32"}), ("rank", {"rank": 4})):
        node = save_room.ExportLoRA.execute(recipe, f"as_{name}", **settings)
        path = base / "models" / "loras" / node.args[0]
        found[name] = gap(output(stock(patcher, comfy.utils.load_torch_file(str(path)))), whole) / effect
        found[f"{name} bytes"] = path.stat().st_size
        found[f"{name} said"] = node.ui["text"][0]
    return found


def full_qr_basis():
    """A full-QR file needs the model's own basis: computed under the bar, kept in the trainer's folder, found again."""
    import weakref

    import comfy.model_management as management
    import qr_lora_pack.nodes.host.initial_basis as bases
    from qr_lora_pack.nodes.host import folders

    kept = lambda: sorted(path.name for path in folders.bases_folder().glob("*"))  # noqa: E731
    file = GOLDEN / "base_bfl.safetensors"

    def loaded():
        return comfy.sd.load_diffusion_model(str(file))

    calls, real = [], management.throw_exception_if_processing_interrupted

    def cancel_at_the_fifth_layer():
        calls.append(1)
        if len(calls) == 5:
            raise management.InterruptProcessingException()

    management.throw_exception_if_processing_interrupted = cancel_at_the_fifth_layer
    try:
        ours(loaded(), full_qr)
        cancelled = False
    except management.InterruptProcessingException:
        cancelled = True
    finally:
        management.throw_exception_if_processing_interrupted = real
    found = {"cancelled": cancelled, "nothing half-written": kept() == []}
    found["first"] = gap(output(ours(loaded(), full_qr)), tensors["qr.out3"])
    found["kept"] = kept()
    found["expected"] = core.basis_name(
        core.model_fingerprint(file), full_qr.adapters[0].targets, full_qr.adapters[0].rank, "exact"
    )
    if not hasattr(loaded(), "cached_patcher_init"):
        return found  # older hosts do not say which file a model came from: kept in memory only
    computed, real_basis = [], bases.initial_basis
    bases.initial_basis = lambda *given: computed.append(given) or real_basis(*given)
    bases._computed = weakref.WeakKeyDictionary()  # as after a restart
    found["second"] = gap(output(ours(loaded(), full_qr)), tensors["qr.out3"])
    found["computed again"] = len(computed)
    (folders.bases_folder() / kept()[0]).write_bytes(b"damaged")
    bases._computed = weakref.WeakKeyDictionary()
    found["damaged"] = gap(output(ours(loaded(), full_qr)), tensors["qr.out3"])
    found["computed for damaged"] = len(computed)
    bases.initial_basis = real_basis
    return found


class StandInBuffer:
    """What ModelPatcherDynamic asks of pinned memory when it is made, where there is no graphics card to pin for."""

    size = 0

    def __init__(self, *_):
        pass


def dynamic():
    """The loader that NVIDIA users get: the host's own classes as far as they go without a card."""
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        return {}
    found = {}
    patched = ours(model())
    call = comfy.model_patcher.LowVramPatch(QKV, patched.patches)
    room = torch.empty(call.memory_required(), dtype=torch.uint8)
    call.prepare(room, None, copy=True, commit=True)  # the patch's tensors move into one gathered block
    expected = comfy.lora.calculate_weight(patched.patches[QKV], numbers(patched, QKV), QKV)
    found["gathered"] = torch.equal(call(numbers(patched, QKV)), expected)
    found["bytes"] = [room.numel(), sum(t.nbytes for t in tensors_of(patched.patches[QKV]))]
    half = numbers(patched, QKV).bfloat16()
    found["bf16"] = relative(call(half).float(), expected)
    comfy.model_patcher.comfy_aimdo.host_buffer.HostBuffer = StandInBuffer
    file = str(GOLDEN / "base_bfl.safetensors")
    plain = comfy.sd.load_diffusion_model(file)
    card = torch.device("meta")  # anything but a CPU, which the class hands over to the plain patcher
    live = comfy.model_patcher.ModelPatcherDynamic(plain.model, card, torch.device("cpu"))
    try:
        apply.plain_clone(live)
    except core.QRLoRAError as error:
        found["cannot reload"] = str(error)
    live.cached_patcher_init = plain.cached_patcher_init
    clone = apply.plain_clone(live)
    found["delegate"] = [type(live).__name__, type(clone).__name__, clone.model is live.model]
    live.model.dynamic_patchers.clear()
    return found


def tensors_of(queue):
    def walk(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            for one in value:
                yield from walk(one)

    for _, patch, *_ in queue:
        yield from walk(patch.weights)


def residual_reads():
    """Weights that stay in RAM are restored at every use: the file is read once for a load, not once for a use."""
    patched = ours(model("fp8_e4m3fn"), rest=residual)
    reads, real = [], core.Residual.weight

    def counted(self, name):
        reads.append(name)
        return real(self, name)

    core.Residual.weight = counted
    try:
        patched.patch_model(torch.device("cpu"), lowvram_model_memory=1)
        loading = len(reads)
        for _ in range(3):
            helpers.run(patched, tensors)
        found = {"at loading": loading, "at three uses": len(reads) - loading}
        patched.detach()
        import qr_lora_pack.nodes.host.restore as restore

        found["held after unloading"] = len(restore._held.get(residual, {}))
    finally:
        core.Residual.weight = real
    return found


checks = [
    nothing_connected,
    exports,
    full_qr_basis,
    dynamic,
    residual_reads,
    full_qr_portable,
    cancelled,
    golden_outputs,
    rows,
    order,
    quantised,
    same_as_export,
]
checks += [low_vram, partial_load, refused]
result.write_text(json.dumps({"nodes": node_ids, **{check.__name__: check() for check in checks}}, indent=1))
