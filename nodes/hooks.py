"""An adapter as a hook of the conditioning, so that ComfyUI's own keyframes schedule it over the sampling steps."""

import weakref
from typing import Any

import comfy.hooks
from comfy_api.latest import io

from ..qrlora_core import MergeRecipe
from . import host, report, sockets
from .apply import low_rank_updates

Hooks = io.Custom("HOOKS")


class CreateHook(io.ComfyNode):
    """DELTA_R -> HOOKS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRACreateHook",
            "Create Hook \u0394R",
            "Makes a hook of an adapter or a merge. Set Hook Keyframes then schedules its strength over the sampling "
            "steps, and Cond Set Props attaches it to a prompt, with a mask if you like. With a constant strength of 1 "
            "it does what Apply QR-LoRA does.",
            inputs=[
                sockets.DeltaR.Input("delta_r", tooltip="From Load \u0394R Adapter or Merge \u0394R."),
                sockets.strength_input("strength", "A factor for the whole adapter; keyframes multiply it."),
                Hooks.Input("prev_hooks", optional=True, tooltip="Hooks to add this one to."),
            ],
            outputs=[Hooks.Output(display_name="hooks", tooltip="For Set Hook Keyframes and Cond Set Props.")],
            search_aliases=["qr-lora hook", "schedule alpha", "keyframes"],
        )

    @classmethod
    def execute(
        cls, delta_r: MergeRecipe, strength: float, prev_hooks: comfy.hooks.HookGroup | None = None
    ) -> io.NodeOutput:
        group = comfy.hooks.HookGroup() if prev_hooks is None else prev_hooks.clone()
        if strength != 0:
            group.add(DeltaRHook(delta_r, strength))
        return io.NodeOutput(group, ui={"text": [report.hook_text(delta_r, strength, len(group))]})


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
        self.known: weakref.WeakKeyDictionary[Any, dict[host.Place, Any]] = weakref.WeakKeyDictionary()

    def add_hook_patches(self, model: Any, model_options: Any, target_dict: Any, registered: Any) -> bool:
        """Called by the host with the model that is sampled, or with a text encoder, which an adapter never changes.

        Raises:
            QRLoRAError: the model lacks a layer, or a tensor is not finite.
        """
        if self.recipe is None or not self.should_register(model, model_options, target_dict, registered):
            return False
        patches: dict[host.Place, Any] = {}
        if target_dict.get("target") != comfy.hooks.EnumWeightTarget.Clip:
            if model.model not in self.known:
                self.known[model.model] = host.low_rank_patches(low_rank_updates(model, self.recipe))
            patches = self.known[model.model]
        host.require_taken(patches, model.add_hook_patches(self, patches, self._strength_model))
        registered.add(self)
        return True

    def clone(self) -> "DeltaRHook":
        other: DeltaRHook = super().clone()
        other.recipe, other.known = self.recipe, self.known
        return other
