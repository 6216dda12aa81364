"""The command line as a newcomer meets it: help, mistakes, exit codes, events, a dry run."""

import argparse
import json
import logging
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from demo.small_flux import GOLDEN
from qrlora_core import open_adapter
from tests.train.conftest import small_cache
from train import cli
from train.arguments import make_parser
from train.cli import DONE, FAILED, STOPPED, USAGE, main
from train.config import EncodeConfig, FitConfig, as_table
from train.events import read_events
from train.imports import quiet_imports

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("encode", "fit", "check", "basis", "residual", "merge", "export", "similarity", "sample")


@pytest.fixture
def run(settings, tmp_path):
    """Call a subcommand with a settings file of the small run, and more flags."""

    def run(command, *flags, **changes):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(as_table(settings(**changes))))
        return main([command, "--settings", str(path), *map(str, flags)])

    return run


def subparsers():
    (action,) = [one for one in make_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return action.choices


def test_every_command_is_there():
    assert tuple(subparsers()) == COMMANDS == tuple(cli.RUN)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "%" not in text.replace("100 %", "") and "None" not in text and "==SUPPRESS==" not in text
    if not command:
        assert all(name in text for name in COMMANDS)
        assert "Exit codes: 0 done, 1 failed" in text and "python -m train encode" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command):
    for action in subparsers()[command]._actions:
        assert action.help and len(action.help) >= 8, f"{command} {action.option_strings}"


@pytest.mark.parametrize("command, kind", [("fit", FitConfig), ("encode", EncodeConfig), ("check", FitConfig)])
def test_every_setting_has_a_flag(command, kind):
    flags = {flag for action in subparsers()[command]._actions for flag in action.option_strings}
    assert {f"--{one.name.replace('_', '-')}" for one in fields(kind)} <= flags


