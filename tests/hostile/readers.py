"""Everything in this pack that reads a file which somebody else may have written, with good files for it to begin with.

A reader takes a damaged file and either refuses it with an error of the pack, or gives a result that is right; what is
right is checked here against the bytes of the file and not by asking the pack again.
"""

import io
import json
import math
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import qrlora_core as core
from demo.small_flux import GOLDEN
from qrlora_core.basis import open_basis, save_basis
from qrlora_core.storage import TensorFile, TensorSpec
from qrlora_core.writing import header_bytes, verify_checksum
from tests.core.test_merge import NAMES, make
from tests.nodes.pack import load
from train import events
from train.config import EncodeConfig, FitConfig, as_table
from train.data.captions import caption_of
from train.data.pictures import read_picture
from train.model.basis import _opened as opened_basis
from train.model.source import BaseModel
from train.run import checkpoint
from train.settings import load_settings, make_config

from . import mutate

feed, runs, jobs, owner, drawn = (
    load(f"training.{name}") for name in ("feed", "runs", "jobs", "owner", "run_pictures")
)

PARAMETERS = {f"{name}.delta_r": (3, 10) for name in NAMES}


class Reader(NamedTuple):
    """One way in.

    Attributes:
        name: for reports.
        share: how many cases it gets of every hundred, about.
        ending: of its file's name.
        samples: good files.
        mutate: makes a damaged one.
        use: reads it as the pack does, and checks what comes out against the bytes; AssertionError: it is wrong.
    """

    name: str
    share: int
    ending: str
    samples: tuple[bytes, ...]
    mutate: Callable[[bytes, random.Random], bytes]
    use: Callable[[Path, bytes], None]


# What a refusal may be. Whatever else is raised is a fault.
REFUSALS = ("QRLoRAError", "ConfigError", "EventError", "DatasetError")


def is_refusal(error: BaseException) -> bool:
    """By name: the nodes have a copy of the core of their own, as in ComfyUI."""
    return any(kind.__name__ in REFUSALS for kind in type(error).__mro__)


def readers(folder: Path) -> tuple[Reader, ...]:
    """All of them; good files are made in `folder`, which stays in use."""
    adapters, residual, basis = _adapters(folder), _residual(folder), _basis(folder)
    cache, steps = _cache(folder), _checkpoints(folder)
    models = tuple(_models())
    files = (*adapters, residual, basis, cache, steps[0], *models)
    settings = _settings()
    reported = _events()
    return (
        Reader("adapter", 26, ".safetensors", adapters, mutate.safetensors, Adapters(adapters[0], folder)),
        Reader("any LoRA", 8, ".safetensors", tuple(_loras()), mutate.safetensors, use_lora),
        Reader("residual", 8, ".safetensors", (residual,), mutate.safetensors, use_residual),
        Reader("basis", 8, ".safetensors", (basis,), mutate.safetensors, use_basis),
        Reader("training cache", 8, ".safetensors", (cache,), mutate.safetensors, use_cache),
        Reader("checkpoint", 8, ".safetensors", steps[1:], mutate.safetensors, Checkpoints(*steps, folder)),
        Reader("base model", 8, ".safetensors", models, mutate.safetensors, use_model),
        Reader("model folder", 3, ".json", (_model_json(),), mutate.text, ModelFolders(folder, models[0])),
        Reader("any file", 8, ".safetensors", files, mutate.safetensors, use_any),
        Reader("settings", 6, ".json", settings[:2], mutate.text, use_settings),
        Reader("settings, TOML", 3, ".toml", settings[2:], mutate.text, use_settings),
        Reader("events", 6, ".jsonl", (reported,), mutate.text, use_events),
        Reader("results", 4, ".json", tuple(_run_files()), mutate.text, Runs(folder)),
        Reader("owner's file", 1, ".json", (b'{"python": "", "accelerate_config": ""}',), mutate.text, use_owner),
        Reader("picture", 6, ".png", tuple(_pictures()), mutate.anything, use_picture),
        Reader("caption", 1, ".txt", ("\ufeffa <s> caf\u00e9 [trigger]".encode(),), mutate.anything, use_caption),
    )


