"""Settings: from files and flags, checked before anything is loaded."""

import json
import math
from dataclasses import MISSING, fields

import pytest

from train.config import EncodeConfig, FitConfig, as_table
from train.settings import ConfigError, choices, load_settings, make_config, plain_type

FIT = {"model": "m", "data": "d", "run_dir": "r"}
ENCODE = {"pipeline": "p", "pictures": ["a"], "output": "o", "instance_prompt": "x"}


@pytest.mark.parametrize("kind, base", [(FitConfig, FIT), (EncodeConfig, ENCODE)])
def test_there_and_back_through_json(kind, base):
    config = make_config(kind, base)
    assert make_config(kind, json.loads(json.dumps(as_table(config)))) == config
    assert as_table(config).keys() == {one.name for one in fields(kind)}


def test_published_defaults():
    config = make_config(FitConfig, FIT)
    assert (config.rank, config.adapter_alpha, config.learning_rate, config.steps) == (64, 64.0, 1e-4, 1000)
    assert (config.batch_size, config.gradient_accumulation, config.guidance) == (1, 4, 1.0)
    assert (config.method, config.init, config.precision, config.scaling) == ("delta_r_triangular", "zero", "bf16", 1.0)
    assert config.targets == () and config.scheduler == "constant" and config.timestep_sampling == "uniform"


def test_alpha_follows_the_rank_until_it_is_stated():
    """Lowering the rank alone used to multiply the update; settings files of before say 64 and keep their meaning."""
    low = make_config(FitConfig, FIT, {"rank": 16})
    assert low.scaling == 1.0 and low.adapter_alpha == 16.0
    stated = make_config(FitConfig, FIT, {"rank": 16, "alpha": 64})
    assert stated.scaling == 4.0
    same = make_config(FitConfig, FIT, {"rank": 16, "alpha": 16})
    assert same.trajectory() == low.trajectory() and same.key_fields() == low.key_fields()


def test_later_sources_win():
    assert make_config(FitConfig, FIT, {"rank": 8, "steps": 5}, {"rank": 16}).rank == 16


@pytest.mark.parametrize("kind", [FitConfig, EncodeConfig])
def test_every_setting_has_a_help_text_and_every_number_a_range(kind):
    for one in fields(kind):
        assert len(one.metadata["help"]) >= 8, one.name
        if plain_type(one) in (int, float):
            low, high = one.metadata["low"], one.metadata["high"]
            assert low is not None and high is not None and low < high, one.name
            assert one.default == "auto" or low <= one.default <= high


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rnak": 3}, "unknown setting 'rnak'; did you mean 'rank'"),
        ({"zzzzzz": 3}, "unknown setting 'zzzzzz'"),
        ({"rank": 0}, "rank is 0, expected 1 to 3072"),
        ({"rank": 4.0}, r"rank is 4\.0, expected int"),
        ({"rank": "4"}, "rank is '4', expected int"),
        ({"rank": True}, "rank is True, expected int"),
        ({"rank": None}, "rank is None"),
        ({"rank": 10**400}, "rank is"),
        ({"alpha": 10**400}, "alpha is inf"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": False}, "alpha is False"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1, expected bool or auto"),
        ({"gradient_checkpointing": "on"}, "gradient_checkpointing is 'on', expected bool or auto"),
        ({"offload": "half"}, "offload is 'half', expected float or auto"),
        ({"offload": 1.5}, "offload is 1.5, expected 0 to 1"),
        ({"base_storage": "fp4"}, "base_storage is 'fp4', expected one of auto, bf16"),
        ({"alpha": "auto"}, "alpha is 'auto', expected float"),
        ({"trigger": "\ud800"}, "trigger is '.ud800', which is not valid Unicode"),
        ({"method": "lora"}, "expected one of delta_r, delta_r_triangular, qr"),
        ({"method": ["qr"]}, "expected one of"),
        ({"precision": "BF16"}, "precision is 'BF16'"),
        ({"targets": "attn.to_q"}, "targets is 'attn.to_q', expected tuple"),
        ({"targets": [1]}, "expected a list of names"),
        ({"targets": [""]}, "expected a list of names"),
        ({"model": ""}, "model is '', expected a path"),
        ({"data": "a\0b"}, "data is"),
        ({"model": 7}, "model is 7, expected str"),
        ({"optimizer": "prodigy"}, "learning_rate is a factor near 1"),
        ({"scheduler": "piecewise_constant"}, "scheduler_rules is ''"),
        ({"scheduler": "piecewise_constant", "scheduler_rules": "1:a,2"}, "such as"),
        ({"offload": 0.5, "base_storage": "nf4"}, "offload works with"),
        ({"method": "qr", "init": "random"}, "init random"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        make_config(FitConfig, FIT, change)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 8},
        {"alpha": 0},
        {"seed": 2**63 - 1},
        {"offload": 1},
        {"offload": "auto", "base_storage": "nf4"},
        {"gradient_checkpointing": False},
        {"base_storage": "auto"},
        {"model": "/x/\ud800"},
        {"optimizer": "prodigy", "learning_rate": 1},
        {"scheduler": "piecewise_constant", "scheduler_rules": "1:100,0.1:500,0.01"},
    ],
)
def test_accepted(change):
    config = make_config(FitConfig, FIT, change)
    assert all(getattr(config, key) == value for key, value in change.items())