@pytest.mark.process
def test_help_on_a_terminal_that_knows_few_letters():
    """Windows pipes take the letters of one code page; the help text has a Greek one."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "train", "fit", "--help"], cwd=ROOT, env=environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0 and b"what ?R starts as" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "command,usage",
    [
        ("fit", "fit --model ... --data ... --run-dir ... [settings, see --help]"),
        ("encode", "encode --pipeline ... --pictures ... --output ... [settings, see --help]"),
        ("check", "check [settings, see --help]"),
    ],
)
def test_usage_is_one_line_that_names_what_is_needed(command, usage, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.splitlines()[:2] == [f"usage: python -m train {usage}", ""]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fitt"],
        ["fit", "--rnak", "3"],
        ["fit", "--ran", "3"],
        ["fit", "--rank", "many"],
        ["fit", "--method", "lora"],
        ["residual", "--model", "m"],
        ["residual", "--model", "m", "--output", "o", "--rank", "0"],
        ["merge", "--style", "a", "--content", "b", "--output", "o", "--alpha", "inf"],
        ["sample", "--pipeline", "p", "--output", "o"],
    ],
    ids=" ".join,
)
def test_wrong_flags(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE and "usage: python -m train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fit"], "missing settings: model, data, run_dir"),
        (["fit", "--model", "m", "--data", "d", "--run-dir", "r", "--rank", "0"], "rank is 0, expected 1 to 3072"),
        (["fit", "--settings", "missing.toml"], "missing.toml cannot be read"),
        (["encode"], "missing settings: pipeline, pictures, output"),
    ],
)
def test_wrong_settings(arguments, message, caplog):
    assert main(arguments) == USAGE
    assert message in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "flags, value",
    [
        ([], "auto"),
        (["--gradient-checkpointing"], True),
        (["--gradient-checkpointing", "on"], True),
        (["--gradient-checkpointing", "off"], False),
        (["--no-gradient-checkpointing"], False),
        (["--gradient-checkpointing", "auto"], "auto"),
    ],
)
def test_a_switch_that_may_be_auto(flags, value):
    args = make_parser().parse_args(["fit", *flags, "--offload", "auto"])
    config = cli._config(args, FitConfig, {"model": "m", "data": "d", "run_dir": "r"})
    assert config.gradient_checkpointing == value and config.offload == "auto"


def test_flags_win_over_the_file(run, capsys):
    assert run("fit", "--dry-run", "--rank", 4, "--targets", "attn.to_q", "attn.to_k", "--no-use-mask") == DONE
    lines = capsys.readouterr().out.splitlines()
    assert "rank = 4" in lines and 'targets = ["attn.to_q", "attn.to_k"]' in lines and "use_mask = false" in lines
    assert "alpha = 8.0" in lines, "what no flag says stays as the file has it"
    assert any("4 layers" in line for line in lines)
    assert any(line.startswith("memory     base_storage fp32") for line in lines)


def test_dry_run_writes_nothing(run, tmp_path):
    assert run("fit", "--dry-run") == DONE
    assert not (tmp_path / "run").exists()


def test_dry_run_with_a_mistake(run, caplog):
    assert run("fit", "--dry-run", "--targets", "attn.to_w") == FAILED
    assert "did you mean" in caplog.text and "Traceback" not in caplog.text


def test_resume_alone_wants_something_to_resume(run, caplog):
    assert run("fit", "--resume") == FAILED
    assert "no checkpoint in run_dir to resume from" in caplog.text


def test_fit_and_its_events(run, tmp_path):
    events = tmp_path / "events.jsonl"
    assert run("fit", "--events", events, steps=2) == DONE
    kinds = [event.kind for event in read_events(events)]
    assert kinds[0] == "phase" and kinds[-1] == "finished" and kinds.count("step") == 2 and "started" in kinds
    assert len(open_adapter(tmp_path / "run" / "adapter.safetensors").layers) == 15
    # once more: a finished run has nothing to do, and says so in the same way
    assert run("fit", "--events", events, steps=2) == DONE
    assert [event.kind for event in read_events(events)][-1] == "finished"


def test_a_stop_file_is_exit_code_three(run, tmp_path):
    (tmp_path / "stop").touch()
    events = tmp_path / "events.jsonl"
    assert run("fit", "--stop-file", tmp_path / "stop", "--events", events) == STOPPED
    assert read_events(events)[-1].kind == "stopped"


@pytest.mark.parametrize(
    "flags, changes, reason, code",
    [
        (["--rank", "0"], {}, "settings", USAGE),
        ([], {"data": "missing.cache"}, "data", FAILED),
        ([], {"model": "missing.safetensors"}, "model", FAILED),
        (["--targets", "attn.to_w"], {}, "settings", FAILED),
        (["--rank", "200"], {}, "model", FAILED),
    ],
)
def test_failures_are_told_to_who_listens(run, tmp_path, flags, changes, reason, code):
    events = tmp_path / "events.jsonl"
    assert run("fit", "--events", events, *flags, **changes) == code
    last = read_events(events)[-1]
    assert last.kind == "failed" and last.data["reason"] == reason and last.data["message"]


def test_events_that_cannot_be_written(run, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert run("fit", "--events", tmp_path / "file" / "events.jsonl") == USAGE
    assert "the events cannot be written" in caplog.text


def test_what_nobody_foresaw_keeps_its_traceback(run, monkeypatch, caplog):
    def surprise(*_):
        raise KeyError("surprise")

    monkeypatch.setattr("train.run.fit.prepare", surprise)
    assert run("fit") == FAILED
    assert "KeyError: 'surprise'" in caplog.text and "Traceback" in caplog.text


def test_check_needs_no_more_than_a_model(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    small = ["--model", str(GOLDEN / "base_bfl.safetensors"), "--device", "cpu"]
    assert main(["check", *small]) == DONE
    assert "ready to train" in capsys.readouterr().out
    assert main(["check", *small, "--json", "--no-data"]) == DONE
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["check", *small, "--json", "--data", "missing.cache"]) == FAILED
    assert "missing.cache" in json.loads(capsys.readouterr().out)["problems"][0]["what"]
    small_cache(tmp_path / "data.safetensors")
    assert main(["check", *small, "--data", "data.safetensors", "--run-dir", "new/run"]) == DONE
    assert not (tmp_path / "new").exists()


def test_ctrl_c(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUN, "encode", interrupted)
    assert main(["encode"]) == STOPPED


def test_out_of_memory_has_a_name_in_every_torch(monkeypatch):
    """torch.OutOfMemoryError came with 2.5; with 2.4 the handler of failures must not fail itself."""
    monkeypatch.delattr(torch, "OutOfMemoryError")
    known = runpy.run_path(str(ROOT / "train" / "errors.py"))["OUT_OF_MEMORY"]
    assert known == (torch.cuda.OutOfMemoryError,)


@pytest.mark.process
def test_nothing_of_other_peoples_imports_is_printed(settings, tmp_path):
    """torchao, Triton, bitsandbytes and transformers complain on a machine that is as it should be."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(as_table(settings(steps=1, memory_check=False))))
    for command, *more in (("fit",), ("fit", "--dry-run"), ("check",)):
        line = [sys.executable, "-m", "train", command, "--settings", path, *more]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        assert all(one.startswith("INFO ") for one in done.stderr.splitlines()), done.stderr


def test_warnings_that_are_not_of_an_import_stay(caplog):
    with quiet_imports():
        logging.getLogger("torchao").warning("no triton")
        logging.getLogger("torchao").error("it is broken")
    logging.getLogger("torchao").warning("a real one")
    assert [record.message for record in caplog.records] == ["it is broken", "a real one"]


def test_check_without_a_model_asks_whether_the_machine_can_train(capsys):
    assert main(["check", "--device", "cpu"]) == DONE
    text = capsys.readouterr().out
    assert "model      not known" in text and text.rstrip().endswith("ready to train")


def test_the_help_of_fit_is_in_groups(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    groups = [
        "what and where (model, data and run_dir are required):",
        "what is trained:",
        "steps:",
        "loss:",
        "memory:",
    ]
    places = [text.index(f"\n{title}") for title in groups]
    assert places == sorted(places) and text.rindex("--rank ") > places[1] and text.rindex("--offload ") > places[4]
