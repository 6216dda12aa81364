"""Products in fp8: what they compute, what autograd makes of them, and where they are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.small_flux import GOLDEN
from tests.train.test_model import SOURCE, backward, forward
from train.config import FitConfig
from train.errors import TrainError
from train.model.fp8 import FP8, Fp8Linear, cast_linear, fp8_linear, require_fp8_products
from train.model.layer import inject
from train.model.transformer import load_transformer
from train.run.fit import fit
from train.settings import ConfigError, make_config

PATHS = {"model": str(GOLDEN / "base_bfl.safetensors"), "data": "d", "run_dir": "r"}


def drawn(rows=48, out=64, width=128):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, width, generator=generator)
    return x, (0.02 * torch.randn(out, width, generator=generator)).to(FP8), torch.randn(out, generator=generator)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_it_is_the_product_of_rounded_inputs(dtype, bound):
    x, weight, bias = drawn()
    scale = x.abs().max() / 448
    wanted = (x / scale).to(FP8).double() * scale @ weight.double().mT + bias
    made = fp8_linear(x.to(dtype), weight, bias, dtype)
    assert made.dtype == dtype and made.shape == (2, 48, 64)
    # where bfloat16 has moved an input over the edge between two fp8 numbers, the product is another
    assert float((made - wanted).norm() / wanted.norm()) < (bound if dtype == torch.float32 else 0.03)
    exact = x.double() @ weight.double().mT + bias
    assert 1e-3 < float((made - exact).norm() / exact.norm()) < 0.05


def test_the_gradient_is_that_of_the_unrounded_product():
    x, weight, bias = drawn()
    gradients = []
    for product in (fp8_linear, cast_linear):
        leaf = x.clone().requires_grad_()
        product(leaf, weight, bias, torch.float32).backward(torch.ones(2, 48, 64))
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, 65504.0])
def test_no_input_overflows(value):
    _, weight, _ = drawn()
    made = fp8_linear(torch.full((3, 128), value), weight, None, torch.float32)
    wanted = torch.full((3, 128), value).double() @ weight.double().mT
    assert torch.isfinite(made).all() and torch.allclose(made.double(), wanted, rtol=1e-3, atol=1e-30)


def test_sizes_that_cannot_be_multiplied_so_are_cast():
    x, weight, bias = drawn(out=24)
    assert torch.equal(fp8_linear(x, weight, bias, torch.float32), cast_linear(x, weight, bias, torch.float32))


@pytest.mark.parametrize("offload", [0.0, 1.0])
def test_the_whole_model(offload):
    """Beside the same base whose weights are cast; where blocks wait it is the same product."""
    with torch.no_grad():
        cast = forward(load_transformer(SOURCE, "fp8", "fp32"))
        model = load_transformer(SOURCE, "fp8", "fp32", offload=offload, fp8_products=True)
        made = forward(model)
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == (0 if offload else 20)
    assert 1e-4 < float((made - cast).norm() / cast.norm()) < 0.05


def test_gradients_of_the_adapter_stay_close():
    found = []
    for products in (False, True):
        model = load_transformer(SOURCE, "fp8", "fp32", fp8_products=products)
        layers = inject(
            model,
            SOURCE.targets(),
            lambda name: torch.linalg.qr(torch.randn(SOURCE.weight(name).shape[0], 8, generator=seeded())),
            "delta_r",
            1.0,
            start_of=lambda target: torch.full((8, target.shape[1]), 1e-3),
        )
        found.append(backward(model.train(), layers, "fp32")[1])
    assert 0 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.1


def seeded():
    return torch.Generator().manual_seed(3)


def test_a_run_goes_on_bit_equal_and_only_with_it(settings, tmp_path):
    whole = settings(steps=4, base_storage="fp8", fp8_products=True)
    fit(whole)
    parts = replace(whole, run_dir=str(tmp_path / "parts"))
    fit(replace(parts, steps=2))
    fit(parts)
    one, other = (load_file(Path(config.run_dir) / "adapter.safetensors") for config in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    cast = replace(whole, run_dir=str(tmp_path / "cast"), fp8_products=False)
    fit(cast)
    assert any(
        not torch.equal(one[key], value) for key, value in load_file(tmp_path / "cast/adapter.safetensors").items()
    )
    with pytest.raises(TrainError, match="fp8_products None -> True"):
        fit(replace(cast, steps=6, fp8_products=True))


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="fp8_products needs base_storage fp8, which is auto"):
        make_config(FitConfig, {**PATHS, "fp8_products": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(TrainError, match="40 series or newer") as caught:
        require_fp8_products(torch.device("cuda"))
    assert caught.value.reason == "settings"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    require_fp8_products(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(TrainError, match="needs an NVIDIA card"):
        require_fp8_products(torch.device("cuda"))