def verbatim(tensors: Iterable[Tensor], content: bytes) -> None:
    """Whether every tensor stands in the file as it is, and holds nothing but numbers."""
    for tensor in tensors:
        assert bool(torch.isfinite(tensor.float()).all()), "NaN or Inf was read"
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() in content, "other bytes were read"


class Adapters:
    """Open, read, merge with a good one, compare, truncate, save and open again."""

    def __init__(self, good: bytes, folder: Path) -> None:
        (folder / "good").mkdir(exist_ok=True)
        path = folder / "good" / "adapter.safetensors"
        path.write_bytes(good)
        self.good, self.saved = core.open_adapter(path), folder / "good" / "saved.safetensors"

    def __call__(self, path: Path, content: bytes) -> None:
        adapter = core.open_adapter(path)
        layers = {name: adapter.layer(name) for name in adapter.layers}
        for name, layer in layers.items():
            info = adapter.layers[name]
            assert layer.up.shape == (info.shape[0], info.rank) and layer.down.shape == (info.rank, info.shape[1]), name
            assert math.isfinite(info.scaling) and info.scaling != 0
            parts = [layer.up, layer.down, *(layer.initial or ())]
            if adapter.method == "qr" and layer.initial is not None:  # two matrices side by side in one tensor
                parts = list(adapter.update(name)[:2]) if layer.up.dtype == layer.down.dtype else []
            verbatim(parts, content)
        recipe = core.MergeRecipe.of(adapter)
        core.holds("a <c> dog", (core.triggers_of(adapter) or ("x",))[0])
        merged = core.merge(recipe, 0.5, core.MergeRecipe.of(self.good), 1.0)
        core.merge_report(merged)
        whole = core.merged_adapter(merged, initial_of=lambda one, name: core.Basis(*one.layer(name)[:2]))
        small = core.truncated(whole, 2).adapter
        core.similarity_report(whole, self.good)
        core.save_adapter(small, self.saved, overwrite=True)
        again = core.open_adapter(self.saved)
        for name in small.layers:
            assert torch.equal(again.layer(name).up, small.layer(name).up), f"{name} was saved otherwise"


def use_lora(path: Path, content: bytes) -> None:
    """A LoRA of whatever dialect: what is opened is an adapter like any other."""
    found = core.open_lora(path, rank=2, other_parts="leave out")
    for name, info in found.adapter.layers.items():
        layer = found.adapter.layer(name)
        assert layer.up.shape == (info.shape[0], info.rank) and layer.down.shape == (info.rank, info.shape[1]), name
        for tensor in layer[:2]:
            assert bool(torch.isfinite(tensor.float()).all()), "NaN or Inf was read"
        assert math.isfinite(info.scaling)
    core.lora_text(found)


def use_residual(path: Path, content: bytes) -> None:
    residual = core.Residual(path)
    for name, spec in residual.layers.items():
        weight = residual.weight(name)
        assert tuple(weight.shape) == spec.shape and weight.dtype == spec.dtype
        nothing = core.Basis(torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]))
        core.match_residual(weight, weight, [(nothing, 1.0)], 0.1, name)
        verbatim([weight], content)


def use_basis(path: Path, content: bytes) -> None:
    targets = make(1).targets
    found = opened_basis(path, targets)
    for reader in (found or {}).values():
        verbatim(reader(), content)
    readers, _ = open_basis(path)
    for reader in readers.values():
        q, r = reader()
        verbatim((q, r), content)
        assert q.shape[1] == r.shape[0]


def use_cache(path: Path, content: bytes) -> None:
    cache = core.TrainingCache(path)
    cache.identity()
    for index in range(len(cache.items)):
        latent, mask = cache.latent(index), cache.mask(index)
        assert tuple(latent.shape) == cache.latent_shape(index)
        flipped = [cache.latent(index, True)] if cache.has_flip(index) else []
        text = [part for part in cache.text(cache.items[index].text) if part is not None]  # some families pool nothing
        verbatim([latent, *flipped, *text, *([] if mask is None else [mask])], content)
        json.dumps([cache.items[index].caption, cache.items[index].name])