def test_rules_that_are_accepted_are_those_that_diffusers_reads():
    import torch

    from train.run.optim import make_scheduler

    config = make_config(FitConfig, FIT, {"scheduler": "piecewise_constant", "scheduler_rules": "1:2,0.5:4,0.25"})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, config)
    rates = []
    for _ in range(6):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_missing_settings_are_all_named():
    with pytest.raises(ConfigError, match="missing settings: data, run_dir"):
        make_config(FitConfig, {"model": "m"})


def test_toml_and_json_files(tmp_path):
    toml, js = tmp_path / "a.toml", tmp_path / "b.JSON"
    toml.write_bytes(b'\xef\xbb\xbfmodel = "m\\\\x"\nalpha = 8\ntargets = ["attn.to_q"]\nsteps = 1_000\n')
    js.write_text(json.dumps({"model": "m\\x", "alpha": 8, "targets": ["attn.to_q"], "steps": 1000}))
    for path in (toml, js):
        config = make_config(FitConfig, load_settings(path), {"data": "d", "run_dir": "r"})
        assert (config.model, config.alpha, config.targets, config.steps) == ("m\\x", 8.0, ("attn.to_q",), 1000)
        assert isinstance(config.alpha, float)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.toml", b"rank = ", "a.toml is not valid"),
        ("a.json", b"{", "a.json is not valid"),
        ("a.json", b"[" * 100_000, "a.json is not valid"),
        ("a.json", b"[1]", "holds list, expected a table"),
        ("a.json", "{}".encode("utf-16"), "a.json is not valid"),
        ("a.yaml", b"rank: 3", "read from .toml or .json"),
        ("a.toml", None, "a.toml cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path / name)


def test_a_windows_path_with_single_backslashes_is_explained(tmp_path):
    """The commonest mistake in a TOML file on Windows."""
    path = tmp_path / "a.toml"
    path.write_text('model = "C:\\models\\flux.safetensors"\n')
    with pytest.raises(ConfigError, match="single quotes"):
        load_settings(path)


def test_what_a_resumed_run_must_share_and_what_names_a_result():
    config = make_config(FitConfig, FIT)
    trajectory, key = config.trajectory(), config.key_fields()
    assert {"rank", "learning_rate", "seed", "method", "base_storage", "precision"} <= trajectory.keys()
    assert not {"steps", "model", "run_dir", "checkpoint_every", "device", "offload"} & trajectory.keys()
    assert {"steps", "trigger", "rank", "output_format", "save_dtype"} <= key.keys()
    assert not {"model", "data", "run_dir", "device", "basis_cache", "resume"} & key.keys()
    json.dumps([trajectory, key])


def test_choices_are_those_of_the_types():
    found = {one.name: choices(one) for one in fields(FitConfig)}
    assert found["method"] == ("delta_r", "delta_r_triangular", "qr") and found["rank"] is None
    assert found["base_storage"] == ("auto", "bf16", "fp16", "fp32", "fp8", "int8", "nf4") and found["offload"] is None
    required = [one.name for one in fields(FitConfig) if one.default is MISSING]
    assert required == ["model", "data", "run_dir"]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 16**6000},
        {"steps": [[1] * 100] * 1000},
        {"rank": "9" * 10_000},
        {"scheduler": "piecewise_constant", "scheduler_rules": "1:" + "9" * 5000 + ",1"},
        {"x" * 100_000: 1},
        {"targets": ["a", 16**6000]},
    ],
    ids=lambda settings: next(iter(settings))[:20],
)
def test_numbers_and_texts_of_any_length_are_refused_in_few_words(settings):
    with pytest.raises(ConfigError) as caught:
        make_config(FitConfig, {"model": "m", "data": "d", "run_dir": "r"}, settings)
    assert len(str(caught.value)) < 1000
