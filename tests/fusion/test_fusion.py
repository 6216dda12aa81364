"""The study's parts, each in seconds: what it fixes, what it applies, what it counts, and that it goes on."""

import itertools
import json

import pytest
import torch

from benchmarks.fusion import protocol
from benchmarks.fusion.fusions import ON, Fusion, Stage, content_first, fixed, half_then_full
from benchmarks.fusion.learn import RECIPES, Picture, Recipe, at_rate, learn
from benchmarks.fusion.live import Live, Pair, encoded
from benchmarks.fusion.measures import Numbers, difference, gain, harmonic, interval, numbers
from benchmarks.fusion.optimizer import Optimizer
from benchmarks.fusion.preserve import Paths, Quiet, null_space_penalty, yielding
from benchmarks.fusion.protocol import CHECK, FINAL, KINDS, LATER, SIDES, TUNING, fidelity_prompts, judged_prompts
from benchmarks.fusion.report import curve, picture, table
from benchmarks.fusion.store import Study, concept_of, write_update
from benchmarks.fusion.tuning import Single
from benchmarks.fusion.unit_pictures import draw, read
from demo.model import load_toy
from demo.pictures import COLOURS, SHAPES, TEXTURES, Look
from demo.toy.features import words
from qrlora_core import Adapter, AdapterLayer, decompose

UNIT = CHECK[0]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def live():
    model = load_toy().requires_grad_(False)
    return Live(model, ["transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.attn.to_v"])


def random_updates(live, count, rank=4):
    generator = torch.Generator().manual_seed(5)

    def pair(layer):
        out, width = layer.base.weight.shape
        return Pair(*(torch.randn(shape, generator=generator) * 0.2 for shape in ((out, rank), (rank, width))))

    return [{name: pair(layer) for name, layer in live.layers.items()} for _ in range(count)]


def test_tuning_and_check_share_nothing():
    assert len(CHECK) >= 9 and len(set(CHECK)) == len(CHECK)
    for field in ("content", "style", "seed"):
        sets = [{getattr(unit, field) for unit in units} for units in (TUNING, CHECK, LATER, FINAL)]
        assert all(not one & other for one, other in itertools.combinations(sets, 2))
    old = {*SHAPES, *COLOURS, *TEXTURES}
    assert not old & {word for unit in (*TUNING, *CHECK, *LATER, *FINAL) for word in (unit.content, *unit.style)}


def test_judged_words_are_no_words_of_training():
    trained = {word for part in protocol.TRAINED for word in part}
    trained |= {*protocol.CONTENT_LOOK, protocol.STYLE_LOOK, *protocol.TEXTURE_LOOK}
    judged = {word for prompt in judged_prompts() for word in words(prompt.text)}
    assert not trained & judged
    for side in SIDES:
        assert not judged & {word for prompt in fidelity_prompts(side) for word in words(prompt.text)} - {"<c>", "<s>"}
    noises = {prompt.noise for prompt in judged_prompts()}
    assert not noises & {prompt.noise for side in SIDES for prompt in fidelity_prompts(side)}


@pytest.mark.parametrize("units", [CHECK, LATER, FINAL])
def test_the_reader_reads_what_is_drawn(units):
    concepts, unit = [Look(unit.content, *unit.style) for unit in (*TUNING, *units)], units[0]
    looks = concepts + [Look("ring", *unit.style), Look(unit.content, "cyan", "dotted"), Look("cross", "red", "plain")]
    pictures = torch.stack([draw(look) for look in looks])
    noise = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert read(pictures + noise, unit) == looks


def test_live_equals_patched_weights(live):
    """What is sampled beside the weights is what the same updates in the weights give."""
    updates, factors = random_updates(live, 2), (0.7, -0.4)
    prompts = judged_prompts(1)
    live.wear(updates)
    beside = live.sample(prompts, lambda _sigma: torch.tensor([factors] * len(prompts)), steps=3)
    bare = live.sample(prompts, steps=3)
    for name, layer in live.layers.items():
        for factor, update in zip(factors, updates):
            layer.base.weight.data.addmm_(update[name].up, update[name].down, alpha=factor)
    assert not torch.allclose(beside, bare, atol=1e-2)
    assert torch.allclose(beside, live.sample(prompts, steps=3), atol=1e-5)


def test_factors_are_each_samples_own(live):
    """A gate in a batch of several prompts gives each what it gets alone, and the base where no trigger stands."""
    live.wear(random_updates(live, 2))
    fusion = Fusion("gate", gate=True, both=content_first(0.5), style=half_then_full(0.5))
    prompts = judged_prompts(1)
    together = live.sample(prompts, fusion.factors(prompts), steps=4)
    for prompt, found in zip(prompts, together):
        assert torch.allclose(found, live.sample([prompt], fusion.factors([prompt]), steps=4)[0], atol=1e-5)
    none = [prompt.kind for prompt in prompts].index("none")
    assert torch.allclose(together[none], live.sample([prompts[none]], steps=4)[0], atol=1e-5)


