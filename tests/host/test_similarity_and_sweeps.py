"""Similarity, sweeps, contact sheets, block factors and hooks through a real server: what is drawn, not only that."""

import copy
import json
import os

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from safetensors.torch import load_file, save_file

import qrlora_core as core
from demo.server import GOLDEN, WorkflowError
from qrlora_plots import text
from tests.host.test_server import gap, node, output, workflow

ADAPTERS = {"style": "2", "content": "3"}


def similarity(fixed_scale=True):
    graph = {key: workflow()[key] for key in ("2", "3")}
    graph["similar"] = node("QRLoRASimilarity", delta_r_a=["2", 0], delta_r_b=["3", 0], fixed_scale=fixed_scale)
    graph["saved"] = node("SaveImage", images=["similar", 0], filename_prefix="similar")
    graph["numbers"] = node("PreviewAny", source=["similar", 1])
    return graph


def picture(server, entry, name, index=0):
    """One of the pictures that a node saved."""
    saved = entry["outputs"][name]["images"][index]
    folder = server.base / saved["type"] if saved["type"] != "output" else server.base / "output"
    image = Image.open(folder / saved["subfolder"] / saved["filename"])
    image.load()
    return image


def reported(server):
    return core.similarity_report(*(core.open_adapter(GOLDEN / f"official_{name}.safetensors") for name in ADAPTERS))


def drawn_at(figure, axes, x, y):
    """Pixel of a point of the data of some axes."""
    column, row = axes.transData.transform((x, y))
    return round(column), round(figure.bbox.height - 1 - row)


def axes_titled(figure, words):
    return next(axes for axes in figure.axes if words in axes.get_title(loc="left"))


@pytest.mark.parametrize("fixed", [True, False])
def test_similarity_draws_and_tells_the_numbers(server, fixed):
    from qrlora_plots import similarity_figure
    from qrlora_plots.heat_maps import heat_map_grid
    from qrlora_plots.similarity import KINDS

    entry = server.queue(similarity(fixed))
    found = json.loads(entry["outputs"]["numbers"]["text"][0])
    wanted = reported(server)
    assert found["summary"].keys() == wanted["summary"].keys() and len(found["layers"]) == 15
    for mine, theirs in zip(found["layers"], wanted["layers"]):
        assert mine["name"] == theirs["name"]
        assert mine["cosine"]["delta_r"] == pytest.approx(theirs["cosine"]["delta_r"], abs=1e-9)
    shown = entry["outputs"]["similar"]
    assert "15 layers in both, one basis in all of them" in shown["text"][0] and shown["images"][0]["type"] == "temp"
    image = picture(server, entry, "saved").convert("RGB")
    assert image.size == (1600, 2300)
    figure = similarity_figure(found, fixed_scale=fixed)
    limit = 1.0 if fixed else max(abs(layer["cosine"]["update"]) for layer in found["layers"])
    for block in ("double", "single"):
        _, numbers, grid = heat_map_grid(found, block, "update")
        axes = next(one for one in figure.axes if one.get_label() == f"heat {block}")
        colours = axes.images[0].get_cmap()
        for row in range(grid.shape[0]):
            for column in range(len(numbers)):
                wanted_colour = colours((grid[row, column] + limit) / (2 * limit), bytes=True)[:3]
                pixel = image.getpixel(drawn_at(figure, axes, column, row))
                assert max(abs(a - int(b)) for a, b in zip(pixel, wanted_colour)) <= 3, (block, row, column)
    axes = axes_titled(figure, "cosine of \u0394R")
    for place, layer in enumerate(found["layers"]):
        pixel = image.getpixel(drawn_at(figure, axes, place, layer["cosine"]["delta_r"]))
        wanted_colour = KINDS[layer["part"], layer["stream"]][1]
        assert "#{:02X}{:02X}{:02X}".format(*pixel) == wanted_colour, layer["name"]


