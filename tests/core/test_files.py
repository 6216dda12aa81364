"""Hostile, damaged and foreign files: always one of our errors, never a changed adapter, never a half-written file."""

import errno
import json
import os
import shutil
import struct
import sys

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qrlora_core as core
from qrlora_core import writing
from qrlora_core.families import FLUX, native_layers, native_place
from qrlora_core.storage import TensorFile, TensorSpec
from qrlora_core.writing import CHECKSUM, header_bytes, size_text, verify_checksum, write_tensors
from tests.core.test_merge import NAMES, make

LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One good file of each kind, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    adapter = make(1)
    core.save_adapter(adapter, folder / "portable.safetensors")
    core.save_adapter(adapter, folder / "published.safetensors", format="published")
    core.save_adapter(make(1, method="qr"), folder / "qr.safetensors", format="published")
    core.write_residual(folder / "residual.safetensors", adapter.targets, lambda name: torch.ones(12, 10))
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


def use(path, kind):
    """Everything that a graph does with a file."""
    if kind == "residual":
        residual = core.Residual(path)
        return {name: residual.weight(name).clone() for name in NAMES}  # the layers that its adapter has
    adapter = core.open_adapter(path)
    tensors = {}
    for name in adapter.layers:
        tensors[name, "up"], tensors[name, "down"], _ = adapter.layer(name)
        tensors[name, "scaling"] = adapter.layers[name].scaling
    return tensors


@pytest.mark.parametrize("kind", ["portable", "published", "qr", "residual"])
def test_truncated_at_any_byte(good, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good[kind])
    for length in reversed(range(len(good[kind]))):
        os.truncate(path, length)
        with pytest.raises(core.FileFormatError, match=r"x\.safetensors"):
            use(path, kind)


@settings(max_examples=400)
@given(st.data(), st.sampled_from(["portable", "published", "qr", "residual"]))
def test_flipped_header_bits(good, tmp_path_factory, data, kind):
    content = bytearray(good[kind])
    header = 8 + struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path, whole = (tmp_path_factory.mktemp("flip") / "x.safetensors" for _ in range(2))
    path.write_bytes(content)
    whole.write_bytes(good[kind])
    try:
        changed = use(path, kind)
    except core.QRLoRAError:
        return
    # what still opens must be the same adapter: only words in the metadata can have been hit
    reference = use(whole, kind)
    assert changed.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(torch.as_tensor(changed[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("length", [2**63, 2**40, 200_000_000])
def test_huge_header(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(core.FileFormatError):
        core.open_adapter(path)


def test_deeply_nested_and_lying_headers(tmp_path):
    for text in ("[" * 10_000, json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}})):
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 8)
        with pytest.raises(core.FileFormatError):
            core.open_adapter(path)


def without(tensors, ending):
    key = next(key for key in tensors if key.endswith(ending))
    return {other: value for other, value in tensors.items() if other != key}


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: without(t, "delta_r.weight"), "incomplete"),
        (lambda t: without(t, "lora.q.weight"), "incomplete"),
        (lambda t: without(t, "base_r.weight"), "incomplete"),
        (lambda t: t | {"text_encoder.x.weight": torch.ones(2, 2)}, "do not belong"),
        (lambda t: t | {f"{LAYER}.lora.delta_r.weight": torch.ones(4, 10)}, "pairs"),
        (lambda t: t | {f"{LAYER}.lora.delta_r.weight": torch.ones(3)}, "pairs"),
        (lambda t: t | {f"{LAYER}.lora.base_r.weight": torch.ones(3, 9)}, "shape"),
        (lambda t: t | {f"{LAYER}.lora.q.weight": torch.ones(12, 3, dtype=torch.int8)}, "I8"),
        (lambda t: t | {f"{LAYER}.lora.q.weight": torch.ones(12, 3).to(torch.float8_e4m3fn)}, "16 bits"),
        (lambda t: {}, "begins with nothing"),
    ],
)
def test_contents_that_do_not_fit(good, tmp_path, change, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good["published"])
    save_file(change(load_file(path)), path)
    with pytest.raises(core.FileFormatError, match=words):
        core.open_adapter(path)


@pytest.mark.parametrize("up,down", [((12, 0), (0, 10)), ((0, 3), (3, 10)), ((12, 4), (4, 0)), ((0, 0), (0, 0))])
@pytest.mark.parametrize("method", ["delta_r", "qr"])
@pytest.mark.parametrize("names", [("lora_B", "lora_A"), ("lora.up", "lora.down"), ("lora.q", "lora.delta_r")])
def test_empty_tensors(tmp_path, up, down, method, names):
    path = tmp_path / "x.safetensors"
    tensors = {f"{LAYER}.{name}.weight": torch.ones(shape) for name, shape in zip(names, (up, down))}
    save_file(tensors, path, {"qrlora.method": method})
    with pytest.raises(core.FileFormatError):
        core.open_adapter(path)


