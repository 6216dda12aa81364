"""A merge in fewer columns: the best approximation of every layer's update, and what it loses."""

from typing import NamedTuple

import torch

from .adapter import Adapter, AdapterLayer, LayerInfo, Progress
from .basis import orthonormal
from .errors import SettingError
from .linalg import EXACTLY_ORTHONORMAL, orthonormality_error


class Truncated(NamedTuple):
    """`adapter`: of the wanted rank. `lost`: share of the energy of all updates together that it leaves out."""

    adapter: Adapter
    lost: float


def truncated(adapter: Adapter, rank: int, progress: Progress | None = None) -> Truncated:
    """The best adapter of at most `rank` columns in each layer (Eckart & Young 1936).

    With orthonormal Q the singular values of `Q dR` are those of the small dR: `dR = U S V^T`, `Q' = Q U_rank`,
    `dR' = S_rank V_rank^T`. The (out, in) update is never formed.

    Args:
        adapter: any adapter or merge that tells its whole change.
        rank: columns of the result, 1 or more; layers that have fewer keep theirs.
        progress: wraps the list of layer names that is gone through, as `tqdm` does.

    Raises:
        SettingError: rank is below 1.
        BasisMismatchError: a full-QR adapter without its initial Q and R.
        WeightError: a tensor holds NaN or Inf.
    """
    if rank < 1:
        raise SettingError(f"rank {rank} is below 1")
    layers: dict[str, AdapterLayer] = {}
    infos: dict[str, LayerInfo] = {}
    kept_energy = whole_energy = 0.0
    names = list(adapter.layers)
    for name in names if progress is None else progress(names):
        up, down, alpha = adapter.update(name)
        scaling = alpha / up.shape[1]
        q, delta_r = orthonormal(up, down)
        # stored in 16 bits: near enough for a basis, not for singular values
        if orthonormality_error(q) > EXACTLY_ORTHONORMAL:
            q, small = torch.linalg.qr(q.float())
            delta_r = small @ delta_r.float()
        left, values, right = torch.linalg.svd(delta_r.float(), full_matrices=False)
        count = min(rank, len(values))
        energies = (scaling * values.double()).square()
        whole_energy += float(energies.sum())
        kept_energy += float(energies[:count].sum())
        layers[name] = AdapterLayer(q.float() @ left[:, :count], values[:count, None] * right[:count])
        infos[name] = LayerInfo(adapter.layers[name].shape, count, scaling, torch.float32)
    smaller = Adapter(adapter.name, "delta_r", infos, layers.__getitem__, has_initial=False, metadata=adapter.metadata)
    return Truncated(smaller, 1.0 - kept_energy / whole_energy if whole_energy > 0 else 0.0)
