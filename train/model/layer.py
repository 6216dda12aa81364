"""The trained layer: the frozen linear layer it wraps, plus a low-rank update on a frozen or trained basis."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qrlora_core import Adapter, AdapterLayer, Basis, LayerTarget

from ..config import Method


class QRLinear(nn.Module):
    """A linear layer with a QR-LoRA update (Yang et al., arXiv 2507.04599, section 3.2).

    `delta_r` and `delta_r_triangular`: `y = W x + scaling * Q (dR x)`, which equals the published
    `(W_res + scaling * Q (R + dR)) x` without ever rounding `R + dR` (an update of 1e-4 would lose most of its bits in
    bfloat16). `qr`: `y = W x + scaling * (Q' (R' - R) x + (Q' - Q) R x)`, the same difference `Q'R' - QR` written so
    that nothing large cancels.

    W is never changed, and may be stored in any way in which `base` itself can work. Trained tensors are float32 and
    are cast to the input's dtype for the products; Q and R are buffers.

    Args:
        base: the frozen layer, weight (out, in).
        basis: Q (out, rank) with orthonormal columns, R (rank, in). R may be None but for method qr.
        method: "delta_r", "delta_r_triangular" or "qr".
        scaling: alpha / rank.
        start: what dR starts as, (rank, in); zeros when None. Not for method qr.
        dtype: of the frozen Q and R.

    Shapes:
        input (..., in) -> output (..., out)
    """

    q: Tensor
    r: Tensor

    def __init__(
        self,
        base: nn.Module,
        basis: tuple[Tensor, Tensor | None],
        method: Method,
        scaling: float,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base
        self.method = method
        self.scaling = scaling
        q, r = basis
        if method == "qr":
            assert r is not None, "method qr starts from Q and R"
            self.register_buffer("q", q.float(), persistent=False)
            self.register_buffer("r", r.float(), persistent=False)
            self.trained_q = nn.Parameter(q.float().clone())
            self.trained_r = nn.Parameter(r.float().clone())
            return
        self.register_buffer("q", q.to(dtype), persistent=False)
        width = base.in_features
        assert isinstance(width, int)
        delta_r = torch.zeros(q.shape[1], width) if start is None else start.float().clone()
        self.delta_r = nn.Parameter(delta_r.to(q.device))
        if method == "delta_r_triangular":
            with torch.no_grad():
                self.delta_r.triu_()
            # An optimizer that never sees a gradient below the diagonal never builds up momentum there
            self.delta_r.register_hook(torch.triu)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        flat = x.reshape(-1, x.shape[-1])
        if self.method == "qr":
            up = torch.cat([self.trained_q, self.trained_q - self.q], dim=1).to(x.dtype)
            down = torch.cat([self.trained_r - self.r, self.r]).to(x.dtype)
        else:
            up, down = self.q.to(x.dtype), self.delta_r.to(x.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), flat @ down.mT, up.mT, alpha=self.scaling).view_as(y)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put back what an optimizer may have moved: below the diagonal a triangular dR is zero."""
        if self.method == "delta_r_triangular":
            self.delta_r.triu_()

    def adapter_layer(self) -> AdapterLayer:
        """The trained state as a layer of an adapter, float32 on the CPU, copied."""

        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float32, copy=True)

        if self.method == "qr":
            initial = Basis(copied(self.q), copied(self.r))
            return AdapterLayer(copied(self.trained_q), copied(self.trained_r), initial)
        return AdapterLayer(copied(self.q), copied(self.delta_r))


def inject(
    model: nn.Module,
    targets: Iterable[LayerTarget],
    basis_of: Callable[[str], Basis],
    method: Method,
    scaling: float,
    *,
    start_of: Callable[[LayerTarget], Tensor | None] = lambda _: None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, QRLinear]:
    """Put a `QRLinear` in the place of every target layer; the model's other parameters are frozen.

    Args:
        model: a diffusers transformer.
        targets: what to adapt.
        basis_of: layer name -> Q and R.
        start_of: layer -> initial dR, (rank, in), or None for zeros.
        device: where Q, R and the trained tensors go.
        dtype: of the frozen Q.

    Returns:
        Layer name -> the new layer, in the order of `targets`.
    """
    model.requires_grad_(False)
    layers: dict[str, QRLinear] = {}
    for target in targets:
        parent, _, child = target.name.rpartition(".")
        owner = model.get_submodule(parent)
        q, r = (tensor.to(device or tensor.device) for tensor in basis_of(target.name))
        layer = QRLinear(owner.get_submodule(child), (q, r), method, scaling, start_of(target), dtype)
        owner.register_module(child, layer)
        layers[target.name] = layer
    return layers


def parameter_shapes(targets: Iterable[LayerTarget], method: Method, rank: int) -> dict[str, tuple[int, ...]]:
    """What `trained_parameters` will hold, before there is a model: name -> shape, in network order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        name, (out, width) = target.name, target.shape
        if method == "qr":
            shapes[f"{name}.trained_q"], shapes[f"{name}.trained_r"] = (out, rank), (rank, width)
        else:
            shapes[f"{name}.delta_r"] = (rank, width)
    return shapes


def trained_parameters(layers: Mapping[str, QRLinear]) -> dict[str, nn.Parameter]:
    """`<layer>.delta_r` (or `.trained_q`, `.trained_r`) -> parameter, in network order."""
    return {
        f"{name}.{kind}": parameter
        for name, layer in layers.items()
        for kind, parameter in layer.named_parameters(recurse=False)
    }


def trained_adapter(
    layers: Mapping[str, QRLinear], basis_of: Callable[[str], Basis], alpha: float, name: str
) -> Adapter:
    """What was trained, as an adapter with its full-precision Q (a layer computes with a rounded one).

    Args:
        layers: as `inject` gave them.
        basis_of: the same as there.
        alpha: scaling times rank.
        name: title.
    """
    tensors = {}
    for key, layer in layers.items():
        trained = layer.adapter_layer()
        if layer.method != "qr":
            basis = Basis(*(tensor.detach().to("cpu", torch.float32) for tensor in basis_of(key)))
            trained = AdapterLayer(basis.q, trained.down, basis)
        tensors[key] = trained
    method = next(iter(layers.values())).method
    return Adapter.from_tensors(name, tensors, alpha, method=method)