def test_similarity_without_matplotlib(bare_server):
    """The numbers are there, the picture is text, and the node says what to install."""
    entry = bare_server.queue(similarity())
    assert len(json.loads(entry["outputs"]["numbers"]["text"][0])["layers"]) == 15
    assert "-m pip install matplotlib" in entry["outputs"]["similar"]["text"][0]
    assert 100 < picture(bare_server, entry, "saved").height < 1000
    sheet = bare_server.queue(sweep_graph("1", "0, 1"))
    assert picture(bare_server, sheet, "sheet").width > 300


def sweep_graph(alphas, betas, **sheet):
    graph = workflow()
    graph["4"] = node(
        "QRLoRAScaleSweep",
        delta_r_style=["2", 0],
        alphas=alphas,
        delta_r_content=["3", 0],
        betas=betas,
        on_basis_mismatch="stack",
    )
    inputs = {"images": ["10", 0], "labels": ["4", 1], "columns": 0, "max_size": 512, "title": ["4", 2]}
    graph["sheet"] = node("QRLoRAContactSheet", **{**inputs, "filename_prefix": "sheet", **sheet})
    del graph["12"]
    return graph


def inked(image):
    """The part of a white picture that something is drawn on."""
    return image.crop(ImageChops.invert(image).getbbox())


def written(words, size):
    """Words alone."""
    paper = Image.new("RGB", (40 * len(words), 4 * size), text.PAPER)
    ImageDraw.Draw(paper).text((size, size), words, fill=text.INK, font=text.font_for(words, size))
    return inked(paper)


def test_a_sweep_over_schedules(server):
    """One picture for each line; a constant one is the plain merge, and a late content differs from an early one."""
    graph = sweep_graph("1", "1")
    graph["4"]["inputs"]["schedules"] = "constant\ncontent: early\ncontent: late"
    entry = server.queue(graph)
    text = entry["outputs"]["4"]["text"][0]
    assert text == "1 x 1 x 3 = 3 pictures\nalpha 1\nbeta 1\nschedules constant / content: early / content: late"
    sheet = picture(server, entry, "sheet")
    recipe = json.loads(sheet.info["qr_lora_contact_sheet"])
    assert recipe["columns"] == [f"schedule = {one}" for one in ("constant", "content: early", "content: late")]
    assert recipe["cells"][1]["values"] == {"alpha": 1, "beta": 1, "schedule": "content: early"}
    shown = [picture(server, entry, "11", index).tobytes() for index in range(3)]
    assert len(set(shown)) == 3
    plain = server.queue(sweep_graph("1", "1"))
    assert picture(server, plain, "11").tobytes() == shown[0]


def test_a_schedule_that_cannot_be_read_is_an_error_on_the_node(server):
    graph = sweep_graph("1", "1")
    graph["4"]["inputs"]["schedules"] = "constant\nlatest"
    with pytest.raises(WorkflowError, match="there is no schedule 'latest'"):
        server.queue(graph)


