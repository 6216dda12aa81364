"""Pictures over lists of alpha and beta from a diffusers pipeline folder: what the published `inference_merge` does."""

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from qrlora_core import Adapter, Basis, MergeRecipe, merge, merged_adapter, open_adapter
from qrlora_plots import contact_sheet

from ..errors import TrainError
from ..model.backbones import Pipeline
from ..model.basis import initial_basis_of, require_layers
from ..model.device import chosen_device
from ..model.layer import QRLinear
from ..model.pipeline_folder import open_pipeline
from ..model.source import BaseModel
from ..model.transformer import DTYPES

log = logging.getLogger(__name__)


def sample(args: argparse.Namespace) -> None:
    """One picture for every alpha, beta, prompt and seed, each PNG with its recipe in the metadata.

    Where there is more than one alpha or beta, every prompt and seed also gets a contact sheet of all of them.
    """
    if args.style is None and args.content is None:
        raise TrainError("settings", "name a --style or a --content adapter, or both")
    if args.width % 16 or args.height % 16:
        raise TrainError("settings", f"--width {args.width} and --height {args.height}: multiples of 16 are needed")
    grid = _grid(args)
    device = chosen_device(args.device)
    folder = open_pipeline(args.pipeline)
    family = folder.backbone
    if folder.own_class in family.pipeline.undrawable:
        reason = family.pipeline.undrawable[folder.own_class]
        raise TrainError("model", f"{args.pipeline.name!r} is of a {folder.own_class}, which {reason}")
    source = BaseModel(args.pipeline)
    if source.backbone.family != family.family:
        raise TrainError(
            "model",
            f"the pipeline folder {args.pipeline.name!r} is of {family.title}, the transformer in it of "
            f"{source.backbone.title}",
        )
    style, content = (MergeRecipe.of(open_adapter(path)) if path else None for path in (args.style, args.content))
    for recipe in (style, content):  # before gigabytes are loaded
        require_layers(source, recipe.adapters[0].targets if recipe else ())
    args.output.mkdir(parents=True, exist_ok=True)
    pipeline = folder.load("parts", DTYPES[args.precision])
    live = LiveAdapter(getattr(pipeline, family.pipeline.network), source, device)
    # offloading moves whole components and comes after the new layers, which then move with them
    live.set(_recipe(style, 1.0, content, 1.0))
    if args.offload and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    for alpha, beta in dict.fromkeys((cell.alpha, cell.beta) for cell in grid):
        live.set(_recipe(style, alpha, content, beta))
        for cell in grid:
            if (cell.alpha, cell.beta) == (alpha, beta):
                _draw(pipeline, family.pipeline, cell, args)
    _write_sheets(grid, args)


class Cell(NamedTuple):
    """One picture to make: its number among the prompts, and where it goes."""

    number: int
    prompt: str
    seed: int
    alpha: float
    beta: float
    path: Path


def _grid(args: argparse.Namespace) -> list[Cell]:
    """Everything that was asked for, once; files that exist are an error before anything is loaded."""
    alphas = dict.fromkeys(args.alphas if args.style else [0.0])
    betas = dict.fromkeys(args.betas if args.content else [0.0])
    cells = []
    for (number, prompt), seed in itertools.product(enumerate(args.prompts), dict.fromkeys(args.seeds)):
        for alpha, beta in itertools.product(alphas, betas):
            name = f"prompt{number}_seed{seed}_alpha{alpha:.9g}_beta{beta:.9g}.png"
            cells.append(Cell(number, prompt, seed, alpha, beta, args.output / name))
    taken = [path for path in (*(cell.path for cell in cells), *_sheets(cells)) if path.exists()]
    if taken:
        raise TrainError(
            "settings", f"{taken[0].name} exists in {args.output.name} already; choose another output folder"
        )
    return cells


