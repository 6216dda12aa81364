"""What libraries say about themselves while they are imported stays out of the terminal; their warnings do not."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from train import chatter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.process
def test_importing_what_the_trainer_needs_is_quiet():
    code = "from train.chatter import silence; silence(); from train.model import transformer; import diffusers\n"
    code += "from diffusers import FluxPipeline, FluxTransformer2DModel"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == done.stderr == "", done.stderr


def test_other_warnings_stay(caplog):
    chatter.silence()
    chatter.silence()
    logger = logging.getLogger("torchao")
    assert sum(isinstance(one, chatter._Without) for one in logger.filters) == 1
    logger.warning("Failed to load _C.so: it was made for another Python")
    logger.warning("this model cannot be quantised")
    assert [record.getMessage() for record in caplog.records] == ["this model cannot be quantised"]
