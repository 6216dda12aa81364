"""Live mode and torch.compile, which does not see hooks."""

import functools
import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...qrlora_core import SettingError

log = logging.getLogger(__name__)

# Under this name the host's compile node and those of other packs put their wrapper
_COMPILED = "torch.compile"


def uncompiled(options: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Compiled code of this model is not used meanwhile.

    torch.compile does not look at hooks: it would run what it compiled without them, or with those of another clone,
    and so without the adapter or with an old strength. What was compiled stays, for the model without an adapter.

    Args:
        options: the host's `transformer_options`, which name its own compile node.

    Raises:
        SettingError: a compiled model, and a PyTorch that cannot be told so.
    """
    compiles = _COMPILED in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if compiles:
        _tell_uncompiled()
    if not compiles and "torch._dynamo" not in sys.modules:  # nobody has compiled anything
        return nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is not None:
        eager: AbstractContextManager[Any] = set_stance("force_eager")
        return eager
    if compiles:
        raise SettingError(
            "live mode on a compiled model needs PyTorch 2.6; set mode to 'patch', or leave compiling out"
        )
    return nullcontext()


@functools.cache
def _tell_uncompiled() -> None:
    """Once, not at every step."""
    log.warning(
        "QR-LoRA: live mode runs the model uncompiled, so Torch Compile Model gains nothing here; mode 'patch' in "
        "Apply QR-LoRA and compiling go together"
    )
