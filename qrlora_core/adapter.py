"""What an adapter is, wherever it came from: a record of layers that are read when they are asked for."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .errors import BasisMismatchError, FileFormatError, TargetError
from .families import network_order
from .linalg import Basis, require_finite
from .targets import LayerTarget, nearest

AdapterMethod = Literal["delta_r", "delta_r_triangular", "qr"]
METHODS: tuple[str, ...] = get_args(AdapterMethod)

# Wraps the names of layers that are gone through, as `tqdm` does; it may stop the work by raising
Progress = Callable[[Sequence[str]], Iterable[str]]


class AdapterLayer(NamedTuple):
    """The tensors of one adapted layer.

    Attributes:
        up: shape (out, rank). Methods delta_r: the frozen Q. Method qr: the trained Q'.
        down: shape (rank, in). Methods delta_r: dR. Method qr: the trained R'.
        initial: Q and R as they were before training, when the file holds them. Methods delta_r: Q is `up` itself.
    """

    up: Tensor
    down: Tensor
    initial: Basis | None = None


class LayerInfo(NamedTuple):
    """What is known of a layer before its tensors are read: (out, in), rank, alpha / rank, and how it is stored."""

    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype


class Adapter:
    """A trained change of some layers of a model, lazily loaded.

    The change of one layer is `scaling * up @ down` for the dR methods, and
    `scaling * (up @ down - Q R)` with the initial Q, R for method qr.

    Attributes:
        name: what to call it in messages; usually the file's name.
        method: "delta_r", "delta_r_triangular" or "qr".
        layers: layer name -> LayerInfo, in network order.
        metadata: the file's own strings.
        has_initial: whether every layer comes with its initial Q and R.

    Args:
        read: layer name -> tensors.
        hold: keep what was read in memory, so that a file is read once, whoever refers to the adapter: patches, recipes
            and sweeps share its tensors, and they go when nobody refers to it any more.

    Raises:
        FileFormatError: no layers, an unknown method, or a layer without rank or shape.
    """

    __slots__ = ("__dict__", "__weakref__", "_held", "_read", "has_initial", "layers", "metadata", "method", "name")

    def __init__(
        self,
        name: str,
        method: AdapterMethod,
        layers: Mapping[str, LayerInfo],
        read: Callable[[str], AdapterLayer],
        *,
        has_initial: bool,
        metadata: Mapping[str, str] | None = None,
        hold: bool = False,
    ) -> None:
        if method not in METHODS:
            raise FileFormatError(f"{name}: method is {method!r}, expected one of {', '.join(METHODS)}")
        if not layers:
            raise FileFormatError(f"{name} holds no layers")
        for layer, info in layers.items():
            if len(info.shape) != 2 or min(info.shape) < 1:
                raise FileFormatError(f"{name}: {layer} has shape {info.shape}, expected (out, in)")
            if info.rank < 1:
                raise FileFormatError(f"{name}: {layer} has rank {info.rank}")
        self.name = name
        self.method = method
        self.layers = {layer: layers[layer] for layer in sorted(layers, key=network_order)}
        self.metadata = dict(metadata or {})
        self.has_initial = has_initial
        self._read = read
        self._held: dict[str, AdapterLayer] | None = {} if hold else None

    @classmethod
    def from_tensors(
        cls,
        name: str,
        layers: Mapping[str, AdapterLayer],
        alpha: float,
        *,
        method: AdapterMethod = "delta_r",
        metadata: Mapping[str, str] | None = None,
    ) -> "Adapter":
        """An adapter from tensors at hand, all layers with the same alpha."""
        infos = {}
        for key, layer in layers.items():
            rank = layer.up.shape[1]
            dtype = torch.promote_types(layer.up.dtype, layer.down.dtype)
            infos[key] = LayerInfo((layer.up.shape[0], layer.down.shape[1]), rank, alpha / rank, dtype)
        held = dict(layers)
        complete = all(layer.initial is not None for layer in held.values())
        return cls(name, method, infos, held.__getitem__, has_initial=complete, metadata=metadata)

    @property
    def rank(self) -> int:
        """The largest rank of any layer."""
        return max(info.rank for info in self.layers.values())

    @property
    def alpha(self) -> float:
        """Alpha of the first layer of the largest rank: `scaling * rank`."""
        return next(info.scaling * info.rank for info in self.layers.values() if info.rank == self.rank)

    @property
    def targets(self) -> tuple[LayerTarget, ...]:
        return tuple(LayerTarget(name, info.shape) for name, info in self.layers.items())

    def layer(self, name: str) -> AdapterLayer:
        """The tensors of one layer, in the dtype and precision of the file; not to be changed.

        Raises:
            TargetError: the adapter has no such layer.
            WeightError: a tensor holds NaN or Inf.
            FileFormatError: the file was changed before all of it was read.
        """
        if self._held is not None and name in self._held:
            return self._held[name]
        if name not in self.layers:
            raise TargetError(f"{self.name} has no layer {name!r}{nearest(name, self.layers)}")
        layer = self._read(name)
        for what, tensor in (("Q", layer.up), ("dR", layer.down), *zip("QR", layer.initial or ())):
            require_finite(tensor, f"{self.name}: {what} of {name}")
        if self._held is not None:
            self._held[name] = layer
        return layer

    def update(self, name: str) -> tuple[Tensor, Tensor, float]:
        """A layer's whole change as a LoRA, `alpha / k * up @ down`: up (out, k), down (k, in) and alpha.

        For method qr that is `[Q' Q] [R'; -R]`, k = 2 * rank; any other pair would count the weight's core twice.

        Raises:
            BasisMismatchError: method qr without its initial Q and R.
        """
        layer, scaling = self.layer(name), self.layers[name].scaling
        up, down = layer.up, layer.down
        if self.method == "qr":
            if layer.initial is None:
                raise BasisMismatchError(
                    f"{self.name} holds only the trained Q' and R'. What they change is known together with the "
                    "initial Q and R, a residual, or the model itself"
                )
            up = torch.cat([up, layer.initial.q.to(up)], dim=1)
            down = torch.cat([down, -layer.initial.r.to(down)])
        return up, down, scaling * up.shape[1]

    @functools.cached_property
    def basis_fingerprint(self) -> str | None:
        """Sixteen hex digits that two adapters share when all their Q agree bit for bit in float32.

        None for a full-QR file that holds only Q' and R'. Reads every Q once.
        """
        if self.method == "qr" and not self.has_initial:
            return None
        digest = hashlib.sha256()
        for name in self.layers:
            layer = self.layer(name)
            q = layer.initial.q if self.method == "qr" and layer.initial else layer.up
            digest.update(f"{name}{tuple(q.shape)}".encode())
            digest.update(q.to(torch.float32).contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.method}, rank {self.rank}, {len(self.layers)} layers)"
