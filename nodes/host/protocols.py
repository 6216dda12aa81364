"""What this pack uses of ComfyUI's objects, for the type checker: the host's own modules have no types.

A member that is missing here is one that nothing in this pack may rely on; the tests run against the real ones.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor


class ModelPatcher(Protocol):
    """A model and what is done to it: `comfy.model_patcher.ModelPatcher` or its dynamic kind.

    Attributes:
        model: the host's model; its `diffusion_model` is the transformer.
        patches: key -> patches in the order in which they are applied.
        backup: key -> the weight as it was, while a patched one is in its place.
        hook_backup: the same for hooks.
        load_device, offload_device: where weights are used, and where they wait.
    """

    model: Any
    patches: MutableMapping[str, list[Any]]
    backup: Mapping[str, Any]
    hook_backup: Mapping[str, Any]
    load_device: torch.device
    offload_device: torch.device

    def clone(self, *args: Any, **kwargs: Any) -> "ModelPatcher": ...

    def is_dynamic(self) -> bool: ...

    def get_non_dynamic_delegate(self) -> "ModelPatcher": ...

    def model_size(self) -> int: ...

    def get_model_object(self, name: str) -> Any: ...

    def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> list[Any]: ...

    def add_hook_patches(self, hook: Any, patches: Mapping[Any, Any], strength_patch: float = 1.0) -> set[Any]: ...

    def add_callback_with_key(self, call_type: str, key: str, callback: Callable[..., Any]) -> None: ...

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable[..., Any]) -> None: ...

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None: ...

    def set_injections(self, key: str, injections: list[Any]) -> None: ...

    def set_attachments(self, key: str, attachment: Any) -> None: ...

    def get_attachment(self, key: str) -> Any: ...

    def set_additional_models(self, key: str, models: list[Any]) -> None: ...


class Encoder(Protocol):
    """What a CLIP and a VAE of the graph have in common: a patcher over a torch module."""

    patcher: Any


class Clip(Encoder, Protocol):
    """`comfy.sd.CLIP`."""

    def tokenize(self, text: str) -> Any: ...

    def encode_from_tokens_scheduled(self, tokens: Any) -> list[tuple[Tensor, dict[str, Any]]]: ...


class Vae(Encoder, Protocol):
    """`comfy.sd.VAE`: pictures are (n, height, width, 3) from 0 to 1."""

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...
