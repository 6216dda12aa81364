"""The layers of a LoRA, each computed once when it is asked for: `B A = Q dR` with `Q, T = qr(B)`, `dR = T A`."""

import threading
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import AdapterLayer, LayerInfo
from .linalg import positive_qr


class Factors(NamedTuple):
    """A module's change, `scaling * up @ down`, as its file stores it.

    Attributes:
        up: (out, rank), the rows of all layers of the module.
        down: (rank, in).
        scaling: alpha / rank.
    """

    up: Tensor
    down: Tensor
    scaling: float


class LoraLayers:
    """Layers of low-rank modules, each made orthonormal when it is first asked for, and then held.

    A file is read and checked when it is opened, in the precision that it has; this is what takes long, and what a
    LoRA that is applied as a whole needs only while the model is patched. A module's factors are let go when all of
    its layers are made.

    Args:
        device: where the work is done; what is held is on the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._made: dict[str, AdapterLayer] = {}
        self._waiting: dict[str, tuple[str, slice | Tensor, Tensor]] = {}
        self._modules: dict[str, Factors] = {}
        self._left: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._waiting or name in self._made

    def add(self, name: str, module: str, factors: Factors, rows: slice | Tensor) -> LayerInfo:
        """A layer that has some rows of a module; columns of B that are zero there are dropped, all but one."""
        up = factors.up[rows]
        used = up.any(dim=0)
        used[0] |= ~used.any()
        self._modules[module] = factors
        self._left[module] += 1
        self._waiting[name] = (module, rows, used)
        return LayerInfo((up.shape[0], factors.down.shape[1]), min(up.shape[0], int(used.sum())), 1.0, torch.float32)

    def put(self, name: str, layer: AdapterLayer) -> LayerInfo:
        """A layer that is there already."""
        self._made[name] = layer
        return LayerInfo((layer.up.shape[0], layer.down.shape[1]), layer.up.shape[1], 1.0, torch.float32)

    def layer(self, name: str) -> AdapterLayer:
        """Q and dR of a layer, float32, on the CPU, with `diag(T) >= 0`."""
        with self._lock:
            if name in self._made:
                return self._made[name]
            module, rows, used = self._waiting[name]
            up, down, scaling = self._modules[module]
            up, down = up[rows].to(self._device).float(), down.to(self._device).float()
            if not bool(used.all()):
                up, down = up[:, used.to(up.device)], down[used.to(up.device)]
            q, small = positive_qr(up)
            made = AdapterLayer(q.cpu(), (scaling * small @ down).cpu())
            self._made[name] = made
            del self._waiting[name]
            self._left[module] -= 1
            if not self._left[module]:
                del self._modules[module]
            return made
