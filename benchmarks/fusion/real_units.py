"""The units of a real model's study, as a file names them: concepts, adapters, prompts. All of it is fixed beforehand.

    {"tuning": {"contents": [CONCEPT, ...], "styles": [CONCEPT, ...]},
     "check": {"contents": [...], "styles": [...]},
     "prompts": {"both": [PROMPT, ...], "content": [...], "style": [...], "none": [...]}}

    CONCEPT: {"name": "dog", "picture": "dog.png", "adapter": "dog.safetensors", "trigger": "<c>", "noun": "dog"}
    PROMPT: {"text": "a {content} on a beach in {style} style", "words": "a beach"}

Files lie beside the units' own file. `{content}` becomes trigger and noun, `{style}` the trigger. `words` are what the
prompt asks for and no adapter is of; they are never captions of training, and there are at least two of them.
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("both", "content", "style", "none")


class Concept(NamedTuple):
    """One content or style: its picture, and the adapter that was trained on it."""

    name: str
    picture: Path
    adapter: Path
    trigger: str
    noun: str = ""

    @property
    def words(self) -> str:
        """Its place in a prompt."""
        return f"{self.trigger} {self.noun}".strip()


class Asked(NamedTuple):
    """A prompt of a kind of KINDS, with its seed, and the words that no adapter is of."""

    kind: str
    text: str
    words: str
    noise: int


class Unit(NamedTuple):
    """One content and one style, and what is asked of them."""

    content: Concept
    style: Concept
    prompts: tuple[Asked, ...]

    @property
    def name(self) -> str:
        return f"{self.content.name}-{self.style.name}"


class Units(NamedTuple):
    """Tuning units, check units, and all words between which a picture is read."""

    tuning: tuple[Unit, ...]
    check: tuple[Unit, ...]
    words: tuple[str, ...]


def read_units(path: Path, pictures: int) -> Units:
    """Units of a file, every pair of a part's contents and styles.

    Args:
        path: of the file.
        pictures: of each kind and unit; prompts are taken in turn, each with seeds of its own.

    Raises:
        ValueError: a file, a concept or a kind of prompts is missing, parts share a concept, or words are too few.
    """
    facts = json.loads(path.read_text(encoding="utf-8"))
    _require(facts, ("tuning", "check", "prompts"), path.name)
    prompts = facts["prompts"]
    _require(prompts, KINDS, f"{path.name}: prompts")
    words = tuple(dict.fromkeys(one["words"] for kind in KINDS for one in prompts[kind]))
    if len(words) < 2:
        raise ValueError(f"{path.name} asks for {len(words)} words; at least two are needed to be told apart")
    parts = {}
    for part in ("tuning", "check"):
        _require(facts[part], ("contents", "styles"), f"{path.name}: {part}")
        contents, styles = (
            [_concept(one, path.parent) for one in facts[part][side]] for side in ("contents", "styles")
        )
        parts[part] = tuple(
            Unit(content, style, tuple(_asked(prompts, content, style, pictures)))
            for content, style in itertools.product(contents, styles)
        )
    names = [{concept.name for unit in units for concept in unit[:2]} for units in parts.values()]
    if names[0] & names[1]:
        raise ValueError(f"{path.name}: {', '.join(sorted(names[0] & names[1]))} is both tuned on and checked")
    return Units(parts["tuning"], parts["check"], words)


def _asked(prompts: dict[str, Any], content: Concept, style: Concept, pictures: int) -> list[Asked]:
    asked = []
    for kind in KINDS:
        for number in range(pictures):
            prompt = prompts[kind][number % len(prompts[kind])]
            text = prompt["text"].format(content=content.words, style=style.words)
            asked.append(Asked(kind, text, prompt["words"], number))
    return asked


def _concept(facts: dict[str, str], folder: Path) -> Concept:
    _require(facts, ("name", "picture", "adapter", "trigger"), f"concept {facts.get('name', '')!r}")
    made = Concept(
        facts["name"], folder / facts["picture"], folder / facts["adapter"], facts["trigger"], facts.get("noun", "")
    )
    for file in (made.picture, made.adapter):
        if not file.is_file():
            raise ValueError(f"{made.name}: {file} does not exist")
    return made


def _require(facts: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if not facts.get(key)]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
