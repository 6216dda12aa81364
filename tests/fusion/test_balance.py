"""The program that holds dR Balance against the study's reader."""

import pytest
import torch

from benchmarks.fusion import balance
from benchmarks.fusion.fusions import Stage
from benchmarks.fusion.protocol import CHECK
from benchmarks.fusion.store import Study
from qrlora_core import ACTS, cells


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_measures_what_the_node_measures(tmp_path):
    """Untrained adapters for a few steps: their own survival is 1, a setting is sampled as Merge would act."""
    study = Study(tmp_path, 6, adapter_steps=2)
    points = balance.measured(study, CHECK[0], 1)
    assert [round(point.level, 3) for point in points] == [1, 0.667, 0.333]
    (alone,) = cells(points, [1.0], [0.0], ["always, one pass each"])
    assert alone.style == pytest.approx(1) and alone.style_purity == pytest.approx(1)
    for cell in cells(points, [0.8], [1.2], ACTS):
        fusion = balance.fusion_of(cell)
        assert fusion.gate == ACTS[cell.act].by_prompt and fusion.separate == ACTS[cell.act].one_pass_each
    passes = balance.fusion_of(cells(points, [0.8], [1.2], ["by prompt, one pass each"])[0])
    assert passes.both == (Stage(0, 2.4, 0.8),) and passes.style == (Stage(0.75, 0, 0.4), Stage(0, 0, 0.8))
    first = balance.fusion_of(cells(points, [0.8], [1.2], ["by prompt, content first"])[0])
    assert first.both[0] == Stage(0.83, 1.2, 0) and first.both[-1] == Stage(0, 0, 0.8)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [([1, 2, 3], [10, 20, 40], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 2, 2], [5, 6, 7, 7], 0.9428)],
)
def test_ranks(one, other, wanted):
    assert balance.rank_correlation(one, other) == pytest.approx(wanted, abs=1e-3)
