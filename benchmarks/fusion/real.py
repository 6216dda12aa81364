"""The study of `benchmarks.fusion` for a real model: FLUX.1, and adapters that were trained on real pictures.

    python -m benchmarks.fusion.real --pipeline FLUX --dino DINO --clip CLIP --units units.json --folder runs/real

Everything is read from folders on this disk: a diffusers pipeline, and DINO and CLIP in the layout of transformers.
`real_units.py` says what the units' file holds, `real_measures.py` what is measured. What is fixed is chosen on tuning
units, check units are drawn afterwards; pictures and numbers stay in the folder, and a run that was stopped goes on.
"""

import argparse
import datetime
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

from benchmarks.common import machine
from qrlora_core import Adapter, __version__, open_adapter
from qrlora_core.gate import DOUBLED, HALF_UNTIL
from train.data.pictures import read_picture
from train.model.device import chosen_device

from . import report
from .fusions import Fusion, content_first, content_then_base, factors_at, fixed, half_then_full
from .measures import harmonic
from .real_measures import COLUMNS, Judges, Numbers, Scores, numbers
from .real_model import RealModel
from .real_units import KINDS, Asked, Concept, Unit, read_units

log = logging.getLogger(__name__)
VERSION = "real-1"
REFERENCE = "best fixed alpha, beta"
PASSES = "Merge: by prompt, one pass each"
GRID = (0.6, 0.8, 1.0)
_BASE = Fusion("no adapter", both=())
_ALONE = {"content": Fusion("content alone", both=fixed(0, 1)), "style": Fusion("style alone", both=fixed(1, 0))}


