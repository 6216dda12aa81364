"""Every family: read from both layouts, its gradient that of plain autograd, its training resumable bit by bit; what
was trained in diffusers is what ComfyUI applies."""

import inspect
import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from qrlora_core import EncodedText, TrainingCache, decompose, open_adapter
from tests.train.families import FAMILIES, save_data, save_single_file
from tests.train.test_fit import StopAt, same, tensors
from tests.train.tiny import sparse_model
from train.config import FitConfig
from train.data.batches import Sampler
from train.errors import TrainError
from train.events import EventWriter
from train.model.layer import inject, trained_parameters
from train.model.source import BaseModel
from train.model.transformer import load_transformer
from train.run.denoise import denoising_loss, prediction
from train.run.estimate import Available, choose_memory
from train.run.fit import fit, train
from train.run.lock import held_run_folder
from train.run.output import save
from train.run.prepare import prepare
from train.run.processes import make_accelerator
from train.run.reporter import Reporter
from train.run.stop import Stopped, StopWatch
from train.settings import make_config

HOST, HOST_PYTHON = os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_PYTHON")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, recipe, and a folder with `model.safetensors` (ComfyUI's layout) and `data.safetensors`."""
    folder = tmp_path_factory.mktemp(request.param)
    save_single_file(FAMILIES[request.param], folder / "model.safetensors")
    small = FAMILIES[request.param]
    save_data(folder / "data.safetensors", small.channels, small.pooled, small.text_width)
    return request.param, FAMILIES[request.param], folder


def settings(folder, **changes):
    base = {
        "model": str(folder / "model.safetensors"),
        "data": str(folder / "data.safetensors"),
        "run_dir": str(folder / "run"),
        "basis_cache": str(folder / "basis"),
        "rank": 4,
        "steps": 3,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 0,
        "device": "cpu",
        "precision": "fp32",
        "caption_dropout": 0.3,
    }
    return make_config(FitConfig, base, changes)


def test_both_layouts_and_prefixes_give_equal_tensors(family, tmp_path):
    name, small, folder = family
    source, state = BaseModel(folder / "model.safetensors"), small.model().state_dict()
    assert source.backbone.family == name and len(source.targets()) == small.layers
    assert source.specs.keys() == state.keys()
    small.model().save_pretrained(tmp_path / small.network, max_shard_size="300KB")
    save_single_file(small, tmp_path / "prefixed.safetensors", prefix="model.diffusion_model.")
    for other in (BaseModel(tmp_path), BaseModel(tmp_path / "prefixed.safetensors")):
        assert other.config == source.config and other.targets() == source.targets()
        for key, value in state.items():
            assert torch.equal(source.tensor(key), value) and torch.equal(other.tensor(key), value), key


def test_the_gradient_is_that_of_plain_autograd(family):
    """dR inside of the weight, W + scaling Q dR, without any layer of ours."""
    _, small, folder = family
    source, config = BaseModel(folder / "model.safetensors"), settings(folder, init="random")
    targets, generator = source.targets(), torch.Generator().manual_seed(3)
    bases = {target.name: decompose(source.weight(target.name), 4) for target in targets}
    starts = {target.name: torch.randn(4, target.shape[1], generator=generator) * 1e-2 for target in targets}
    batch = Sampler(TrainingCache(folder / "data.safetensors"), config).batch(0)

    model = load_transformer(source, "fp32", "fp32")
    layers = inject(model, targets, bases.__getitem__, "delta_r", 0.5, start_of=lambda target: starts[target.name])
    model.enable_gradient_checkpointing()
    loss = denoising_loss(model.train(), source.backbone, batch, config, CPU, torch.float32)
    loss.backward()
    ours = {name.removesuffix(".delta_r"): p.grad for name, p in trained_parameters(layers).items()}

    plain = small.model().requires_grad_(False)
    free = {name: start.clone().requires_grad_() for name, start in starts.items()}
    weights = {f"{name}.weight": source.weight(name) + 0.5 * bases[name].q @ free[name] for name in free}

    class Whole(torch.nn.Module):
        config = plain.config

        def forward(self, **inputs):
            return functional_call(plain, weights, kwargs=inputs)

    reference = denoising_loss(Whole(), source.backbone, batch, config, CPU, torch.float32)
    reference.backward()
    assert float(loss) == pytest.approx(float(reference), rel=1e-5)
    # what only changes the text after the last block has no gradient; everything else has
    reached = [name for name, start in free.items() if start.grad is not None and start.grad.any()]
    assert len(reached) > 0.7 * len(free)
    assert {name for name, gradient in ours.items() if gradient is not None and gradient.any()} == set(reached)
    for name in reached:
        assert float((ours[name] - free[name].grad).norm() / free[name].grad.norm()) < 1e-4, name


