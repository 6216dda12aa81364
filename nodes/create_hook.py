"""An adapter as a hook of the conditioning, so that ComfyUI's own keyframes schedule it over the sampling steps."""

from comfy_api.latest import io

from ..qrlora_core import NOTHING, MergeRecipe
from . import report, sockets
from .arrivals import Node
from .host.hooks import DeltaRHook, HookGroup

Hooks = io.Custom("HOOKS")


class CreateHook(Node):
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
                sockets.delta_r_input("delta_r", "From Load \u0394R Adapter or Merge \u0394R."),
                sockets.strength_input("strength", "A factor for the whole adapter; keyframes multiply it."),
                Hooks.Input("prev_hooks", optional=True, tooltip="Hooks to add this one to."),
            ],
            outputs=[Hooks.Output(display_name="hooks", tooltip="For Set Hook Keyframes and Cond Set Props.")],
            search_aliases=["qr-lora hook", "schedule alpha", "keyframes"],
        )

    @classmethod
    def execute(
        cls, strength: float, delta_r: MergeRecipe = NOTHING, prev_hooks: HookGroup | None = None
    ) -> io.NodeOutput:
        group = HookGroup() if prev_hooks is None else prev_hooks.clone()
        if delta_r.scaled(strength).active:
            group.add(DeltaRHook(delta_r, strength))
        return io.NodeOutput(group, ui={"text": [report.hook_text(delta_r, strength, len(group))]})
