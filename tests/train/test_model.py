"""How the base is held: precision, casting that survives the backward pass, quantisation; W never changes."""

import pytest
import torch
from torchao.utils import TorchAOBaseTensor

from demo.small_flux import GOLDEN, base_weights, golden_tensors, to_diffusers
from qrlora_core import EncodedText, decompose, flux_targets
from train.errors import TrainError
from train.model.backbones.flux import FLUX
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.transformer import DTYPES, _waiting_blocks, load_transformer
from train.run.denoise import prediction

SOURCE = BaseModel(GOLDEN / "base_bfl.safetensors")
# bounds of the largest difference to float32 in the output, and of the relative error of the gradients; the dtype in
# which linear layers wait when they are cast for each use
HELD = [
    ("fp32", "fp32", 1e-6, 1e-5, None),
    ("bf16", "fp32", 2e-4, 0.02, torch.bfloat16),
    ("fp8", "fp32", 3e-3, 0.2, torch.float8_e4m3fn),
    ("int8", "fp32", 1e-3, 0.05, None),
    ("bf16", "bf16", 4e-2, 0.1, None),
    ("fp8", "bf16", 4e-2, 0.2, torch.float8_e4m3fn),
    ("fp16", "fp16", 1e-2, 0.02, None),
]


def forward(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 4, generator=generator)
    golden = golden_tensors()
    embeds, pooled = golden["input.encoder_hidden_states"][:1], golden["input.pooled_projections"][:1]
    text = EncodedText(embeds, pooled)
    return prediction(model, FLUX, latents, torch.tensor([0.4]), text, 1.0, torch.device("cpu"), dtype)


def adapted(storage, precision):
    """The golden base, held in that way, with a small update in every target layer."""
    model = load_transformer(SOURCE, storage, precision)
    layers = inject(
        model,
        flux_targets(1, 1, 128),
        lambda name: decompose(SOURCE.weight(name), 8),
        "delta_r",
        1.0,
        start_of=lambda target: torch.full((8, target.shape[1]), 1e-3),
        dtype=DTYPES[precision],
    )
    return model.train(), layers


def backward(model, layers, precision):
    """Output, and the gradients of all dR in one tensor."""
    output = forward(model, DTYPES[precision])
    output.square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in trained_parameters(layers).values()])


@pytest.fixture(scope="module")
def exact():
    with torch.no_grad():
        return forward(load_transformer(SOURCE, "fp32", "fp32"))


@pytest.fixture(scope="module")
def reference():
    return backward(*adapted("fp32", "fp32"), "fp32")


def values(tensor):
    """As plain float32, whatever the tensor is stored in."""
    return tensor.dequantize().float() if isinstance(tensor, TorchAOBaseTensor) else tensor.float()


@pytest.mark.parametrize("storage,precision,bound,gradient_bound,cast", HELD, ids=[f"{s}-{p}" for s, p, *_ in HELD])
@pytest.mark.parametrize("recompute", [False, True])
def test_training_on_few_bits(reference, storage, precision, bound, gradient_bound, cast, recompute):
    """Output and gradients near those of float32, and every weight as it was after a step."""
    model, layers = adapted(storage, precision)
    if recompute:
        model.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in model.state_dict().items() if "delta_r" not in name}
    output, gradients = backward(model, layers, precision)
    assert float((output - reference[0]).abs().max()) < bound
    assert gradients.dtype == torch.float32 and float(gradients.norm()) > 0
    assert float((gradients - reference[1]).norm() / reference[1].norm()) < gradient_bound
    for name, value in model.state_dict().items():
        if "delta_r" not in name:
            assert before[name].dtype == value.dtype and torch.equal(values(before[name]), values(value)), name
    if cast is not None:  # also in the last layer of a block, whose recomputation could end before it is put away
        assert {layer.base.weight.dtype for layer in layers.values()} == {cast}
        assert model.single_transformer_blocks[0].proj_out.weight.dtype == cast
        assert model.proj_out.weight.dtype == DTYPES[precision]


@pytest.mark.parametrize("storage,precision,bound", [row[:3] for row in HELD], ids=[f"{s}-{p}" for s, p, *_ in HELD])
def test_bounds(exact, storage, precision, bound):
    with torch.no_grad():
        output = forward(load_transformer(SOURCE, storage, precision), DTYPES[precision])
    difference = float((output - exact).abs().max())
    assert difference < bound and (storage == "fp32" or difference > 0)


def test_the_basis_does_not_depend_on_how_the_base_is_held():
    weight = SOURCE.weight("transformer_blocks.0.attn.to_q")
    assert torch.equal(weight, to_diffusers(base_weights())["transformer_blocks.0.attn.to_q.weight"])


def test_blocks_that_wait_in_ram():
    real = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    assert _waiting_blocks(real, 0.0) == set()
    assert len(_waiting_blocks(real, 1.0)) == 57
    half = _waiting_blocks({"transformer_blocks": 4, "single_transformer_blocks": 8}, 0.5)
    assert half == {f"transformer_blocks.{i}" for i in (2, 3)} | {
        f"single_transformer_blocks.{i}" for i in (4, 5, 6, 7)
    }


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainError, match='base_storage int8 needs the package torchao: ".*" -m pip install torchao'):
        load_transformer(SOURCE, "int8", "bf16")
