"""The training cache: what is written comes back, and a file that does not fit together is refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import qrlora_core as core
from qrlora_core import CacheItem, EncodedPicture, EncodedText, PlainText, TrainingCache, bucket_size, save_cache


def parts(pictures=2, **changes):
    """Items, pictures and texts that fit together."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    values = {
        "items": [CacheItem(f"{i}.png", 1, "caption", 2, i == 1) for i in range(pictures)],
        "pictures": [EncodedPicture(draw(16, 4, 6), draw(16, 4, 6), torch.rand(4, 6)) for _ in range(pictures)],
        "texts": [EncodedText(draw(5, 8), draw(7)) for _ in range(2)],
        "empty_text": 0,
    }
    return values | changes


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.safetensors"


def test_round_trip(path):
    made = parts()
    save_cache(path, **made, metadata={"qrlora.trigger": "<c>"})
    cache = TrainingCache(path)
    assert list(cache.items) == made["items"] and cache.text_count == 2 and cache.empty_text == 0
    assert cache.metadata["qrlora.trigger"] == "<c>"
    for index, picture in enumerate(made["pictures"]):
        assert cache.latent_shape(index) == (16, 4, 6) and cache.has_flip(index)
        assert torch.equal(cache.latent(index), picture.latent)
        assert torch.equal(cache.latent(index, flipped=True), picture.flipped)
        assert torch.equal(cache.mask(index), picture.mask)
    for index, text in enumerate(made["texts"]):
        assert torch.equal(cache.text(index).embeds, text.embeds)
        assert torch.equal(cache.text(index).pooled, text.pooled)
    assert not [one for one in path.parent.iterdir() if one != path]


def test_dtypes_are_kept_and_parts_are_optional(path):
    texts = [EncodedText(torch.ones(5, 8, dtype=torch.bfloat16), torch.ones(7, dtype=torch.float16))]
    pictures = [EncodedPicture(torch.ones(16, 2, 2, dtype=torch.float64))]
    save_cache(path, [CacheItem("a", 0)], pictures, texts)
    cache = TrainingCache(path)
    assert cache.text(0).embeds.dtype == torch.bfloat16 and cache.text(0).pooled.dtype == torch.float16
    assert cache.latent(0).dtype == torch.float32
    assert cache.mask(0) is None and not cache.has_flip(0) and cache.empty_text is None


def test_a_damaged_cache_is_refused(path):
    """One bit of a latent; without the checksum nothing would tell."""
    save_cache(path, **parts())
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(core.FileFormatError, match="is damaged: its content does not match its checksum"):
        TrainingCache(path)


def plain(**changes):
    return PlainText("<c>", "a dog", EncodedText(torch.ones(3, 8), torch.ones(7)))._replace(**changes)


def test_a_caption_without_the_trigger_is_no_part_of_the_data(path, tmp_path):
    """A run that began with a cache of old goes on with one that was written since."""
    made = parts()
    save_cache(path, **made)
    assert TrainingCache(path).plain() is None
    other = tmp_path / "other.safetensors"
    save_cache(other, **made, plain=plain())
    old, new = TrainingCache(path), TrainingCache(other)
    found = new.plain()
    assert (found.trigger, found.prompt) == ("<c>", "a dog") and torch.equal(found.text.embeds, torch.ones(3, 8))
    assert new.fingerprint() == old.fingerprint() and new.text_count == old.text_count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": EncodedText(torch.ones(3, 8), None)}, "without the trigger is incomplete"),
        ({"text": EncodedText(torch.ones(3), torch.ones(7))}, "without the trigger is incomplete"),
        ({"text": EncodedText(torch.ones(0, 8), torch.ones(7))}, "without the trigger is empty"),
        ({"trigger": 3}, "qrlora.plain is damaged"),
    ],
)
def test_a_caption_without_the_trigger_that_does_not_fit(path, change, message):
    with pytest.raises(core.FileFormatError, match=message):
        save_cache(path, **parts(), plain=plain(**change))
    assert not path.exists()


def test_the_key_of_the_source_is_the_identity(path, tmp_path):
    save_cache(path, **parts(), source_key="0123456789abcdef")
    assert TrainingCache(path).identity() == "0123456789abcdef" != TrainingCache(path).fingerprint()
    other = tmp_path / "other.safetensors"
    save_cache(other, **parts())
    assert TrainingCache(other).identity() == TrainingCache(other).fingerprint()


