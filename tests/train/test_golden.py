"""Against what the published trainers computed: losses, gradients, three AdamW steps, the adapters they wrote."""

import pytest
import torch
from safetensors.torch import load_file

from demo.small_flux import GOLDEN, base_weights, golden_tensors, own_weight
from qrlora_core import Basis, flux_targets, open_adapter
from train.config import FitConfig
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.transformer import load_transformer
from train.run.denoise import weighted_mse
from train.run.optim import make_optimizer
from train.settings import make_config

METHODS = {"style": "delta_r_triangular", "content": "delta_r", "qr": "qr"}
TARGETS = flux_targets(1, 1, 128)


def relative(ours, published):
    return float((ours - published).norm() / published.norm())


def start(name):
    """The small FLUX with the layers that the published trainer began with."""
    first = open_adapter(GOLDEN / f"official_{name}_step0.safetensors")

    def basis_of(layer):
        tensors = first.layer(layer)
        return Basis(tensors.up, tensors.down) if name == "qr" else Basis(*tensors.initial)

    model = load_transformer(BaseModel(GOLDEN / "base_bfl.safetensors"), "fp32", "fp32")
    layers = inject(
        model,
        TARGETS,
        basis_of,
        METHODS[name],
        1.0,
        start_of=lambda target: None if name == "qr" else first.layer(target.name).down,
    )
    return model, layers


def loss_of(model):
    golden = golden_tensors()
    inputs = {key.removeprefix("input."): value for key, value in golden.items() if key.startswith("input.")}
    return weighted_mse(model(**inputs).sample, golden["target"])


def trained(name, steps=3):
    """(losses, first gradients, layers, model) after the published recipe."""
    model, layers = start(name)
    parameters = trained_parameters(layers)
    rate, decay = (1e-4, 1e-2) if name == "qr" else (1e-3, 1e-4)
    config = make_config(
        FitConfig, {"model": "m", "data": "d", "run_dir": "r", "learning_rate": rate, "weight_decay": decay}
    )
    optimizer = make_optimizer(parameters.values(), config)
    losses, gradients = [], {}
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        gradients = gradients or {key: parameter.grad.clone() for key, parameter in parameters.items()}
        optimizer.step()
        for layer in layers.values():
            layer.constrain()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), gradients, layers, model


@pytest.fixture(scope="module", params=list(METHODS))
def run(request):
    return request.param, *trained(request.param)


def test_losses(run):
    name, losses, *_ = run
    assert relative(losses, golden_tensors()[f"{name}.losses"]) < 1e-6


def test_first_gradients(run):
    """The published layer trains W_res + Q (R + dR), ours W + Q dR: the gradients of dR are the same."""
    name, _, gradients, *_ = run
    if name == "qr":
        pytest.skip("the published run kept no gradients of the full method")
    for target in TARGETS:
        published = golden_tensors()[f"{name}.grad.{target.name}"]
        assert relative(gradients[f"{target.name}.delta_r"], published) < 1e-5, target.name


def test_adapters_after_three_steps(run):
    name, _, _, layers, _ = run
    published = open_adapter(GOLDEN / f"official_{name}.safetensors")
    before = open_adapter(GOLDEN / f"official_{name}_step0.safetensors")
    for target in TARGETS:
        theirs, first = published.layer(target.name), before.layer(target.name)
        ours = layers[target.name].adapter_layer()
        assert relative(ours.down, theirs.down) < 1e-5, target.name
        assert relative(ours.up, theirs.up) < 1e-5, target.name
        # what the steps changed, not only where they began
        assert relative(ours.down - first.down, theirs.down - first.down) < 2e-3, target.name


def test_output_after_three_steps(run):
    name, *_, model = run
    inputs = {k.removeprefix("input."): v for k, v in golden_tensors().items() if k.startswith("input.")}
    with torch.no_grad():
        output = model(**inputs).sample
    assert float((output - golden_tensors()[f"{name}.out3"]).abs().max()) < 1e-5


def test_a_wrong_base_would_be_noticed():
    """The comparisons above can fail: a base that differs by a percent gives another first loss."""
    model, _ = start("style")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    published = golden_tensors()["style.losses"][0]
    assert abs(float(loss_of(model).detach() - published)) > 1e-5 * float(published)


def test_golden_files_are_those_of_this_base():
    residual = load_file(GOLDEN / "official_residual_fp32.safetensors")
    adapter = open_adapter(GOLDEN / "official_style.safetensors")
    name = TARGETS[0].name
    q, r = adapter.layer(name).initial
    assert base_weights() and relative(residual[f"{name}.residual.weight"] + q @ r, own_weight(name, adapter)) < 1e-6
