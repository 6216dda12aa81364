"""The similarity picture: known values are where they belong, in the colour they should have."""

import copy
import io
import json
import sys

import pytest
from PIL import Image

import qrlora_core as core
from qrlora_plots import PlotsUnavailableError, similarity_figure, similarity_image, similarity_png
from qrlora_plots.figures import figure_png
from qrlora_plots.heat_maps import heat_map_grid
from qrlora_plots.similarity import BAND, KINDS
from tests.core.test_merge import make

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def report(golden):
    style, content = (core.open_adapter(golden / f"official_{name}.safetensors") for name in ("style", "content"))
    return core.similarity_report(style, content)


def pixel(figure, image, axes, x, y):
    column, row = axes.transData.transform((x, y))
    return "#{:02X}{:02X}{:02X}".format(*image.getpixel((round(column), round(image.height - 1 - row))))


def drawn(report, **options):
    """A report's figure and the pixels of that figure."""
    figure = similarity_figure(report, **options)
    return figure, Image.open(io.BytesIO(figure_png(figure))).convert("RGB")


def titled(figure, words):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(words))


def changed(report, **cosines):
    """The same report with other cosines of dR and of the updates, as JSON would give it back."""
    other = json.loads(json.dumps(report))
    for entry in other["layers"]:
        entry["cosine"].update(cosines)
    return other


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("quantity,title", [("delta_r", "cosine of \u0394R"), ("update", "cosine of the whole")])
def test_markers_are_at_their_values(report, fixed, quantity, title):
    other = copy.deepcopy(report)
    for index, entry in enumerate(other["layers"]):
        entry["cosine"][quantity] = (-1) ** index * (0.2 + 0.04 * index)
    figure, image = drawn(other, fixed_scale=fixed)
    axes = titled(figure, title)
    for index, entry in enumerate(other["layers"]):
        value = entry["cosine"][quantity]
        assert pixel(figure, image, axes, index, value) == KINDS[entry["part"], entry["stream"]][1], entry["name"]
        assert pixel(figure, image, axes, index, -value) not in {kind[1] for kind in KINDS.values()}


def test_the_null_band_lies_behind(report):
    other = changed(report, delta_r=0.8)
    for entry in other["layers"]:
        entry["null_band"]["delta_r"] = 0.3
    figure, image = drawn(other)
    axes = titled(figure, "cosine of \u0394R")
    for place in (0, 7, 14):
        assert pixel(figure, image, axes, place, 0.25) == pixel(figure, image, axes, place, -0.25) == BAND
        assert pixel(figure, image, axes, place, 0.36) != BAND


def test_heat_map_colours(report):
    other = copy.deepcopy(report)
    for index, entry in enumerate(other["layers"]):
        entry["cosine"]["update"] = -0.9 + 0.125 * index
    other["layers"][3]["cosine"]["update"] = None
    figure, image = similarity_figure(other), similarity_image(other)
    for block in ("double", "single"):
        kinds, numbers, grid = heat_map_grid(other, block, "update")
        axes = next(one for one in figure.axes if one.get_label() == f"heat {block}")
        assert [label.get_text() for label in axes.get_yticklabels()] == kinds
        colours = axes.images[0].get_cmap()
        for row in range(len(kinds)):
            for column in range(len(numbers)):
                wanted = colours((grid[row, column] + 1) / 2, bytes=True)[:3]
                seen = pixel(figure, image, axes, column, row)
                if row == 3 and block == "double":
                    assert seen == "#F3E9C6"  # no value: the paper, which no cosine has
                    continue
                assert max(abs(a - int(b)) for a, b in zip(bytes.fromhex(seen[1:]), wanted)) <= 3


def test_numbers_and_names_are_written(report):
    figure = similarity_figure(report)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "official_style" in words and "15 layers in both, one basis in all of them" in words
    summary = report["summary"]["delta_r"]
    written = " ".join(axes.get_title(loc="left") for axes in figure.axes)
    for name in ("mean", "median", "std", "min", "max"):
        assert f"{name} {summary[name]:.4f}" in written
    labels = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
    assert {"cosine similarity", "degrees", "norm", "layers", "block"} <= labels


def test_what_is_not_defined_is_said(golden):
    style, full = (core.open_adapter(golden / f"official_{name}.safetensors") for name in ("style", "qr"))
    figure = similarity_figure(core.similarity_report(style, full), fixed_scale=False)
    for title in ("cosine of the whole", "cosine of \u0394R"):
        assert "not defined" in titled(figure, title).texts[0].get_text()
    assert titled(figure, "cosine of Q: double blocks")  # the map falls back to what is known


def test_other_networks(golden):
    """Only single blocks, one layer, different bases, an adapter of zeros: each has a picture."""
    name = ("single_transformer_blocks.3.attn.to_v",)
    one, two = make(1, names=name), make(2, names=name, basis_seed=1)
    zero = core.merged_adapter(core.MergeRecipe.of(one).scaled(0.0))
    for pair in ((one, two), (one, zero), (zero, zero)):
        for fixed in (True, False):
            assert similarity_png(core.similarity_report(*pair), fixed_scale=fixed)[:4] == b"\x89PNG"


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotsUnavailableError, match="-m pip install matplotlib"):
        similarity_png(report)
