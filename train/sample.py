"""Pictures over lists of alpha and beta from a diffusers pipeline folder: what the published `inference_merge` does."""

import argparse
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline
from PIL.PngImagePlugin import PngInfo
from torch import nn

from qrlora_core import Adapter, Basis, MergeRecipe, decompose, merge, merged_adapter, open_adapter

from .encode import load_part
from .errors import TrainError
from .layer import QRLinear
from .model import DTYPES
from .source import BaseModel
from .tools import chosen_device

log = logging.getLogger(__name__)


def sample(args: argparse.Namespace) -> None:
    """One picture for every alpha, beta, prompt and seed, each PNG with its recipe in the metadata."""
    if args.style is None and args.content is None:
        raise TrainError("settings", "name a --style or a --content adapter, or both")
    device = chosen_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    pipeline = load_part(
        lambda: FluxPipeline.from_pretrained(args.pipeline, torch_dtype=DTYPES[args.precision], local_files_only=True),
        "parts",
    )
    style, content = (MergeRecipe.of(open_adapter(path)) if path else None for path in (args.style, args.content))
    live = LiveAdapter(pipeline.transformer, BaseModel(args.pipeline))
    # offloading moves whole components and comes after the new layers, which then move with them
    first = _recipe(style, args.alphas[0], content, args.betas[0])
    live.set(first)
    if args.offload and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    alphas = args.alphas if style else [0.0]
    betas = args.betas if content else [0.0]
    for alpha, beta in itertools.product(alphas, betas):
        live.set(_recipe(style, alpha, content, beta))
        for (number, prompt), seed in itertools.product(enumerate(args.prompts), args.seeds):
            picture = pipeline(
                prompt,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                width=args.width,
                height=args.height,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
            recipe = {"alpha": alpha, "beta": beta, "prompt": prompt, "seed": seed, "steps": args.steps}
            recipe |= {"style": args.style and args.style.name, "content": args.content and args.content.name}
            info = PngInfo()
            info.add_text("qrlora", json.dumps(recipe))
            path = args.output / f"prompt{number}_seed{seed}_alpha{alpha:g}_beta{beta:g}.png"
            picture.save(path, pnginfo=info)
            log.info("%s", path)


class LiveAdapter:
    """Adapters on a diffusers transformer that can be exchanged without touching a weight.

    Args:
        model: FluxTransformer2DModel.
        source: the same model on disk, where a full-QR adapter's initial basis is decomposed from.
    """

    def __init__(self, model: Any, source: BaseModel) -> None:
        self._model, self._source = model, source
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
        rank = adapter.layers[name].rank
        if (name, rank) not in self._bases:
            self._bases[name, rank] = decompose(self._source.weight(name), rank, method="exact")
        return self._bases[name, rank]


def _recipe(style: MergeRecipe | None, alpha: float, content: MergeRecipe | None, beta: float) -> MergeRecipe:
    parts: Sequence[tuple[MergeRecipe | None, float]] = ((style, alpha), (content, beta))
    known = [(recipe, strength) for recipe, strength in parts if recipe is not None]
    if len(known) == 1:
        return known[0][0].scaled(known[0][1])
    return merge(known[0][0], known[0][1], known[1][0], known[1][1])
