"""Blocks whose weights wait elsewhere and come one block ahead of their use, forward and backward (double buffering).

On a graphics card they wait in pinned RAM and are copied on a stream of their own while the block before them computes.
On a processor they wait in the model's file and are read by a thread: no RAM is held that another program needs.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .fp8 import cast_linear

Weights = dict[str, Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


class StreamedLinear(nn.Module):
    """A frozen linear layer whose weight comes with its block.

    What a block computed with stays what it is until autograd has used it: every use has tensors of its own, and none
    is changed or put away behind autograd's back.

    Args:
        layer: whose sizes are taken.
        weights: name -> tensor of the block that computes now.
        name: of the layer.
        dtype: what it computes in.
        product: computes with input, weight and bias as they are held, and that dtype.
    """

    def __init__(
        self, layer: nn.Linear, weights: Callable[[], Weights], name: str, dtype: torch.dtype, product: Product
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._weights, self._dtype, self._product = weights, dtype, product
        self._names = f"{name}.weight", f"{name}.bias" if layer.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        held, (weight, bias) = self._weights(), self._names
        return self._product(x, held[weight], None if bias is None else held[bias], self._dtype)


class Stream:
    """The waiting blocks of a model, in network order, at most two of them where the model computes.

    Which comes next follows from the last two, as it did when they came last: so it is known forward, and backward
    where blocks are recomputed, and in whatever order a model has. A wrong guess costs time and nothing else.

    Attributes:
        hits, misses: how many blocks had been asked for before they were needed, and how many had not.

    Args:
        device: where the model computes.
        dtype: what it computes in.
        product: see `StreamedLinear`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, product: Product = cast_linear) -> None:
        self.device, self.dtype, self.product = device, dtype, product
        self.hits = self.misses = 0
        self._read: list[Callable[[], Weights]] = []
        self._now: tuple[int, Weights] = (-1, {})
        self._next: tuple[int, Any] = (-1, None)
        self._pair = (-1, -1)  # the last two
        self._followed: dict[tuple[int, int], int] = {}
        self._mover: _Mover = _CudaMover(device) if device.type == "cuda" else _ThreadMover(device)

    def __len__(self) -> int:
        return len(self._read)

    def add(self, block: nn.Module, names: Mapping[str, Callable[[], Tensor]]) -> None:
        """Let a block's linear layers wait.

        Args:
            block: its other parameters stay where they are.
            names: parameter, by its name in the block -> reads it, as it is held while it waits.
        """
        index = len(self._read)
        self._read.append(self._mover.waiting(names))
        layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        for name in layers:
            parent, _, child = name.rpartition(".")
            owner = block.get_submodule(parent)
            layer = owner.get_submodule(child)
            assert isinstance(layer, nn.Linear)
            owner.register_module(child, StreamedLinear(layer, self._current, name, self.dtype, self.product))
        block.register_forward_pre_hook(lambda module, inputs: self._take(index))

    def _current(self) -> Weights:
        return self._now[1]

    def _take(self, index: int) -> None:
        """Have a block's weights here, and the following one's on their way."""
        last, _ = self._now
        if index != last:
            asked, moving = self._next
            self.hits, self.misses = self.hits + (asked == index), self.misses + (asked != index)
            # the one before is let go first, so that there are never three
            self._now = (-1, {})
            moving = moving if asked == index else self._mover.start(self._read[index])
            self._next = (-1, None)
            self._now = (index, self._mover.finish(moving))
        self._followed[self._pair] = index
        self._pair = (self._pair[1], index)
        following = self._expected()
        if following not in (index, self._next[0]) and 0 <= following < len(self._read):
            self._next = (following, self._mover.start(self._read[following]))

    def _expected(self) -> int:
        """The block after this one; out of range when nothing is known. In a first pass they go on as they went."""
        before, index = self._pair
        following = self._followed.get(self._pair, 2 * index - before)
        if following != index:
            return following
        # the last one is recomputed at once: what comes after that
        return self._followed.get((index, index), index - 1)


class _Mover:
    """How weights get from where they wait to where the model computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def waiting(self, names: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Weights]:
        """What gives a block's tensors as they wait."""
        return lambda: {name: read() for name, read in names.items()}

    def start(self, read: Callable[[], Weights]) -> Any:
        """Begin to move a block; the answer is for `finish`."""
        raise NotImplementedError

    def finish(self, moving: Any) -> Weights:
        """The block's tensors, ready to be computed with."""
        raise NotImplementedError


class _ThreadMover(_Mover):
    """A thread reads them from the model's file. (Apple's GPUs get a copy.)"""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pool = ThreadPoolExecutor(1, "weights")

    def start(self, read: Callable[[], Weights]) -> "Future[Weights]":
        return self._pool.submit(lambda: {name: tensor.to(self._device) for name, tensor in read().items()})

    def finish(self, moving: "Future[Weights]") -> Weights:
        return moving.result()


class _CudaMover(_Mover):
    """A stream of its own copies them from pinned RAM; the stream that computes waits for it, not the program."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pinned else None

    def waiting(self, names: Mapping[str, Callable[[], Tensor]]) -> Callable[[], Weights]:
        held = {name: read() for name, read in names.items()}
        if self._pinned:
            held = {name: tensor.pin_memory() for name, tensor in held.items()}
        return lambda: held

    def start(self, read: Callable[[], Weights]) -> tuple[Weights, Any]:
        with self._on_stream():
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in read().items()}
            event = self._stream.record_event() if self._stream is not None else None
        return moved, event

    def finish(self, moving: tuple[Weights, Any]) -> Weights:
        moved, event = moving
        if event is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(event)
            for tensor in moved.values():  # its memory is not given to another before the computing stream is done
                tensor.record_stream(computing)
        return moved

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
