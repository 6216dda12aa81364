"""What is known of adapters taken together: which share a basis, and what one looks like on the basis of another.

Everything is computed once for a pair or set of adapters and forgotten with them, so that turning alpha computes
nothing again.
"""

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from .adapter import Adapter, AdapterLayer
from .basis import joint_basis, orthonormal, same_basis
from .linalg import product_norm, reexpress

Value = TypeVar("Value")


class _Memory(Generic[Value]):
    """What was computed for a layer of some adapters; it goes when one of the adapters goes."""

    def __init__(self) -> None:
        self._values: weakref.WeakKeyDictionary[Adapter, dict[tuple[object, ...], Value]] = weakref.WeakKeyDictionary()

    def get(self, adapters: tuple[Adapter, ...], name: str, compute: Callable[[], Value]) -> Value:
        """What `compute` gave for this layer of these adapters; it is called at most once while all of them live."""
        first, *others = adapters
        values = self._values.setdefault(first, {})
        key: tuple[object, ...] = (name, *map(weakref.ref, others))
        if key not in values:
            value = compute()
            key = (name, *(weakref.ref(other, lambda _: values.pop(key, None)) for other in others))
            values[key] = value
        return values[key]


_own_layers: _Memory[AdapterLayer] = _Memory()
_moved_updates: _Memory[Tensor] = _Memory()
_alignments: _Memory[tuple[float, float]] = _Memory()
_compared: dict[tuple[int, int], bool] = {}
_column_counts: _Memory[tuple[int, int, int]] = _Memory()


def own_layer(adapter: Adapter, name: str) -> AdapterLayer:
    """A layer of a dR adapter on orthonormal columns, whatever its file holds."""

    def compute() -> AdapterLayer:
        layer = adapter.layer(name)
        up, down = orthonormal(layer.up, layer.down)
        return layer if up is layer.up else AdapterLayer(up, down)

    return _own_layers.get((adapter,), name, compute)


def shares_basis(first: Adapter, second: Adapter, name: str) -> bool:
    """Whether two dR adapters have one basis in a layer that both have."""
    if first is second or (first.basis_fingerprint and first.basis_fingerprint == second.basis_fingerprint):
        return True
    return same_columns(own_layer(first, name).up, own_layer(second, name).up)


def same_columns(first: Tensor, second: Tensor) -> bool:
    """`same_basis` of two Q, (out, rank), compared once for a pair: turning alpha asks for the same again."""
    key = (id(first), id(second))
    same = _compared.get(key)
    if same is None:
        same = _compared[key] = same_basis(first, second)
        for tensor in (first, second):  # another tensor may get the number of one that is gone
            weakref.finalize(tensor, _compared.pop, key, None).atexit = False
    return same


def moved_update(adapter: Adapter, onto: Adapter, name: str) -> Tensor:
    """dR of a layer on the basis of another adapter."""

    def compute() -> Tensor:
        own = own_layer(adapter, name)
        return reexpress(own_layer(onto, name).up, own.up, own.down)[0]

    return _moved_updates.get((adapter, onto), name, compute)


def alignment(adapter: Adapter, onto: Adapter, name: str) -> tuple[float, float] | None:
    """Energy of a layer's update and the share that moving it loses; None where both have one basis."""
    if shares_basis(adapter, onto, name):
        return None

    def compute() -> tuple[float, float]:
        own = own_layer(adapter, name)
        return product_norm(own.up, own.down) ** 2, reexpress(own_layer(onto, name).up, own.up, own.down)[1]

    return _alignments.get((adapter, onto), name, compute)


def column_counts(owners: tuple[Adapter, ...], name: str) -> tuple[int, int, int]:
    """Of the bases of a layer of some adapters: how many differ, their columns, and the columns of the joint basis."""

    def compute() -> tuple[int, int, int]:
        ups: list[Tensor] = []
        for owner in owners:
            layer = owner.layer(name)
            own_ups = [own_layer(owner, name).up] if owner.method != "qr" else [layer.up]
            if owner.method == "qr" and layer.initial:  # Q'R' and QR: two products
                own_ups.insert(0, layer.initial.q)
            ups += [up for up in own_ups if not any(same_columns(earlier, up) for earlier in ups)]
        columns = sum(up.shape[1] for up in ups)
        return len(ups), columns, joint_basis(ups).q.shape[1] if len(ups) > 1 else columns

    if (
        all(owner.method != "qr" and shares_basis(owners[0], owner, name) for owner in owners[1:])
        and owners[0].method != "qr"
    ):
        owners = owners[:1]
    return _column_counts.get(owners, name, compute)
