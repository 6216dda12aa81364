"""Writing safetensors files: by streams, whole or not at all, with a checksum where they are to be gone on from."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import FileFormatError, PathError
from .storage import DTYPE_NAMES, TensorFile, TensorSpec
from .whole import whole_file

CHECKSUM = "qrlora.sha256"  # of the whole file, with sixty-four zeros in the place of the checksum itself
CONTENT = "modelspec.hash_sha256"  # of the tensors' bytes alone, whatever the header says: "0x" and hex digits
_NO_CHECKSUM = "0" * 64
_BLOCK = 1 << 22


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    checksum: bool = False,
    content: bool = False,
) -> Path:
    """Write a safetensors file one tensor at a time; it appears whole or not at all.

    The bytes go to a temporary file in the same folder, are flushed to disk, and take the final name last. Whatever
    ends the writing early (an error, a cancel, a full disk) leaves nothing behind.

    Args:
        path: final name; parent folders are made.
        specs: dtype and shape of every tensor, in the order in which `tensors` will yield them.
        tensors: (key, tensor) pairs; each is converted to its spec's dtype and may be dropped after it was taken.
        metadata: strings for the header.
        overwrite: replace an existing file; otherwise it is an error, raised before anything is written.
        check: called with the temporary file before it takes its name; what it raises ends the writing.
        checksum: keep a SHA-256 of everything in the header, for `verify_checksum`.
        content: keep the tensors' `content_hash` in the header; one of the two.

    Returns:
        The path.

    Raises:
        PathError: the file exists, the folder cannot be written, or the disk has too little room.
        FileFormatError: `tensors` does not yield what `specs` announced.
    """
    path = Path(path)
    placeholder = {CHECKSUM: _NO_CHECKSUM} if checksum else {CONTENT: f"0x{_NO_CHECKSUM}"} if content else {}
    header = header_bytes(specs, {**placeholder, **{key: metadata[key] for key in metadata if key not in placeholder}})
    total = len(header) + sum(spec.nbytes for spec in specs.values())
    with whole_file(path, overwrite=overwrite, check=check) as file:
        free = shutil.disk_usage(path.parent).free
        if free < total:
            raise PathError(f"{path.name} needs {size_text(total)}, the disk has {size_text(free)} free")
        file.write(header)
        digest = hashlib.sha256(header if checksum else b"")
        written = _write_stream(file, specs, tensors, digest.update if placeholder else lambda data: None)
        if written != list(specs):
            raise FileFormatError(f"{path.name}: {len(written)} of {len(specs)} tensors were written")
        if placeholder:
            file.seek(header.index(_NO_CHECKSUM.encode()))
            file.write(digest.hexdigest().encode())
    return path


def content_hash(specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What a file of these tensors would have as CONTENT, without writing it.

    Raises:
        FileFormatError: `tensors` does not yield what `specs` announced.
    """
    digest = hashlib.sha256()
    for key, tensor in tensors:
        digest.update(_content(key, tensor, specs[key]))
    return f"0x{digest.hexdigest()}"


def verify_checksum(path: Path) -> bool:
    """Read a file from end to end and compare it with the checksum that it was written with.

    Returns:
        Whether it has one; files that were written without are taken as they are.

    Raises:
        FileFormatError: the content is not what was written, or the file cannot be read.
    """
    path = Path(path)
    try:
        metadata = TensorFile(path, skip_other=True).metadata
        stated = metadata.get(CHECKSUM, "").encode()
        if not stated:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(file.read(8 + length).replace(stated, _NO_CHECKSUM.encode(), 1))
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise FileFormatError(f"{path.name} cannot be read ({error})") from error
    if digest.hexdigest().encode() != stated:
        raise FileFormatError(f"{path.name} is damaged: its content does not match its checksum")
    return True


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file with these tensors, one after the other."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, spec in specs.items():
        entries[key] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def size_text(count: float) -> str:
    """A number of bytes in words, never rounded to nothing."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _write_stream(
    file: BinaryIO,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    on_data: Callable[[memoryview], None],
) -> list[str]:
    written: list[str] = []
    expected = iter(specs)
    for key, tensor in tensors:
        if key != next(expected, None):
            raise FileFormatError(f"tensor {key} was not announced at this place")
        content = _content(key, tensor, specs[key])
        file.write(content)
        on_data(content)
        written.append(key)
    return written


def _content(key: str, tensor: Tensor, spec: TensorSpec) -> memoryview:
    """A tensor's bytes as a file holds them."""
    if tuple(tensor.shape) != spec.shape:
        raise FileFormatError(f"tensor {key} {tuple(tensor.shape)} was not announced at this place")
    data = tensor.detach().to("cpu", spec.dtype).contiguous()
    return data.reshape(-1).view(torch.uint8).numpy().data