def test_sweep_and_contact_sheet(server):
    entry = server.queue(sweep_graph("0.5, 1", "0:1:0.5"))
    assert entry["outputs"]["4"]["text"] == ["2 x 3 = 6 pictures\nalpha 0.5, 1\nbeta 0, 0.5, 1"]
    assert len(entry["outputs"]["11"]["images"]) == 6  # the host ran everything once for each pair
    sheet = picture(server, entry, "sheet")
    recipe = json.loads(sheet.info["qr_lora_contact_sheet"])
    assert recipe["rows"] == ["alpha = 0.5", "alpha = 1"]
    assert recipe["columns"] == ["beta = 0", "beta = 0.5", "beta = 1"]
    assert recipe["adapters"] == ["official_content.safetensors", "official_style.safetensors"]
    assert recipe["seeds"] == [1] and recipe["title"] == "alpha: official_style; beta: official_content"
    assert [cell["values"] for cell in recipe["cells"]] == [
        {"alpha": alpha, "beta": beta} for alpha in (0.5, 1.0) for beta in (0.0, 0.5, 1.0)
    ]
    assert json.loads(sheet.info["prompt"])["4"]["inputs"]["alphas"] == "0.5, 1"  # as ComfyUI's own pictures
    # the same layout, drawn here
    from qrlora_plots import contact_sheet

    singles = []
    for cell in recipe["cells"]:
        one = server.queue(workflow(cell["values"]["alpha"], cell["values"]["beta"]))
        singles.append(picture(server, one, "11").convert("RGB"))
    labels = [cell["label"] for cell in recipe["cells"]]
    blank = [Image.new("RGB", (64, 64)) for _ in labels]
    layout = contact_sheet(blank, labels, title=recipe["title"])
    assert layout.image.size == sheet.size
    for cell, single in zip(layout.cells, singles):
        shown = sheet.convert("RGB").crop(cell.box)
        assert shown.size == (192, 192)
        small = shown.resize((64, 64), Image.Resampling.NEAREST)
        assert max(high for _, high in ImageChops.difference(small, single).getextrema()) <= 1
    assert len({single.tobytes() for single in singles}) == 6
    # what is written at the edges, against the same words alone
    sheet = sheet.convert("RGB")
    first = layout.cells[0].box
    letters = round(3 * 192 / 42)
    middle = first[1] - text.text_size("A", letters)[1] - letters // 2
    assert inked(sheet.crop((0, 0, sheet.width, middle))).tobytes() == written(recipe["title"], letters).tobytes()
    for cell in layout.cells[:3]:
        header = inked(sheet.crop((cell.box[0], middle, cell.box[2], first[1] - 1)))
        assert header.tobytes() == written(recipe["columns"][cell.column], letters).tobytes()
    for cell in layout.cells[::3]:
        header = inked(sheet.crop((0, cell.box[1], first[0] - 1, cell.box[3])))
        assert header.tobytes() == written(recipe["rows"][cell.row], letters).tobytes()


@pytest.mark.parametrize("prefix", ["nul\0byte", "x" * 5000, "../out", "loop/sheet", "half \ud83d"], ids=range(5))
def test_a_hostile_name_of_a_sheet_is_refused_in_words(server, prefix):
    loop = server.base / "output" / "loop"
    if os.name != "nt" and not loop.is_symlink():
        loop.symlink_to(loop)
    graph = {"picture": node("EmptyImage", width=32, height=32, batch_size=1, color=0)}
    inputs = {"columns": 0, "max_size": 64, "title": "", "filename_prefix": prefix}
    graph["sheet"] = node("QRLoRAContactSheet", images=["picture", 0], **inputs)
    with pytest.raises(WorkflowError, match="is refused|leads out"):
        server.queue(graph)


def test_any_labelled_list_makes_a_sheet(server):
    graph = sweep_graph("0.5", "0, 1", labels=["words", 0], columns=1, title="")
    graph["words"] = node("PrimitiveStringMultiline", value="first light\nsecond light")
    entry = server.queue(graph)
    assert "2 x 1 pictures" in entry["outputs"]["sheet"]["text"][0]
    recipe = json.loads(picture(server, entry, "sheet").info["qr_lora_contact_sheet"])
    assert [cell["label"] for cell in recipe["cells"]] == ["first light", "second light"] and not recipe["rows"]
    del graph["sheet"]["inputs"]["labels"]
    recipe = json.loads(picture(server, server.queue(graph), "sheet").info["qr_lora_contact_sheet"])
    assert [cell["label"] for cell in recipe["cells"]] == ["1", "2"]
    graph["sheet"]["inputs"]["labels"] = ["words", 0]
    graph["words"]["inputs"]["value"] = "one\ntwo\nthree"
    with pytest.raises(WorkflowError, match="2 pictures and 3 labels"):
        server.queue(graph)