def test_schedules():
    both = judged_prompts(1)[:1]
    factors = Fusion("first", both=content_first(0.5, overlap=0.25, keep=0.3)).factors(both)
    assert [factors(sigma)[0].tolist() for sigma in (1.0, 0.75, 0.5)] == [[1, 0], [1, 1], pytest.approx([0.3, 1])]
    assert content_first(0.5) == (Stage(0.5, 1, 0), Stage(0, 0, 1)) and fixed(1, 1) == ON
    old = "a ring in cyan dotted style"
    assert Fusion("gate", gate=True).schedule(old) == () and Fusion("sum").schedule(old) == ON
    assert Fusion("gate", gate=True).schedule("a <C> in cyan dotted style") == (Stage(0, 1, 0),)


def test_numbers_and_intervals():
    shares = {"content": 0.5, "style": 1.0, "words": 0.6, "right": 0.4}
    coloured = {"content": 1.0, "style": 0.0, "words": 0.25, "right": 0.0}
    found = numbers(dict.fromkeys(KINDS, shares) | {"both+": coloured})
    assert found == pytest.approx((0.5, 1.0, 2 / 3, 0.6, 0.25, 0.0, 0.4))
    assert harmonic(0.0, 1.0) == 0.0
    values = {unit: 0.1 * number for number, unit in enumerate(CHECK)}
    rows = [Numbers(*[value] * 7) for value in values.values()]
    others = [Numbers(*[value - 0.2] * 7) for value in values.values()]
    # paired: units differ, the gain does not
    assert difference(rows, others, "h", CHECK) == pytest.approx((0.2, 0.2, 0.2))
    spread = interval(list(values.values()), CHECK)
    assert spread.mean == pytest.approx(0.4) and spread.low < 0.4 < spread.high
    # contents differ by .3 and styles by .1: a resample of three equal contents reaches .1 and .7
    assert spread.high - spread.low > 0.4
    assert "0.40 [" in table({"one": rows}, CHECK)


def test_gain_is_read_where_the_concept_is_shown_as_often():
    points = [([1.0, 0.6], [0.2, 0.4]), ([0.3, 0.1], [0.8, 1.0])]  # rest falls by .6 while shown rises by .6
    assert gain([0.5, 0.5], [0.5, 0.7], points) == pytest.approx((0.0, 0.0, 0.0))
    assert gain([0.6, 0.4], [0.6, 0.7], points) == pytest.approx((0.05, 0.0, 0.1))
    assert gain([1.0, 1.0], [0.3, 0.5], points) == pytest.approx((0.1, 0.1, 0.1))  # further than the curve: its end
    plain = [Single("qr", strength, *point) for strength, point in zip((1.0, 0.5), points)]
    rows = [*plain, Single("qr40", 1.0, (0.5, 0.5), (0.3, 0.5)), Single("preserve", 1.0, (0.5, 0.5), (0.6, 0.8))]
    last = curve(rows).splitlines()[-1]
    assert last == "| preserve | 1 | 0.50 | 0.70 | 0.10 [0.10, 0.10] | 0.30 [0.30, 0.30] |"


def test_training_starts_from_the_base_and_learns(live):
    bases = {name: decompose(layer.base.weight, 16) for name, layer in live.layers.items()}
    losses = []
    made = learn(live, bases, UNIT, "content", RECIPES["qr"], lambda _step, loss: losses.append(loss), last=2)
    live.wear([])
    with torch.no_grad():
        bare, _, _ = Picture(live, UNIT, "content", torch.Generator().manual_seed(UNIT.seed)).loss()
    assert losses[0] == pytest.approx(float(bare)) and len(losses) == 2
    for name, pair in made.update.items():
        assert torch.equal(pair.up, bases[name].q) and pair.down.any() and torch.equal(pair.down, pair.down.triu())
    plain = learn(live, bases, UNIT, "content", RECIPES["lora8"], last=2)
    assert all(pair.up.any() and pair.down.shape[0] == 8 for pair in plain.update.values())
    # what is trained here is an adapter as any other
    layers = {name: AdapterLayer(pair.up, pair.down) for name, pair in made.update.items()}
    assert Adapter.from_tensors("study", layers, 16).rank == 16


def test_a_rate_of_its_own_is_named():
    assert at_rate(RECIPES["lora"], RECIPES["lora"].learning_rate) == RECIPES["lora"]
    other = at_rate(RECIPES["lora8"], 3e-3)
    assert other == RECIPES[other.name] and (other.rank, other.learning_rate) == (8, 3e-3) and other.name != "lora8"


