"""The same content is one file, however often it is saved; anything else gets a number."""

import hashlib

import pytest
import torch

import qrlora_core as core
from qrlora_core.writing import CONTENT
from tests.core.test_merge import make, of


def merged(alpha):
    return core.merged_adapter(core.merge(of(make(1)), alpha, of(make(2)), 1.0))


def test_the_hash_in_the_header_is_that_of_the_tensors_bytes(tmp_path):
    path = core.save_adapter(merged(0.9), tmp_path / "one.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert core.TensorFile(path).metadata[CONTENT] == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()


@pytest.mark.parametrize("format", ["portable", "published"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_turning_alpha_to_and_fro_writes_each_merge_once(tmp_path, format, dtype):
    def save(alpha):
        return core.save_once(merged(alpha), tmp_path, "styles/ink", format=format, dtype=dtype)

    first, second, third, fourth = (save(alpha) for alpha in (0.9, 0.8, 0.9, 0.8))
    assert (first.is_new, second.is_new, third.is_new, fourth.is_new) == (True, True, False, False)
    assert (third.path, fourth.path) == (first.path, second.path) and first.path != second.path
    assert [one.files for one in (first, second, third, fourth)] == [1, 2, 2, 2]
    assert len(list(tmp_path.rglob("*"))) == 3, "the folder and two files"


def test_an_adapter_that_was_saved_and_opened_is_the_same(tmp_path):
    first = core.save_once(merged(0.9), tmp_path, "one")
    again = core.save_once(core.open_adapter(first.path), tmp_path, "one")
    assert again == (first.path, False, 1)


def test_what_differs_is_written(tmp_path):
    plain = merged(0.9)
    core.save_once(plain, tmp_path, "one")
    assert core.save_once(plain, tmp_path, "one", dtype=torch.float16).is_new, "another dtype"
    assert core.save_once(plain, tmp_path, "one", format="published").is_new, "another format"
    assert core.save_once(plain, tmp_path, "two").is_new, "another name"
    layers = {name: plain.layer(name) for name in plain.layers}
    named = core.Adapter.from_tensors("x", layers, plain.alpha, metadata={"qrlora.trigger": "<s>"})
    assert core.save_once(named, tmp_path, "one").is_new, "another trigger"


def test_a_file_of_somebody_else_keeps_its_name(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(b"not a model")
    saved = core.save_once(merged(0.9), tmp_path, "one")
    assert saved.is_new and saved.path.name == "one_00002.safetensors"
    assert core.save_once(merged(0.9), tmp_path, "one") == (saved.path, False, 2)
    assert (tmp_path / "one.safetensors").read_bytes() == b"not a model"
