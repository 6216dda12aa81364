"""The merge that is learnt: what it is taught, and that it comes nearer to it."""

import pytest
import torch

from benchmarks.fusion.learnt import TEACHER, _paths, _student, distil, prompts
from benchmarks.fusion.live import Live, Pair
from benchmarks.fusion.protocol import SAMPLER_STEPS, judged_prompts
from demo.model import load_toy
from demo.toy.features import words
from qrlora_core import decompose


@pytest.fixture
def live():
    torch.set_num_threads(1)
    return Live(load_toy(), ["transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.attn.to_v"])


def pair_on_one_basis(live, rank=4):
    generator = torch.Generator().manual_seed(3)
    bases = {name: decompose(layer.base.weight, rank) for name, layer in live.layers.items()}
    return [
        {name: Pair(basis.q, 0.3 * torch.randn(basis.r.shape, generator=generator)) for name, basis in bases.items()}
        for _ in range(2)
    ]


def test_a_student_comes_nearer_and_keeps_the_rank(live):
    content, style = pair_on_one_basis(live)
    before = {name: pair.up.clone() for name, pair in content.items()}
    made = distil(live, content, style, "style", 1, steps=12, each=1)
    summed = {name: Pair(pair.up, pair.down + style[name].down) for name, pair in content.items()}
    asked = prompts("style", torch.Generator().manual_seed(9), 90_000, 1)  # other words and noise
    distances = []
    for student in (summed, made):
        live.wear([content, style, student])
        tokens, sigma, features, pooled, taught = _paths(live, asked, of_student=False)
        with torch.no_grad():
            found = live.velocity(tokens, sigma, features, pooled, _student(len(tokens)))
        distances.append(float((found - taught).square().mean()))
    assert distances[1] < 0.9 * distances[0], distances
    assert all(pair.up.shape[1] == 4 and not pair.up.requires_grad for pair in made.values())
    assert all(torch.equal(pair.up, before[name]) for name, pair in content.items()), "the pair is only read"
    again = distil(live, content, style, "style", 1, steps=12, each=1)
    assert all(torch.equal(again[name].down, pair.down) for name, pair in made.items())
    other = {name: Pair(pair.up.flip(1), pair.down) for name, pair in style.items()}
    with pytest.raises(ValueError, match="two bases"):
        distil(live, content, other, "style", 1, steps=1, each=1)


def test_teachers_go_by_the_prompt():
    asked = prompts("style", torch.Generator().manual_seed(0), 0, 2)
    assert [one.kind for one in asked] == ["both"] * 2 + ["content"] * 2 + ["style"] * 2 + ["none"] * 2
    factors = TEACHER.factors(asked)
    assert factors(1.0)[::2].tolist() == [[2, 1], [1, 0], [0, 0.5], [0, 0]]
    assert factors(1 / SAMPLER_STEPS)[4].tolist() == [0, 1]
    judged = {word for one in judged_prompts() for word in words(one.text)} - {"<c>", "<s>"}
    for side in ("style", "texture"):
        taught = prompts(side, torch.Generator().manual_seed(0), 0, 18)
        assert not judged & {word for one in taught for word in words(one.text)}
        assert len({one.noise for one in taught}) == len(taught)