def test_fingerprint_is_of_the_content(path, tmp_path):
    made = parts()
    save_cache(path, **made)
    first = TrainingCache(path).fingerprint()
    other = tmp_path / "other.safetensors"
    save_cache(other, **made, metadata={"qrlora.trigger": "x"})
    assert TrainingCache(other).fingerprint() == first
    changes = [
        {"items": [made["items"][0], CacheItem("1.png", 1, "other", 2, True)]},
        {"items": [made["items"][0], CacheItem("1.png", 1, "caption", 3, True)]},
        {"pictures": [made["pictures"][0], made["pictures"][1]._replace(latent=made["pictures"][1].latent + 1e-6)]},
        {"pictures": [made["pictures"][0], made["pictures"][1]._replace(mask=None)]},
        {"texts": [made["texts"][0], made["texts"][1]._replace(pooled=made["texts"][1].pooled * 2)]},
        {"empty_text": None},
    ]
    for change in changes:
        save_cache(other, **(made | change), overwrite=True)
        assert TrainingCache(other).fingerprint() != first, change.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["items"].pop(), "1 items got 2 pictures"),
        (lambda m: m["items"].__setitem__(0, CacheItem("a", 5)), "names text 5 of 2"),
        (lambda m: m["items"].__setitem__(0, CacheItem("a", 1, is_class=True)), "no picture to train on"),
        (lambda m: m.update(items=[], pictures=[]), "no picture to train on"),
        (lambda m: m.update(empty_text=2), "empty caption is text 2 of 2"),
        (lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 3, 4))), "even sides"),
        (lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 4))), "expected 3-D"),
        (lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 0, 4))), "empty"),
        (lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 4, 4), torch.ones(16, 4, 6))), "flip is"),
        (
            lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 4, 4), None, torch.ones(4, 6))),
            r"mask\.0 is",
        ),
        (
            lambda m: m["pictures"].__setitem__(0, EncodedPicture(torch.ones(16, 4, 4), None, 2 * torch.ones(4, 4))),
            "outside of 0 to 1",
        ),
        (lambda m: m["texts"].__setitem__(0, EncodedText(torch.ones(5), torch.ones(7))), "text 0 is incomplete"),
        (lambda m: m["texts"].__setitem__(0, EncodedText(torch.ones(0, 8), torch.ones(7))), "text 0 is empty"),
    ],
)
def test_what_does_not_fit_is_not_written(path, change, message):
    made = parts()
    change(made)
    with pytest.raises(core.FileFormatError, match=message) as caught:
        save_cache(path, **made)
    assert ".tmp" not in str(caught.value)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite(path, value):
    made = parts()
    made["pictures"][1].latent[3, 1, 1] = value
    with pytest.raises(core.WeightError, match=r"latent\.1"):
        save_cache(path, **made)
    assert not list(path.parent.iterdir())


def test_nothing_is_overwritten_unasked(path):
    save_cache(path, **parts())
    before = path.read_bytes()
    with pytest.raises(core.PathError, match="exists"):
        save_cache(path, **parts(pictures=1))
    assert path.read_bytes() == before
    save_cache(path, **parts(pictures=1), overwrite=True)
    assert len(TrainingCache(path).items) == 1


def header(**changes):
    item = {"name": "a", "text": 0, "caption": "", "repeats": 1, "is_class": False}
    return {"version": 1, "items": [item], "empty_text": None} | changes


def item(**changes):
    return header(items=[header()["items"][0] | changes])


@pytest.mark.parametrize(
    "table",
    [
        None,
        "",
        "{",
        "[]",
        "7",
        "null",
        header(version=2),
        header(items=None),
        header(items=7),
        header(items=[7]),
        header(items=[{"name": "a"}]),
        item(extra=1),
        item(text="0"),
        item(text=-1),
        item(text=1),
        item(text=True),
        item(text=0.0),
        item(repeats=0),
        item(repeats=10**12),
        item(repeats=None),
        item(name=None),
        item(is_class="no"),
        item(is_class=True),
        header(empty_text="0"),
        header(empty_text=True),
        header(empty_text=-1),
        header(empty_text=5),
        header(items=[]),
    ],
    ids=str,
)
def test_hostile_headers(path, table):
    text = table if table is None or isinstance(table, str) else json.dumps(table)
    tensors = {"latent.0": torch.ones(16, 2, 2), "text.0.embeds": torch.ones(1, 4), "text.0.pooled": torch.ones(4)}
    save_file(tensors, path, metadata={} if text is None else {"qrlora.cache": text})
    with pytest.raises(core.FileFormatError, match=r"c\.safetensors"):
        TrainingCache(path)


