"""Thumbnails of the templates: what the toy draws, instead of a graph of grey boxes.

python -m demo.thumbnails    writes example_workflows/*.jpg (but for that of `demo.minute`) and docs/*.png
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from qrlora_core import (
    Adapter,
    MergeRecipe,
    merge,
    merge_acting,
    merged_adapter,
    open_adapter,
    similarity_report,
    sweep,
)
from qrlora_plots import contact_sheet, similarity_figure
from qrlora_plots.text import font_for

from .concepts import ACT, CONTENT, MERGED_PROMPT, PACK, STYLE, SUM, to_image
from .fused import Fused
from .minute import FOLDER as TEMPLATES
from .minute import THUMBNAIL
from .model import load_toy, patched, sample
from .pictures import draw
from .toy.files import BASE, FOLDER

DOCS = PACK / "docs"
TILE, GAP = 256, 64
SEED = 9  # of 32 the one from which a plain sum is drawn clearest, by eye
EDITED = "a ring in green checked style"
PAPER, INK = "#f4f1ea", "#33302a"


def main() -> None:
    style, content = (open_adapter(FOLDER / f"{one.name}.safetensors") for one in (STYLE, CONTENT))
    pictures = {one.name: to_image(draw(one.look)) for one in (STYLE, CONTENT)}
    drawn = drawn_by(style, content)
    both = row([pictures[CONTENT.name], "+", pictures[STYLE.name], "=", drawn["merged"]])
    made = {
        "Merge style and content": both,
        **two_loras(style, content, drawn),
        "Train and merge": stacked(
            row([pictures[CONTENT.name], ">", drawn["content"]]), row([pictures[STYLE.name], ">", drawn["style"]])
        ),
        "One pass each": one_pass_each(style, content),
        "Sweep alpha and beta": sheet(style, content),
        "Compare two adapters": compared(style, content),
    }
    for name, picture in made.items():
        picture.thumbnail(THUMBNAIL)
        picture.convert("RGB").save(TEMPLATES / f"{name}.jpg", quality=70, optimize=True, progressive=True)
    registry(pictures[CONTENT.name], pictures[STYLE.name], drawn["merged"])


def two_loras(style: Adapter, content: Adapter, drawn: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """Template -> what its merge does, shown by the toy: two files that become one, and both from nothing to all."""
    toy, files = load_toy(BASE), [MergeRecipe.of(one) for one in (style, content)]

    def both(strength: float) -> Adapter:
        return merged_adapter(merge(files[0], strength, files[1], strength))

    def at(strength: float) -> Image.Image:
        return to_image(sample(patched(toy, both(strength)), [MERGED_PROMPT], [SEED])[0])

    rising: list[Image.Image | str] = []
    for strength in (0.0, 0.4, 0.7, 1.0):
        rising += ([">"] if rising else []) + [at(strength)]
    summed = row([drawn["content"], "+", drawn["style"], "=", at(0.8)])
    plain, edited = (to_image(sample(by, [EDITED], [SEED])[0]) for by in (toy, patched(toy, both(0.8))))
    return {
        "Merge two LoRAs": titled(summed, "two LoRAs, Z-Image"),
        "Merge two LoRAs, FLUX2 klein": titled(row(rising), "two LoRAs, FLUX.2 klein"),
        "Merge two LoRAs, Qwen-Image": titled(
            row([drawn["style"], "+", drawn["content"], "=", at(1.0)]), "two LoRAs, Qwen-Image"
        ),
        "Edit with two LoRAs, Kontext": titled(row([plain, ">", edited]), "an edit, FLUX.1 Kontext"),
    }


def one_pass_each(style: Adapter, content: Adapter) -> Image.Image:
    """Three prompts, both adapters on: as a sum above, in passes of their own below."""
    fused = Fused(load_toy(BASE), (style, content))
    rows = []
    for title, act in (("plain sum", SUM), ("one pass each", ACT)):
        recipe = merge_acting(MergeRecipe.of(style), 1.0, MergeRecipe.of(content), 1.0, act=act)
        prompts = (MERGED_PROMPT, "a <c> in blue dotted style", "a ring in green checked style")
        drawn = [to_image(one) for one in fused.sample(recipe, prompts, [SEED] * len(prompts))]
        rows.append(titled(row(drawn), title))
    return stacked(*rows)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture with a line of text above it."""
    paper = Image.new("RGB", (picture.width, picture.height + GAP // 2), PAPER)
    paper.paste(picture, (0, GAP // 2))
    ImageDraw.Draw(paper).text((GAP, 3 * GAP // 4), title, INK, font_for(title, 3 * GAP // 4), anchor="lm")
    return paper


def drawn_by(style: Adapter, content: Adapter) -> dict[str, Image.Image]:
    """What each adapter draws beside what it was trained on, and both together."""
    toy = load_toy(BASE)
    both = merged_adapter(merge(MergeRecipe.of(style), 1.0, MergeRecipe.of(content), 1.0))
    wanted = {
        "content": (content, "a <c> in blue dotted style"),
        "style": (style, "a triangle in <s> style"),
        "merged": (both, MERGED_PROMPT),
    }
    return {
        name: to_image(sample(patched(toy, adapter), [prompt], [SEED])[0]) for name, (adapter, prompt) in wanted.items()
    }


def row(parts: Sequence[Image.Image | str]) -> Image.Image:
    """Pictures in a line, with signs between them."""
    count = sum(isinstance(part, Image.Image) for part in parts)
    paper = Image.new("RGB", (count * TILE + (len(parts) - count + 2) * GAP, TILE + 2 * GAP), PAPER)
    pen, left = ImageDraw.Draw(paper), GAP
    for part in parts:
        if isinstance(part, str):
            pen.text((left + GAP // 2, GAP + TILE // 2), part, INK, font_for(part, GAP), anchor="mm")
            left += GAP
        else:
            paper.paste(part.resize((TILE, TILE), Image.Resampling.NEAREST), (left, GAP))
            left += TILE
    return paper


def registry(content: Image.Image, style: Image.Image, merged: Image.Image) -> None:
    """Icon, 400 x 400, and banner, 21 : 9, of the pack in ComfyUI's registry."""
    merged.resize((400, 400), Image.Resampling.NEAREST).save(DOCS / "icon.png", optimize=True)
    banner = Image.new("RGB", (1344, 576), PAPER)
    line = row([content, "+", style, "=", merged])
    banner.paste(line, ((banner.width - line.width) // 2, (banner.height - line.height) // 2))
    banner.save(DOCS / "banner.png", optimize=True)


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    paper = Image.new("RGB", (upper.width, upper.height + lower.height - GAP), PAPER)
    paper.paste(upper, (0, 0))
    paper.paste(lower, (0, upper.height - GAP))
    return paper


def sheet(style: Adapter, content: Adapter) -> Image.Image:
    toy, grid = load_toy(BASE), "0:1:0.25"
    cells = sweep(MergeRecipe.of(style), grid, MergeRecipe.of(content), grid)
    pixels = [sample(patched(toy, merged_adapter(cell.recipe)), [MERGED_PROMPT], [SEED])[0] for cell in cells]
    return contact_sheet([to_image(one) for one in pixels], [cell.label for cell in cells]).image


def compared(style: Adapter, content: Adapter) -> Image.Image:
    """The upper half of the similarity picture."""
    import io

    data = io.BytesIO()
    similarity_figure(similarity_report(style, content)).savefig(data, format="png", dpi=60)
    whole = Image.open(data)
    return whole.crop((0, 0, whole.width, whole.height // 2))


if __name__ == "__main__":
    with torch.no_grad():
        main()