class RealStudy:
    """Pictures and scores of a folder.

    Args:
        folder: where everything is kept.
        model, judges: what draws, and what looks.
        words: between which a picture is read.
        settings: of the pipeline's call.
    """

    def __init__(
        self, folder: Path, model: RealModel, judges: Judges, words: Sequence[str], settings: dict[str, Any]
    ) -> None:
        self.folder, self.model, self.judges = folder, model, judges
        self.words, self.settings = words, settings
        self.content = cache(lambda concept: judges.content(_opened(concept.picture)))
        self.styled = cache(lambda concept: judges.styled(_opened(concept.picture)))
        self.adapter = cache(lambda concept: opened(concept))

    def numbers(self, fusion: Fusion, unit: Unit) -> Numbers:
        """A unit's numbers of a method."""
        found, base = self.means(fusion, unit, KINDS), self.means(_BASE, unit, KINDS)
        alone = {side: self.means(one, unit, [side])[side] for side, one in _ALONE.items()}
        return numbers(found, base, alone, self.drift(fusion, unit))

    def means(self, fusion: Fusion, unit: Unit, kinds: Sequence[str]) -> dict[str, Scores]:
        """Mean scores of the pictures of each kind."""
        asked = [one for one in unit.prompts if one.kind in kinds]
        scored = [(one.kind, self.scores(fusion, unit, one)) for one in asked]
        return {
            kind: Scores(*(fmean(column) for column in zip(*(score for which, score in scored if which == kind))))
            for kind in kinds
        }

    def scores(self, fusion: Fusion, unit: Unit, asked: Asked) -> Scores:
        """One picture's, drawn unless it is there."""
        key = self._key(fusion, unit, asked)
        path = self.folder / "pictures" / f"{key}.png"
        if not path.is_file():
            self._wear(unit)
            drawn = self.model.draw(asked.text, asked.noise, *self._acting(fusion, asked), **self.settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            drawn.save(partial, "png")
            partial.replace(path)
        known = self.folder / "scores" / unit.name / f"{key}.json"
        facts = {"words": list(self.words), "asked": asked.words}
        if known.is_file():
            stored = json.loads(known.read_text(encoding="utf-8"))
            if stored["facts"] == facts:
                return Scores(*stored["scores"])
        picture = _opened(path)
        found = Scores(
            float(self.judges.content(picture) @ self.content(unit.content)),
            float(self.judges.styled(picture) @ self.styled(unit.style)),
            float(self.words[self.judges.nearest(picture, self.words)] == asked.words),
        )
        _write(known, {"facts": facts, "scores": found})
        return found

    def drift(self, fusion: Fusion, unit: Unit) -> float:
        """Mean distance to the base's own predictions on prompts without triggers."""
        found = []
        for asked in (one for one in unit.prompts if one.kind == "none"):
            known = self.folder / "drift" / f"{self._key(fusion, unit, asked)}.json"
            if not known.is_file():
                self._wear(unit)
                made = self.model.drift(asked.text, asked.noise, *self._acting(fusion, asked), **self.settings)
                _write(known, made)
            found.append(float(json.loads(known.read_text(encoding="utf-8"))))
        return fmean(found)

    def _wear(self, unit: Unit) -> None:
        self.model.wear([self.adapter(unit.content), self.adapter(unit.style)])

    def _acting(self, fusion: Fusion, asked: Asked) -> tuple[Any, bool]:
        schedule = _schedule(fusion, asked)
        return lambda sigma: torch.tensor([factors_at(schedule, sigma)]), fusion.separate

    def _key(self, fusion: Fusion, unit: Unit, asked: Asked) -> str:
        """What decides a picture, in short; the same for units that share what acts."""
        schedule = _schedule(fusion, asked)
        acting = [any(stage[1 + side] for stage in schedule) for side in range(2)]
        worn = [str(concept.adapter) if acts else "" for concept, acts in zip(unit[:2], acting)]
        facts = json.dumps([asked.text, asked.noise, schedule, fusion.separate and any(acting), worn, self.settings])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.replace(path)


def _schedule(fusion: Fusion, asked: Asked) -> Any:
    return fusion.case(asked.kind in ("both", "content"), asked.kind in ("both", "style"))


def _opened(path: Path) -> Image.Image:
    return read_picture(path).convert("RGB")


def opened(concept: Concept) -> Adapter:
    """Its adapter, read into memory once."""
    return open_adapter(concept.adapter)


def best_fixed(study: RealStudy, units: Sequence[Unit]) -> Fusion:
    """The factors that are best everywhere: harmonic mean of H and words over units."""
    candidates = [Fusion(REFERENCE, both=fixed(alpha, beta)) for alpha in GRID for beta in GRID]

    def found(candidate: Fusion) -> float:
        every = [study.numbers(candidate, unit) for unit in units]
        log.info(
            "%s: H %.2f, words %.2f", candidate.both, *(fmean(getattr(n, f) for n in every) for f in ("h", "words"))
        )
        return harmonic(fmean(one.h for one in every), fmean(one.words for one in every))

    return max(candidates, key=found)


def methods(study: RealStudy, tuning: Sequence[Unit]) -> list[Fusion]:
    """What is compared, with nothing left open."""
    return [
        _BASE,
        Fusion("plain sum"),
        best_fixed(study, tuning),
        Fusion("content first", both=content_first(0.5)),
        Fusion("prompt gate", gate=True),
        Fusion(
            "Merge: by prompt, content first",
            both=content_first(0.5),
            gate=True,
            content=content_then_base(0.5),
            style=half_then_full(0.5),
        ),
        Fusion(PASSES, both=fixed(1.0, DOUBLED), gate=True, style=half_then_full(HALF_UNTIL), separate=True),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (("pipeline", "diffusers' folder"), ("dino", "for contents"), ("clip", "for words and styles")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("--style-clip", type=Path, help="a CLIP whose image features are for styles, such as CSD's")
    parser.add_argument("--units", type=Path, required=True, help="see real_units.py")
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="where everything is kept")
    parser.add_argument("--pictures", type=int, default=4, help="of each kind of prompts, unit and method")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--offload", action="store_true", help="parts of the pipeline wait in RAM")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    units = read_units(args.units, args.pictures)
    device = chosen_device(args.device)
    concepts = dict.fromkeys(concept for unit in (*units.tuning, *units.check) for concept in unit[:2])
    model = RealModel(args.pipeline, [opened(one) for one in concepts], device, args.precision, args.offload)
    settings = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
    settings["guidance_scale"] = args.guidance
    judges = Judges(args.dino, args.clip, args.style_clip, device)
    study = RealStudy(args.folder, model, judges, units.words, settings)
    print(f"{machine()}; version {__version__}, protocol {VERSION}, {datetime.date.today()}")
    fusions = methods(study, units.tuning)
    print(f"\nChosen on {len(units.tuning)} tuning units:\n\n{report.chosen(fusions)}\n")
    results = {fusion.name: [study.numbers(fusion, unit) for unit in units.check] for fusion in fusions}
    print(f"On {len(units.check)} check units:\n\n{report.table(results, units.check, COLUMNS)}\n")
    print(report.comparison(results, REFERENCE, units.check, COLUMNS))
    facts = {"version": VERSION, "date": str(datetime.date.today()), "pack": __version__, "machine": machine()}
    facts |= {"settings": settings, "pictures": args.pictures, "methods": [asdict(one) for one in fusions]}
    print(report.save(args.folder / "results.json", units.check, results, facts))
    print(report.picture(results, units.check, args.folder / "fusion.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
