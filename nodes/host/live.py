"""Live application: `y = W x + sum_i a_i Q_i (dR_i x)` beside a weight that nobody touches.

    recipe --layout--> FactorStore (Q and dR, see `live_store`)
                   \\-> LiveState (one table of a_i for each clone; read at every step)

Turning alpha makes a new table and nothing else: no weight is patched, moved or summed. Any storage format serves,
because W is never read.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.utils
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn

from ...qrlora_core import MergeRecipe, SettingError, WeightSlice, evaluations
from .compiled import uncompiled
from .live_store import FactorStore, Stack, factor_store
from .protocols import ModelPatcher
from .steps import Factors, StepReader, ids_of_pass

log = logging.getLogger(__name__)

KEY = "qr_lora_live"


class LiveState:
    """What the hooks of one clone read.

    Attributes:
        recipe: everything that is added, by this node and by earlier ones.
        table: the factor of each term at the present evaluation, one tuple for the whole batch or one for each of its
            prompts.
    """

    def __init__(self, recipe: MergeRecipe, store: FactorStore, places: Mapping[str, WeightSlice]) -> None:
        self.recipe, self.store, self.places = recipe, store, dict(places)
        self.reader = StepReader(recipe.terms)
        self.table: tuple[Factors, ...] = ()
        self.uncalled: set[nn.Module] = set()
        self._handles: list[Any] = []

    def inject(self, patcher: ModelPatcher) -> None:
        """Hook every module; what a clone that is gone may have left there is taken away first."""
        self.eject(patcher)
        modules = {name: comfy.utils.get_attr(patcher.model, name) for name in self.store.layout}
        for name, module in modules.items():
            remove_hooks(module)
            hook = _Hook(self, self.store.layout[name])
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self.uncalled = set(modules.values())

    def eject(self, _patcher: Any) -> None:
        """Take this clone's hooks off; nothing happens where there are none."""
        while self._handles:
            self._handles.pop().remove()