@pytest.mark.parametrize(
    "alphas,words",
    [
        ("0.6, o.8", "'o.8' is not a number"),
        ("0:1", "'0:1' is not a range"),
        ("0:1:0.01", "gives 101 numbers, more than 100"),
        ("0:1:0.04", "26 alphas x 4 betas are 104 pictures, more than 100"),
    ],
)
def test_bad_sweeps_show_the_part_at_fault(server, alphas, words):
    with pytest.raises(WorkflowError) as caught:
        server.queue(sweep_graph(alphas, "0, 0.3, 0.6, 1"))
    assert words in json.loads(str(caught.value))[-1][1]["exception_message"]


def block_graph(**changed):
    factors = dict.fromkeys(("double_blocks", "single_blocks", "attention", "feed_forward"), 1.0)
    factors |= {"image_stream": 1.0, "text_stream": 1.0, "double_ranges": "", "single_ranges": ""}
    graph = workflow()
    graph["scaled"] = node("QRLoRABlockScale", delta_r=["4", 0], **{**factors, **changed})
    graph["5"]["inputs"]["delta_r"] = ["scaled", 0]
    return graph


def test_block_scale(server):
    golden = load_file(GOLDEN / "tensors.safetensors")
    entry = server.queue(block_graph(double_blocks=0.5, single_ranges="0: 0.5"))
    text_shown = entry["outputs"]["scaled"]["text"][0]
    assert text_shown == "double 0.5, single 0: 0.5\n15 layers x 0.5"
    half = output(server)
    graph = workflow()
    graph["5"]["inputs"]["strength"] = 0.5
    server.queue(graph)
    assert gap(half, output(server)) < 1e-5
    server.queue(block_graph())
    assert gap(output(server), golden["merged.0.9.1.0.out"]) < 1e-4
    entry = server.queue(block_graph(attention=0.0, feed_forward=0.0))
    assert entry["outputs"]["scaled"]["text"][0].endswith("15 layers off")
    assert gap(output(server), golden["base.out"]) < 1e-5
    graph = block_graph(attention=0.0)
    graph["save"] = node("QRLoRAExportLoRA", delta_r=["scaled", 0], filename="only_ff")
    server.queue(graph)
    saved = core.open_adapter(server.base / "models" / "loras" / "only_ff.safetensors")
    assert {core.layer_kind(name).part for name in saved.layers} == {"feed_forward"}
    with pytest.raises(WorkflowError, match="matches no block; the adapter has double blocks: 0 to 0"):
        server.queue(block_graph(double_ranges="1-18: 0.5"))


def latent(server, name):
    return load_file(next((server.base / "output").glob(f"{name}_*.latent")))["latent_tensor"]


def hooked(adapter, sampler, prefix, *, hook=True, keyframes=(), strength=1.0):
    """A sampler run: the adapter as a hook on the prompt, or applied to the model."""
    graph = {key: copy.deepcopy(workflow()[key]) for key in ("1", "2", "6", "7", "8")}
    graph["2"]["inputs"]["delta_r_name"] = adapter
    graph["8"]["inputs"].update(steps=4, **sampler)
    graph["out"] = node("SaveLatent", samples=["8", 0], filename_prefix=prefix)
    if not hook:
        graph["5"] = node("QRLoRAApply", model=["1", 0], delta_r=["2", 0], strength=strength)
        graph["8"]["inputs"]["model"] = ["5", 0]
        return graph
    graph["8"]["inputs"]["model"] = ["1", 0]
    graph["hook"] = node("QRLoRACreateHook", delta_r=["2", 0], strength=strength)
    hooks = ["hook", 0]
    for index, (start, factor) in enumerate(keyframes):
        graph[f"k{index}"] = node("CreateHookKeyframe", strength_mult=factor, start_percent=start)
        if index:
            graph[f"k{index}"]["inputs"]["prev_hook_kf"] = [f"k{index - 1}", 0]
    if keyframes:
        graph["set"] = node("SetHookKeyframes", hooks=hooks, hook_kf=[f"k{len(keyframes) - 1}", 0])
        hooks = ["set", 0]
    graph["cond"] = node(
        "ConditioningSetProperties", cond_NEW=["6", 0], strength=1.0, set_cond_area="default", hooks=hooks
    )
    graph["8"]["inputs"].update(positive=["cond", 0], negative=["cond", 0])
    return graph


