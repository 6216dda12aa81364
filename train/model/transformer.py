"""The frozen transformer: built empty, filled tensor by tensor, held in as few bits as asked for, by diffusers' means.

No step holds the model twice. The library's casting hooks work in training too: autograd keeps what a layer computed
with, and with gradient checkpointing that is one block at a time. Blocks that wait elsewhere are `streaming`'s.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers.hooks import apply_layerwise_casting
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import Tensor, nn

from ..config import Precision, Storage
from ..errors import TrainError
from .backbones import Backbone
from .fp8 import cast_linear, fp8_linear, multiply_in_fp8, require_fp8_products
from .source import BaseModel
from .streaming import Stream

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
BITS: dict[Storage, float] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8.1, "nf4": 4.5}
NEEDS: dict[Storage, str] = {"int8": "torchao", "nf4": "bitsandbytes"}


def load_transformer(
    source: BaseModel,
    storage: Storage = "bf16",
    precision: Precision = "bf16",
    device: torch.device | None = None,
    offload: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    fp8_products: bool = False,
) -> Any:
    """Load a base model, frozen.

    Args:
        source: where the weights are.
        storage: how the linear layers of the blocks are held.
        precision: what the model computes in; all other weights are held so, too.
        device: where it computes.
        offload: share of the blocks that wait in RAM, or in the file where the model computes on the CPU, and come for
            each use, 0 to 1.
        on_progress: called with (tensors done, tensors in all).
        fp8_products: multiply what is held in fp8 without a cast, see `fp8_linear`.

    Raises:
        TrainError: reason "settings" when it cannot multiply in fp8, "library" when a quantisation's package is not
            installed or diffusers is too old, "model" when tensors are missing.

    Returns:
        Diffusers' model of the source's family. Held in few bits are the linear layers of its blocks; the rest is small
        and sensitive.
    """
    device = device or torch.device("cpu")
    compute = DTYPES[precision]
    if fp8_products:
        require_fp8_products(device)
    backbone = source.backbone
    with init_empty_weights():
        model = _model_class(backbone)(**source.config)
    expected = set(model.state_dict())
    if expected - source.specs.keys():
        missing = sorted(expected - source.specs.keys())
        raise TrainError("model", f"{source.path.name} lacks {len(missing)} tensors: {', '.join(missing[:3])}")
    outside = _outside(model, tuple(source.blocks))
    quantizer = _quantizer(storage, compute, device, outside)
    if quantizer is not None:
        quantizer.preprocess_model(model, device_map=None, keep_in_fp32_modules=[])
    waiting = _waiting_blocks(source.blocks, offload)
    casts = quantizer is None and storage != precision
    held = DTYPES[storage if casts else precision]
    stream = Stream(device, compute, fp8_linear if fp8_products else cast_linear)
    _let_wait(model, source, waiting, expected, held, stream)
    for done, name in enumerate(sorted(expected), 1):
        if not (backbone.block_of(name) in waiting and source.in_layer(name)):
            value = source.tensor(name)
            value = value.to(DTYPES[storage] if casts and source.in_layer(name) else compute)
            if quantizer is not None and quantizer.check_if_quantized_param(model, value, name, {}):
                quantizer.create_quantized_param(model, value, name, device, {}, [])
            else:
                set_module_tensor_to_device(model, name, device, value=value, dtype=value.dtype)
        on_progress(done, len(expected))
    model.requires_grad_(False)
    if casts:
        for block in (block for name in source.blocks for block in model.get_submodule(name).children()):
            if fp8_products:
                multiply_in_fp8(block, compute)
            # an empty tuple, not None: None would cast the block as a whole, later adapters with it
            apply_layerwise_casting(block, DTYPES[storage], compute, skip_modules_pattern=())
    return model


def _let_wait(
    model: nn.Module,
    source: BaseModel,
    waiting: Collection[str],
    names: Iterable[str],
    held: torch.dtype,
    stream: Stream,
) -> None:
    """Replace the linear layers of blocks by ones whose weights come one block ahead of their use."""
    of_block: dict[str, list[str]] = {}
    for name in sorted(names):
        if source.in_layer(name):
            of_block.setdefault(source.backbone.block_of(name), []).append(name)
    for kind, count in source.blocks.items():
        for block in (f"{kind}.{index}" for index in range(count)):
            if block in waiting:
                readers = {
                    name.removeprefix(f"{block}."): functools.partial(_waiting_tensor, source, name, held)
                    for name in of_block[block]
                }
                stream.add(model.get_submodule(block), readers)


def _waiting_tensor(source: BaseModel, name: str, held: torch.dtype) -> Tensor:
    return source.tensor(name).to(held)


def install_hint(package: str) -> str:
    """The command that installs a package for this very interpreter."""
    return f'"{sys.executable}" -m pip install {package}'


def require_package(package: str, purpose: str) -> None:
    """Raise TrainError (reason "library") when a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise TrainError("library", f"{purpose} needs the package {package}: {install_hint(package)}")


def _quantizer(storage: Storage, compute: torch.dtype, device: torch.device, outside: list[str]) -> Any:
    if storage not in NEEDS:
        return None
    require_package(NEEDS[storage], f"base_storage {storage}")
    import diffusers

    if storage == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=outside)
    else:
        config = diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=outside,
        )
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    try:
        quantizer.validate_environment(device_map={"": device})
    except (RuntimeError, ImportError, ValueError) as error:
        raise TrainError("library", f"base_storage {storage} cannot be used here: {error}") from error
    return quantizer


def _model_class(backbone: Backbone) -> Any:
    import diffusers

    try:
        return getattr(diffusers, backbone.model_class)
    except AttributeError as error:
        raise TrainError(
            "library",
            f"diffusers {diffusers.__version__} does not know {backbone.title}, which needs {backbone.since}: "
            + install_hint(f'--upgrade "diffusers>={backbone.since}"'),
        ) from error


def _outside(model: nn.Module, blocks: tuple[str, ...], path: str = "") -> list[str]:
    """The largest modules that hold none of these lists of blocks, and are none of them."""
    modules: list[str] = []
    for name, child in model.named_children():
        name = f"{path}{name}"
        if any(block.startswith(f"{name}.") for block in blocks):
            modules += _outside(child, blocks, f"{name}.")
        elif name not in blocks:
            modules.append(name)
    return modules


def _waiting_blocks(blocks: Mapping[str, int], offload: float) -> set[str]:
    """Which blocks wait in RAM: the given share of each list, the last ones."""
    return {
        f"{kind}.{index}" for kind, count in blocks.items() for index in range(count - round(count * offload), count)
    }
