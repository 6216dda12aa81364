"""The settings of training as a node of its own, and widgets for fields of FitConfig."""

import re
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..train.config import FitConfig
from ..train.settings import choices
from . import sockets
from .arrivals import Node
from .training.options import AUTO, PRESETS, TrainOptions

PRESET = "preset"
_OFFLOAD = {"none": 0.0, "half": 0.5, "all": 1.0}
_SWITCH = {"on": True, "off": False}
_NEEDS_MORE = ("piecewise_constant",)  # rules that the node has no widget for
_SPECS = {spec.name: spec for spec in fields(FitConfig)}


def number_input(name: str, tooltip: str, **more: Any) -> Any:
    """A widget for a numeric field of FitConfig, with that field's own default and range."""
    spec = _SPECS[name]
    low, high = spec.metadata["low"], spec.metadata["high"]
    if spec.type is int:
        more = {"min": int(low), "max": min(int(high), 2**53 - 1), **more}
        return io.Int.Input(name, default=more.pop("default", spec.default), tooltip=tooltip, **more)
    more = {"min": low, "max": high, "step": 0.01, "round": False, **more}
    return io.Float.Input(name, default=more.pop("default", spec.default), tooltip=tooltip, **more)


def combo_input(name: str, tooltip: str, with_preset: bool = False) -> Any:
    """A widget for a field of FitConfig that is one of several words."""
    spec = _SPECS[name]
    options = ([PRESET] if with_preset else []) + [word for word in choices(spec) or () if word not in _NEEDS_MORE]
    return io.Combo.Input(name, options=options, default=PRESET if with_preset else spec.default, tooltip=tooltip)