class Checkpoints:
    """A run with a good older checkpoint and a damaged newest one goes on with one of them, and rightly."""

    def __init__(self, older: bytes, newest: bytes, folder: Path) -> None:
        self.run, self.newest = folder / "run", newest
        (self.run / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        (self.run / checkpoint.FOLDER / "step-00000002.safetensors").write_bytes(older)
        self.place = self.run / checkpoint.FOLDER / "step-00000004.safetensors"

    def __call__(self, path: Path, content: bytes) -> None:
        self.place.write_bytes(content)
        found = checkpoint.newest_checkpoint(self.run, PARAMETERS)
        assert found is not None, "the good one was lost"
        if found.step == 2:
            return
        held = found.tensors("")
        verbatim((tensor for tensor in held.values() if tensor.is_floating_point()), content)
        assert {name: tuple(t.shape) for name, t in found.tensors("param.").items()} == PARAMETERS
        sealed = verify_checksum(self.place)
        assert not sealed or found.tensors("").keys() == TensorFile(self.place, skip_other=True).specs.keys()
        json.dumps(found.state)


def use_model(path: Path, content: bytes) -> None:
    model = BaseModel(path)
    assert len(model.fingerprint) == 16
    for target in model.targets():
        weight = model.weight(target.name)
        assert tuple(weight.shape) == target.shape == model.specs[f"{target.name}.weight"].shape
        model.stored_dtype(f"{target.name}.weight")
    for name in list(model.specs)[::5]:
        assert tuple(model.tensor(name).shape) == model.specs[name].shape
    assert all(count >= 1 for count in model.blocks.values())


class ModelFolders:
    """A diffusers folder whose JSON is damaged."""

    def __init__(self, folder: Path, model: bytes) -> None:
        self.folder = folder / "model"
        self.folder.mkdir(exist_ok=True)
        (self.folder / "model.safetensors").write_bytes(model)

    def __call__(self, path: Path, content: bytes) -> None:
        for name in ("config.json", "model.safetensors.index.json"):
            for old in self.folder.glob("*.json"):
                old.unlink()
            (self.folder / name).write_bytes(content)
            model = BaseModel(self.folder)
            assert sum(model.config["axes_dims_rope"]) == model.config["attention_head_dim"]
            assert all(type(number) is int and number > 0 for number in model.config["axes_dims_rope"])


def use_any(path: Path, content: bytes) -> None:
    """What the drop-downs ask of every file in a folder, and the plain reader."""
    fingerprint = core.model_fingerprint(path)
    assert len(fingerprint) == 16
    file = TensorFile(path, skip_other=True)
    core.file_kind(file)
    for key in (*file.specs, *file.other):
        spec = file.specs.get(key) or file.other[key]
        tensor = file.tensor(key)
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() in content
    assert file.other or TensorFile(path).specs == file.specs


def use_settings(path: Path, content: bytes) -> None:
    values = load_settings(path)
    kind = EncodeConfig if "pipeline" in values else FitConfig
    config = make_config(kind, values)
    table = json.dumps(as_table(config), allow_nan=False)
    assert make_config(kind, json.loads(table)) == config
    for one in ("steps", "rank", "resolution", "repeats"):
        assert 1 <= getattr(config, one, 1) <= 1_000_000


def use_events(path: Path, content: bytes) -> None:
    """The node's feed takes every line, good or not; the trainer's own reader refuses a file with a bad one."""
    job = jobs.Job("1", None, lambda kind, message: json.dumps(message))
    found = feed.earlier_events(path)
    job.catch_up(found)
    json.dumps(job.summary())
    drawn.loss_curve(job.steps(), "loss")
    for one in events.read_events(path):
        events.parse(one.line())


class Runs:
    """What a run folder says of its results and of its trainer: nothing that is damaged was ever vouched for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "results"
        self.folder.mkdir(exist_ok=True)

    def __call__(self, path: Path, content: bytes) -> None:
        run = runs.RunFolder(self.folder)
        (self.folder / "result.json").write_bytes(content)
        run.trainer.write_bytes(content)
        for steps, result in run.results().items():
            assert type(steps) is int and isinstance(result.sha256, str)
            assert all(isinstance(name, str) and isinstance(file, str) for name, file in result.published.items())
        noted = run.earlier_trainer()
        assert noted is None or (noted[0] > 0 and math.isfinite(noted[1]))
        run.record(7, "0" * 64, {"a": "b.safetensors"})
        assert run.results()[7].published["a"] == "b.safetensors"


def use_owner(path: Path, content: bytes) -> None:
    os.environ[owner.VARIABLE] = str(path)
    try:
        found = owner.owner()
    finally:
        del os.environ[owner.VARIABLE]
    assert Path(found.python).is_file()


def use_picture(path: Path, content: bytes) -> None:
    picture = read_picture(path)
    assert picture.mode in ("RGB", "RGBA") and picture.width * picture.height <= 128_000_000
    picture.resize((8, 8))


def use_caption(path: Path, content: bytes) -> None:
    picture = path.with_suffix(".png")
    caption = caption_of(picture, "", "<s>")
    assert caption == caption.strip() and "[trigger]" not in caption
    caption.encode()


def _adapters(folder: Path) -> tuple[bytes, ...]:
    found = []
    wide = {"qrlora.trigger": "<s>", "qrlora.base_fingerprint": "0" * 16}
    ones = torch.ones(12, 10)
    base = {name: core.Basis(up := make(1).layer(name).up, up.mT @ ones) for name in NAMES}
    with_r = core.Adapter.from_tensors(
        "r", {name: core.AdapterLayer(*make(1).layer(name)[:2], base[name]) for name in NAMES}, 3.0
    )
    half = {name: core.AdapterLayer(*(tensor.bfloat16() for tensor in make(2).layer(name)[:2])) for name in NAMES}
    for index, (adapter, written) in enumerate(
        (
            (make(1), "portable"),
            (make(1, method="qr"), "portable"),
            (make(1, method="qr"), "published"),
            (with_r, "published"),
            (core.Adapter.from_tensors("half", half, 3.0), "portable"),
        )
    ):
        path = folder / f"adapter{index}.safetensors"
        core.save_adapter(adapter, path, format=written, metadata=wide)
        found.append(path.read_bytes())
        path.unlink()
    plain = {key: spec for key, spec in TensorFile(_written(folder, found[3])).specs.items() if "base_r" not in key}
    header = header_bytes(plain, {})
    tensors = TensorFile(folder / "again.safetensors")
    found.append(header + b"".join(tensors.tensor(key).numpy().tobytes() for key in plain))
    return tuple(found)


def _loras() -> Iterable[bytes]:
    """kohya's fused names, ComfyUI's with diffusers' suffixes, LoHa, LoKr and a whole difference."""
    draws = _seeded()

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    pair = {f"{fused}.lora_up.weight": some(24, 2), f"{fused}.lora_down.weight": some(2, 8)}
    yield _file({**pair, f"{fused}.alpha": torch.tensor(2.0)}, {})
    name = f"transformer.{NAMES[0]}"
    yield _file({f"{name}.lora_A.weight": some(2, 8), f"{name}.lora_B.weight": some(8, 2)}, {})
    proj = "lora_unet_double_blocks_0_img_attn_proj"
    shapes = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
    yield _file({f"{proj}.hada_{part}": some(*shape) for part, shape in shapes.items()}, {})
    yield _file({f"{proj}.lokr_w1": some(2, 2), f"{proj}.lokr_w2": some(4, 4)}, {})
    yield _file({f"{proj}.diff": some(8, 8)}, {})


def _written(folder: Path, content: bytes) -> Path:
    path = folder / "again.safetensors"
    path.write_bytes(content)
    return path


def _residual(folder: Path) -> bytes:
    path = folder / "residual.safetensors"
    core.write_residual(path, make(1).targets, lambda name: torch.randn(12, 10, generator=_seeded()))
    return path.read_bytes()


def _basis(folder: Path) -> bytes:
    path, adapter = folder / "basis.safetensors", make(1)
    specs = {target.name: TensorSpec(torch.float32, target.shape) for target in adapter.targets}
    weight = torch.randn(12, 10, generator=_seeded())
    save_basis(path, specs, lambda name: core.decompose(weight, 3), {"qrlora.rank": "3"})
    return path.read_bytes()


def _cache(folder: Path) -> bytes:
    draws = _seeded()
    pictures = [
        core.EncodedPicture(
            torch.randn(4, 4, 2, generator=draws), torch.randn(4, 4, 2, generator=draws), torch.rand(4, 2)
        ),
        core.EncodedPicture(torch.randn(4, 2, 2, generator=draws)),
    ]
    texts = [core.EncodedText(torch.randn(3, 4, generator=draws), torch.randn(4, generator=draws)) for _ in range(2)]
    items = [core.CacheItem("a.png", 1, "a <c> dog"), core.CacheItem("b.png", 1, "a <c> dog", 2)]
    path = core.save_cache(folder / "cache.safetensors", items, pictures, texts, empty_text=0)
    return path.read_bytes()


def _checkpoints(folder: Path) -> tuple[bytes, bytes]:
    """Two of one run, as the trainer writes them for AdamW."""
    draws = _seeded()
    tensors = {f"param.{name}": torch.randn(shape, generator=draws) for name, shape in PARAMETERS.items()}
    for number, shape in enumerate(PARAMETERS.values()):
        tensors[f"optimizer.{number}.step"] = torch.tensor(2.0)
        tensors[f"optimizer.{number}.exp_avg"] = torch.randn(shape, generator=draws)
        tensors[f"optimizer.{number}.exp_avg_sq"] = torch.rand(shape, generator=draws)
    state = {
        "identity": {"rank": 3, "data": "0" * 16},
        "optimizer": {"groups": [{"lr": 1e-4, "betas": [0.9, 0.999], "params": [0, 1]}], "state": {}},
        "scaler": {},
        "smoothed_loss": 0.5,
    }
    run = folder / "made"
    return tuple(checkpoint.save_checkpoint(run, step, tensors, state, 2).read_bytes() for step in (2, 4))  # type: ignore[return-value]


def _models() -> Iterable[bytes]:
    """FLUX with thin matrices: bfloat16, scaled fp8, and int8 as ComfyUI marks it."""
    golden = TensorFile(GOLDEN / "base_bfl.safetensors")
    whole = ("img_in.weight", "final_layer.linear.weight", "txt_in.weight", "vector_in.in_layer.weight")
    thin = {}
    for key in golden.specs:
        tensor = golden.tensor(key).bfloat16()
        thin[key] = tensor if tensor.ndim < 2 or key in whole else tensor[:, :2].contiguous()
    yield _file(thin, {})
    fp8, int8 = dict(thin), dict(thin)
    for key in [key for key in thin if "_blocks" in key and key.endswith(".weight")]:
        layer = key.removesuffix(".weight")
        fp8[key], fp8[f"{layer}.scale_weight"] = thin[key].to(torch.float8_e4m3fn), torch.tensor(0.5)
        int8[key] = (100 * thin[key].float()).to(torch.int8)
        int8[f"{layer}.weight_scale"] = torch.full((thin[key].shape[0],), 0.01)
        marked = json.dumps({"format": "int8_tensorwise"}).encode()
        int8[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marked), dtype=torch.uint8)
    yield _file(fp8, {"_quantization_metadata": json.dumps({"layers": {}})})
    yield _file(int8, {})
    yield _file(_in_blocks(thin), {})


