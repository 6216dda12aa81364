"""Noise as the families know it, against diffusers' schedulers; which of SDXL's kinds a model is of."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from tests.train.families import FAMILIES, save_data, save_single_file
from tests.train.test_families import settings
from train.errors import TrainError
from train.model.backbones import FLOW
from train.model.backbones.process import Discrete, discrete_steps
from train.model.source import BaseModel
from train.run.fit import fit

SHAPE = (3, 4, 8, 8)
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def drawn():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, *SHAPE, generator=generator)
    return latents, noise, torch.tensor([0.001, 0.4567, 1.0])


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_noise_and_targets_are_those_of_diffusers(predicts, zero_snr):
    process, (latents, noise, sigmas) = Discrete(predicts, zero_snr), drawn()
    scheduler = DDIMScheduler(**TRAINED, rescale_betas_zero_snr=zero_snr)
    steps = discrete_steps(sigmas)
    assert steps.tolist() == [1, 456, 999]
    torch.testing.assert_close(
        process.mixed(latents, noise, sigmas), scheduler.add_noise(latents, noise, steps), atol=2e-5, rtol=1e-4
    )
    target = noise if predicts == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    torch.testing.assert_close(process.target(latents, noise, sigmas), target, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("predicts", ["epsilon", "v"])
def test_a_right_prediction_leads_to_the_picture(predicts):
    """From any sigma to none in one step, and by way of another one."""
    process, (latents, noise, sigmas) = Discrete(predicts), drawn()
    mixed, target = process.mixed(latents, noise, sigmas), process.target(latents, noise, sigmas)
    none, half = torch.zeros(3), torch.tensor([0.0005, 0.2, 0.5])
    torch.testing.assert_close(process.step(mixed, target, sigmas, none), latents, atol=1e-4, rtol=1e-4)
    between = process.step(mixed, target, sigmas, half)
    torch.testing.assert_close(between, process.mixed(latents, noise, half), atol=1e-4, rtol=1e-4)


def test_a_step_from_noise_alone_is_finite():
    """Where noise is predicted and the last step holds nothing else, there is nothing to divide by."""
    process, noise = Discrete("epsilon", zero_snr=True), drawn()[1]
    predicted = noise * 1.001
    made = process.step(noise, predicted, torch.ones(3), torch.full((3,), 0.5))
    assert made.isfinite().all() and made.abs().max() < 100


def test_flow_is_that_of_diffusers():
    latents, noise, sigmas = drawn()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.8, 0.5])
    mixed = FLOW.mixed(latents, noise, torch.full((3,), 0.8))
    torch.testing.assert_close(mixed, scheduler.scale_noise(latents, scheduler.timesteps[:1], noise))
    step = scheduler.step(FLOW.target(latents, noise, sigmas), scheduler.timesteps[0], mixed).prev_sample
    following = FLOW.step(mixed, noise - latents, torch.full((3,), 0.8), torch.full((3,), 0.5))
    torch.testing.assert_close(following, step)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint of SDXL: the U-Net under its prefix, and something of the text encoders."""
    path = tmp_path_factory.mktemp("sdxl") / "model.safetensors"
    save_single_file(FAMILIES["sdxl"], path, prefix="model.diffusion_model.")
    save_file(load_file(path) | {"conditioner.embedders.0.x.weight": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize(
    "keys, name",
    [((), "epsilon"), (("v_pred",), "v"), (("v_pred", "ztsnr"), "v, zero terminal SNR"), (("ztsnr",), "epsilon")],
)
def test_what_a_checkpoint_predicts(checkpoint, tmp_path, keys, name):
    save_file(load_file(checkpoint) | {key: torch.zeros(()) for key in keys}, tmp_path / "x.safetensors")
    assert BaseModel(tmp_path / "x.safetensors").backbone.process.name == name


def folder_with(tmp_path, scheduler):
    FAMILIES["sdxl"].model().save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(scheduler)
    return tmp_path


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, "epsilon"),
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v, zero terminal SNR"),
    ],
)
def test_what_a_folder_predicts(tmp_path, settings, name):
    assert BaseModel(folder_with(tmp_path, json.dumps(settings))).backbone.process.name == name


@pytest.mark.parametrize(
    "scheduler, message", [('{"prediction_type": "sample"}', "predicts 'sample'"), ("[", "cannot")]
)
def test_other_folders_are_refused(tmp_path, scheduler, message):
    with pytest.raises(TrainError, match=message) as caught:
        BaseModel(folder_with(tmp_path, scheduler))
    assert caught.value.reason == "model"


def widened(state):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return {key: torch.zeros(64, 9, 3, 3)}


def shortened(state):
    return {key: None for key in state if key.startswith("model.diffusion_model.middle_block.1.transformer_blocks.1.")}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: {"edm_mean": torch.zeros(4)}, "as Playground 2.5 does"),
        (lambda state: {"edm_vpred.sigma_max": torch.zeros(())}, "as CosXL does"),
        (widened, "takes 9 channels and gives 4: a variant for inpainting"),
        (shortened, "transformer blocks, not as SDXL has them"),
    ],
)
def test_relatives_are_refused(checkpoint, tmp_path, change, message):
    state = load_file(checkpoint)
    state |= change(state)
    save_file({key: value for key, value in state.items() if value is not None}, tmp_path / "x.safetensors")
    with pytest.raises(TrainError, match=message) as caught:
        BaseModel(tmp_path / "x.safetensors")
    assert caught.value.reason == "model" and "Use SDXL 1.0" in str(caught.value)


def test_weights_of_the_loss_are_of_flow_matching(checkpoint, tmp_path):
    small = FAMILIES["sdxl"]
    save_data(tmp_path / "data.safetensors", small.channels, small.pooled)
    with pytest.raises(TrainError, match="loss_weighting cosmap is for flow matching; SDXL predicts epsilon") as caught:
        fit(settings(tmp_path, model=str(checkpoint), loss_weighting="cosmap"))
    assert caught.value.reason == "settings"
