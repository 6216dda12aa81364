"""Properties of the decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qrlora_core as core
from qrlora_core.linalg import (
    KRYLOV_STEPS,
    OVERSAMPLE,
    orthonormality_error,
    positive_qr,
    product_norm,
    reexpress,
    trapezoid_error,
)


def random_weight(out, width, seed, dtype=torch.float32):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(shapes, st.data(), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_decomposition_of_any_shape(shape, data, seed, dtype):
    rank = data.draw(st.integers(1, min(shape)))
    weight = random_weight(*shape, seed, dtype)
    q, r = core.decompose(weight, rank)
    assert q.shape == (shape[0], rank) and r.shape == (rank, shape[1]) and q.dtype == r.dtype == torch.float32
    assert orthonormality_error(q) < 1e-5
    assert (r.diagonal() >= 0).all() and trapezoid_error(r) == 0
    residual = core.residual_weight(weight, core.Basis(q, r), 1.0)
    torch.testing.assert_close(core.restored_weight(residual, core.Basis(q, r), 1.0), weight.float())
    # the best rank-r part leaves exactly the tail of the spectrum
    tail = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    assert abs(residual.double().norm() - tail) <= 1e-4 * weight.double().norm()


@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
def test_exact_core_is_that_of_the_full_svd(shape):
    weight = random_weight(*shape, 3)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    best = u[:, :8] @ s[:8].diag() @ vh[:8]
    q, r = core.decompose(weight, 8)
    # float32 turns singular vectors by about eps * s[0] / gap, and processors differ in how they round
    bound = 1e-6 + 4 * torch.finfo(torch.float32).eps * s[0] / (s[7] - s[8])
    assert (q.double() @ r.double() - best).norm() <= bound * best.norm() < 1e-3 * best.norm()


@pytest.mark.parametrize("shape", [(400, 400), (1000, 400), (400, 1000)])
def test_fast_keeps_the_energy(shape):
    rank = 4
    assert min(shape) > KRYLOV_STEPS * (rank + OVERSAMPLE)  # or it would fall back to the exact way
    weight = random_weight(*shape, 5)  # a flat spectrum, the hardest case
    fast, exact = core.decompose(weight, rank, method="fast"), core.decompose(weight, rank)
    assert core.core_energy(weight, fast.q) >= 0.999 * core.core_energy(weight, exact.q)
    assert orthonormality_error(fast.q) < 1e-5 and (fast.r.diagonal() >= 0).all()
    torch.testing.assert_close(fast.r, core.base_r(weight, fast.q), atol=1e-4, rtol=1e-4)
    assert torch.equal(fast.q, core.decompose(weight, rank, method="fast").q)


@pytest.mark.parametrize("shape", [(1024, 1100), (1100, 1024)])
@pytest.mark.parametrize("spectrum", [torch.linspace(2, 1, 80), torch.exp(-torch.arange(400) / 8)])
def test_fast_keeps_the_energy_where_the_spectrum_ends_early(shape, spectrum):
    """A Krylov block is then made of rounding, which must not displace real directions."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator)).Q for size in shape)
    weight = (left * spectrum) @ right.mT
    best = float(spectrum[:64].double().square().sum() / spectrum.double().square().sum())
    assert core.core_energy(weight, core.decompose(weight, 64, method="fast").q) >= 0.999 * best


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_signs_do_not_depend_on_the_method_or_on_lapack(method):
    weight = random_weight(40, 6, 1) @ random_weight(6, 50, 2)
    q, r = core.decompose(weight, 6, method=method)
    flipped = core.decompose(weight.flip(0), 6, method=method)
    torch.testing.assert_close(flipped.q.flip(0), q, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(flipped.r, r, atol=1e-2, rtol=1e-3)


def test_fp8_weights_are_read():
    weight = random_weight(32, 16, 0).to(torch.float8_e4m3fn)
    torch.testing.assert_close(core.decompose(weight, 4).q, core.decompose(weight.float(), 4).q)


@pytest.mark.parametrize(
    "weight,rank,words",
    [
        (torch.full((4, 5), float("nan")), 2, "20 values"),
        (torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), 1, "1 values"),
        (torch.ones(4, 5), 5, r"rank 5 .*\(4, 5\).* 1 to 4"),
        (torch.ones(4, 5), 0, "rank 0"),
        (torch.ones(4), 1, r"2-D.*\(4,\)"),
        (torch.ones(2, 3, 4), 1, r"\(2, 3, 4\)"),
        (torch.ones(4, 4, dtype=torch.int32), 1, "int32"),
    ],
)
def test_bad_weights_are_refused(weight, rank, words):
    with pytest.raises(core.WeightError, match=words):
        core.decompose(weight, rank)


