"""The programs that need a host run through on a small model, so that they are known to work where a card is."""

import os
import subprocess

import pytest
import torch

from benchmarks.fusion.learn import RECIPES
from benchmarks.fusion.optimizer import Optimizer
from benchmarks.fusion.protocol import CHECK
from benchmarks.fusion.store import Study
from demo import server as instance
from tests.host.conftest import HOST

SMALL = ["--double", "1", "--single", "1", "--hidden", "128", "--rank", "4", "--latent", "8"]


@pytest.fixture
def run(host_python):
    """(module of benchmarks, arguments) -> what it printed."""

    def run_it(module, *arguments):
        environment = {"COMFYUI_PATH": str(HOST)}
        done = host_python(HOST).run(["-m", f"benchmarks.{module}", *arguments], instance.PACK, environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run_it


def test_a_program_is_run_as_by_a_python_of_its_own(host_python, tmp_path):
    """Its command line, folder, environment and main module; what it says and how it ends; nothing for the next one."""
    script = tmp_path / "program.py"
    script.write_text(
        "import beside, os, sys, __main__\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['GIVEN'], __name__, __main__.__file__ == __file__, sys.path[0])\n"
        "sys.exit({'3': 3, 'words': 'the end', 'fine': None}[sys.argv[1]] if sys.argv[1] != 'fails' else 1 / 0)\n"
    )
    (tmp_path / "beside.py").touch()
    python, ended = host_python(HOST), {}
    for how in ("3", "words", "fails", "fine"):
        ended[how] = python.run([script, how], tmp_path, {"GIVEN": "\u00fc"})
        assert ended[how].stdout == f"{[how]} {tmp_path} \u00fc __main__ True {tmp_path}\n"
    assert [one.returncode for one in ended.values()] == [3, 1, 1, 0]
    assert ended["words"].stderr == "the end\n" and "ZeroDivisionError" in ended["fails"].stderr
    module = python.run(["-m", "program", "3"], tmp_path, {"GIVEN": ""})
    assert module.returncode == 3 and module.stdout.startswith("['3']")


def test_card(run):
    printed = run("card", *SMALL, "--storages", "fp32", "--train-steps", "1")
    assert "FAILED" not in printed, printed
    rows = [line for line in printed.splitlines() if " s  " in line]
    assert len(rows) == 17 and "s a step, peak" in rows[-1]
    errors = [float(line.split("error ")[1]) for line in rows if "error" in line]
    assert len(errors) == 2 and max(errors) < 1e-4


def test_apply(run):
    printed = run("apply", *SMALL, "--rounds", "1")
    assert "nodes, live, after turning alpha" in printed and "step, live" in printed
    held = float(printed.split("their patches hold ")[1].split(" MB")[0])
    assert held < 50, "a sweep holds no copies"


def test_lora(run):
    """Both sides load a file of a few fused modules; at FLUX.1's size the exit code says how many are too slow."""
    printed = run("lora", "--double", "1", "--single", "1", "--hidden", "256", "--ranks", "4,8", "--rounds", "1")
    assert printed.count("stock ") == printed.count("all bases ") == 2


HALVES = """
import comfy.sd


class Halves:
    FUNCTION = "merge"

    def merge(self, model, lora_stack, output_strength, **settings):
        for one in lora_stack:
            model, _ = comfy.sd.load_lora_for_models(model, None, one["lora"], 0.5 * output_strength, 0.0)
        return model, None, "halved"


NODE_CLASS_MAPPINGS = {"LoRAOptimizer": Halves}
"""


def test_another_packs_merge_is_read_off_the_models_weights(tmp_path, monkeypatch, host_python):
    """A pack whose node adds half of each adapter: what comes back is half of their sum, in every layer."""
    monkeypatch.setenv("COMFYUI_PATH", str(HOST))
    monkeypatch.setenv("COMFYUI_PYTHON", str(instance.interpreter(HOST)))

    def by_host_python(command, cwd, **_):
        assert command[0] == os.environ["COMFYUI_PYTHON"]
        return host_python(HOST).run(command[1:], cwd)

    monkeypatch.setattr(subprocess, "run", by_host_python)
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "lora_optimizer.py").touch()
    (pack / "__init__.py").write_text(HALVES)
    study, unit = Study(tmp_path / "study", pictures=1, adapter_steps=1), CHECK[0]
    study.joints["optimizer"] = Optimizer(pack, CHECK[:1])
    joined = study.joined("optimizer", unit, "style", RECIPES["qr"])
    assert study.joined_path("optimizer", unit, "texture", RECIPES["qr"]).is_file(), "all pairs in one process"
    content, style = (study.adapter(unit, side, RECIPES["qr"]).update for side in ("content", "style"))
    for name, pair in joined.items():
        wanted = sum(one[name].up @ one[name].down for one in (content, style)) / 2
        assert wanted.any()
        torch.testing.assert_close(pair.up @ pair.down, wanted, rtol=1e-3, atol=1e-6)