def _draw(pipeline: Any, family: Pipeline, cell: Cell, args: argparse.Namespace) -> None:
    picture = pipeline(
        prompt=cell.prompt,
        num_inference_steps=args.steps,
        **family.guidance(args.guidance),
        width=args.width,
        height=args.height,
        generator=torch.Generator("cpu").manual_seed(cell.seed),
    ).images[0]
    recipe = {"alpha": cell.alpha, "beta": cell.beta, "prompt": cell.prompt, "seed": cell.seed, "steps": args.steps}
    recipe |= {"guidance": args.guidance, "width": args.width, "height": args.height}
    recipe |= {"style": args.style and args.style.name, "content": args.content and args.content.name}
    info = PngInfo()
    info.add_text("qrlora", json.dumps(recipe))
    picture.save(cell.path, pnginfo=info)
    log.info("%s", cell.path)


def _sheets(cells: Sequence[Cell]) -> dict[Path, list[Cell]]:
    """Contact sheet -> its pictures: those of one prompt and seed, where there are several."""
    groups: dict[Path, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.path.with_name(f"prompt{cell.number}_seed{cell.seed}_sheet.png"), []).append(cell)
    return {path: group for path, group in groups.items() if len(group) > 1}


def _write_sheets(cells: Sequence[Cell], args: argparse.Namespace) -> None:
    """Alpha downwards, beta to the right."""
    for path, group in _sheets(cells).items():
        pictures = []
        for cell in group:
            with Image.open(cell.path) as picture:
                pictures.append(picture.convert("RGB"))
        labels = [f"alpha={cell.alpha:.4g}, beta={cell.beta:.4g}" for cell in group]
        contact_sheet(pictures, labels, title=f"{group[0].prompt}   seed {group[0].seed}").image.save(path)
        log.info("%s", path)


class LiveAdapter:
    """Adapters on a diffusers transformer that can be exchanged without touching a weight.

    Args:
        model: diffusers' transformer.
        source: the same model on disk, where a full-QR adapter's initial basis is decomposed from.
        device: where that is done.
    """

    def __init__(self, model: Any, source: BaseModel, device: torch.device) -> None:
        self._model = model
        self._decomposed = initial_basis_of(source, device)
        self._layers: dict[str, QRLinear] = {}
        self._bases: dict[tuple[str, int], Basis] = {}

    def set(self, recipe: MergeRecipe) -> None:
        """Apply a recipe in place of the one before; strength 0 everywhere leaves the base model.

        Raises:
            TrainError: the model lacks a layer, or has it in another shape.
        """
        for layer in self._layers.values():
            layer.scaling = 0.0
        if not recipe.active:
            return
        adapter = merged_adapter(recipe, initial_of=self._initial)
        for name in adapter.layers:
            up, down, alpha = adapter.update(name)
            layer = self._layer(name, adapter)
            like = next(layer.base.parameters())
            layer.q = up.to(like.device, like.dtype)
            layer.delta_r = nn.Parameter(down.to(like.device, torch.float32), requires_grad=False)
            layer.scaling = alpha / up.shape[1]

    def _layer(self, name: str, adapter: Adapter) -> QRLinear:
        if name not in self._layers:
            parent, _, child = name.rpartition(".")
            try:
                owner = self._model.get_submodule(parent)
                base = owner.get_submodule(child)
            except AttributeError as error:
                raise TrainError("model", f"the pipeline's transformer has no {name}") from error
            shape = (base.out_features, base.in_features)
            if shape != adapter.layers[name].shape:
                raise TrainError("model", f"{name} is {shape} here, {adapter.layers[name].shape} in {adapter.name}")
            q = torch.zeros(shape[0], 1)
            layer = QRLinear(base, (q, None), "delta_r", 0.0)
            owner.register_module(child, layer)
            self._layers[name] = layer
        return self._layers[name]

    def _initial(self, adapter: Adapter, name: str) -> Basis:
        key = name, adapter.layers[name].rank
        if key not in self._bases:
            self._bases[key] = self._decomposed(adapter, name)
        return self._bases[key]


def _recipe(style: MergeRecipe | None, alpha: float, content: MergeRecipe | None, beta: float) -> MergeRecipe:
    parts: Sequence[tuple[MergeRecipe | None, float]] = ((style, alpha), (content, beta))
    given = [(recipe, strength) for recipe, strength in parts if recipe is not None]
    if len(given) == 1:
        return given[0][0].scaled(given[0][1])
    return merge(given[0][0], given[0][1], given[1][0], given[1][1])
