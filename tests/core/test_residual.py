"""Residuals: they restore the weight they were made from, and nothing else."""

import json
import os
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qrlora_core as core
from tests.core.test_merge import NAMES, make

SCALING = 2.0


def parts(seed, dtype=torch.float32, shape=(24, 18), rank=4):
    """A weight, its basis for SCALING, and its residual as a file of that dtype holds it."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    q, r = core.decompose(weight, rank)
    basis = core.Basis(q, r / SCALING)
    return weight, basis, core.residual_weight(weight, basis, SCALING).to(dtype)


@settings(max_examples=40)
@given(st.integers(0, 99), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_residual_finds_its_basis(seed, dtype):
    weight, basis, residual = parts(seed, dtype)
    _, foreign, _ = parts(seed + 1000)
    tolerance = core.storage_tolerance(torch.float32, dtype)
    found = core.match_residual(weight, residual, [(foreign, 1.0), (basis, SCALING)], tolerance, NAMES[0])
    assert found.basis is basis and found.scaling == SCALING and found.error <= tolerance
    flipped = core.Basis(-basis.q, basis.r)
    for candidates in ([(foreign, 1.0)], [(basis, 1.0)], [(flipped, SCALING)], []):
        with pytest.raises(core.BasisMismatchError, match=f"does not belong.*{NAMES[0]}"):
            core.match_residual(weight, residual, candidates, tolerance, NAMES[0])


def test_shapes_and_values_are_checked():
    weight, basis, residual = parts(1)
    with pytest.raises(core.BasisMismatchError, match=r"\(18, 24\), the weight \(24, 18\)"):
        core.match_residual(weight, residual.mT, [(basis, SCALING)], 1.0, NAMES[0])
    residual[3, 4] = float("inf")
    with pytest.raises(core.WeightError, match=f"{NAMES[0]} holds 1 "):
        core.match_residual(weight, residual, [(basis, SCALING)], 1.0, NAMES[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_precision_is_that_of_the_values(dtype):
    weight = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    rounded = weight.to(dtype).float()
    assert core.value_dtype(weight) == torch.float32 and core.value_dtype(rounded) == dtype
    assert (rounded - weight).norm() / weight.norm() <= core.storage_tolerance(torch.float32, dtype)


def test_what_float16_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(core.WeightError, match=r"to_q as torch.float16 holds 120 "):
        core.write_residual(
            tmp_path / "r.safetensors", make(1).targets, lambda _: torch.full((12, 10), 1e6), dtype=torch.float16
        )
    with pytest.raises(core.TargetError, match="distinct"):
        core.write_residual(tmp_path / "r.safetensors", make(1).targets * 2, lambda _: torch.ones(12, 10))
    with pytest.raises(core.TargetError, match="got none"):
        core.write_residual(tmp_path / "r.safetensors", [], lambda _: torch.ones(12, 10))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_cancelling_at_any_layer_leaves_nothing(tmp_path, error):
    targets = core.flux_targets(1, 1, 16)
    for stop in (0, 7, len(targets) - 1):

        def residual_of(name, stop=stop):
            if name == targets[stop].name:
                raise error
            return torch.ones(next(target.shape for target in targets if target.name == name))

        with pytest.raises(error):
            core.write_residual(tmp_path / "r.safetensors", targets, residual_of)
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="asks for a sparse file")
def test_opening_a_large_file_reads_its_header_only(tmp_path):
    import resource  # Windows has none

    specs, offset = {}, 0
    for block in range(14):
        size = 12288 * 12288 * 4
        entry = {"dtype": "F32", "shape": [12288, 12288], "data_offsets": [offset, offset + size]}
        specs[f"transformer_blocks.{block}.ff.net.2.residual.weight"] = entry
        offset += size
    header = json.dumps(specs).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    residual = core.Residual(path)
    assert time.perf_counter() - start < 1 and len(residual.layers) == 14
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert residual.weight("transformer_blocks.13.ff.net.2")[-1, -1] == 0
    with pytest.raises(core.TargetError, match="did you mean 'transformer_blocks."):
        residual.weight("transformer_blocks.14.ff.net.2")
