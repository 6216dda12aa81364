"""Batches are functions of settings and number; what sampling, shift, weighting, dropout and masks do."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from qrlora_core import CacheItem, EncodedPicture, EncodedText, TrainingCache, save_cache
from tests.train.conftest import small_cache
from train.data.batches import Sampler, drawn_sigma
from train.model.backbones.flux import FLUX
from train.run.denoise import denoising_loss, loss_weights, sample_latents, shifted, weighted_mse


@pytest.fixture
def cache(tmp_path):
    return TrainingCache(small_cache(tmp_path / "c.safetensors", class_pictures=2, mask=True, flip=True))


def test_equal_numbers_give_equal_batches_in_any_order(cache, settings):
    one, other = Sampler(cache, settings(batch_size=2)), Sampler(cache, settings(batch_size=2))
    batches = [one.batch(number) for number in range(7)]
    for number in (6, 0, 3, 5):
        first, second = batches[number], other.batch(number)
        for one_part, other_part in zip(
            [*first[:3], *first.text, first.mask], [*second[:3], *second.text, second.mask]
        ):
            assert torch.equal(one_part, other_part)


def test_other_numbers_and_seeds_give_other_noise(cache, settings):
    sampler, elsewhere = Sampler(cache, settings()), Sampler(cache, settings(seed=1))
    noises = [sampler.batch(number).noise.flatten()[:8] for number in range(6)]
    noises.append(elsewhere.batch(0).noise.flatten()[:8])
    assert all(not torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_pass_shows_every_picture(cache, settings, size):
    sampler = Sampler(cache, settings(batch_size=size))
    for which in range(3):
        numbers = range(which * sampler.batches_per_pass, (which + 1) * sampler.batches_per_pass)
        seen = [index for number in numbers for index in sampler.indices(number)]
        assert set(seen) == {0, 1, 2}
        if size == 1:
            assert sorted(seen) == [0, 1, 2]
        for number in numbers:
            shapes = {cache.latent_shape(index) for index in sampler.indices(number)}
            assert len(shapes) == 1 and len(sampler.indices(number)) == size


def test_repeats_count(tmp_path, settings):
    texts = [EncodedText(torch.zeros(2, 4), torch.zeros(4))]
    items = [CacheItem("a", 0, repeats=3), CacheItem("b", 0)]
    pictures = [EncodedPicture(torch.zeros(16, 2, 2))] * 2
    sampler = Sampler(TrainingCache(save_cache(tmp_path / "r.safetensors", items, pictures, texts)), settings())
    assert sorted(index for number in range(4) for index in sampler.indices(number)) == [0, 0, 0, 1]


def test_class_pictures_are_drawn_apart(cache, settings):
    assert {Sampler(cache, settings(), is_class=True).indices(n)[0] for n in range(6)} == {3, 4}


def test_flips_take_latent_and_mask_together(cache, settings):
    sampler, flips = Sampler(cache, settings()), 0
    for number in range(40):
        index, batch = sampler.indices(number)[0], sampler.batch(number)
        flipped = torch.equal(batch.latents[0], cache.latent(index, flipped=True))
        assert flipped or torch.equal(batch.latents[0], cache.latent(index))
        mask = cache.mask(index)
        assert torch.equal(batch.mask[0], mask.flip(-1) if flipped else mask)
        flips += flipped
    assert 8 < flips < 32


def test_caption_dropout_changes_captions_and_nothing_else(cache, settings):
    plain, dropped = Sampler(cache, settings()), Sampler(cache, settings(caption_dropout=0.5))
    empty, count = cache.text(0).embeds, 0
    for number in range(60):
        before, after = plain.batch(number), dropped.batch(number)
        for name in ("latents", "noise", "sigmas"):
            assert torch.equal(getattr(before, name), getattr(after, name))
        count += torch.equal(after.text.embeds[0], empty)
        assert not torch.equal(before.text.embeds[0], empty)
    assert 15 < count < 45


def sigmas_of(cache, config, count=2000):
    sampler = Sampler(cache, config)
    return torch.cat([sampler.batch(number).sigmas for number in range(count // config.batch_size)])


def test_uniform_sigmas(cache, settings):
    sigmas = sigmas_of(cache, settings(batch_size=8))
    assert sigmas.min() >= 1e-3 and sigmas.max() <= 1
    histogram = torch.histc(sigmas, bins=4, min=0, max=1) / len(sigmas)
    assert float((histogram - 0.25).abs().max()) < 0.05


def test_logit_normal_sigmas(cache, settings):
    sigmas = sigmas_of(cache, settings(batch_size=8, timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.7))
    logits = torch.logit(sigmas)
    assert abs(float(logits.mean()) - 0.5) < 0.08 and abs(float(logits.std()) - 0.7) < 0.08


def test_mode_sigmas_lean_to_the_middle(cache, settings):
    """Esser et al., arXiv 2403.03206, equation 20: with s > 0 the middle is denser than the ends."""
    sigmas = sigmas_of(cache, settings(batch_size=8, timestep_sampling="mode", mode_scale=1.29))
    histogram = torch.histc(sigmas, bins=5, min=0, max=1) / len(sigmas)
    assert histogram[2] > 1.5 * histogram[0] and histogram[2] > 1.5 * histogram[4]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_sigmas_are_those_of_diffusers_bit_by_bit(settings, sampling):
    config = settings(timestep_sampling=sampling, logit_mean=0.3, logit_std=0.8, mode_scale=1.1)
    for seed in range(20):
        ours = drawn_sigma(config, torch.Generator().manual_seed(seed))
        theirs = compute_density_for_timestep_sampling(
            "none" if sampling == "uniform" else sampling,
            1,
            0.3,
            0.8,
            1.1,
            generator=torch.Generator().manual_seed(seed),
        )
        assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting):
    sigmas = torch.linspace(1e-3, 1, 50)
    assert torch.equal(loss_weights(weighting, sigmas), compute_loss_weighting_for_sd3(weighting, sigmas))


def test_shift():
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert torch.equal(shifted(sigmas, 1.0), sigmas)
    assert torch.allclose(shifted(sigmas, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    for tokens in (64, 256, 1024, 4096, 9000):
        assert FLUX.shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-12)


def test_samples_follow_the_schedule_of_diffusers():
    """A model that predicts x itself: Euler steps multiply by 1 + (next - sigma), wherever the scheduler puts them."""

    class Identity(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return (hidden_states,)

        config = type("Config", (), {"guidance_embeds": False, "in_channels": 64})

    noise = torch.randn(1, 16, 8, 8)
    text = EncodedText(torch.zeros(1, 2, 4), torch.zeros(1, 4))
    found = sample_latents(Identity(), FLUX, noise, text, 5, 1.0, torch.device("cpu"), torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - i / 5 for i in range(5)], mu=calculate_shift(16))
    expected = noise
    for time in scheduler.timesteps:
        expected = scheduler.step(expected, time, expected, return_dict=False)[0]
    assert torch.allclose(found, expected, atol=1e-6)


class Fixed(torch.nn.Module):
    """Predicts the same velocity everywhere, and remembers what it was shown."""

    class config:
        guidance_embeds = True
        in_channels = 64

    def __init__(self, packed):
        super().__init__()
        self.packed, self.seen = packed, None

    def forward(self, **inputs):
        self.seen = inputs
        return (self.packed,)


def test_loss_of_a_known_prediction(cache, settings):
    """By hand: a model that predicts zero has the loss mean(mask / mean(mask) * (noise - latents)^2)."""
    config = settings(guidance=2.5)
    sampler = Sampler(cache, config)
    batch = sampler.batch(1)
    height, width = batch.latents.shape[2:]
    model = Fixed(torch.zeros(1, height * width // 4, 64))
    loss = denoising_loss(model, FLUX, batch, config, torch.device("cpu"), torch.float32)
    error = (batch.noise - batch.latents).square() * batch.mask[:, None] / batch.mask.mean()
    assert float(loss) == pytest.approx(float(error.mean()), rel=1e-5)
    assert float(model.seen["guidance"][0]) == 2.5 and torch.equal(model.seen["timestep"], batch.sigmas)
    mixed = (1 - batch.sigmas) * batch.latents + batch.sigmas * batch.noise
    shown = FluxPipeline._unpack_latents(model.seen["hidden_states"], height, width, 1)
    assert torch.allclose(shown, mixed, atol=1e-6)
    perfect = Fixed(FluxPipeline._pack_latents(batch.noise - batch.latents, 1, 16, height, width))
    assert float(denoising_loss(perfect, FLUX, batch, config, torch.device("cpu"), torch.float32)) < 1e-12


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_loss_weighting(cache, settings, weighting):
    config = settings(loss_weighting=weighting, use_mask=False)
    batch = Sampler(cache, config).batch(0)
    sigma = float(batch.sigmas)
    model = Fixed(torch.zeros(1, batch.latents[0, 0].numel() // 4, 64))
    weight = sigma**-2 if weighting == "sigma_sqrt" else 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    plain = float(weighted_mse(torch.zeros_like(batch.latents), batch.noise - batch.latents))
    loss = denoising_loss(model, FLUX, batch, config, torch.device("cpu"), torch.float32)
    assert float(loss) == pytest.approx(weight * plain, rel=1e-4)


def test_positions_and_patches_are_those_of_the_pipeline():
    latents, text = torch.randn(2, 16, 4, 6), EncodedText(torch.zeros(2, 3, 8), torch.zeros(2, 8))
    model = Fixed(None)
    inputs = FLUX.inputs(model, latents, torch.ones(2), text, 1.0)
    assert inputs["hidden_states"].shape == (2, 6, 64) and inputs["img_ids"].shape == (6, 3)
    assert torch.equal(inputs["hidden_states"], FluxPipeline._pack_latents(latents, 2, 16, 4, 6))
    expected = FluxPipeline._prepare_latent_image_ids(2, 2, 3, torch.device("cpu"), torch.float32)
    assert torch.equal(inputs["img_ids"], expected)
    assert torch.equal(FLUX.prediction((inputs["hidden_states"],), latents.shape), latents)
    # token 4 is row 1, column 1; its numbers are a 2x2 patch of every channel
    assert inputs["img_ids"][4].tolist() == [0, 1, 1]
    assert torch.equal(inputs["hidden_states"][1, 4].reshape(16, 2, 2), latents[1, :, 2:4, 2:4])


def test_fill_sees_nothing_kept_and_all_of_it_painted():
    """In the order of diffusers' own pipeline: latents, then what is kept, then a mask of 8x8 pixels for each."""
    latents, text = torch.randn(1, 16, 4, 6), EncodedText(torch.zeros(1, 3, 8), torch.zeros(1, 8))
    model = Fixed(None)
    model.config.in_channels = 384
    try:
        seen = FLUX.inputs(model, latents, torch.ones(1), text, 1.0)["hidden_states"]
    finally:
        model.config.in_channels = 64
    kept = torch.full_like(latents, -0.1159 * 0.3611)
    expected = torch.cat([FluxPipeline._pack_latents(part, 1, 16, 4, 6) for part in (latents, kept)], dim=-1)
    assert seen.shape == (1, 6, 384) and bool((seen[..., 128:] == 1).all())
    assert torch.allclose(seen[..., :128], expected)