class TrainOptionsNode(Node):
    """Widgets -> QRLORA_TRAIN_OPTIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRATrainOptions",
            "Train \u0394R Options",
            "Settings of Train \u0394R beyond the usual ones: memory, optimizer, sampling of timesteps, checkpoints, "
            "processes. Without this node the published defaults are used, in the memory that the card has.",
            inputs=[*_memory(), *_optimizer(), *_loss(), *_pictures(), *_files(), *_more()],
            outputs=[sockets.TrainOptions.Output(display_name="options", tooltip="For Train \u0394R.")],
            search_aliases=["qr-lora training settings"],
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        base_storage: str,
        gradient_checkpointing: str,
        offload: str,
        targets: str,
        keep_aspect: bool,
        flip: bool,
        resume: str,
        processes: int,
        stop_seconds: float,
        silence_seconds: float,
        repeats: int = 1,
        resolutions: str = "",
        **same: Any,
    ) -> io.NodeOutput:
        fit: dict[str, Any] = {**same, "targets": _words(targets)}
        if base_storage != PRESET:
            fit["base_storage"] = base_storage
        if gradient_checkpointing != PRESET:
            fit["gradient_checkpointing"] = _SWITCH[gradient_checkpointing]
        if offload != PRESET:
            fit["offload"] = _OFFLOAD[offload]
        elif preset != AUTO and base_storage in ("int8", "nf4"):  # those cannot be offloaded, and need it less
            fit["offload"] = 0.0
        return io.NodeOutput(
            TrainOptions(
                preset,
                fit,
                keep_aspect,
                flip,
                resume,
                processes,
                stop_seconds,
                silence_seconds,
                repeats,
                _words(resolutions),
            )
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[\s,;]+", text)))


def _memory() -> list[Any]:
    return [
        io.Combo.Input(
            "preset",
            options=[AUTO, *PRESETS],
            default=AUTO,
            tooltip="Memory of the graphics card; decides the three settings below where they say 'preset'. "
            "auto: as exact as what is free allows.",
        ),
        combo_input(
            "base_storage",
            "How the base model is held while training; its weights are never changed. fp8 takes half of bf16. int8 "
            "needs the package torchao, nf4 needs bitsandbytes.",
            with_preset=True,
        ),
        io.Combo.Input(
            "gradient_checkpointing",
            options=[PRESET, *_SWITCH],
            default=PRESET,
            tooltip="on: far less memory, about a third slower. off: for cards with memory to spare.",
        ),
        io.Combo.Input(
            "offload",
            options=[PRESET, *_OFFLOAD],
            default=PRESET,
            tooltip="The share of the model's blocks that waits in RAM (on a CPU: in the file) and comes one block "
            "ahead of its use: slower, fits small cards. Not with int8, nf4.",
        ),
        combo_input("precision", "Arithmetic of the forward pass. What is trained is always float32."),
    ]


def _optimizer() -> list[Any]:
    return [
        combo_input(
            "optimizer",
            "adamw as published. adamw8bit needs bitsandbytes, prodigy needs prodigyopt and a learning rate of 1.",
        ),
        combo_input("scheduler", "Learning rate over the steps; constant as published."),
        number_input("warmup_steps", "Steps in which the learning rate rises from zero."),
        number_input("weight_decay", "Decoupled weight decay of AdamW and Prodigy.", step=1e-5),
        number_input("max_grad_norm", "Gradients are clipped to this length; 0: not at all."),
    ]


def _loss() -> list[Any]:
    return [
        combo_input("timestep_sampling", "How noise levels are drawn: uniform as published."),
        combo_input("shift", "Moves noise levels: none as published; resolution: as FLUX's own sampling does."),
        number_input("guidance", "Guidance value that the model is given during training; 1 as published."),
        number_input("caption_dropout", "Share of steps with an empty caption."),
    ]


def _pictures() -> list[Any]:
    return [
        io.Boolean.Input(
            "keep_aspect",
            default=True,
            tooltip="Keep every picture's aspect ratio at the area of resolution x resolution; otherwise a square.",
        ),
        io.Boolean.Input("flip", default=False, tooltip="Train on mirrored pictures too. Not for text or faces."),
        io.Boolean.Input(
            "use_mask", default=True, tooltip="Where a picture has an alpha channel, only what is opaque is learned."
        ),
        io.String.Input(
            "targets",
            default="",
            multiline=True,
            tooltip="Layers to train, by name or ending, such as attn.to_q; empty: the published ones.",
        ),
    ]


def _files() -> list[Any]:
    return [
        number_input("checkpoint_every", "Steps between checkpoints, from which a stopped run goes on; 0: at the end."),
        number_input("keep_checkpoints", "How many checkpoints are kept.", max=100),
        number_input("sample_every", "Steps between sample pictures; 0: none.", default=250),
        io.Combo.Input(
            "resume",
            options=["auto", "never", "require"],
            default="auto",
            tooltip="auto: go on where the same training stopped. never: start anew in another folder. require: an "
            "error when there is nothing to go on with.",
        ),
        io.Int.Input(
            "processes",
            default=1,
            min=1,
            max=64,
            tooltip="Processes of accelerate, one per graphics card. The batch grows with them.",
        ),
        io.Float.Input(
            "stop_seconds",
            default=30.0,
            min=1.0,
            max=3600.0,
            step=1.0,
            tooltip="How long a cancelled training may take to write its checkpoint. Cancel again ends it at once.",
        ),
        io.Float.Input(
            "silence_seconds",
            default=1800.0,
            min=5.0,
            max=86400.0,
            step=1.0,
            tooltip="A training that reports nothing for this long counts as hung and is ended.",
        ),
        io.Combo.Input(
            "strengths",
            options=["auto", "on", "off"],
            default="auto",
            optional=True,
            tooltip="At the end, pictures and curves of the adapter at several strengths, with and without the "
            "trigger. auto: where that takes at most a tenth of the training.",
        ),
    ]


def _more() -> list[Any]:
    """What came later: older workflows have no values for these."""
    return [
        io.Int.Input(
            "repeats",
            default=1,
            min=1,
            max=10_000,
            optional=True,
            tooltip="How often each picture comes in one pass over the data.",
        ),
        io.String.Input(
            "resolutions",
            default="",
            optional=True,
            tooltip="Further resolutions, such as 768, 1024: every picture is trained in each of them. Batches hold "
            "pictures of one size.",
        ),
        number_input("prior_weight", "Weight of the loss on class_images.", optional=True),
        number_input(
            "validate_every",
            "Steps between validation losses (the same noise every time, so that they compare), shown beside the loss; "
            "0: none.",
            optional=True,
        ),
    ]