class _Hook:
    """Adds the update to the output of one module."""

    def __init__(self, state: LiveState, stacks: tuple[Stack, ...]) -> None:
        self.state, self.stacks = state, stacks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        table = self.state.table
        self.state.uncalled.discard(module)
        if not any(any(factors) for factors in table):
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        if len(set(table)) == 1:
            self._add(x, y, table[0])
            return y
        if x.shape[0] % len(table):
            raise SettingError(
                f"this model mixes the {len(table)} prompts of a batch before {type(module).__name__} (shape "
                f"{tuple(x.shape)}), so an adapter cannot act on one of them only; use one strength for all"
            )
        for rows, made, factors in zip(x.chunk(len(table)), y.chunk(len(table)), table):
            self._add(rows, made, factors)
        return y

    def _add(self, x: Tensor, y: Tensor, factors: Factors) -> None:
        """Add to `y` what the terms with these factors add; in place, because `y` was just made."""
        for stack in self.stacks:
            active = [(factors[term], down) for term, down in stack.downs if factors[term]]
            if not active:
                continue
            dtype = x.dtype if x.dtype.is_floating_point and x.dtype.itemsize > 1 else y.dtype
            hidden = nn.functional.linear(x.to(dtype), self._down(active, x.device, dtype))
            column = 0
            for rows in stack.rows:
                up = self._tensor(rows.up, x.device, dtype)
                change = nn.functional.linear(hidden[..., column : column + up.shape[1]], up)
                y[..., rows.start : rows.start + rows.length] += change.to(y.dtype)
                column += up.shape[1]

    def _down(self, active: list[tuple[float, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The sum of dR's as the store holds them, summed in float32."""
        (factor, index), *others = active
        if not others and factor == 1.0:
            return self._tensor(index, device, dtype)
        total = self._tensor(index, device, torch.float32) * factor
        for factor, index in others:
            total.add_(self._tensor(index, device, torch.float32), alpha=factor)
        return total.to(dtype)

    def _tensor(self, index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Where the host left it on the CPU for lack of memory, it comes for this use."""
        tensor: Tensor = self.state.store.tensors[index]
        return tensor.to(device, dtype, non_blocking=True)


def remove_hooks(module: nn.Module) -> int:
    """Take every hook of this kind off a module, whoever put it there; how many there were."""
    ours = [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Hook)]
    for key in ours:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
    return len(ours)


def live_clone(model: ModelPatcher, recipe: MergeRecipe, places: Mapping[str, WeightSlice]) -> Any:
    """A clone of `model` that adds a recipe while it runs, besides what an earlier node made it add.

    Args:
        model: a ModelPatcher; it is not changed.
        recipe: what to add, strengths included.
        places: of every layer of every adapter.

    Raises:
        SettingError: a layer is no linear layer.
        QRLoRAError: a tensor is not finite, or the basis of a full-QR adapter is not known.
    """
    clone = model.clone()
    earlier: LiveState | None = clone.get_attachment(KEY)
    if earlier is not None:
        recipe = MergeRecipe(earlier.recipe.terms + recipe.terms)
        places = {**earlier.places, **places}
    state = LiveState(recipe, factor_store(model, recipe, places), places)
    clone.set_attachments(KEY, state)
    clone.set_injections(KEY, [PatcherInjection(inject=state.inject, eject=state.eject)])
    clone.set_additional_models(KEY, [state.store.patcher.clone()])
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, _Steps(state)), (WrappersMP.CALC_COND_BATCH, _Prompts(state))):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def set_factors(clone: Any, recipe: MergeRecipe) -> None:
    """Let a live clone add the same adapters by other factors from the next evaluation of the model on.

    Args:
        clone: of `live_clone`, and of no other clone.
        recipe: all that it adds, terms in the same order, earlier nodes' ones first.
    """
    state: LiveState = clone.get_attachment(KEY)
    state.recipe, state.reader = recipe, StepReader(recipe.terms)


class _Steps:
    """Wraps each evaluation of the model: the table of factors is set before it, and cleared after it."""

    def __init__(self, state: LiveState) -> None:
        self.state = state

    def __call__(
        self,
        executor: Callable[..., Any],
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = transformer_options or {}
        reader = self.state.reader
        separate = any(reader.own_passes)
        total: Any = None
        try:
            for table, weights in evaluations(reader.own_passes, reader.factors(options, t)):
                self.state.table = table
                asked = ids_of_pass(options, table) if separate else options
                latents = x.clone() if separate else x  # a step that is skipped is written into what came in
                # UNets take a control's outputs off its lists as they run
                lists = control and {
                    key: list(value) if isinstance(value, list) else value for key, value in control.items()
                }
                with uncompiled(options):
                    prediction = executor(latents, t, c_concat, c_crossattn, lists, asked, **kwargs)
                if set(weights) != {1.0}:
                    prediction = weighted(prediction, weights)
                total = prediction if total is None else total + prediction
            return total
        finally:
            self.state.table = ()
            self._warn()

    def _warn(self) -> None:
        """Say once when the model ran without calling some of the hooked layers: there an adapter adds nothing."""
        uncalled, self.state.uncalled = self.state.uncalled, set()
        if uncalled:
            log.warning(
                "QR-LoRA: %d of %d layers were not run as layers of their own, so live mode added nothing there; "
                "set mode to 'patch' in Apply QR-LoRA if that was not meant",
                len(uncalled),
                len(self.state.store.layout),
            )


def weighted(prediction: Tensor, weights: Sequence[float]) -> Tensor:
    """A prediction (batch, ...) times a weight for each of the batch's prompts, whose samples lie together."""
    factors = torch.tensor(weights, dtype=prediction.dtype, device=prediction.device)
    rows = factors.repeat_interleave(prediction.shape[0] // len(weights))
    return prediction * rows.view(-1, *[1] * (prediction.ndim - 1))


class _Prompts:
    """Wraps each batch of conditionings: what their prompts are is kept by the id that the model will see."""

    def __init__(self, state: LiveState) -> None:
        self.state = state

    def __call__(self, executor: Callable[..., Any], model: ModelPatcher, conds: Any, *args: Any, **kwargs: Any) -> Any:
        self.state.reader.note_conditionings(conds)
        return executor(model, conds, *args, **kwargs)