def test_an_interrupted_training_ends_bit_equal(family, tmp_path):
    _, _, folder = family
    whole = settings(folder, run_dir=str(tmp_path / "whole"), sample_every=3)
    fit(whole)
    assert list((tmp_path / "whole" / "samples").iterdir())
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    loading = len(BaseModel(folder / "model.safetensors").specs)
    with pytest.raises(Stopped):
        fit(broken, watch=StopAt(loading + 6))
    assert list((tmp_path / "broken" / "checkpoints").iterdir())
    fit(broken)
    same(tensors(whole), tensors(broken))


def test_texts_of_a_batch_may_have_other_lengths(family):
    """What fills up the shorter text does not change the prediction for it."""
    name, small, folder = family
    if name in ("flux", "flux2", "sd3"):
        pytest.skip("it has no mask: its texts come from their encoder in one length")
    source = BaseModel(folder / "model.safetensors")
    model, generator = load_transformer(source, "fp32", "fp32").eval(), torch.Generator().manual_seed(5)
    latents = torch.randn(2, small.channels, 4, 4, generator=generator)
    embeds = torch.randn(2, 40, small.text_width, generator=generator)
    embeds[1, 5:] = 0
    pooled = torch.randn(2, small.pooled, generator=generator) if small.pooled else None
    sigmas = torch.tensor([0.3, 0.6])
    with torch.no_grad():
        both = prediction(model, source.backbone, latents, sigmas, EncodedText(embeds, pooled), 1.0, CPU, torch.float32)
        short = EncodedText(embeds[1:, :5], None if pooled is None else pooled[1:])
        alone = prediction(model, source.backbone, latents[1:], sigmas[1:], short, 1.0, CPU, torch.float32)
    assert float((both[1:] - alone).abs().max()) < 5e-5


