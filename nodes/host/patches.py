"""Low-rank patches on a model that hold their recipe: nothing is summed before a weight is computed."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...qrlora_core import LayerSum, Product, TargetError, WeightSlice
from .places import Place, patch_key
from .protocols import ModelPatcher


class RecipePatch(WeightAdapterBase):
    """What a recipe adds to one layer: `strength * scaling * sum_i Q_i (sum_j factor_ij dR_ij)`.

    It refers to the adapters' own tensors, so a sweep of many factors holds no copies. Sums and products are float32;
    only the finished change takes the weight's dtype.

    Args:
        loaded_keys: not used; the host copies patches by calling `type(patch)(patch.loaded_keys, patch.weights)`.
        weights: (scaling, ((up, ((down, factor), ...)), ...)), plain tuples because the host moves the tensors in them
            to the device and rebuilds them.
    """

    name = "qr_lora_recipe"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, layer_sum: LayerSum) -> "RecipePatch":
        """A patch for one layer."""
        products = tuple((product.up, product.summands) for product in layer_sum.products)
        return cls(set(), (layer_sum.scaling, products))

    @property
    def columns(self) -> int:
        """Columns of all its products together."""
        return sum(up.shape[1] for up, _ in self.weights[1])

    def change(self, device: torch.device) -> tuple[Tensor, float]:
        """The product of all terms, (out, in) float32 on a device, and the scaling that belongs to it."""
        scaling, products = self.weights
        ups, downs = [], []
        for up, summands in products:
            moved = tuple((down.to(device), factor) for down, factor in summands)
            ups.append(up.to(device, torch.float32))
            downs.append(Product(up, moved).delta_r())
        up, down = (ups[0], downs[0]) if len(ups) == 1 else (torch.cat(ups, 1), torch.cat(downs))
        # rounded as alpha is in a file, so that an export through any loader gives the very same weight
        alpha = float(torch.tensor(scaling * up.shape[1], dtype=torch.float32))
        return up @ down, alpha / up.shape[1]

    def calculate_weight(self, weight, key, strength, strength_model, offset, function, *_args, **_kwargs):  # type: ignore[no-untyped-def]
        """Called by the host with the rows of this layer; they are changed in place, as the host's slices need."""
        change, scaling = self.change(weight.device)
        weight += function(((strength * scaling) * change).to(weight.dtype).reshape(weight.shape))
        return weight


def patched_clone(model: ModelPatcher, patches: Mapping[Place, WeightAdapterBase], strength: float) -> Any:
    """A clone of `model` with these patches, all at one strength.

    Raises:
        TargetError: the host did not take every patch.
    """
    clone = model.clone()
    require_taken(patches, clone.add_patches(dict(patches), strength))
    return clone


def placed(sums: Mapping[str, LayerSum], places: Mapping[str, WeightSlice]) -> dict[Place, WeightAdapterBase]:
    """One patch for each layer, under the host's key of its place."""
    return {patch_key(places[name]): RecipePatch.of(layer_sum) for name, layer_sum in sums.items()}


def require_taken(patches: Iterable[Place], taken: Iterable[Place]) -> None:
    """Raise TargetError when the host left patches out, which it does without a word."""
    patches, accepted = list(patches), set(taken)
    lost = [str(key) for key in patches if key not in accepted]
    if lost:
        raise TargetError(
            f"the host took {len(patches) - len(lost)} of {len(patches)} patches; not {', '.join(lost[:3])}"
        )
