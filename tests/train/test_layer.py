"""The trained layer: equal to the published one and to peft's LoRA with a frozen B; its triangle; bfloat16."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from qrlora_core import LayerTarget, decompose
from train.config import FitConfig
from train.model.layer import QRLinear, inject, trained_parameters
from train.run.optim import make_optimizer
from train.settings import make_config

OUT, IN, RANK, SCALING = 24, 20, 6, 0.5


class Two(nn.Module):
    """Two linear layers with names like those of a transformer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, IN)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


TARGETS = (LayerTarget("first", (OUT, IN)), LayerTarget("second", (IN, OUT)))


def two(seed=0):
    torch.manual_seed(seed)
    return Two()


def bases(model, rank=RANK):
    return {t.name: decompose(model.get_submodule(t.name).weight, rank) for t in TARGETS}


def with_layers(model, method, start=None, scaling=SCALING):
    known = bases(model)
    return known, inject(
        model, TARGETS, known.__getitem__, method, scaling, start_of=lambda t: None if start is None else start[t.name]
    )


def random_starts(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {t.name: 0.1 * torch.randn(RANK, t.shape[1], generator=generator) for t in TARGETS}


def settings(**changes):
    return make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"}, changes)


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triangular", "qr"])
def test_a_new_layer_changes_nothing(method):
    model, x = two(), torch.randn(5, 3, IN)
    before = model(x)
    with_layers(model, method)
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triangular", "qr"])
def test_equals_the_published_layer(method):
    """W_res + scaling Q' R' (or Q (R + dR)) against what our layer computes, in float64."""
    model, start = two(), random_starts()
    known, layers = with_layers(model, method, None if method == "qr" else start)
    x = torch.randn(5, IN, dtype=torch.float64)
    for target in TARGETS[:1]:
        layer = layers[target.name]
        layer.base.double()
        q, r = (tensor.double() for tensor in known[target.name])
        rest = layer.base.weight - SCALING * q @ r
        if method == "qr":
            with torch.no_grad():
                layer.trained_q += 0.05 * torch.randn(OUT, RANK)
                layer.trained_r += 0.05 * torch.randn(RANK, IN)
            moved = layer.trained_q.double() @ layer.trained_r.double()
        else:
            delta = start[target.name].triu() if "triangular" in method else start[target.name]
            moved = q @ (r + delta.double())
        theirs = x @ (rest + SCALING * moved).mT + layer.base.bias
        assert float((layer(x) - theirs).detach().abs().max()) < 1e-6  # Q' and R' are float32
        assert float((layer(x) - layer.base(x)).detach().abs().max()) > 1e-2


def test_equals_a_lora_whose_b_is_frozen():
    """peft as an oracle: B = Q frozen, A = dR; outputs and gradients, forward and backward."""
    start = random_starts()
    ours, theirs = two(), two()
    known, layers = with_layers(ours, "delta_r", start)
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["first", "second"], bias="none")
    inject_adapter_in_model(config, theirs)
    for name in known:
        lora = theirs.get_submodule(name)
        with torch.no_grad():
            lora.lora_B["default"].weight.copy_(known[name].q).requires_grad_(False)
            lora.lora_A["default"].weight.copy_(start[name])
    x = torch.randn(4, 7, IN)
    outputs = [model(x) for model in (ours, theirs)]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        output.square().mean().backward()
    for name, layer in layers.items():
        lora = theirs.get_submodule(name).lora_A["default"].weight
        assert torch.allclose(layer.delta_r.grad, lora.grad, rtol=1e-5, atol=1e-8)
    ours_count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert ours_count == sum(p.numel() for n, p in theirs.named_parameters() if "lora_A" in n)


def test_small_updates_survive_bfloat16():
    """Update 1e-4 in a bf16 layer: W x + Q (dR x) keeps it, the published (R + dR) in bf16 loses most of it."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).bfloat16()
    weight = base.weight.detach().float()
    basis = decompose(weight, 16)
    delta = 1e-4 * torch.randn(16, 64)
    layer = QRLinear(base, basis, "delta_r", 1.0, delta, dtype=torch.bfloat16)
    x = torch.eye(64, dtype=torch.bfloat16)
    wanted = (basis.q @ delta).mT
    low_rank = layer.q.float() @ layer.delta_r.bfloat16().float()
    assert float((low_rank.mT - wanted).detach().norm() / wanted.norm()) < 0.01
    summed = (basis.r.bfloat16() + delta.bfloat16()).float() - basis.r.bfloat16().float()
    assert float((summed - delta).norm() / delta.norm()) > 0.3
    assert layer(x).dtype == torch.bfloat16 and layer.delta_r.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "weight_decay": 0.3},
        {"optimizer": "adamw", "weight_decay": 0.0, "learning_rate": 0.1},
        {"optimizer": "prodigy", "learning_rate": 1.0, "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_the_triangle_holds_after_every_optimizer(changes, random):
    """In the weights themselves, bit for bit, and in the momentum: nothing is masked in the forward pass."""
    model = two()
    known, layers = with_layers(model, "delta_r_triangular", random_starts() if random else None)
    parameters = trained_parameters(layers)
    optimizer = make_optimizer(parameters.values(), settings(**changes))
    x, y = torch.randn(16, IN), torch.randn(16, IN)
    for _ in range(12):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers.values():
            layer.constrain()
        for parameter in parameters.values():
            assert float(parameter.detach().tril(-1).abs().max()) == 0
            for value in optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    assert float(value.tril(-1).abs().max()) == 0
    assert all(float(parameter.detach().abs().max()) > 0 for parameter in parameters.values())
    for name, layer in layers.items():
        assert torch.equal(layer.adapter_layer().up, known[name].q)


def test_without_the_constraint_the_triangle_would_break():
    """The test above can fail: the same loss on a full dR fills the lower triangle at once."""
    model = two()
    _, layers = with_layers(model, "delta_r")
    parameters = trained_parameters(layers)
    optimizer = make_optimizer(parameters.values(), settings())
    (model(torch.randn(16, IN)) - 1).square().mean().backward()
    optimizer.step()
    assert all(float(parameter.detach().tril(-1).abs().max()) > 0 for parameter in parameters.values())


def test_nothing_but_the_update_is_trained():
    model = two()
    before = copy.deepcopy(model.state_dict())
    _, layers = with_layers(model, "qr")
    optimizer = make_optimizer(trained_parameters(layers).values(), settings(learning_rate=0.1))
    model(torch.randn(4, IN)).square().mean().backward()
    optimizer.step()
    for target in TARGETS:
        layer = layers[target.name]
        assert torch.equal(layer.base.weight, before[f"{target.name}.weight"])
        assert layer.base.weight.grad is None and layer.base.bias.grad is None
        assert not torch.equal(layer.trained_q, layer.q) and not torch.equal(layer.trained_r, layer.r)
