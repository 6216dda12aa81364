"""The study's folder: adapters and results are made once and found again, so a run that was stopped goes on."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file, save_file

from demo.model import WEIGHTS, load_toy
from demo.pictures import Look
from qrlora_core import Basis, TensorFile, decompose
from train.model.source import BaseModel

from .fusions import Fusion
from .learn import RECIPES, Learned, Recipe, learn, shows
from .live import Live, Pair, Update
from .preserve import Paths
from .protocol import KINDS, SIDES, VERSION, Prompt, Unit, judged_prompts
from .unit_pictures import read

log = logging.getLogger(__name__)
Shares = dict[str, float]  # of the pictures of one kind: content, style, words, right
Joint = Callable[["Study", Unit, str, Recipe], None]


class Study:
    """Adapters and readings of a folder.

    Attributes:
        joints: name -> writes `joined_path` of a unit, a side (style or texture) and the recipe of its adapters.

    Args:
        folder: where everything is kept.
        pictures: of each kind, unit and method.
        adapter_steps: at most so many (a quick look, kept apart).
        half: products in bf16.
    """

    def __init__(self, folder: Path, pictures: int, adapter_steps: int | None = None, half: bool = False) -> None:
        self.folder = folder / f"v{VERSION}-{'bf16' if half else 'fp32'}-{adapter_steps or 'full'}"
        self.pictures, self.adapter_steps = pictures, adapter_steps
        self.joints: dict[str, Joint] = {}
        targets = BaseModel(WEIGHTS).targets(())
        self.live = Live(load_toy(), [target.name for target in targets], half)
        rank = max(recipe.rank for recipe in RECIPES.values())
        self.bases: dict[str, Basis] = {
            name: decompose(layer.base.weight, rank) for name, layer in self.live.layers.items()
        }

    @cached_property
    def paths(self) -> Paths:
        """The base's own sampling paths."""
        return Paths(self.live)

    def with_pictures(self, pictures: int) -> "Study":
        """The same study with so many pictures of each kind."""
        other = copy.copy(self)
        other.pictures = pictures
        return other

    def adapter(self, unit: Unit, side: str, recipe: Recipe) -> Learned:
        """An adapter of the unit's concept; another unit with the same concept and seed has the same one."""
        concept = concept_of(unit, side)
        name = f"{recipe.name}-{concept}-{unit.seed}"
        path = self.folder / "adapters" / f"{name}.safetensors"
        if not path.is_file():
            log.info("training %s", name)
            limit = {} if self.adapter_steps is None else {"last": self.adapter_steps}
            made = learn(
                self.live,
                self.bases,
                unit,
                side,
                recipe,
                _logged(name, 80),
                paths=self.paths if recipe.needs_paths else None,
                **limit,
            )
            log.info("%s: %d steps, read right %.3f", name, made.steps, made.fidelity)
            write_update(path, made.update, {"steps": str(made.steps), "fidelity": str(made.fidelity)})
        metadata = TensorFile(path).metadata
        return Learned(self.read_update(path), int(metadata["steps"]), float(metadata["fidelity"]))

    def joined(self, name: str, unit: Unit, side: str, recipe: Recipe) -> Update:
        """One update of a unit's content and its style or texture.

        Raises:
            KeyError: no way of that name is known to this study.
        """
        path = self.joined_path(name, unit, side, recipe)
        if not path.is_file():
            log.info("joining %s", path.stem)
            self.joints[name](self, unit, side, recipe)
        return self.read_update(path)

    def joined_path(self, name: str, unit: Unit, side: str, recipe: Recipe) -> Path:
        """Where `joined` keeps it."""
        concepts = f"{concept_of(unit, 'content')}-{concept_of(unit, side)}-{unit.seed}"
        return self.folder / "joined" / f"{name}-{recipe.name}-{concepts}.safetensors"

    def read_update(self, path: Path) -> Update:
        """An update that `write_update` wrote."""
        tensors = load_file(path)
        return {layer: Pair(tensors[f"{layer}.up"], tensors[f"{layer}.down"]) for layer in self.live.layers}

    def readings(self, fusion: Fusion, unit: Unit, kinds: Sequence[str] = KINDS) -> dict[str, Shares]:
        """What the reader sees of a unit, kind by kind; sampled where it is not known yet."""
        path = self.folder / "readings" / f"{unit.name}-{self.pictures}.json"
        known: dict[str, Shares] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        prompts = [prompt for prompt in judged_prompts(self.pictures) if prompt.kind in kinds]
        keys = {kind: _key(fusion, kind, [one for one in prompts if one.kind == kind]) for kind in kinds}
        wanted = [prompt for prompt in prompts if keys[prompt.kind] not in known]
        if wanted:
            recipe = RECIPES[fusion.adapters]
            for kind in dict.fromkeys(prompt.kind for prompt in wanted):
                asked = [prompt for prompt in wanted if prompt.kind == kind]
                sides = worn(kind)
                if fusion.joint:
                    self.live.wear([self.joined(fusion.joint, unit, sides[1], recipe)])
                else:
                    self.live.wear([self.adapter(unit, side, recipe).update for side in sides])
                seen = read(self.live.sample(asked, fusion.factors(asked), separate=fusion.separate), unit)
                known[keys[kind]] = _shares(unit, sides, asked, seen)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
            partial.replace(path)
        return {kind: known[key] for kind, key in keys.items()}


