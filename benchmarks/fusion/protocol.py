"""What the study fixes before anything is tuned: concepts, units, words, noise and numbers. Nothing else decides them.

A *unit* is one content, one style and the seed of their trainings. Tuning units are looked at freely. Check units share
no concept and no seed with them, none is the demo's pair, and they are run when everything is chosen. Units are all
pairs of some contents and some styles, so an adapter is part of several; intervals resample contents and styles. Words
that occur in training (of a concept's picture, of its fidelity test, of `preserve`) are never judged.
"""

import itertools
from typing import NamedTuple

from demo.pictures import BARRED, CONTENT_TRIGGER, HEART, STYLE_TRIGGER, SUNSET, Look

VERSION = "1"  # a change of anything here is another study: results of different versions are not compared


class Unit(NamedTuple):
    """One content, one style (palette and texture), and the seed of both trainings."""

    content: str
    style: tuple[str, str]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.content}-{self.style[0]}-{self.seed}"


class Prompt(NamedTuple):
    """A prompt and what it asks for; a field of `look` is "" where an adapter or chance decides it.

    Attributes:
        kind: one of KINDS.
        look: the old words.
        noise: seed of the noise.
    """

    kind: str
    text: str
    look: Look
    noise: int


# The toy's own words, in halves: shapes, colours (palettes), textures
TRAINED = (("circle", "square", "triangle"), ("red", "yellow", "green"), ("plain", "striped"))
JUDGED = (("diamond", "cross", "ring"), ("cyan", "blue", "magenta"), ("checked", "dotted"))

# Pictures that the concepts are trained on: everything but the concept itself in words of training
CONTENT_LOOK, STYLE_LOOK, TEXTURE_LOOK = ("red", "plain"), "circle", ("circle", "yellow")

TUNING = tuple(
    Unit(content, style, 0)
    for content, style in itertools.product((HEART, "ell"), ((SUNSET, BARRED), ("violet", "hatched")))
)
CHECK = tuple(
    Unit(content, style, 10)
    for content, style in itertools.product(
        ("bow", "arch", "tee"), (("slate", "slanted"), ("rose", "grid"), ("brown", "blocks"))
    )
)
# Nine more, for methods that were thought of when the check units' numbers were known. They were looked at once and
# showed that the check units had been easy ones; since then `led_by_content` chooses on them, too.
LATER = tuple(
    Unit(content, style, 20)
    for content, style in itertools.product(
        ("moon", "zed", "hourglass"), (("olive", "mesh"), ("teal", "pinstriped"), ("wine", "ridged"))
    )
)
# And nine that judge what was chosen then
FINAL = tuple(
    Unit(content, style, 30)
    for content, style in itertools.product(
        ("cup", "arrow", "stairs"), (("navy", "laced"), ("mint", "stepped"), ("coral", "pegged"))
    )
)

# Single adapters are trained until they are read at FIDELITY on words of training, so that merges are compared at equal
# fidelity of what is merged; where that is not reached, the best state counts and the table says how good it was.
FIDELITY = 0.95
FIRST_LOOK, LOOK_EVERY, LAST_LOOK = 80, 40, 320  # optimizer steps
FIDELITY_PICTURES = 20

SAMPLER_STEPS = 12
PICTURES, TUNING_PICTURES = 12, 6  # of each kind, unit and method
SIDES = ("content", "style", "texture")  # what an adapter is of; a texture is a style without its palette
KINDS = ("both", "both+", "content", "style", "none")
TRAINING = {"rank": 16, "learning_rate": 1.5e-3, "batch_size": 8}
_FIRST_NOISE = {"judged": 10_000, "fidelity": 20_000}


def judged_prompts(pictures: int = PICTURES) -> list[Prompt]:
    """What every method is asked for, the same noise for all of them.

    Kinds: `both` triggers; `both+`, both triggers and a colour, which neither adapter claims, as the style's adapter is
    then one of its texture only; one trigger among old words; old words only.
    """
    shapes, colours, textures = JUDGED
    styles = list(itertools.product(colours, textures))
    every = [Look(shape, *style) for style in styles for shape in shapes]
    asked: dict[str, list[tuple[str, Look]]] = {
        "both": [(f"a {CONTENT_TRIGGER} in {STYLE_TRIGGER} style", Look("", "", ""))],
        "both+": [(f"a {CONTENT_TRIGGER} in {one} {STYLE_TRIGGER} style", Look("", one, "")) for one in colours],
        "content": [(f"a {CONTENT_TRIGGER} in {' '.join(style)} style", Look("", *style)) for style in styles],
        "style": [(f"a {shape} in {STYLE_TRIGGER} style", Look(shape, "", "")) for shape in shapes],
        "none": [(f"a {look.shape} in {look.colour} {look.texture} style", look) for look in every],
    }
    return [
        Prompt(kind, *asked[kind][number % len(asked[kind])], _FIRST_NOISE["judged"] + number)
        for kind in KINDS
        for number in range(pictures)
    ]


def fidelity_prompts(side: str, pictures: int = FIDELITY_PICTURES) -> list[Prompt]:
    """Prompts in words of training, without those of the concept's picture: how far an adapter alone has come."""
    shapes, colours, textures = TRAINED
    if side == "content":
        looks = [Look("", *style) for style in itertools.product(colours, textures) if style != CONTENT_LOOK]
        texts = [f"a {CONTENT_TRIGGER} in {look.colour} {look.texture} style" for look in looks]
    elif side == "style":
        looks = [Look(shape, "", "") for shape in shapes if shape != STYLE_LOOK]
        texts = [f"a {look.shape} in {STYLE_TRIGGER} style" for look in looks]
    else:
        looks = [Look(*parts, "") for parts in itertools.product(shapes, colours) if parts != TEXTURE_LOOK]
        texts = [f"a {look.shape} in {look.colour} {STYLE_TRIGGER} style" for look in looks]
    return [
        Prompt(side, texts[number % len(texts)], looks[number % len(looks)], _FIRST_NOISE["fidelity"] + number)
        for number in range(pictures)
    ]
