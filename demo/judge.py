"""What the reader sees of two adapters and their merge, in numbers and in words."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from qrlora_core import Adapter, MergeRecipe, merge_acting

from .concepts import ACT, CONTENT, DEFAULT_PAIR, MERGED_PROMPT, PAIRS, STYLE, SUM, Pair
from .fused import Fused
from .pictures import COLOURS, CONTENT_TRIGGER, SHAPES, STYLE_TRIGGER, TEXTURES, Look, caption, combinations
from .reader import looks_with, read


class Row(NamedTuple):
    """Shares of the pictures of one experiment.

    Attributes:
        title: prompts, and which adapters are on.
        pictures: how many.
        content: share that shows the new shape.
        style: share in the new palette and with the new texture.
        rest: share whose remaining words (those of the prompt that name nothing new) are right.
    """

    title: str
    pictures: int
    content: float
    style: float
    rest: float


class Experiment(NamedTuple):
    """Prompts at one alpha and beta; a field of a look is "" where the prompt leaves it to an adapter or to chance."""

    title: str
    alpha: float
    beta: float
    prompts: Sequence[str]
    looks: Sequence[Look]
    act: str = SUM

    @property
    def name(self) -> str:
        return f"{self.title}, alpha {self.alpha:g}, beta {self.beta:g}" + (f", {self.act}" if self.act != SUM else "")


def content_prompts() -> tuple[list[str], list[Look]]:
    """The new shape in every colour and texture but those of its one picture."""
    styles = [pair for pair in itertools.product(COLOURS, TEXTURES) if pair != CONTENT.look[1:]]
    prompts = [f"a {CONTENT_TRIGGER} in {colour} {texture} style" for colour, texture in styles]
    return prompts, [Look("", *pair) for pair in styles]


def style_prompts() -> tuple[list[str], list[Look]]:
    """The new style on every shape but that of its one picture."""
    shapes = [shape for shape in SHAPES if shape != STYLE.look.shape]
    return [f"a {shape} in {STYLE_TRIGGER} style" for shape in shapes], [Look(shape, "", "") for shape in shapes]


def plain_prompts() -> tuple[list[str], list[Look]]:
    """Old words only: what an adapter that keeps to its trigger leaves alone."""
    looks = combinations()[0][::19]
    return [caption(look) for look in looks], looks


def experiments() -> list[Experiment]:
    """Everything that the demo reports, in its order."""
    content, style, plain = content_prompts(), style_prompts(), plain_prompts()
    both = [MERGED_PROMPT], [Look("", "", "")]
    return [
        Experiment("<c> in old styles", 0, 0, *content),
        Experiment("<c> in old styles", 0, 1, *content),
        Experiment("<c> in old styles", 1, 1, *content),
        Experiment("<c> in old styles", 1, 1, *content, ACT),
        Experiment("old shapes in <s>", 0, 0, *style),
        Experiment("old shapes in <s>", 1, 0, *style),
        Experiment("old shapes in <s>", 1, 1, *style),
        Experiment("old shapes in <s>", 1, 1, *style, ACT),
        Experiment("<c> in <s>", 0, 0, *both),
        Experiment("<c> in <s>", 0, 1, *both),
        Experiment("<c> in <s>", 1, 0, *both),
        Experiment("<c> in <s>", 1, 1, *both),
        Experiment("<c> in <s>", 1, 1, *both, ACT),
        Experiment("old words only", 0, 0, *plain),
        Experiment("old words only", 1, 1, *plain),
        Experiment("old words only", 1, 1, *plain, ACT),
    ]


def judge(
    model: nn.Module,
    style: Adapter,
    content: Adapter,
    pictures: int = 48,
    progress: Callable[[Sequence[Experiment]], Iterable[Experiment]] = iter,
    pair: Pair = PAIRS[DEFAULT_PAIR],
) -> list[Row]:
    """Sample and read every experiment.

    Args:
        model: the toy.
        style, content: the two adapters.
        pictures: at least so many in each experiment, all prompts equally often.
        progress: wraps the list of experiments, as `tqdm` does.
        pair: what the two were trained on.
    """
    fused = Fused(model, (style, content))
    return [_row(one, *_sampled(fused, style, content, one, pictures), pair.look) for one in progress(experiments())]


def _sampled(
    fused: Fused, style: Adapter, content: Adapter, one: Experiment, pictures: int
) -> tuple[Tensor, list[Look]]:
    repeats = -(-pictures // len(one.prompts))
    recipe = merge_acting(MergeRecipe.of(style), one.alpha, MergeRecipe.of(content), one.beta, act=one.act)
    prompts = list(one.prompts) * repeats
    return fused.sample(recipe, prompts, range(1000, 1000 + len(prompts))), list(one.looks) * repeats


def _row(one: Experiment, pictures: Tensor, looks: Sequence[Look], new: Look) -> Row:
    found = read(pictures, looks_with(new))
    count = len(found)
    content = sum(look.shape == new.shape for look in found) / count
    style = sum(look[1:] == new[1:] for look in found) / count
    rest = sum(all(want in ("", got) for want, got in zip(*pair)) for pair in zip(looks, found)) / count
    return Row(one.name, count, content, style, rest)


def share(rows: Sequence[Row], title: str, field: str) -> float:
    """One number of the table.

    Raises:
        KeyError: no row has that title.
    """
    return {row.title: getattr(row, field) for row in rows}[title]


def verdict(rows: Sequence[Row], enough: float = 0.9, chance: float = 0.3) -> bool:
    """Whether each adapter alone shows what it learned, and nothing shows without them. The merge is only reported.

    `chance` leaves room for the reader: what the toy makes of two unknown words is often no shape at all, and it has to
    call that something; of 48 such samples it called 3 a heart, and 12 a letter L.
    """
    alone = (
        share(rows, "<c> in old styles, alpha 0, beta 1", "content"),
        share(rows, "old shapes in <s>, alpha 1, beta 0", "style"),
    )
    without = [value for row in rows if row.title.endswith("alpha 0, beta 0") for value in (row.content, row.style)]
    return min(alone) >= enough and max(without) <= chance


def summary(rows: Sequence[Row]) -> str:
    """The table in words."""

    def percent(title: str, field: str) -> str:
        return f"{share(rows, title, field):.0%}"

    merged, one, plain = (
        f"{title}, alpha 1, beta 1" for title in ("<c> in <s>", "<c> in old styles", "old words only")
    )
    return "\n".join(
        [
            f"Neither adapter: {percent('<c> in <s>, alpha 0, beta 0', 'content')} show the new shape, "
            f"{percent('<c> in <s>, alpha 0, beta 0', 'style')} the new style.",
            f"Content alone (beta 1): the shape shows in {percent('<c> in old styles, alpha 0, beta 1', 'content')} of "
            "the prompts with colours and textures that it was not trained with; colour and texture are those of the "
            f"prompt in {percent('<c> in old styles, alpha 0, beta 1', 'rest')}.",
            f"Style alone (alpha 1): the new palette and texture show in "
            f"{percent('old shapes in <s>, alpha 1, beta 0', 'style')} of the prompts with shapes that it was not "
            f"trained with; the shape is the prompt's in {percent('old shapes in <s>, alpha 1, beta 0', 'rest')}.",
            *(
                f"Both on, {way}: '<c> in <s>' shows the new shape in {percent(merged + act, 'content')} and the new "
                f"style in {percent(merged + act, 'style')}; with only <c> in the prompt its other words are right in "
                f"{percent(one + act, 'rest')}, with neither in {percent(plain + act, 'rest')}."
                for way, act in (("summed", ""), (ACT, f", {ACT}"))
            ),
        ]
    )
