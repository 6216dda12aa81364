"""The campaign, short: every reader against damaged files, in a process of its own that a crash cannot take along."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import qrlora_core as core
from tests.hostile import campaign, mutate, readers
from train.data.captions import DatasetError
from train.settings import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CASES = 5000


def start(*arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.hostile", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 600, "check": False, **more}
    return subprocess.run(command, cwd=ROOT, env=environment, **options)


@pytest.mark.process
def test_no_damaged_file_does_more_than_be_refused(tmp_path):
    """Each case ends in one of the pack's errors or in a result that is right, within 2 s and 1.5 GB."""
    figures = tmp_path / "figures.json"
    done = start("--cases", CASES, "--json", figures, "--keep", tmp_path / "bad")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    found = json.loads(figures.read_text())
    assert found["cases"] == CASES and found["faults"] == 0
    # a campaign whose files are all refused at the first byte would show nothing, and so would one that damages none
    for name, (cases, refused, _) in found["readers"].items():
        assert cases >= 20, name
        assert refused < cases or name == "training cache", name
    assert sum(refused for _, refused, _ in found["readers"].values()) > 0.4 * CASES


def test_a_case_is_its_number():
    content = mutate.joined({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
    drawn = [[mutate.safetensors(content, random.Random(f"0/{number}")) for number in range(50)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 30


@pytest.fixture
def one_reader(tmp_path, monkeypatch):
    """A campaign over one reader that does what the test says."""

    def make(use, content=b"x"):
        reader = readers.Reader("mine", 1, ".bin", (content,), lambda content, draw: content, use)
        monkeypatch.setattr(campaign, "readers", lambda folder: (reader,))
        monkeypatch.setattr(campaign, "limit_memory", lambda: None)
        monkeypatch.setattr(campaign.logging, "disable", lambda level: None)
        return campaign.run(tmp_path, range(3))

    return make


def test_what_a_campaign_calls_a_fault(one_reader, monkeypatch):
    def raises(error):
        def use(path, content):
            raise error

        return use

    refusals = (core.FileFormatError("no"), ConfigError("no"), DatasetError("no"))
    for error in refusals:
        found = one_reader(raises(error))
        assert (found.cases, found.fault_count, found.tallies["mine"].refused) == (3, 0, 3)
    for error in (ValueError("raw"), AssertionError("wrong result"), MemoryError(), ConfigError("x" * 10_000)):
        found = one_reader(raises(error))
        assert found.fault_count == 3 and len(found.faults) == 1 and "mine" in found.faults[0]
    monkeypatch.setattr(campaign, "SECONDS", -1.0)
    assert "it took" in one_reader(lambda path, content: None).faults[0]


def test_good_files_are_read(tmp_path):
    """The readers accept what they begin with; else every case would be refused for the wrong reason."""
    for reader in readers.readers(tmp_path):
        path = tmp_path / f"good{reader.ending}"
        for content in reader.samples:
            path.write_bytes(content)
            reader.use(path, content)