def test_unknown_method_is_refused():
    with pytest.raises(core.WeightError, match="'quick'"):
        core.decompose(torch.ones(4, 4), 1, method="quick")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6))
def test_reexpression(seed, rank):
    q = core.decompose(random_weight(30, 20, seed), rank).q
    turn = torch.linalg.qr(random_weight(rank, rank, seed + 1)).Q
    down = random_weight(rank, 20, seed + 2)
    moved, lost = reexpress(q, q @ turn, down)  # another basis of the same space
    torch.testing.assert_close(q @ moved, q @ turn @ down, atol=1e-4, rtol=1e-4)
    assert lost < 1e-5
    outside = torch.linalg.qr(torch.cat([q, random_weight(30, rank, seed + 3)], dim=1)).Q[:, rank:]
    _, lost = reexpress(q, outside, down)
    assert lost > 1 - 1e-5
    assert product_norm(q, down) == pytest.approx(float(down.double().norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(400, 400), (500, 400), (400, 500)])
@pytest.mark.parametrize("true_rank", [0, 5, 45])
def test_fast_on_weights_of_low_rank(shape, true_rank):
    """The Krylov blocks run out of directions; what fills them must not be counted twice."""
    rank = 4
    assert min(shape) > KRYLOV_STEPS * (rank + OVERSAMPLE)
    left, right = (torch.linalg.qr(random_weight(side, 50, side)).Q[:, :true_rank] for side in shape)
    spectrum = torch.linspace(2, 1, true_rank)
    weight = left * spectrum @ right.T
    fast = core.decompose(weight, rank, method="fast")
    assert orthonormality_error(fast.q) < 1e-5 and not fast.r.tril(-1).any()
    if true_rank:
        energy = spectrum.square()
        assert core.core_energy(weight, fast.q) >= 0.999 * float(energy[:rank].sum() / energy.sum())
    restored = core.restored_weight(core.residual_weight(weight, fast, 1.0), fast, 1.0)
    torch.testing.assert_close(restored, weight, atol=1e-5, rtol=1e-5)


def test_fast_on_a_spectrum_like_that_of_flux():
    weight = random_weight(400, 400, 8) / 20 + random_weight(400, 30, 9) @ random_weight(30, 400, 10) / 300
    fast, exact = (core.decompose(weight.bfloat16(), 4, method=method) for method in ("fast", "exact"))
    assert core.core_energy(weight, fast.q) >= 0.999 * core.core_energy(weight, exact.q)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.randn(300, 16, generator=torch.Generator().manual_seed(1)),
        torch.randn(300, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-5, 3, 16),
        torch.randn(300, 1, generator=torch.Generator().manual_seed(3)) + 1e-4 * torch.eye(300, 16),
        torch.randn(300, 4, generator=torch.Generator().manual_seed(4)).repeat(1, 4),
        torch.zeros(300, 3),
        torch.randn(5, 16, generator=torch.Generator().manual_seed(5)),
        torch.randn(300, 16, generator=torch.Generator().manual_seed(6)) * 1e-20,
        torch.randn(300, 16, generator=torch.Generator().manual_seed(7)) * 1e18,
    ],
    ids=["plain", "scales", "nearly dependent", "dependent", "zero", "wide", "tiny", "huge"],
)
def test_positive_qr(matrix):
    """As good as a Householder QR, whatever the columns are; the signs are canonical."""
    q, small = positive_qr(matrix)
    assert q.dtype == small.dtype == torch.float32 and q.shape == (300 if matrix.shape[0] == 300 else 5, small.shape[0])
    assert orthonormality_error(q) < 1e-5
    assert bool((small.diagonal() >= 0).all()) and bool((small.tril(-1) == 0).all())
    scale = float(matrix.double().norm()) or 1.0
    assert float((q.double() @ small.double() - matrix.double()).norm()) / scale < 1e-6