def _in_blocks(thin: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three layers as MXFP8, NVFP4 and a ConvRot of four columns, the others as they are."""
    found, draws = dict(thin), _seeded()
    layers = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear1")
    for layer, kind in zip(layers, ("mxfp8", "nvfp4", "int8_tensorwise")):
        rows, more = thin[f"{layer}.weight"].shape[0], {}
        tiles = (-(-rows // 128) * 128, 4)
        if kind == "mxfp8":
            found[f"{layer}.weight"] = torch.randn(rows, 32, generator=draws).to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale"] = torch.full(tiles, 127, dtype=torch.uint8)
        elif kind == "nvfp4":
            found[f"{layer}.weight"] = torch.randint(0, 256, (rows, 8), generator=draws).to(torch.uint8)
            found[f"{layer}.weight_scale"] = torch.ones(tiles).to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale_2"] = torch.tensor(0.5)
        else:
            found[f"{layer}.weight"] = torch.randint(-127, 128, (rows, 4), generator=draws).to(torch.int8)
            found[f"{layer}.weight_scale"] = torch.tensor(0.01)
            more = {"params": {"convrot": True, "convrot_groupsize": 4}}
        marked = json.dumps({"format": kind, **more}).encode()
        found[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marked), dtype=torch.uint8)
    return found


def _file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    names = {
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for key, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return mutate.joined(header, data)


def _model_json() -> bytes:
    table = {
        "_class_name": "FluxTransformer2DModel",
        "axes_dims_rope": [16, 56, 56],
        "weight_map": {"img_in.weight": "model.safetensors"},
    }
    return json.dumps(table).encode()


def _settings() -> tuple[bytes, ...]:
    fit = {"model": "m", "data": "d", "run_dir": "r", "steps": 5, "learning_rate": 1e-4, "targets": ["attn.to_q"]}
    fit |= {"trigger": "<c>", "gradient_checkpointing": True, "alpha": 8, "scheduler_rules": "1:100,0.1"}
    encode = {"pipeline": "p", "pictures": ["a.png"], "output": "o", "instance_prompt": "a <c> dog", "flip": True}
    lines = ['model = "m"', 'data = "d"', 'run_dir = "r"', "steps = 5", "alpha = 8.0", 'targets = ["attn.to_q"]']
    return json.dumps(fit).encode(), json.dumps(encode).encode(), "\n".join(lines).encode()


def _events() -> bytes:
    lines = [
        events.TrainEvent("started", {"pid": 7, "steps": 3, "first_step": 0, "pack_version": "1", "run_dir": "r"}, 1.0)
    ]
    numbers = {"steps": 3, "loss": 0.5, "smoothed_loss": 0.5, "lr": 1e-4, "seconds": 1.0, "eta": 2.0, "peak_memory": 1}
    lines += [events.TrainEvent("step", {"step": step, **numbers}, 1.0 + step) for step in (1, 2, 3)]
    lines.append(events.TrainEvent("sample", {"step": 3, "file": "samples/x"}, 5.0))
    lines.append(events.TrainEvent("finished", {"step": 3, "file": "a.safetensors", "sha256": "0"}, 6.0))
    return b"".join(one.line().encode() + b"\n" for one in lines)


def _run_files() -> Iterable[bytes]:
    yield json.dumps({"5": {"sha256": "0" * 64, "published": {"ink": "ink_00002.safetensors"}}}).encode()
    yield b'{"pid": 123, "created": 1700000000.5}'


def _pictures() -> Iterable[bytes]:
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    grey = Image.frombytes("I;16", (20, 10), bytes(range(200)) * 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "PNG", {}),
        (picture, "JPEG", {"exif": exif}),
        (picture, "WEBP", {}),
        (picture, "BMP", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (picture.quantize(8), "GIF", {}),
        (picture.convert("RGBA"), "PNG", {}),
        (grey, "PNG", {}),
        (grey, "TIFF", {}),
    ]
    for one, kind, options in kinds:
        buffer = io.BytesIO()
        one.save(buffer, kind, **options)
        yield buffer.getvalue()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