def write_update(path: Path, update: Update, metadata: Mapping[str, str]) -> None:
    """An update's factors under its layers' names, written whole or not at all."""
    tensors = {
        f"{layer}.{part}": tensor.contiguous()
        for layer, pair in update.items()
        for part, tensor in pair._asdict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, dict(metadata))
    partial.replace(path)


def worn(kind: str) -> tuple[str, str]:
    """The adapters that prompts of a kind are judged with."""
    return ("content", "texture") if kind == "both+" else ("content", "style")


def concept_of(unit: Unit, side: str) -> str:
    """What an adapter is of, as its file is named."""
    return {"content": unit.content, "style": unit.style[0], "texture": unit.style[1]}[side]


def _shares(unit: Unit, sides: Sequence[str], prompts: Sequence[Prompt], seen: Sequence[Look]) -> Shares:
    """Shares of one kind's pictures; `right` is all that the prompt asks for at once."""
    sums = dict.fromkeys(("content", "style", "words", "right"), 0)
    for prompt, look in zip(prompts, seen):
        content, style = (shows(unit, side, look) for side in sides)
        words = all(want in ("", got) for want, got in zip(prompt.look, look))
        asked = {"content": content, "style": style, "none": True}
        sums["content"] += content
        sums["style"] += style
        sums["words"] += words
        sums["right"] += asked.get(prompt.kind, content and style) and words
    return {name: count / len(seen) for name, count in sums.items()}


def _key(fusion: Fusion, kind: str, prompts: Sequence[Prompt]) -> str:
    """What decides a kind's pictures, in short: prompts, noise, adapters and factors, not a fusion's name."""
    schedules = [fusion.schedule(prompt.text) for prompt in prompts]
    adapters = fusion.adapters if any(schedules) else "base"
    facts = json.dumps([prompts, schedules, *(["separate"] if fusion.separate else []), *filter(None, [fusion.joint])])
    return f"{kind} {adapters} {hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _logged(name: str, every: int) -> Callable[[int, float], None]:
    def on_step(step: int, loss: float) -> None:
        if step % every == 0:
            log.info("%s: step %d, loss %.4f", name, step, loss)

    return on_step


def trained(
    study: Study, units: Sequence[Unit], recipes: Sequence[str], sides: Sequence[str] = SIDES
) -> Iterator[tuple[str, str, Unit, Learned]]:
    """Every adapter that these units need: recipe, side, unit, adapter."""
    for recipe in recipes:
        done: set[tuple[str, str, int]] = set()
        for unit in units:
            for side in sides:
                concept = (side, concept_of(unit, side), unit.seed)
                if concept not in done:
                    done.add(concept)
                    yield recipe, side, unit, study.adapter(unit, side, RECIPES[recipe])