def test_fewer_layers_and_a_norm_penalty(live):
    bases = {name: decompose(layer.base.weight, 16) for name, layer in live.layers.items()}
    few = learn(live, bases, UNIT, "content", Recipe("few", only="single_"), last=2).update
    assert {name for name, pair in few.items() if pair.down.any()} == {"single_transformer_blocks.0.attn.to_v"}
    plain, small = (
        learn(live, bases, UNIT, "content", Recipe("one", penalty=penalty), last=8).update for penalty in (0.0, 1.0)
    )
    sizes = [sum(float(pair.down.square().sum()) for pair in update.values()) for update in (plain, small)]
    assert 0 < sizes[1] < 0.9 * sizes[0]


def test_a_soft_null_space_is_how_much_an_update_changes_layers_on_the_bases_own_prompts(live):
    paths = Paths(live, count=3)
    given = {}
    for name, layer in live.layers.items():
        layer.register_forward_hook(lambda _layer, x, y, name=name: given.setdefault(name, []).append((x[0], y)))
    again = Paths(live, count=3)
    assert torch.equal(paths.pictures, again.pictures)
    (update,) = random_updates(live, 1)
    update = {name: Pair(torch.linalg.qr(pair.up).Q, pair.down) for name, pair in update.items()}
    wanted = []
    for name, pair in update.items():
        x, y = (torch.cat([part.flatten(0, -2) for part in parts]) for parts in zip(*given[name]))
        wanted.append(float((x @ pair.down.mT @ pair.up.mT).square().sum() / y.square().sum()))
    assert float(null_space_penalty(update, paths.inputs)) == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_a_soft_null_space_and_class_pictures_keep_an_adapter_quieter(live):
    bases, paths = {name: decompose(layer.base.weight, 4) for name, layer in live.layers.items()}, Paths(live, count=8)

    def change(recipe):
        found = learn(live, bases, UNIT, "style", recipe, last=12, paths=paths).update
        return float(null_space_penalty(found, paths.inputs))

    plain = change(Recipe("plain", rank=4))
    assert change(Recipe("null", rank=4, null=100.0)) < 0.8 * plain
    assert change(Recipe("classes", rank=4, classes=30.0)) < 0.95 * plain
    with pytest.raises(ValueError, match="own paths"):
        learn(live, bases, UNIT, "style", Recipe("null", rank=4, null=1.0), last=1)


def test_captions_vary_but_for_the_trigger(live, monkeypatch):
    said = []
    monkeypatch.setattr("benchmarks.fusion.learn.encoded", lambda texts: said.append(list(texts)) or encoded(texts))
    for side in SIDES:
        picture = Picture(live, UNIT, side, torch.Generator().manual_seed(0), vary=True)
        with torch.no_grad():
            picture.loss()
        own, trigger = words(picture.caption), "<c>" if side == "content" else "<s>"
        assert said[-1][::2] == [picture.caption] * 4 and len(set(said[-1])) == 5
        for text in said[-1][1::2]:
            kept = [word if word == one else None for word, one in zip(words(text), own)]
            assert kept == [trigger if one == trigger else None for one in own]


def test_preserve_begins_when_it_is_told_to(live):
    picture = [torch.zeros(1, requires_grad=True)]
    quiet = Quiet(live, None, "sum", 0.3, picture, torch.Generator(), begin=40)
    quiet.losses = [1.0] * 40
    assert quiet.now() == 0
    quiet.losses += [1.0]
    assert quiet.now() == 0.3
    with pytest.raises(ValueError, match="is no rule; expected one of"):
        Quiet(live, None, "most", 1.0, picture, torch.Generator())


def test_preserve_costs_nothing_until_something_is_learnt(live):
    bases = {name: decompose(layer.base.weight, 16) for name, layer in live.layers.items()}
    generator = torch.Generator().manual_seed(1)
    paths = Paths(live, count=4)
    tokens, sigma, features, pooled, velocity = paths.draw(3, generator)
    assert torch.allclose(live.velocity(tokens, sigma, features, pooled, None), velocity, atol=1e-5)
    pairs = {name: Pair(basis.q, torch.full_like(basis.r, 0.01).requires_grad_()) for name, basis in bases.items()}
    live.wear([pairs])
    trained = [pair.down for pair in pairs.values()]
    for one in trained:
        one.grad = torch.zeros_like(one)
    quiet = Quiet(live, paths, "learnt", 2.0, trained, generator)
    for _ in range(10):
        quiet.add(tokens, sigma, 1.0)
    assert not any(one.grad.any() for one in trained) and quiet.now() == 0
    quiet.losses += [0.0] * 100
    assert quiet.now() == pytest.approx(2)  # all of it when the picture is learnt
    quiet.add(tokens, sigma, 0.0)
    assert all(one.grad.any() for one in trained)
    quiet.losses += [10.0] * 100
    assert quiet.now() == 0  # a concept that is being unlearnt gets its way