@pytest.mark.parametrize("kind", ["portable", "published", "qr"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(good, tmp_path, kind, value):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good[kind])
    with core_file(path) as (tensors, metadata):
        key = next(key for key in tensors if "to_q" in key and tensors[key].ndim == 2)
        tensors[key][0, 0] = value
    save_file(tensors, path, metadata | {"qrlora.method": "qr" if kind == "qr" else "delta_r"})
    with pytest.raises(core.WeightError, match="x: .* NaN or Inf"):
        use(path, kind)


class core_file:
    """The tensors and metadata of a file, to be changed."""

    def __init__(self, path):
        self.content = load_file(path), core.TensorFile(path).metadata

    def __enter__(self):
        return self.content

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_bad_alpha(good, tmp_path, alpha):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good["portable"])
    with core_file(path) as (tensors, metadata):
        save_file(tensors | {f"{LAYER}.alpha": torch.tensor(alpha)}, path, metadata)
    with pytest.raises(core.FileFormatError, match="alpha"):
        core.open_adapter(path)


def noise(*shape):
    """Random numbers that are the same at every run: a matrix of this size may be nearly trapezoidal by luck."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(12, 3)},
        {f"{LAYER}.lora_B.weight": noise(12, 3), f"{LAYER}.lora_A.weight": noise(3, 10)},
        {f"{LAYER}.lora.up.weight": noise(12, 3) / 10, f"{LAYER}.lora.down.weight": noise(3, 10)},
        {f"{LAYER}.lora.up.weight": torch.zeros(12, 3), f"{LAYER}.lora.down.weight": noise(3, 10)},
        # orthonormal, but `down` is no trapezoidal R: somebody's LoRA with a frozen up
        {
            f"{LAYER}.lora.up.weight": torch.linalg.qr(noise(12, 3)).Q.contiguous(),
            f"{LAYER}.lora.down.weight": noise(3, 10),
        },
    ],
)
def test_plain_loras_are_refused_with_a_hint(tmp_path, tensors):
    torch.manual_seed(0)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(core.FileFormatError, match="plain LoRA.*Load LoRA"):
        core.open_adapter(tmp_path / "x.safetensors")


def test_portable_without_metadata_is_known_by_its_basis(good, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(good["portable"])
    save_file(load_file(path), path)
    assert core.open_adapter(path).method == "delta_r"


def test_wrong_socket_messages(good, tmp_path):
    for kind in ("published", "residual"):
        (tmp_path / f"{kind}.safetensors").write_bytes(good[kind])
    with pytest.raises(core.FileFormatError, match="is a residual: load it with Load FLUX Residual"):
        core.open_adapter(tmp_path / "residual.safetensors")
    with pytest.raises(core.FileFormatError, match="is not a residual"):
        core.Residual(tmp_path / "published.safetensors")
    with pytest.raises(core.FileFormatError, match="not a readable safetensors"):
        core.open_adapter(tmp_path / "absent.safetensors")
    with pytest.raises(core.FileFormatError):
        core.open_adapter(tmp_path)


def test_basis_files(tmp_path):
    adapter = make(1)
    specs = {name: TensorSpec(torch.float16, info.shape) for name, info in adapter.layers.items()}
    path = core.save_basis(
        tmp_path / "b.safetensors", specs, lambda name: adapter.layer(name).initial, {"qrlora.rank": "3"}
    )
    layers, metadata = core.open_basis(path)
    assert list(layers) == list(NAMES) and metadata["qrlora.rank"] == "3"
    torch.testing.assert_close(layers[NAMES[0]]().q.float(), adapter.layer(NAMES[0]).up, atol=1e-3, rtol=1e-3)
    with pytest.raises(core.FileFormatError, match="basis"):
        core.open_adapter(path)


SPECS = {f"t{index}": TensorSpec(torch.float32, (4, 4)) for index in range(3)}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
@pytest.mark.parametrize("existing", [False, True])
def test_a_stopped_write_leaves_nothing(tmp_path, error, existing):
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"precious")

    def stream():
        yield "t0", torch.ones(4, 4)
        assert len(list(tmp_path.glob("*.tmp"))) == 1  # it is being written, beside its place
        raise error

    with pytest.raises(error):
        write_tensors(path, SPECS, stream(), {}, overwrite=existing)
    assert [p.name for p in tmp_path.iterdir()] == (["x.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"precious"


def test_what_was_not_announced_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    ones = torch.ones(4, 4)
    for stream in ([("t0", ones)], [("t1", ones)], [("t0", torch.ones(4, 5))], [(f"t{i}", ones) for i in range(4)]):
        with pytest.raises(core.FileFormatError):
            write_tensors(path, SPECS, iter(stream), {})
        assert not list(tmp_path.iterdir())


def test_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(core.PathError, match="needs .* kB"):
        core.save_adapter(make(1), tmp_path / "x.safetensors")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(core.PathError, match="No space left"):
        core.save_adapter(make(1), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_disk_full_in_the_middle(tmp_path):
    import resource

    path = core.save_adapter(make(1), tmp_path / "x.safetensors")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 100, limits[1]))  # the system refuses the last bytes
    try:
        with pytest.raises(core.PathError, match="File too large"):
            core.save_adapter(make(2), path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"] and path.read_bytes() == before


def unreadable():
    """Adapters that a file of the format cannot hold: (adapter, format, metadata)."""
    stacked = core.merge(
        core.MergeRecipe.of(make(1, rank=8)), 1.0, core.MergeRecipe.of(make(2, rank=8, basis_seed=4)), 1.0
    )
    layers = {name: make(1).layer(name) for name in NAMES}
    return {
        "rank": (core.merged_adapter(stacked), "published", {}),
        "alpha": (core.Adapter.from_tensors("a", layers, 0.0), "portable", {}),
        "header": (make(1), "portable", {"qrlora.trigger": "\ud800"}),
        "method": (make(1), "portable", {"qrlora.method": "magic"}),
    }


@pytest.mark.parametrize("case", ["rank", "alpha", "header", "method"])
@pytest.mark.parametrize("existing", [False, True])
def test_what_cannot_be_read_back_is_not_kept(tmp_path, case, existing):
    adapter, format, metadata = unreadable()[case]
    path = tmp_path / "x.safetensors"
    if existing:
        path.write_bytes(b"precious")
    with pytest.raises(core.FileFormatError, match=f"cannot be saved as {format}: x.safetensors"):
        core.save_adapter(adapter, path, format=format, metadata=metadata, overwrite=existing)
    assert [p.name for p in tmp_path.iterdir()] == (["x.safetensors"] if existing else [])
    assert not existing or path.read_bytes() == b"precious"


def test_existing_files_stay(tmp_path):
    path = core.save_adapter(make(1), tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(core.PathError, match="exists already"):
        core.save_adapter(make(2), path)
    assert path.read_bytes() == before
    assert core.free_name(tmp_path, "x").name == "x_00002.safetensors"
    assert core.free_name(tmp_path, "y.safetensors").name == "y.safetensors"
    assert core.free_name(tmp_path, "styles/ink").parent.name == "styles"


@pytest.mark.parametrize("links", [True, False])
def test_a_name_taken_meanwhile_is_not_replaced(tmp_path, monkeypatch, links):
    path = tmp_path / "x.safetensors"
    if not links:  # as on a FAT disk

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)

    def stream():
        for key in SPECS:
            yield key, torch.ones(4, 4)
        path.write_bytes(b"somebody else")

    with pytest.raises(core.PathError, match="exists already"):
        write_tensors(path, SPECS, stream(), {})
    assert path.read_bytes() == b"somebody else" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/../b",
        "C:\\x",
        "..\\x",
        "",
        " ",
        "a/",
        "nul",
        "a/CON.txt",
        "x\0y",
        "a /b",
        "a./b",
        "\\\\h\\s",
        "C:x",
        "aux .txt",
        "conin$",
        "com\u00b9.safetensors",
        "\ud800",
        "x" * 250,
        "x/" * 2000 + "x",
    ],
)
def test_names_that_leave_their_folder(tmp_path, name):
    with pytest.raises(core.PathError, match="refused"):
        core.free_name(tmp_path, name)
    with pytest.raises(core.PathError):
        core.contained_path(tmp_path, name)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_links(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    (inside / "out").symlink_to(outside)
    (tmp_path / "root").symlink_to(inside)
    with pytest.raises(core.PathError, match="link leads out"):
        core.contained_path(inside, "out/x.safetensors")
    assert core.contained_path(tmp_path / "root", "x").parent == inside.resolve()
    (inside / "loop").symlink_to(inside / "loop")
    with pytest.raises(core.PathError, match="refused"):
        core.contained_path(inside, "loop/x.safetensors")
    (inside / "nowhere.safetensors").symlink_to(inside / "absent")  # taken, though `exists` says no
    with pytest.raises(core.PathError, match="exists already"):
        core.write_residual(inside / "nowhere.safetensors", make(1).targets, lambda _: torch.ones(12, 10))


@given(st.text(max_size=40))
def test_any_name_stays_inside_or_is_refused(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "names"
    try:
        path = core.free_name(folder, name)
    except core.PathError:
        return
    assert path.is_relative_to(folder.resolve()) and path != folder and path.suffix == ".safetensors"


def test_targets():
    targets = core.flux_targets(19, 38, 3072)
    assert len(targets) == 342 and sum(t.shape[0] * t.shape[1] for t in targets) == 570 * 3072**2
    names = [target.name for target in targets]
    assert len(core.match_targets(["attn.to_q"], names)) == 57
    assert core.match_targets(["transformer_blocks.3.attn.to_q.weight"], names) == ("transformer_blocks.3.attn.to_q",)
    for wrong, hint in (("to_qq", "to_q"), ("attn.to_", "attn.to_"), ("o_q", "to_q")):
        with pytest.raises(core.TargetError, match=f"did you mean .*{hint}"):
            core.match_targets([wrong], names)
    assert native_place(FLUX, "single_transformer_blocks.7.attn.to_v", (256, 256)) == core.WeightSlice(
        "single_blocks.7.linear1.weight", 512, 256
    )
    for target in core.flux_targets(2, 1, 128):
        assert target.name in native_layers(
            FLUX, native_place(FLUX, target.name, target.shape).key.removesuffix(".weight")
        )
    with pytest.raises(core.TargetError, match="not a layer of FLUX"):
        native_place(FLUX, "transformer_blocks.0.attn.to_z", (1, 1))


@settings(max_examples=30)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 64), st.integers(1, 6))
def test_slices_fill_the_fused_weights(doubles, singles, hidden, ratio):
    """q, k, v of any FLUX follow each other without a gap, and back again by `native_layers`."""
    targets = core.flux_targets(doubles, singles, hidden, ratio)
    assert len(targets) == 12 * doubles + 3 * singles
    rows = {}
    for target in targets:
        place = native_place(FLUX, target.name, target.shape)
        assert (
            target.name == native_layers(FLUX, place.key.removesuffix(".weight"))[len(rows.setdefault(place.key, []))]
        )
        rows[place.key].append((place.start, place.length))
    mlp = native_place(FLUX, "single_transformer_blocks.0.proj_mlp", (ratio * hidden, hidden))
    assert mlp == core.WeightSlice("single_blocks.0.linear1.weight", 3 * hidden, ratio * hidden)
    for key, parts in rows.items():
        fused = "qkv" in key or "linear1" in key
        assert parts == ([(i * hidden, hidden) for i in range(3)] if fused else [(None, None)])


def test_checksum(tmp_path):
    """Over header and data; a file without one is taken as it is."""
    path, spec = tmp_path / "a.safetensors", {"x": TensorSpec(torch.float32, (64,))}
    tensors = [("x", torch.arange(64.0))]
    write_tensors(path, spec, tensors, {"name": "one", f"{CHECKSUM}x": "0" * 64}, checksum=True)
    assert verify_checksum(path)
    assert torch.equal(TensorFile(path).tensor("x"), tensors[0][1])
    whole = path.read_bytes()
    for place in (whole.index(b'"one"') + 1, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(core.FileFormatError, match="does not match its checksum"):
            verify_checksum(path)
    write_tensors(path, spec, tensors, {}, overwrite=True)
    assert not verify_checksum(path)
    path.write_bytes(b"")
    with pytest.raises(core.FileFormatError, match="not a readable safetensors file"):
        verify_checksum(path)


def test_rows_of_a_tensor(tmp_path):
    path, value = tmp_path / "a.safetensors", torch.arange(24.0).reshape(6, 4)
    write_tensors(path, {"x": TensorSpec(torch.bfloat16, (6, 4))}, [("x", value)], {})
    file = TensorFile(path)
    assert torch.equal(file.rows("x", 2, 3).float(), value[2:5])
    assert file.rows("x", 6, 0).shape == (0, 4)
    for start, count in ((5, 2), (-1, 1), (0, 7)):
        with pytest.raises(core.FileFormatError, match="has no rows"):
            file.rows("x", start, count)


def test_size_text():
    assert [size_text(n) for n in (2_000, 2_500_000, 3.2e8, 4e9)] == ["2.0 kB", "2.5 MB", "0.32 GB", "4.00 GB"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a hole in a file takes room")
def test_a_file_that_is_larger_than_memory(tmp_path):
    """A bf16 model of 24 GB on a machine of 16: nothing but a row of it is read."""
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    spec = TensorSpec(torch.float8_e4m3fn, (memory // 2**20 + 1024, 2**20))
    with (tmp_path / "large.safetensors").open("wb") as file:
        header = header_bytes({"x": spec}, {"name": "large"})
        file.write(header)
        file.truncate(len(header) + spec.nbytes)
    opened = TensorFile(tmp_path / "large.safetensors")
    assert opened.specs == {"x": spec} and opened.metadata["name"] == "large"
    assert not opened.rows("x", spec.shape[0] - 1, 1).float().any()
