"""A recipe as a hook of the conditioning, in the host's own hook system."""

import weakref
from typing import Any

import comfy.hooks
from comfy.hooks import HookGroup

from ...qrlora_core import MergeRecipe
from .application import recipe_patches
from .patches import require_taken
from .places import Place
from .protocols import ModelPatcher

__all__ = ["DeltaRHook", "HookGroup"]


class DeltaRHook(comfy.hooks.WeightHook):
    """Patches of a recipe that the host registers with the model when sampling starts.

    The stock hook turns the keys of a file into patches and leaves out what the model does not have. Here the recipe
    meets the model: every layer must be there, and a full-QR file gets its basis from the model's weights.
    """

    def __init__(self, recipe: MergeRecipe | None = None, strength: float = 1.0) -> None:
        # The host clones hooks by calling the class without arguments and copying attributes: keep the defaults.
        super().__init__(strength_model=strength, strength_clip=0.0)
        self.need_weight_init = False
        self.recipe = recipe
        # Registered anew for every run; merging 342 layers each time would be felt. Clones share what is known.
        self.known: weakref.WeakKeyDictionary[Any, dict[Place, Any]] = weakref.WeakKeyDictionary()

    def add_hook_patches(self, model: ModelPatcher, model_options: Any, target_dict: Any, registered: Any) -> bool:
        """Called by the host with the model that is sampled, or with a text encoder, which an adapter never changes.

        Raises:
            QRLoRAError: the model lacks a layer, or a tensor is not finite.
        """
        if self.recipe is None or not self.should_register(model, model_options, target_dict, registered):
            return False
        patches: dict[Place, Any] = {}
        if target_dict.get("target") != comfy.hooks.EnumWeightTarget.Clip:
            if model.model not in self.known:
                self.known[model.model] = recipe_patches(model, self.recipe)
            patches = self.known[model.model]
        require_taken(patches, model.add_hook_patches(self, patches, self._strength_model))
        registered.add(self)
        return True

    def clone(self) -> "DeltaRHook":
        other: DeltaRHook = super().clone()
        other.recipe, other.known = self.recipe, self.known
        return other
