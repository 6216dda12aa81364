"""What a node asks of the running ComfyUI: memory, Cancel, the progress bar, messages to the pages."""

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import comfy.cli_args
import comfy.model_management
import comfy.utils
import psutil

Item = TypeVar("Item")

Interrupted = comfy.model_management.InterruptProcessingException


def interruptible(items: Iterable[Item]) -> Iterator[Item]:
    """Go through `items`; ComfyUI's Cancel button ends the loop with its own exception."""
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item


def with_progress(items: Sequence[Item]) -> Iterator[Item]:
    """Go through `items` under ComfyUI's progress bar; its Cancel button ends the loop with its own exception."""
    bar = comfy.utils.ProgressBar(len(items))
    for index, item in enumerate(items):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update_absolute(index + 1, len(items))


def free_models() -> None:
    """Take every model of ComfyUI off the graphics card."""
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def memory() -> tuple[int | None, int]:
    """Free bytes: of the graphics card (None without one), of RAM."""
    device = comfy.model_management.get_torch_device()
    ram = int(psutil.virtual_memory().available)
    if device.type in ("cpu", "mps"):
        return None, ram
    return int(comfy.model_management.get_free_memory(device)), ram


def take_interrupt() -> bool:
    """Whether Cancel was pressed since the last call. Taking it makes a second press visible as another one."""
    if comfy.model_management.processing_interrupted():
        comfy.model_management.interrupt_current_processing(False)
        return True
    return False


class Progress:
    """ComfyUI's progress bar of this node. Cancel does not end the caller, but waits for `take_interrupt`."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(1)

    def show(self, done: int, total: int) -> None:
        try:
            self._bar.update_absolute(done, max(total, 1))
        except Interrupted:  # the host's own hook raises it, and forgets that it was pressed
            comfy.model_management.interrupt_current_processing(True)


def prompt_id() -> str | None:
    """The queue entry that runs now."""
    return getattr(_server(), "last_prompt_id", None)


def allowed_origin() -> str | None:
    """The origin of other servers' pages that the owner allows by `--enable-cors-header`; "*": all of them."""
    origin: str | None = comfy.cli_args.args.enable_cors_header
    return origin


def send(kind: str, message: dict[str, Any]) -> None:
    """Tell every open page; without a server (a script that imports the nodes) nobody."""
    server = _server()
    if server is not None:
        server.send_sync(kind, message)


def _server() -> Any:
    """The running server, None in a script that imports the nodes. The module needs the host's own start-up first."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)