@pytest.fixture(scope="module")
def in_host():
    """One process of the host for all families: it takes a line of JSON and answers with one."""
    script = Path(__file__).with_name("host_families.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([HOST_PYTHON, script, HOST], cwd=HOST, **pipes) as process:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.process
@pytest.mark.skipif(not HOST_PYTHON, reason="no ComfyUI beside")
def test_what_was_trained_is_what_comfyui_applies(family, in_host, tmp_path):
    _, small, folder = family
    if small.host_size:
        small = replace(small, arguments=small.arguments | small.host_size)
        save_single_file(small, tmp_path / "model.safetensors")
        (tmp_path / "data.safetensors").write_bytes((folder / "data.safetensors").read_bytes())
        folder = tmp_path
    config = settings(folder, run_dir=str(tmp_path / "run"), method="delta_r")
    accelerator = make_accelerator(config)
    with Reporter(EventWriter(None), CPU) as reporter, held_run_folder(tmp_path / "run"):
        state = prepare(config, accelerator, reporter, StopWatch())
        train(state)
        adapter = save(state)
    generator = torch.Generator().manual_seed(9)
    given = {
        "latents": torch.randn(1, small.channels, 8, 4, generator=generator),
        "sigmas": torch.tensor([0.4]),
        "embeds": torch.randn(1, 7, small.text_width, generator=generator),
    }
    if small.pooled:
        given["pooled"] = torch.randn(1, small.pooled, generator=generator)
    text = EncodedText(given["embeds"], given.get("pooled"))

    def output(model):
        with torch.no_grad():
            return prediction(
                model.eval(), state.backbone, given["latents"], given["sigmas"], text, 1.0, CPU, torch.float32
            )

    save_file(given, tmp_path / "inputs.safetensors")
    work = {
        "class": small.host[0],
        "config": small.host[1] | small.host_size,
        "frames": small.frames,
        "steps": small.steps,
        "guided": small.guided,
        "adapter": str(adapter),
    }
    work |= {"model": str(folder / "model.safetensors"), "inputs": str(tmp_path / "inputs.safetensors")}
    work["outputs"] = str(tmp_path / "outputs.safetensors")
    print(json.dumps(work), file=in_host.stdin, flush=True)
    assert in_host.stdout.readline() == "written\n", "the host's process has ended; what it printed is above"
    found = load_file(work["outputs"])
    base, adapted = output(small.model()), output(state.model)
    assert float((adapted - base).abs().max()) > 1e-2, "three steps changed something"
    assert float((found["base"] - base).abs().max()) < 1e-5
    assert float((found["adapted"] - adapted).abs().max()) < 1e-5
    assert len(open_adapter(adapter).layers) == len(BaseModel(folder / "model.safetensors").targets())


def test_relatives_are_told_apart(tmp_path):
    """Lumina 2 has Z-Image's names, Qwen-Image-Layered has Qwen-Image's."""
    small = FAMILIES["z_image"]
    state = small.to_comfy(small.model().state_dict())
    del state["x_pad_token"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lumina.safetensors")
    with pytest.raises(TrainError, match="is not a Z-Image transformer: it has no x_pad_token"):
        BaseModel(tmp_path / "lumina.safetensors")
    state = dict(FAMILIES["qwen_image"].model().state_dict())
    state["time_text_embed.addition_t_embedding.weight"] = torch.zeros(2, 128)
    save_file(state, tmp_path / "layered.safetensors")
    with pytest.raises(TrainError, match="Qwen-Image-Layered"):
        BaseModel(tmp_path / "layered.safetensors")


def test_a_diffusers_that_is_too_old_names_the_command(family):
    _, _, folder = family
    source = BaseModel(folder / "model.safetensors")
    source.backbone = replace(source.backbone, model_class="OfTomorrow2DModel", since="9.1")
    with pytest.raises(TrainError, match='does not know .*, which needs 9.1: .* --upgrade "diffusers>=9.1"') as caught:
        load_transformer(source)
    assert caught.value.reason == "library"


# which argument of diffusers' class says how many blocks a list has
COUNTED = {
    ("flux2", "transformer_blocks"): "num_layers",
    ("flux2", "single_transformer_blocks"): "num_single_layers",
    ("qwen_image", "transformer_blocks"): "num_layers",
    ("z_image", "layers"): "n_layers",
    ("krea2", "transformer_blocks"): "num_layers",
}


def kept_by_autograd(small, path, side, text, checkpointing):
    """Bytes that are kept between forward and backward, and the model's source."""
    save_single_file(small, path)
    source = BaseModel(path)
    model = load_transformer(source, "fp32", "fp32")
    inject(model, source.targets(), lambda layer: decompose(source.weight(layer), 4), "delta_r", 1.0)
    if checkpointing:
        model.enable_gradient_checkpointing()
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address comes twice
        return tensor

    pooled = torch.randn(1, small.pooled) if small.pooled else None
    encoded = EncodedText(torch.randn(1, text, small.text_width), pooled)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latents, sigma = torch.randn(1, small.channels, side, side), torch.tensor([0.5])
        out = prediction(model.train(), source.backbone, latents, sigma, encoded, 1.0, CPU, torch.float32)
    assert out.requires_grad
    return sum(size for size, _ in seen.values()), source


@pytest.mark.parametrize("name, blocks", COUNTED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(name, blocks, checkpointing, tmp_path):
    """What one block more keeps between forward and backward, in multiples of tokens * hidden size."""
    small, argument, side, text = FAMILIES[name], COUNTED[name, blocks], 32, 64

    def kept(count):
        more = replace(small, arguments=small.arguments | {argument: count})
        return kept_by_autograd(more, tmp_path / f"{count}.safetensors", side, text, checkpointing)

    (less, _), (more, source) = kept(2), kept(3)
    unit = (source.backbone.tokens(side, side) + text) * source.facts.hidden * 4
    expected = 1.0 if checkpointing else source.backbone.activation_counts[blocks]
    assert (more - less) / unit == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("dual", [(), (0,), (0, 1)])
def test_activations_of_blocks_that_attend_twice(dual, tmp_path):
    small = replace(FAMILIES["sd3"], arguments=FAMILIES["sd3"].arguments | {"dual_attention_layers": dual})
    kept, source = kept_by_autograd(small, tmp_path / "model.safetensors", 32, 64, False)
    whole, recomputed = source.backbone.activations(source.specs, 32, 32, 64)
    # the last block has less: what it makes of the text goes nowhere
    assert kept / 4 == pytest.approx(sum(whole), rel=0.1)
    assert recomputed == [192 * (256 + 64)] * 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("widths, depths", [((64, 64, 128), (1, 1, 2)), ((64, 128, 128), (1, 2, 3))])
def test_activations_of_a_u_net(checkpointing, widths, depths, tmp_path):
    """All of them: they are no multiple of anything."""
    changes = {"block_out_channels": widths, "transformer_layers_per_block": depths}
    changes["attention_head_dim"] = tuple(width // 64 for width in widths)
    small = replace(FAMILIES["sdxl"], arguments=FAMILIES["sdxl"].arguments | changes)
    kept, source = kept_by_autograd(small, tmp_path / "model.safetensors", 32, 77, checkpointing)
    whole, recomputed = source.backbone.activations(source.specs, 32, 32, 77)
    assert kept / 4 == pytest.approx(sum(recomputed if checkpointing else whole), rel=0.1)


# as the published models' own config.json says it: what shapes must tell, and numbers of weights and adapted layers
PUBLISHED = {
    "SDXL 1.0": (
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        2.57, 700, (2048, 1280),
    ),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
            "dual_attention_layers": [*range(13)], "qk_norm": "rms_norm",
        },
        2.47, 24 * 12 + 13 * 4 - 3, (4096, 2048),
    ),
    "SD3.5 large": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "joint_attention_dim": 4096,
            "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
            "dual_attention_layers": [], "qk_norm": "rms_norm",
        },
        8.06, 38 * 12 - 3, (4096, 2048),
    ),
    "Krea 2": ("Krea2Transformer2DModel", {}, 12.8, 28 * 8, (12 * 2560,)),
    "FLUX.1 Fill": (
        "FluxTransformer2DModel", {"in_channels": 384, "out_channels": 64, "guidance_embeds": True},
        11.9, 342, (4096, 768),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_told_by_their_shapes(name, tmp_path):
    """Files with a header of the real shapes and a hole for data: family, configuration, layers, an estimate."""
    kind, arguments, billions, layers, texts = PUBLISHED[name]
    source = BaseModel(sparse_model(tmp_path / "model.safetensors", getattr(diffusers, kind), arguments))
    assert source.backbone.model_class == kind and source.facts.text_widths == texts
    own = inspect.signature(getattr(diffusers, kind).__init__).parameters
    expected = {key: parameter.default for key, parameter in own.items()} | arguments
    for key, value in source.config.items():
        if key != "sample_size":
            assert json.dumps(value) == json.dumps(expected[key]), key
    assert sum(math.prod(spec.shape) for spec in source.specs.values()) == pytest.approx(billions * 1e9, rel=0.02)
    targets = source.targets()
    assert len(targets) == layers
    config = make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"})
    side = 64
    shapes = [(source.facts.channels, side, side, 256, texts[0])]
    plan, estimate = choose_memory(config, source, targets, shapes, Available(10**11, 24 * 10**9))
    assert estimate.vram < 24e9 and plan.base_storage in ("bf16", "fp8")
