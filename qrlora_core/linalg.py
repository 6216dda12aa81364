"""The mathematics of QR-LoRA on plain tensors (Yang et al., arXiv 2507.04599, section 3).

U, S, V^T = svd(W)                       core = U_r S_r V_r^T, the best rank-r part
Q, R      = qr(core)[:, :r], [:r, :]     Q^T Q = I, R upper trapezoidal, here with diag(R) >= 0
W_res     = W - scaling * Q R            scaling = alpha / rank
W'        = W_res + scaling * Q (R + dR) = W + scaling * Q dR
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .errors import WeightError

Method = Literal["exact", "fast"]

# Block Krylov: each step adds rank + OVERSAMPLE columns. FLUX spectra are nearly flat at rank 64, so what
# decides the captured energy is the size of the whole Krylov space, not the width of one block.
KRYLOV_STEPS = 10
OVERSAMPLE = 32
# A Krylov space of full-rank weights is orthonormal to about 1e-6 in float32
_SPACE_ERROR = 1e-4


# What a Householder QR in float32 leaves, about
_QR_ERROR = 1e-6
# Above this a Q is not the basis of a decomposition; Q stored in bfloat16 is orthonormal to about 2e-3
ORTHONORMAL = 1e-2
# Up to this columns are orthonormal but for the rounding of float32
EXACTLY_ORTHONORMAL = 1e-5


class Basis(NamedTuple):
    """The frozen factors of one layer.

    Attributes:
        q: orthonormal columns, shape (out, rank).
        r: upper trapezoidal `Q^T W`, shape (rank, in).
    """

    q: Tensor
    r: Tensor


def decompose(weight: Tensor, rank: int, *, method: Method = "exact", seed: int = 0) -> Basis:
    """Split off the best rank-`rank` part of a weight and write it as Q R.

    Computes `U_r` and then `Q_2 R = qr(U_r^T W)`, `Q = U_r Q_2`: the same R as a QR of the whole core, without
    ever forming the core. Signs are canonical (`diag(R) >= 0`), so two machines agree where LAPACK builds do not.

    Args:
        weight: shape (out, in), any floating dtype, on any device; the work is done in float32 there.
        rank: number of columns of Q, 1 to min(out, in).
        method: "exact" takes a full SVD; "fast" a block Krylov iteration that keeps at least 0.999 of the energy
            that the best core has on FLUX-like spectra (Musco & Musco, arXiv 1504.05477, algorithm 2).
        seed: start block of "fast"; equal seeds give equal results on one machine.

    Returns:
        Basis of float32 tensors on the weight's device, owning their memory.

    Raises:
        WeightError: the weight is not 2-D, holds NaN or Inf, the rank does not fit, or the SVD does not converge.
    """
    if method not in ("exact", "fast"):
        raise WeightError(f"decomposition method is {method!r}, expected 'exact' or 'fast'")
    weight = _checked(weight, rank)
    narrow = min(weight.shape) <= KRYLOV_STEPS * (rank + OVERSAMPLE)
    try:
        if method == "exact" or narrow:  # a Krylov space as wide as the weight would cost more than the SVD
            left_vectors = torch.linalg.svd(weight, full_matrices=False).U[:, :rank]
        else:
            left_vectors = _krylov_left(weight, rank, seed)
        small_q, r = torch.linalg.qr(left_vectors.mT @ weight)
    except RuntimeError as error:
        if "out of memory" in str(error).lower():
            raise
        raise WeightError(f"the decomposition of a {tuple(weight.shape)} weight failed: {error}") from error
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return Basis(q=(left_vectors @ small_q) * signs, r=torch.triu(r * signs[:, None]))


def base_r(weight: Tensor, q: Tensor) -> Tensor:
    """`R = Q^T W` for a given orthonormal Q: (rank, in), float32. Exact for any Q, whatever W was made of."""
    return q.float().mT @ weight.float()


def residual_weight(weight: Tensor, basis: Basis, scaling: float) -> Tensor:
    """`W_res = W - scaling * Q R`, shape (out, in), float32."""
    return torch.addmm(weight.float(), basis.q.float(), basis.r.float(), alpha=-scaling)


def restored_weight(residual: Tensor, basis: Basis, scaling: float) -> Tensor:
    """`W = W_res + scaling * Q R`, shape (out, in), float32."""
    return torch.addmm(residual.float(), basis.q.float(), basis.r.float(), alpha=scaling)


def core_energy(weight: Tensor, q: Tensor) -> float:
    """Share of the squared Frobenius norm of W that lies in the span of Q, 0 to 1."""
    return float(base_r(weight, q).double().square().sum() / weight.double().square().sum())


def product_norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of `up @ down`, from the two Gram matrices: the (out, in) product is never formed."""
    up, down = up.double(), down.double()
    # the trace can come out as -1e-20 where the product is zero
    return float(((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt())


def reexpress(q: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, float]:
    """Write `up @ down` on another basis as well as that can be done: `dR' = Q^T up dR`.

    Args:
        q: orthonormal target basis, shape (out, r1).
        up, down: the update, shapes (out, r2) and (r2, in).

    Returns:
        `dR'` of shape (r1, in), float32, and the share of the update's energy that is lost, `||Q dR' - up dR||^2 /
        ||up dR||^2`: 0 when both span the same space, 1 when the spans are orthogonal. It is measured, not derived
        from the kept energy, so a target that is not orthonormal shows as a large loss.
    """
    moved = (q.float().mT @ up.float()) @ down.float()
    whole = product_norm(up, down) ** 2
    lost = product_norm(torch.cat([q.double(), up.double()], 1), torch.cat([moved.double(), -down.double()])) ** 2
    return moved, (lost / whole if whole > 0 else 0.0)


def orthonormality_error(q: Tensor) -> float:
    """`||Q^T Q - I||_F / sqrt(rank)`: 0 for orthonormal columns, 1 for a zero matrix."""
    q = q if q.dtype == torch.float64 else q.float()
    gram = q.mT @ q
    rank = gram.shape[0]
    return float((gram - torch.eye(rank, dtype=gram.dtype, device=gram.device)).norm() / rank**0.5)


def trapezoid_error(r: Tensor) -> float:
    """Root mean square below the diagonal over that of the rest: 0 for a trapezoidal R, about 1 for other matrices."""
    below = torch.ones_like(r, dtype=torch.bool).tril(-1)
    if not below.any():
        return 0.0
    values = r.double()
    above = values[~below].square().mean().sqrt()
    return float(values[below].square().mean().sqrt() / above) if above > 0 else 1.0


def positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`Q, T = qr(matrix)` with `diag(T) >= 0`, reduced; float32.

    By a Cholesky factor of the Gram matrix, T^T T = B^T B and Q = B T^-1, which is several times faster for the tall
    matrices of LoRAs; where that leaves Q less orthonormal than a Householder QR would (columns that nearly depend on
    each other), by the latter.

    Args:
        matrix: (out, rank), on any device.
    """
    wide = matrix if matrix.device.type == "mps" else matrix.double()  # which has no float64
    small, info = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
    if not int(info):
        q = torch.linalg.solve_triangular(small.float(), matrix, upper=True, left=False)
        if orthonormality_error(q) <= _QR_ERROR:
            return q, small.float()
    q, small = torch.linalg.qr(matrix)
    signs = torch.where(small.diagonal() < 0, -1.0, 1.0)
    return q * signs, small * signs[:, None]


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise WeightError when `tensor` holds NaN or Inf, saying how many."""
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # float8 has no arithmetic
    if not values.numel():
        return
    if not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values)):  # one pass; NaN and Inf survive it
        bad = int((~torch.isfinite(values)).sum())
        raise WeightError(f"{what} holds {bad} values that are NaN or Inf; the file or model is damaged")


