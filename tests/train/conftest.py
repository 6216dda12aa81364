"""A small base model, a training cache for it, and settings that train it on a CPU in a second."""

import os

# Threads of several small matrix products only wait for each other; child processes inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from demo.small_flux import GOLDEN
from qrlora_core import CacheItem, EncodedPicture, EncodedText, save_cache
from train.config import FitConfig
from train.settings import make_config


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_cache(path, *, class_pictures=0, mask=False, flip=False, seed=0, width=64, **more):
    """Three pictures in two buckets and one caption; sizes that the golden model takes."""
    generator = torch.Generator().manual_seed(seed)

    def picture(height, width):
        return EncodedPicture(
            torch.randn(16, height, width, generator=generator),
            torch.randn(16, height, width, generator=generator) if flip else None,
            torch.rand(height, width, generator=generator) if mask else None,
        )

    sizes = [(4, 4), (4, 4), (6, 4)] + [(4, 4)] * class_pictures
    items = [CacheItem(f"p{i}.png", 1, "a caption", 1, i >= 3) for i in range(len(sizes))]
    texts = [
        EncodedText(torch.randn(5, width, generator=generator), torch.randn(width, generator=generator))
        for _ in range(2)
    ]
    return save_cache(path, items, [picture(*size) for size in sizes], texts, empty_text=0, **more)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder with `data.safetensors`, and the basis that all runs share."""
    folder = tmp_path_factory.mktemp("shared")
    small_cache(folder / "data.safetensors")
    return folder


def base_settings(shared, run_dir):
    """A table of settings that train the golden model on a CPU in a second."""
    return {
        "model": str(GOLDEN / "base_bfl.safetensors"),
        "data": str(shared / "data.safetensors"),
        "run_dir": str(run_dir),
        "basis_cache": str(shared / "basis"),
        "rank": 8,
        "alpha": 8.0,
        "steps": 4,
        "gradient_accumulation": 2,
        "learning_rate": 1e-3,
        "checkpoint_every": 0,
        "device": "cpu",
        "precision": "fp32",
        "base_storage": "fp32",
        "gradient_checkpointing": False,
    }


@pytest.fixture
def settings(shared, tmp_path):
    """Settings of a small run; keyword arguments change some."""
    return lambda **changes: make_config(FitConfig, base_settings(shared, tmp_path / "run"), changes)
