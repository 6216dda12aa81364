"""README's table of families and features: every cell that promises something has a test with that family in it."""

import importlib
import re
from pathlib import Path

import pytest

from qrlora_core.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
FAMILY_NAMES = tuple(family.name for family in FAMILIES)
OTHER = "any other"
HOST, LORA = "tests.host.test_families", "tests.host.test_lora"
NO_FAMILY = [(HOST, "test_a_model_of_no_family")]
# column -> the tests that prove it, each parametrised by families
PROOFS = {
    "LoRA and \u0394R in": [(LORA, "test_every_dialect_changes_weights_as_the_stock_loader_does")],
    "merge, apply, live": [
        (HOST, "test_outputs_are_those_of_the_stock_loader"),
        (LORA, "test_two_files_merge_as_two_stock_loaders_add"),
    ],
    "save, export": [
        (HOST, "test_outputs_are_those_of_the_stock_loader"),
        (HOST, "test_a_residual_is_saved_loaded_and_restored"),
    ],
    "residual": [(HOST, "test_a_residual_is_saved_loaded_and_restored")],
    "block strengths": [(HOST, "test_every_kind_of_block_has_a_strength_that_acts")],
    "similarity, sweep": [(HOST, "test_similarity_and_sweeps_know_every_layer")],
    "hooks": [(HOST, "test_a_hook_is_what_apply_is")],
    "train": [("tests.train.test_families", "test_what_was_trained_is_what_comfyui_applies")],
}
# what the tests of training call a family; FLUX.1's are those against the published code
TRAINED = {
    "FLUX.2": "flux2",
    "Z-Image": "z_image",
    "Qwen-Image": "qwen_image",
    "Krea 2": "krea2",
    "SD3.5": "sd3",
    "SDXL": "sdxl",
}
PUBLISHED = ("tests.train.test_golden", "test_adapters_after_three_steps")
# a cell's words -> kinds of blocks
KINDS = {"refiners": {"noise_refiner", "context_refiner"}, "text blocks": {"text_layerwise", "text_refiner"}}


def table():
    """(family, column, cell) of README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("|\n ").split("|") for line in re.search(r"(\| family \|(?:.*\n)+?)\n", text)[1].splitlines()]
    columns, *rest = [[cell.strip() for cell in row] for row in rows if not set("".join(row)) <= set("- ")]
    for name, *cells in rest:
        cells += [""] * (len(columns) - 1 - len(cells))
        family = next((one for one in (OTHER, *FAMILY_NAMES) if name.startswith(one)), name)
        yield from ((family, column, cell) for column, cell in zip(columns[1:], cells, strict=True))


CELLS = list(table())


def parameters(module, name):
    """What a test is parametrised by: its own values, or those of its module's fixture `family`."""
    test = getattr(importlib.import_module(module), name)
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    if marks:
        return {value for mark in marks if "family" in str(mark.args[0]) for value in mark.args[1]}
    return set(importlib.import_module(module).FAMILIES)


def test_the_table_has_every_family_and_feature():
    assert {family for family, _, _ in CELLS} == {*FAMILY_NAMES, OTHER}
    assert {column for _, column, _ in CELLS} == PROOFS.keys()
    assert len(CELLS) == (len(FAMILY_NAMES) + 1) * len(PROOFS)


@pytest.mark.parametrize("family, column, cell", CELLS, ids=lambda value: str(value)[:20])
def test_a_promise_has_its_proof(family, column, cell):
    proofs = PROOFS[column]
    if family == OTHER and column != "train":
        proofs = NO_FAMILY
    elif column == "train":
        if family == "FLUX.1":
            assert callable(getattr(importlib.import_module(PUBLISHED[0]), PUBLISHED[1])) and cell == "yes"
            return
        family = TRAINED.get(family, family)
    proven = all(family in parameters(*proof) for proof in proofs)
    if cell:
        assert proven, f"{column} of {family} says {cell!r}, and no test proves it"
    elif column == "train":
        assert not proven, f"{family} can be trained, and the table does not say so"


def test_the_kinds_of_blocks_are_those_that_have_strengths():
    kinds = importlib.import_module(HOST).KINDS
    for family, column, cell in CELLS:
        if column == "block strengths" and family != OTHER:
            named = [word.strip() for word in cell.split(",")]
            assert set().union(*(KINDS.get(word, {word}) for word in named)) == kinds[family], family


def test_a_promise_without_a_proof_is_found():
    """The check above can fail."""
    with pytest.raises(AssertionError, match="no test proves it"):
        test_a_promise_has_its_proof("Chroma", "train", "yes")
    with pytest.raises(AssertionError, match="the table does not say so"):
        test_a_promise_has_its_proof("FLUX.2", "train", "")
    with pytest.raises(AssertionError, match="no test proves it"):
        test_a_promise_has_its_proof("FLUX 3", "hooks", "yes")