@pytest.mark.parametrize("adapter", ["official_style.safetensors", "official_qr.safetensors"])
def test_a_constant_hook_equals_apply(server, adapter):
    """Full-QR files too: their basis comes from the model that is sampled."""
    name = adapter.split("_")[1].split(".")[0]
    server.queue(hooked(adapter, {"model": None}, f"hook_{name}", strength=0.7))
    server.queue(hooked(adapter, {}, f"apply_{name}", hook=False, strength=0.7))
    server.queue(hooked(adapter, {}, f"none_{name}", hook=False, strength=0.0))
    applied, plain = latent(server, f"apply_{name}"), latent(server, f"none_{name}")
    assert gap(latent(server, f"hook_{name}"), applied) < 1e-5 < 1e-3 < gap(plain, applied)


def test_keyframes_switch_a_hook_in_the_middle_of_sampling(server):
    """On from 0 %, off from 40 %: of four steps the first two with the adapter, the others without."""
    style = "official_style.safetensors"
    server.queue(hooked(style, {}, "keyed", keyframes=((0.0, 1.0), (0.4, 0.0))))
    graph = hooked(style, {}, "staged", hook=False)
    shared = {
        key: value
        for key, value in graph["8"]["inputs"].items()
        if key in ("positive", "negative", "cfg", "sampler_name", "scheduler", "steps")
    }
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 2, "return_with_leftover_noise": "enable"}
    last = {"add_noise": "disable", "start_at_step": 2, "end_at_step": 9, "return_with_leftover_noise": "disable"}
    graph["first"] = node("KSamplerAdvanced", model=["5", 0], latent_image=["7", 0], noise_seed=1, **shared, **first)
    graph["8"] = node("KSamplerAdvanced", model=["1", 0], latent_image=["first", 0], noise_seed=1, **shared, **last)
    server.queue(graph)
    server.queue(hooked(style, {}, "whole", hook=False))
    keyed, staged = latent(server, "keyed"), latent(server, "staged")
    assert gap(keyed, staged) < 1e-5 < 1e-3 < gap(keyed, latent(server, "whole"))


def test_two_hooks_are_a_merge(server):
    graph = hooked("official_style.safetensors", {}, "two", strength=0.9)
    graph["3"] = workflow()["3"]
    graph["second"] = node("QRLoRACreateHook", delta_r=["3", 0], strength=1.0, prev_hooks=["hook", 0])
    graph["cond"]["inputs"]["hooks"] = ["second", 0]
    entry = server.queue(graph)
    assert "2 hooks" in entry["outputs"]["second"]["text"][0]
    merged = workflow(0.9, 1.0)
    merged["8"]["inputs"]["steps"] = 4
    merged["save"] = node("SaveLatent", samples=["8", 0], filename_prefix="merged_once")
    server.queue(merged)
    assert gap(latent(server, "two"), latent(server, "merged_once")) < 1e-5


def test_a_hook_of_another_model_stops_the_sampler(server):
    name = "transformer_blocks.7.attn.to_q"
    tensors = {f"transformer.{name}.lora_{half}.weight": torch.eye(128, 8).mT for half in "A"}
    tensors[f"transformer.{name}.lora_B.weight"] = torch.eye(128, 8)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        server.base / "models" / "qrlora" / "foreign.safetensors",
        {"qrlora.format": "delta_r"},
    )
    with pytest.raises(WorkflowError) as caught:
        server.queue(hooked("foreign.safetensors", {}, "foreign"))
    assert "lacks 1 of the adapter's 1 layers" in str(caught.value) and name in str(caught.value)
    server.queue(hooked("official_style.safetensors", {}, "usable"))
