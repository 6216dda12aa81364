"""Balance: what alpha, beta and act suit a pair of adapters, by the model's own predictions."""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..qrlora_core import (
    ACTS,
    BY_HAND,
    CHOICES,
    NOTHING,
    Asked,
    MergeRecipe,
    OnMismatch,
    SettingError,
    Triggers,
    balance_report,
    cells,
    four_prompts,
    merge_acting,
    needed,
    proposal,
    triggers_of_both,
)
from ..qrlora_plots import PlotsUnavailableError, array_of, balance_image, text_card
from . import report, sockets
from .arrivals import Node
from .host.balance import Pair, Path, measure

log = logging.getLogger(__name__)

ANY = "any"
PROMPT_KINDS: dict[str, Asked] = {
    "prompt": "both",
    "style_prompt": "style",
    "content_prompt": "content",
    "plain_prompt": "none",
}


class Balance(Node):
    """MODEL, CLIP and two DELTA_R -> DELTA_R, alpha, beta, IMAGE, STRING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return sockets.schema(
            "QRLoRABalance",
            "\u0394R Balance",
            "Proposes alpha, beta and how to act for this pair. It asks the model, on a small grid, how much of each "
            "adapter's effect survives where both act, and how far prompts without triggers drift. No picture is "
            "made. The frontier is shown; 'choose' picks a point on it.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapters are for, before Apply QR-LoRA."),
                io.Clip.Input("clip", tooltip="The text encoders of that model."),
                sockets.delta_r_input("delta_r_style", "The style adapter (or any first one)."),
                sockets.delta_r_input("delta_r_content", "The content adapter (or any second one)."),
                io.Combo.Input(
                    "choose",
                    options=[*CHOICES, BY_HAND],
                    default=CHOICES[0],
                    tooltip="balanced: the weaker of the two as present as possible, while other prompts stay as they "
                    "are. content, style: that one first. quiet: other prompts first. by hand: alpha and beta below, "
                    "measured. Changing this measures nothing anew.",
                ),
                io.Combo.Input(
                    "act",
                    options=[ANY, *ACTS],
                    default=ANY,
                    tooltip="any: all ways compete, see Merge \u0394R. One pass each keeps most, and takes up "
                    "to 3 times the work in a step; choose another one to leave it out.",
                ),
                sockets.strength_input("alpha", "By hand: how much style."),
                sockets.strength_input("beta", "By hand: how much content."),
                sockets.advanced(
                    io.Int.Input, "grid", default=5, min=2, max=9, tooltip="So many values of alpha, and of beta."
                ),
                sockets.advanced(
                    io.Float.Input, "lowest", default=0.4, min=-4.0, max=4.0, step=0.05, tooltip="The first of them."
                ),
                sockets.advanced(
                    io.Float.Input, "highest", default=1.2, min=-4.0, max=4.0, step=0.05, tooltip="The last of them."
                ),
                sockets.advanced(
                    io.Int.Input,
                    "points",
                    default=3,
                    min=1,
                    max=8,
                    tooltip="Noise levels that are measured, spread over a sampling. Time grows with them.",
                ),
                sockets.advanced(
                    io.Int.Input,
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Side of the square picture, in pixels.",
                ),
                sockets.advanced(
                    io.Int.Input,
                    "noises",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="So many at once: steadier numbers, and more time.",
                ),
                sockets.advanced(
                    io.Int.Input,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the noise.",
                ),
                sockets.mismatch_input(),
                _text_input(
                    "style_trigger", "Words that call the style, as in Merge \u0394R. Empty: those of its file."
                ),
                _text_input("content_trigger", "Words that call the content. Empty: those of its file."),
                _text_input("prompt", "A prompt that asks for both. Empty: made of the triggers."),
                _text_input("style_prompt", "A prompt for the style only. Empty: 'prompt' without the other trigger."),
                _text_input("content_prompt", "A prompt for the content only. Empty: as above."),
                _text_input("plain_prompt", "A prompt for neither. Empty: 'prompt' without triggers."),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels of the path that is followed. Empty: the model's own, 4 for each point.",
                ),
            ],
            outputs=[
                sockets.DeltaR.Output(display_name="delta_r", tooltip="The pair, merged as chosen; for Apply QR-LoRA."),
                io.Float.Output(display_name="alpha", tooltip="As chosen."),
                io.Float.Output(display_name="beta", tooltip="As chosen."),
                io.Image.Output(display_name="picture", tooltip="What shows against what drifts, 1600 x 800 pixels."),
                io.String.Output(display_name="json", tooltip="Every number; the help page explains the keys."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            search_aliases=["qr-lora balance", "find alpha beta", "auto merge", "strength finder"],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        choose: str,
        act: str,
        alpha: float,
        beta: float,
        grid: int,
        lowest: float,
        highest: float,
        points: int,
        size: int,
        noises: int,
        seed: int,
        on_basis_mismatch: OnMismatch,
        delta_r_style: MergeRecipe = NOTHING,
        delta_r_content: MergeRecipe = NOTHING,
        style_trigger: str = "",
        content_trigger: str = "",
        sigmas: torch.Tensor | None = None,
        **prompts: str,
    ) -> io.NodeOutput:
        pair = Pair(delta_r_style, delta_r_content, on_basis_mismatch)
        triggers = Triggers(style_trigger, content_trigger)
        missing = [
            name for name, recipe in (("style", delta_r_style), ("content", delta_r_content)) if not recipe.terms
        ]
        if len(missing) == 2:
            text = report.nothing_to_balance()
            return io.NodeOutput(NOTHING, alpha, beta, _card([text]), "{}", ui={"text": [text]})
        words = triggers_of_both(*pair[:2], triggers)
        acts = candidates(act, words, missing)
        asked = four_prompts(prompts.get("prompt", ""), *words)
        asked.update({kind: prompts[name] for name, kind in PROMPT_KINDS.items() if prompts.get(name, "").strip()})
        values = [round(lowest + (highest - lowest) * index / (grid - 1), 4) for index in range(grid)]
        alphas, betas = ([1.0] if name in missing else values for name in ("style", "content"))
        questions = needed(alphas, betas, acts)
        if choose == BY_HAND:
            for trial, kinds in needed([alpha], [beta], acts).items():
                questions[trial] = tuple(dict.fromkeys((*questions.get(trial, ()), *kinds)))
        start = time.monotonic()
        measurements, evaluations = measure(
            model, clip, pair, asked, questions, Path(points, size, noises, seed, sigmas)
        )
        measured = cells(measurements, alphas, betas, acts)
        hand = cells(measurements, [alpha], [beta], acts) if choose == BY_HAND else []
        chosen = proposal(hand or measured, CHOICES[0] if hand else choose)
        result = balance_report(measured, chosen, choose, measurements, asked)
        merged = merge_acting(
            delta_r_style,
            chosen.alpha,
            delta_r_content,
            chosen.beta,
            act=chosen.act,
            switch=chosen.switch or 0.5,
            triggers=triggers,
            on_basis_mismatch=on_basis_mismatch,
        )
        text = report.balance_text(result, missing, evaluations, time.monotonic() - start)
        picture, more = _picture(result, text)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        numbers = json.dumps(result, allow_nan=False, indent=1)
        return io.NodeOutput(
            merged, chosen.alpha, chosen.beta, picture, numbers, ui={**shown, "text": ["\n".join([*more, text])]}
        )


def candidates(act: str, words: tuple[tuple[str, ...], tuple[str, ...]], missing: Sequence[str]) -> list[str]:
    """The acts that compete.

    Args:
        act: one of them, or ANY.
        words: triggers of style and content.
        missing: adapters that are not there; passes and an order are for two.

    Raises:
        SettingError: acting by the prompt is wanted, and an adapter has no trigger.
    """
    unnamed = [name for name, triggers in zip(("style", "content"), words) if not triggers and name not in missing]
    if act != ANY:
        if ACTS[act].by_prompt and unnamed:
            raise SettingError(
                f"the {unnamed[0]} adapter has no trigger, so it cannot act by the prompt: write one into "
                f"{unnamed[0]}_trigger, or set act to 'always'"
            )
        return [act]
    fitting = {name: way for name, way in ACTS.items() if not (way.by_prompt and unnamed)}
    return [name for name, way in fitting.items() if not missing or not (way.one_pass_each or way.content_first)]


def _picture(result: dict[str, Any], text: str) -> tuple[torch.Tensor, list[str]]:
    """The plots, or the numbers as text where they cannot be drawn; and what to say about that."""
    try:
        return torch.from_numpy(array_of(balance_image(result))), []
    except PlotsUnavailableError as error:
        log.warning("QR-LoRA: %s", error)
        return _card([str(error), "", *text.split("\n")]), [str(error)]


def _card(lines: Sequence[str]) -> torch.Tensor:
    return torch.from_numpy(array_of(text_card(lines)))


def _text_input(name: str, tooltip: str) -> Any:
    return io.String.Input(name, default="", optional=True, tooltip=tooltip)
