"""Importing other people's packages without what they print at it."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def quietly_imported(name: str, package: str | None = None) -> ModuleType:
    """`importlib.import_module` within `quiet_imports`."""
    with quiet_imports():
        return importlib.import_module(name, package)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hold back warnings that packages log while they are imported.

    diffusers imports torchao, bitsandbytes and more wherever they are installed, and those complain of Triton, of CUDA
    and of each other on a machine that is as it should be. Errors pass, and so does every warning that comes later.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