def test_a_good_header_is_read(path):
    """The control of the test above."""
    tensors = {"latent.0": torch.ones(16, 2, 2), "text.0.embeds": torch.ones(1, 4), "text.0.pooled": torch.ones(4)}
    save_file(tensors, path, metadata={"qrlora.cache": json.dumps(header())})
    assert TrainingCache(path).items == (CacheItem("a", 0),)


@pytest.mark.parametrize("key", ["latent.0", "text.0.embeds", "text.0.pooled", "text.1.pooled"])
def test_missing_tensors(path, key):
    save_cache(path, **parts())
    metadata = {"qrlora.cache": TrainingCache(path).metadata["qrlora.cache"]}  # without the checksum
    tensors = {name: value.clone() for name, value in load_file(path).items() if name != key}
    path.unlink()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(core.FileFormatError, match="none|incomplete|of 1"):
        TrainingCache(path)


def test_other_files_are_named_for_what_they_are(path, golden):
    with pytest.raises(core.FileFormatError, match="not a training cache.*train encode"):
        TrainingCache(golden / "base_bfl.safetensors")
    with pytest.raises(core.FileFormatError, match="not a readable"):
        TrainingCache(path)


@pytest.mark.parametrize(
    "picture, resolution, step, expected",
    [
        ((512, 512), 512, 64, (512, 512)),
        ((100, 100), 512, 64, (512, 512)),
        ((1024, 512), 512, 64, (704, 320)),
        ((3000, 2000), 1024, 64, (1280, 832)),
        ((1000, 1000), 500, 64, (448, 448)),
        ((10000, 10), 512, 64, (2048, 128)),
    ],
)
def test_buckets(picture, resolution, step, expected):
    assert bucket_size(*picture, resolution, step) == expected
    assert bucket_size(*picture[::-1], resolution, step) == expected[::-1]


@pytest.mark.parametrize("resolution, step", [(512, 64), (1024, 64), (768, 32), (64, 16)])
def test_every_bucket_keeps_its_promises(resolution, step):
    for tenths in range(2, 50):
        width, height = bucket_size(tenths * 100, 1000, resolution, step)
        assert width % step == height % step == 0
        assert 0.5 * resolution**2 < width * height <= 1.02 * resolution**2
        assert bucket_size(1000, tenths * 100, resolution, step) == (height, width)
        # no other bucket of the kind has a nearer aspect ratio
        error = abs(math.log(width / height / (tenths / 10)))
        for one in range(step, 4 * resolution, step):
            other = int(resolution**2 / one) // step * step
            if step <= other <= 4 * resolution:
                for ratio in (one / other, other / one):
                    assert error <= abs(math.log(ratio / (tenths / 10))) + 1e-9


def test_squares_on_request():
    assert bucket_size(1000, 300, 512, 64, keep_aspect=False) == (512, 512)


def test_model_fingerprint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(64, 64, generator=generator), "b": torch.randn(3, generator=generator)}
    save_file(state, tmp_path / "x.safetensors")
    first = core.model_fingerprint(tmp_path / "x.safetensors")
    assert first == core.model_fingerprint(tmp_path) and len(first) == 16
    int(first, 16)
    (tmp_path / "x.safetensors").rename(tmp_path / "y.safetensors")
    assert core.model_fingerprint(tmp_path / "y.safetensors") == first
    for change in ({"a": state["a"] + 1e-6}, {"b": state["b"].half()}, {"c": torch.ones(1)}):
        save_file(state | change, tmp_path / "z.safetensors")
        assert core.model_fingerprint(tmp_path / "z.safetensors") != first


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 8, (100).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"nope",
     (2).to_bytes(8, "little") + b"[]", (8).to_bytes(8, "little") + b'{"a": 1}'],
)  # fmt: skip
def test_model_fingerprint_of_damaged_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(core.FileFormatError, match=r"x\.safetensors is not a readable"):
        core.model_fingerprint(tmp_path / "x.safetensors")
    with pytest.raises(core.FileFormatError):
        core.model_fingerprint(tmp_path / "missing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(core.FileFormatError, match="holds no safetensors"):
        core.model_fingerprint(tmp_path / "empty")
