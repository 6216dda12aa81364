"""Pictures and captions to a training cache, with a pipeline folder of a few units: values, and everything refused."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageOps

from qrlora_core import EncodedText, TrainingCache, bucket_size
from tests.train import tiny
from train.config import EncodeConfig
from train.data import encode as module
from train.data.encode import encode
from train.errors import TrainError
from train.settings import ConfigError, make_config

NO_TEXT = EncodedText(torch.zeros(1, 1), torch.zeros(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Encode with some settings changed; the opened cache."""
    monkeypatch.setattr(module.gc, "collect", int)  # half a second each time, for models of a few kilobytes

    def run(**changes):
        base = {
            "pipeline": str(folder),
            "output": str(tmp_path / "cache.safetensors"),
            "resolution": 64,
            "bucket_step": 16,
            "instance_prompt": "a photo",
            "max_tokens": tiny.TOKENS,
            "device": "cpu",
            "precision": "fp32",
        }
        return TrainingCache(encode(make_config(EncodeConfig, base, changes)))

    return run


def vae_of(folder):
    return AutoencoderKL.from_pretrained(folder, subfolder="vae")


@torch.no_grad()
def latent_of(folder, image):
    """Latents as FLUX has them, from pixels of -1 to 1, computed here."""
    pixels = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None].double() / 255 * 2 - 1
    vae = vae_of(folder)
    return ((vae.encode(pixels.float()).latent_dist.mean - 0.1159) * 0.3611)[0]


