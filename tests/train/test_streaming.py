"""Blocks that wait elsewhere: the same numbers, two of them at a time, each asked for before it is needed."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qrlora_core import FileFormatError, TrainingCache, decompose
from tests.train.families import FAMILIES, save_data, save_single_file
from tests.train.test_families import settings
from tests.train.test_fit import same, tensors
from train.data.batches import Sampler
from train.model import streaming, transformer
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.streaming import Stream, StreamedLinear, _CudaMover
from train.model.transformer import DTYPES, load_transformer
from train.run.denoise import denoising_loss
from train.run.fit import fit

CPU = torch.device("cpu")
MADE = []


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """Of a family: `model.safetensors` and `data.safetensors`."""
    small, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    save_single_file(small, folder / "model.safetensors")
    save_data(folder / "data.safetensors", small.channels, small.pooled, small.text_width)
    return folder


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """Those that are made, the empty ones of models that are held whole included."""
    MADE.clear()

    class Noted(Stream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            MADE.append(self)

    monkeypatch.setattr(transformer, "Stream", Noted)
    return MADE


def stepped(folder, offload, storage="fp32", precision="fp32", checkpointing=True, passes=3, missed=None):
    """Losses and gradients of some passes; how many blocks each of them had to wait for goes into a list."""
    source, config = BaseModel(folder / "model.safetensors"), settings(folder, init="random")
    model = load_transformer(source, storage, precision, offload=offload)
    bases = {target.name: decompose(source.weight(target.name), 4) for target in source.targets()}
    layers = inject(
        model,
        source.targets(),
        bases.__getitem__,
        "delta_r",
        1.0,
        start_of=lambda target: torch.full((4, target.shape[1]), 1e-3),
        dtype=DTYPES[precision],
    )
    if checkpointing:
        model.enable_gradient_checkpointing()
    sampler, losses = Sampler(TrainingCache(folder / "data.safetensors"), config), []
    for number in range(passes):
        loss = denoising_loss(model.train(), source.backbone, sampler.batch(number), config, CPU, DTYPES[precision])
        loss.backward()
        losses.append(loss.detach())
        if missed is not None:
            missed.append(MADE[-1].misses)
    return losses, {name: p.grad for name, p in trained_parameters(layers).items()}, model


def same_gradients(one, other):
    """Layers that only change the text after the last block have none."""
    reached = {name for name, gradient in one.items() if gradient is not None}
    assert reached and reached == {name for name, gradient in other.items() if gradient is not None}
    return all(torch.equal(one[name], other[name]) for name in reached)


@pytest.mark.parametrize("offload", [0.5, 1.0])
def test_every_family_computes_the_same(folder, offload):
    losses, gradients, _ = stepped(folder, 0.0)
    missed = []
    other_losses, other_gradients, model = stepped(folder, offload, missed=missed, passes=3)
    assert any(isinstance(module, StreamedLinear) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(losses, other_losses))
    assert same_gradients(gradients, other_gradients)
    assert missed[2] == missed[1], "their order was known"


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of six equal blocks."""
    folder, small = tmp_path_factory.mktemp("deep"), FAMILIES["qwen_image"]
    save_single_file(replace(small, arguments=small.arguments | {"num_layers": 6}), folder / "model.safetensors")
    save_data(folder / "data.safetensors")
    return folder


@pytest.mark.parametrize("storage, precision", [("fp32", "fp32"), ("fp8", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_storage_computes_the_same(deep, streams, storage, precision, checkpointing):
    losses, gradients, _ = stepped(deep, 0.0, storage, precision, checkpointing)
    other_losses, other_gradients, _ = stepped(deep, 1.0, storage, precision, checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(losses, other_losses))
    assert same_gradients(gradients, other_gradients)
    # 0; then 1 (what follows the first when it is the second time there), without recomputing 0 again before it
    assert (streams[-1].misses, len(streams[-1])) == (2 if checkpointing else 3, 6)
    # at the beginning of a pass the first block is there still
    assert streams[-1].hits == (11 + 10 + 10 if checkpointing else 3 * 6) - streams[-1].misses


def test_never_more_than_two_blocks(deep, streams, monkeypatch):
    alive, most, read = weakref.WeakSet(), [], transformer._waiting_tensor

    def noted(source, name, held):
        tensor = read(source, name, held)
        block = source.backbone.block_of(name)
        holder = type("Held", (), {})()
        holder.block = block
        weakref.finalize(tensor, lambda kept=holder: None)  # the holder lives as long as the tensor
        alive.add(holder)
        most.append(len({one.block for one in alive}))
        return tensor

    monkeypatch.setattr(transformer, "_waiting_tensor", noted)
    gc.disable()
    try:
        stepped(deep, 1.0, passes=3)
    finally:
        gc.enable()
    # the block that computes, the one that comes, and while it is recomputed the one that autograd has not done with
    assert len(most) > 6 * 10 and max(most) <= 3


def test_an_adapter_does_not_depend_on_where_weights_wait(deep, tmp_path):
    """A run begun in one way goes on in the other, bit for bit."""
    whole = settings(deep, run_dir=str(tmp_path / "whole"), offload=0.0)
    half = settings(deep, run_dir=str(tmp_path / "half"), offload=1.0, steps=2)
    fit(whole)
    fit(half)
    fit(replace(half, steps=3, offload=0.5))
    same(tensors(whole), tensors(replace(half, steps=3)))


def test_a_file_that_changes_meanwhile_ends_the_run(deep, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((deep / "model.safetensors").read_bytes())
    model = load_transformer(BaseModel(path), "fp32", "fp32", offload=1.0)
    state = load_file(path)
    save_file(state, path, {"other": "metadata"})
    inner = model.transformer_blocks[0]
    with pytest.raises(FileFormatError, match="was changed since it was opened"):
        inner(torch.randn(1, 4, 128), torch.randn(1, 3, 128), None, torch.randn(1, 128))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


def test_the_way_to_a_graphics_card_without_one(monkeypatch):
    """What copies from RAM moves the same numbers in the same order; pinning and streams need a card."""
    monkeypatch.setattr(streaming, "_ThreadMover", _CudaMover)
    blocks, x = [Block() for _ in range(4)], torch.randn(2, 3)
    plain = nn.Sequential(*[Block() for _ in range(4)])
    for block, one in zip(blocks, plain):
        one.load_state_dict(block.state_dict())
    expected, stream = plain(x), Stream(CPU, torch.float32)
    for block in blocks:
        held = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        stream.add(block, {name: (lambda tensor=tensor: tensor) for name, tensor in held.items()})
    model = nn.Sequential(*blocks)
    assert not list(model.parameters())
    for _ in range(2):
        assert torch.equal(model(x), expected)
    for block, one in list(zip(model, plain))[::-1]:
        assert torch.equal(block(x), one(x))
    # the first, the first again and the one after it; backward nothing is missed
    assert (stream.hits, stream.misses) == (8, 3)