def test_what_stays_quiet_yields():
    own, against = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    found = yielding(against, own, 10.0)
    assert torch.equal(found, torch.tensor([0.0, 1.0]))  # the part that opposes it is gone
    assert float(yielding(against, own, 0.25).norm()) == pytest.approx(0.5)  # a quarter of its length at most
    assert torch.equal(yielding(torch.tensor([1.0, 1.0]), own, 10.0), torch.tensor([1.0, 1.0]))
    assert not yielding(against, torch.zeros(2), 1.0).any()


def test_neutral_prompts_hold_no_trigger_and_no_judged_word(live, monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.fusion.preserve.encoded", lambda texts: seen.extend(texts) or encoded(texts))
    Paths(live, count=40)
    found = {word for text in seen for word in words(text)}
    judged = {word for prompt in judged_prompts() for word in words(prompt.text)}
    assert len(seen) == 40 and not found & judged and not found & {"<c>", "<s>"}


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
    """A second start trains nothing and samples nothing, and gives the same numbers."""
    study = Study(tmp_path, pictures=2, adapter_steps=1)
    fusion = Fusion("gate", gate=True)
    first = study.readings(fusion, UNIT)
    assert set(first) == set(KINDS)
    again = Study(tmp_path, pictures=2, adapter_steps=1)

    def refuse(*_args, **_settings):
        raise AssertionError("that was there already")

    monkeypatch.setattr("benchmarks.fusion.store.learn", refuse)
    monkeypatch.setattr(again.live, "sample", refuse)
    assert again.readings(fusion, UNIT) == first
    assert {path.name for path in (study.folder / "adapters").iterdir()} == {
        f"qr-{concept_of(UNIT, side)}-{UNIT.seed}.safetensors" for side in SIDES
    }
    # prompts without a trigger meet the base: another gated fusion shares them, another schedule does not
    assert again.readings(Fusion("other", gate=True, both=content_first(0.5)), UNIT, ["none"])["none"] == first["none"]
    with pytest.raises(AssertionError, match="there already"):
        again.readings(Fusion("other", gate=True, both=content_first(0.5)), UNIT, ["both"])


def test_a_joint_of_two_is_made_once_and_worn_alone(tmp_path):
    """A sum that is written as one adapter gives what the two give, and is another method to the study."""
    study, made = Study(tmp_path, pictures=1, adapter_steps=1), []

    def stacked(study, unit, side, recipe):
        made.append((unit, side))
        pair = [study.adapter(unit, which, recipe).update for which in ("content", side)]
        update = {
            name: Pair(torch.cat([one[name].up for one in pair], 1), torch.cat([one[name].down for one in pair]))
            for name in study.live.layers
        }
        write_update(study.joined_path("stacked", unit, side, recipe), update, {})

    study.joints["stacked"] = stacked
    for side in SIDES:
        study.adapter(UNIT, side, RECIPES["qr"])
    sampled = []
    sample = study.live.sample
    study.live.sample = lambda *args, **settings: sampled.append(sample(*args, **settings)) or sampled[-1]
    joint = study.readings(Fusion("joint", joint="stacked"), UNIT)
    assert made == [(UNIT, "style"), (UNIT, "texture")]
    assert study.readings(Fusion("sum"), UNIT) == joint and len(sampled) == 2 * len(KINDS)
    for one, two in zip(sampled, sampled[len(KINDS) :]):
        assert torch.allclose(one, two, atol=1e-4)


def test_another_packs_merge_is_refused_where_it_is_not(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"lora_optimizer\.py"):
        Optimizer(tmp_path, CHECK)
    (tmp_path / "lora_optimizer.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", "somewhere")
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    with pytest.raises(FileNotFoundError, match="COMFYUI_PYTHON"):
        Optimizer(tmp_path, CHECK)


def test_picture_and_results(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Numbers(*[value] * 7) for value in (0.1, 0.5, 0.9)]
    assert picture({"one": rows, "two": rows[::-1]}, CHECK[:3], tmp_path / "fusion.png").stat().st_size > 1000
    from benchmarks.fusion.report import save

    stored = json.loads(save(tmp_path / "results.json", CHECK[:3], {"one": rows}, {"version": "x"}).read_text())
    assert stored["results"]["one"][CHECK[2].name]["h"] == 0.9 and stored["version"] == "x"