def test_latents_are_those_of_the_vae_and_of_the_bucket(run, folder, tmp_path):
    wide = tiny.picture(tmp_path / "in" / "a.png", 200, 100)
    tall = tiny.picture(tmp_path / "in" / "b.png", 100, 200, seed=1)
    cache = run(pictures=[str(tmp_path / "in")], flip=True)
    assert [item.name for item in cache.items] == ["a.png", "b.png"]
    for index, path in enumerate((wide, tall)):
        size = (80, 48) if index == 0 else (48, 80)
        assert bucket_size(*Image.open(path).size, 64, 16) == size
        cut = ImageOps.fit(Image.open(path), size, Image.Resampling.LANCZOS)
        assert cache.latent_shape(index) == (16, size[1] // 8, size[0] // 8)
        torch.testing.assert_close(cache.latent(index), latent_of(folder, cut), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            cache.latent(index, flipped=True), latent_of(folder, ImageOps.mirror(cut)), rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(cache.latent(0), cache.latent(0, flipped=True))


def test_texts_are_those_of_the_pipeline(run, folder, tmp_path):
    tiny.picture(tmp_path / "a.png")
    tiny.picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf  a [trigger] dog\r\n")
    cache = run(pictures=[str(tmp_path)], trigger="<c>", instance_prompt="a photo of [trigger]", repeats=3)
    assert [item.caption for item in cache.items] == ["a photo of <c>", "a <c> dog"]
    assert {item.repeats for item in cache.items} == {3}
    assert cache.metadata["qrlora.trigger"] == "<c>" and cache.metadata["qrlora.prompt"] == "a photo of <c>"
    pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None)
    wanted = [*((item.text, item.caption) for item in cache.items), (cache.empty_text, "")]
    assert len({index for index, _ in wanted}) == 3 == cache.text_count
    for index, caption in wanted:
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(caption, None, max_sequence_length=tiny.TOKENS)
        assert torch.equal(cache.text(index).embeds, embeds[0])
        assert torch.equal(cache.text(index).pooled, pooled[0])


def test_the_first_caption_is_encoded_without_its_trigger_too(run, folder, tmp_path):
    path = str(tiny.picture(tmp_path / "a.png"))
    cache = run(pictures=[path], trigger="<c>", instance_prompt="a photo of a [trigger] dog")
    plain = cache.plain()
    assert (plain.trigger, plain.prompt) == ("<c>", "a photo of a dog") and cache.text_count == 2
    pipeline = FluxPipeline.from_pretrained(folder, transformer=None, vae=None)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(plain.prompt, None, max_sequence_length=tiny.TOKENS)
    assert torch.equal(plain.text.embeds, embeds[0]) and torch.equal(plain.text.pooled, pooled[0])
    none = run(pictures=[path], instance_prompt="a photo of a <c> dog", output=str(tmp_path / "none.safetensors"))
    assert none.plain() is None, "no trigger is named"
    assert none.fingerprint() == cache.fingerprint()


def test_one_caption_is_encoded_once(run, tmp_path):
    paths = [str(tiny.picture(tmp_path / f"{name}.png")) for name in "abc"]
    cache = run(pictures=paths, captions="prompt")
    assert cache.text_count == 2 and {item.text for item in cache.items} == {1}


def test_storage_follows_the_precision(run, tmp_path):
    cache = run(pictures=[str(tiny.picture(tmp_path / "a.png"))], precision="bf16")
    assert cache.text(0).embeds.dtype == cache.text(0).pooled.dtype == torch.bfloat16
    assert cache.latent(0).dtype == torch.float32


def test_fp16_leaves_the_vae_in_fp32(run, folder, tmp_path):
    cache = run(pictures=[str(tiny.picture(tmp_path / "a.png", 64, 64))], precision="fp16")
    exact = latent_of(folder, Image.open(tmp_path / "a.png"))
    # the weights were read as fp16; arithmetic in fp16 would be ten times as far away
    assert float((cache.latent(0) - exact).abs().max()) < 2e-3


def test_class_pictures_and_unicode_paths(run, tmp_path):
    own = tiny.picture(tmp_path / "my d\u00f6g \u72ac" / "a b.png")
    other = tiny.picture(tmp_path / "class" / "c.jpg", seed=4)
    cache = run(pictures=[str(own.parent)], class_pictures=[str(other.parent)], class_prompt="a dog")
    assert [(item.name, item.caption, item.is_class) for item in cache.items] == [
        ("a b.png", "a photo", False),
        ("c.jpg", "a dog", True),
    ]


def test_every_picture_in_several_sizes(run, folder, tmp_path):
    """Also those of the class; a size that is named twice is there once."""
    own, other = tiny.picture(tmp_path / "a.png", 200, 100), tiny.picture(tmp_path / "c.png", 64, 64, seed=4)
    more = {"class_pictures": [str(other)], "class_prompt": "a dog", "repeats": 3}
    cache = run(pictures=[str(own)], resolutions=["96", "64", "96"], **more)
    sizes = [bucket_size(*size, side, 16) for size in ((200, 100), (64, 64)) for side in (64, 96)]
    assert [cache.latent_shape(index)[1:] for index in range(4)] == [(h // 8, w // 8) for w, h in sizes]
    assert [(item.name, item.repeats, item.is_class) for item in cache.items] == [
        ("a.png", 3, False), ("a.png", 3, False), ("c.png", 3, True), ("c.png", 3, True),
    ]  # fmt: skip
    cut = ImageOps.fit(Image.open(own), sizes[1], Image.Resampling.LANCZOS)
    torch.testing.assert_close(cache.latent(1), latent_of(folder, cut), atol=1e-5, rtol=1e-4)


def test_mask_is_the_alpha_channel_and_hides_no_colours(run, folder, tmp_path):
    path = tiny.picture(tmp_path / "a.png", 128, 128, "RGBA")
    plain = Image.open(path).convert("RGB")
    tiny.picture(tmp_path / "b.png")
    cache = run(pictures=[str(tmp_path)], mask=True)
    mask = cache.mask(0)
    assert mask.shape == (8, 8) and mask[:, :3].eq(1).all() and mask[:, 5:].eq(0).all()
    assert cache.mask(1) is None
    # what the mask hides is still the picture, not black
    expected = latent_of(folder, plain.resize((64, 64), Image.Resampling.LANCZOS))
    torch.testing.assert_close(cache.latent(0), expected, rtol=1e-4, atol=1e-5)
    tmp = tmp_path / "without.safetensors"
    assert run(pictures=[str(path)], output=str(tmp)).mask(0) is None


def test_a_mask_that_leaves_nothing_is_an_error(run, tmp_path):
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(tmp_path / "a.png")
    with pytest.raises(TrainError, match=r"a\.png is transparent everywhere"):
        run(pictures=[str(tmp_path)], mask=True)


def test_crops_and_draws_come_from_the_seed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_encode_texts", lambda folder, config, texts, device: [NO_TEXT] * len(texts))
    paths = [str(tiny.picture(tmp_path / "a.png", 90, 60))]

    def latent(name, **changes):
        return run(pictures=paths, output=str(tmp_path / name), buckets=False, **changes).latent(0)

    centre = latent("0")
    assert torch.equal(latent("1", seed=9), centre)
    one, again, other = (latent(n, center_crop=False, seed=s) for n, s in (("2", 1), ("3", 1), ("4", 2)))
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, centre)
    drawn, twice, third = (latent(n, sample_latents=True, seed=s) for n, s in (("5", 1), ("6", 1), ("7", 2)))
    assert torch.equal(drawn, twice) and not torch.equal(drawn, third) and not torch.equal(drawn, centre)


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not a picture",
    "cut.png": None,
    "cut.jpg": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named(run, monkeypatch, tmp_path, name):
    content = BROKEN[name]
    if content is None:
        whole = tiny.picture(tmp_path / f"whole{name[-4:]}", 200, 200).read_bytes()
        content = whole[: len(whole) // 2]
        (tmp_path / f"whole{name[-4:]}").unlink()
    (tmp_path / name).write_bytes(content)
    tiny.picture(tmp_path / "good.png")

    def never(*_):
        raise AssertionError("the text encoders were loaded before the pictures were looked at")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_encode_texts", never)
        with pytest.raises(TrainError, match=rf"{name}.*cannot be read.*skip_broken") as caught:
            run(pictures=[str(tmp_path)])
    assert caught.value.reason == "data" and not (tmp_path / "cache.safetensors").exists()
    assert [item.name for item in run(pictures=[str(tmp_path)], skip_broken=True).items] == ["good.png"]


@pytest.mark.parametrize(
    "pictures, settings, reason, message",
    [
        (["missing"], {}, "data", "missing does not exist"),
        (["nothing"], {}, "data", "no pictures in the folder nothing"),
        (["a.png"], {"class_pictures": ["nothing"], "class_prompt": "x"}, "data", "no pictures in the folder nothing"),
        (["a.png"], {"captions": "files"}, "data", r"a\.png has no caption: write a\.txt beside it"),
        (["a.png"], {"instance_prompt": ""}, "data", r"a\.png has no caption.*instance_prompt"),
        (["b.png"], {}, "data", r"b\.txt cannot be read as UTF-8"),
        (["c.png"], {}, "data", r"c\.png has no caption"),
        (["d.png"], {}, "settings", "trigger is not set"),
        (["broken.png"], {"skip_broken": True}, "data", "none of the pictures can be read"),
        (["a.png"], {"output": "a.png"}, "settings", r"a\.png exists already"),
        (["a.png"], {"device": "cuda:7"}, "settings", "cuda:7"),
        (["a.png"], {"device": "toaster"}, "settings", "toaster"),
    ],
)
def test_refused(run, tmp_path, monkeypatch, pictures, settings, reason, message):
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        tiny.picture(tmp_path / f"{name}.png")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "._a.png").write_bytes(b"what macOS leaves")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_text("  \n")
    (tmp_path / "d.txt").write_text("a [trigger]")
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(TrainError, match=message) as caught:
        run(pictures=pictures, **settings)
    assert caught.value.reason == reason
    assert not list(tmp_path.glob(".qrlora-*"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has no model_index.json"),
        (lambda folder: folder.write_bytes(b"x"), "is a file"),
    ],
)
def test_no_pipeline_folder(run, tmp_path, damage, message):
    damage(tmp_path / "FLUX.1-dev")
    with pytest.raises(TrainError, match=f"FLUX.1-dev' {message}.*nothing is downloaded") as caught:
        run(pictures=[str(tiny.picture(tmp_path / "a.png"))], pipeline=str(tmp_path / "FLUX.1-dev"))
    assert caught.value.reason == "model"


@pytest.mark.parametrize(
    "part, what",
    [
        ("vae/diffusion_pytorch_model.safetensors", "VAE"),
        ("vae/config.json", "VAE"),
        ("text_encoder_2/model.safetensors", "text encoders"),
        ("tokenizer/tokenizer.json", "text encoders|vocabulary"),
    ],
)
@pytest.mark.parametrize("cut", [True, False], ids=["truncated", "missing"])
def test_damaged_pipeline_folder(run, folder, tmp_path, part, what, cut):
    copy = tmp_path / "copy"
    copy.mkdir()
    for one in folder.rglob("*"):
        if one.is_file():
            (copy / one.relative_to(folder)).parent.mkdir(exist_ok=True)
            (copy / one.relative_to(folder)).write_bytes(one.read_bytes())
    content = (copy / part).read_bytes()
    (copy / part).unlink()
    if cut:
        (copy / part).write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainError, match=what) as caught:
        run(pictures=[str(tiny.picture(tmp_path / "a.png"))], pipeline=str(copy))
    assert caught.value.reason == "model"
    assert not (tmp_path / "cache.safetensors").exists()


def test_out_of_memory_says_what_to_do(run, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_encode_texts", full)
    with pytest.raises(TrainError, match="device cpu") as caught:
        run(pictures=[str(tiny.picture(tmp_path / "a.png"))])
    assert caught.value.reason == "memory"


def test_resolutions_may_be_numbers_as_in_a_settings_file():
    base = {"pipeline": "p", "pictures": ["a"], "output": "o"}
    assert make_config(EncodeConfig, base, {"resolutions": [768, 1024]}).sides == (512, 768, 1024)
    with pytest.raises(ConfigError, match="expected a list of names"):
        make_config(EncodeConfig, base, {"resolutions": [768.5]})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pictures": []}, "pictures is empty"),
        ({"captions": "prompt", "instance_prompt": ""}, "instance_prompt is empty"),
        ({"class_prompt": "a dog"}, "go together"),
        ({"resolution": 100}, "multiples of 16"),
        ({"bucket_step": 128}, "larger than resolution"),
        ({"resolutions": ["128", "large"]}, "resolutions holds 'large', expected numbers from 64 to 4096"),
        ({"resolutions": ["8192"]}, "resolutions holds '8192'"),
        ({"resolutions": ["100"]}, "multiples of 16"),
    ],
)
def test_settings_that_contradict(settings, message):
    base = {"pipeline": "p", "pictures": ["a"], "output": "o", "instance_prompt": "x", "resolution": 64}
    with pytest.raises(ConfigError, match=message):
        make_config(EncodeConfig, base, settings)
