"""Reading safetensors files: lazily, by offset, checked against change. Pickles are never opened."""

import hashlib
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FileFormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What is not floating point and is not written here; exponents without a mantissa are read as the bytes that they are
_OTHER_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E8M0": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in (*DTYPES.items(), *_OTHER_DTYPES.items()) if name != "F8_E8M0"}
_LONGEST_HEADER = 100_000_000  # what the safetensors library allows
_SAMPLE = 4096


class TensorSpec(NamedTuple):
    """What a tensor will be, before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorFile:
    """A safetensors file whose tensors are read when they are asked for; opening it reads the header and no more.

    Tensors are read by offset and not through a memory map: a map faults, and takes the process with it, when somebody
    shortens the file meanwhile. Size and time of the file are compared at every read, so that a file that was written
    anew is noticed and never mixed with what it was.

    Attributes:
        path: where it lies.
        specs: key -> TensorSpec of every tensor that is floating point.
        other: the same of tensors that are not, where they are allowed; one whose dtype is not known here counts as a
            row of bytes.
        metadata: the header's strings.

    Args:
        path: where it lies.
        skip_other: allow tensors that are not floating point, as the text encoders of a whole checkpoint and packed
            weights are.

    Raises:
        FileFormatError: missing, truncated, not safetensors, or with tensors that are not floating point.
    """

    def __init__(self, path: Path, *, skip_other: bool = False) -> None:
        self.path = Path(path)
        try:
            self._version = _version(self.path.stat())
            # numpy's way maps the file for reading; torch's wants as much memory as the file is large
            with safe_open(str(self.path), framework="np") as file:  # checks header and length
                self.metadata: dict[str, str] = dict(file.metadata() or {})
            entries, start = _header(self.path)
            raw = {key: (str(entry["dtype"]), tuple(entry["shape"])) for key, entry in entries.items()}
            self._offsets = {key: start + int(entry["data_offsets"][0]) for key, entry in entries.items()}
        except (SafetensorError, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{self.path.name} is not a readable safetensors file ({error}); it may be truncated or still "
                "being downloaded"
            ) from error
        odd = {key: name for key, (name, _) in raw.items() if name not in DTYPES}
        self.other: dict[str, TensorSpec] = {}
        if skip_other:
            self.other = {key: _other_spec(entries[key]) for key in odd}
            raw = {key: value for key, value in raw.items() if key not in odd}
        elif odd:
            key, name = next(iter(odd.items()))
            raise FileFormatError(f"{self.path.name}: {key} is stored as {name}, expected one of {', '.join(DTYPES)}")
        self.specs = {key: TensorSpec(DTYPES[name], shape) for key, (name, shape) in raw.items()}

    def tensor(self, key: str) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            FileFormatError: no such tensor, or the file was changed or removed since it was opened.
        """
        return self._read(key, self._spec(key), 0)

    def rows(self, key: str, start: int, count: int) -> Tensor:
        """`count` rows (of the first dimension) of a tensor from `start` on; nothing else of it is read.

        Raises:
            FileFormatError: see `tensor`; or the tensor has no such rows.
        """
        spec = self._spec(key)
        if not spec.shape or start < 0 or count < 0 or start + count > spec.shape[0]:
            raise FileFormatError(f"{self.path.name}: {key} {spec.shape} has no rows {start} to {start + count}")
        part = TensorSpec(spec.dtype, (count, *spec.shape[1:]))
        return self._read(key, part, start * (spec.nbytes // spec.shape[0] if spec.shape[0] else 0))

    def _spec(self, key: str) -> TensorSpec:
        spec = self.specs.get(key, self.other.get(key))
        if spec is None:
            raise FileFormatError(f"{self.path.name} has no tensor {key}")
        return spec

    def _read(self, key: str, spec: TensorSpec, offset: int) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                self._require_unchanged(os.fstat(file.fileno()))
                file.seek(self._offsets[key] + offset)
                if spec.nbytes:
                    _read_into(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
                self._require_unchanged(os.fstat(file.fileno()))
        except (OSError, EOFError) as error:
            raise FileFormatError(f"{self.path.name}: {key} cannot be read ({error})") from error
        return tensor

    def identity(self) -> tuple[str, int, int]:
        """Path, size and modification time: what tells one version of a file from another."""
        return (str(self.path.resolve()), *self._version)

    def _require_unchanged(self, status: os.stat_result) -> None:
        if _version(status) != self._version:
            raise FileFormatError(
                f"{self.path.name} was changed since it was opened; load it again (press R, then queue once more)"
            )


def model_fingerprint(path: Path) -> str:
    """Sixteen hex digits that tell one base model from another, within a second for 24 GB.

    Covers the header of every safetensors file (names, dtypes, shapes), its size, and the first 4096 bytes of every
    tensor; a fine-tune changes those of nearly all. Names of files and folders do not count.

    Args:
        path: a safetensors file, or a folder whose safetensors files make the model.

    Raises:
        FileFormatError: no such file, or nothing in the folder.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileFormatError(f"{path.name} holds no safetensors file")
    digest = hashlib.sha256()
    for part in files:
        try:
            size = part.stat().st_size
            with part.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > min(size, _LONGEST_HEADER):
                    raise FileFormatError(f"{part.name} is not a readable safetensors file; it may be truncated")
                header = file.read(length)
                digest.update(size.to_bytes(8, "little") + header)
                entries = json.loads(header)
                starts = sorted(e["data_offsets"][0] for key, e in entries.items() if key != "__metadata__")
                for start in starts:
                    file.seek(8 + length + start)
                    digest.update(file.read(_SAMPLE))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{part.name} is not a readable safetensors file ({error})") from error
    return digest.hexdigest()[:16]


def _version(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a header that the library has accepted, and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def _other_spec(entry: Mapping[str, Any]) -> TensorSpec:
    dtype = _OTHER_DTYPES.get(str(entry["dtype"]))
    if dtype is not None:
        return TensorSpec(dtype, tuple(entry["shape"]))
    start, end = entry["data_offsets"]
    return TensorSpec(torch.uint8, (int(end) - int(start),))


def _read_into(file: FileIO, buffer: memoryview) -> None:
    """Fill a buffer; one system call gives at most 2 GB."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("the file ends too early")
        buffer = buffer[count:]