def _checked(weight: Tensor, rank: int) -> Tensor:
    if weight.ndim != 2:
        raise WeightError(f"only 2-D weights can be decomposed, this one has shape {tuple(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise WeightError(f"only floating point weights can be decomposed, this one is {weight.dtype}")
    if not 1 <= rank <= min(weight.shape):
        raise WeightError(f"rank {rank} does not fit a {tuple(weight.shape)} weight: use 1 to {min(weight.shape)}")
    weight = weight.detach().float()
    require_finite(weight, f"the {tuple(weight.shape)} weight")
    return weight


def _krylov_left(weight: Tensor, rank: int, seed: int) -> Tensor:
    """Top left singular vectors, (out, rank), from a block Krylov space built on the shorter side.

    Each block is made orthogonal to all before it (block Lanczos), so the images `A x` of the blocks that drive the
    iteration are at the same time the projection of A: no further product with A is needed.
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.mT
    start = torch.randn(tall.shape[1], rank + OVERSAMPLE, generator=torch.Generator().manual_seed(seed))
    blocks = [torch.linalg.qr(start.to(tall.device)).Q]
    images = [tall @ blocks[0]]
    for _ in range(KRYLOV_STEPS - 1):
        block, space = tall.mT @ images[-1], torch.cat(blocks, dim=1)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            block = block - space @ (space.mT @ block)
        block = torch.linalg.qr(block).Q
        blocks.append(block)
        images.append(tall @ block)
    space, image = torch.cat(blocks, dim=1), torch.cat(images, dim=1)
    # Where the spectrum ends early, a block is nothing but rounding and its QR points back into the space before it;
    # a direction counted twice would push a real one out.
    gram = space.mT @ space
    if float((gram - torch.eye(len(gram), device=gram.device)).abs().max()) > _SPACE_ERROR:
        space = torch.linalg.qr(space).Q
        image = tall @ space
    vectors = torch.linalg.eigh((image.mT @ image).double()).eigenvectors
    top = vectors[:, -rank:].flip(1).float()
    # For a wide weight the iteration ran on W^T: its right vectors are the left ones of W.
    left_vectors: Tensor = torch.linalg.qr(image @ top if tall is weight else space @ top).Q
    return left_vectors
