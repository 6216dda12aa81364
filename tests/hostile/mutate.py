"""Damaged and hostile versions of good files: every change is drawn from a random.Random, so that a seed is a case."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]

NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", " ", "\0", "\n", "nan", "inf", "-1", "1e999", "0x10", "null", "[]", "{}", "\u0661\u0662", "\ud800", "\u202e"),
    *("..", "../../x", "/etc/passwd", "C:\\x", "CON", "a" * 300, "9" * 5000, "%s%n{0}", "delta_r", "qr", "lora"),
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4", "Q", "")
# NaN, infinity and the largest numbers, as they lie in files
WORDS = (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\x7e", b"\0\x7c", b"\xff\xff\xff\xff", b"\0" * 4)
LAYERS = (
    *("transformer_blocks.0.attn.to_q", "transformer_blocks.9999.ff.net.2", "single_transformer_blocks.0.attn.to_v"),
    *("transformer_blocks.00.attn.to_q", "transformer_blocks.-1.attn.to_q", "transformer_blocks." + "9" * 5000, "x"),
)


def safetensors(content: bytes, draw: random.Random) -> bytes:
    """One to three changes of a safetensors file; half of them keep it a readable one."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = draw.choice(_FILES)(content, draw)
    return content


def text(content: bytes, draw: random.Random) -> bytes:
    """One to three changes of a text file: JSON, JSON lines or TOML."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        content = draw.choice(_TEXTS)(content, draw)
    return content


def anything(content: bytes, draw: random.Random) -> bytes:
    """One to three changes of bytes, whatever they are."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        content = draw.choice(_BYTES)(content, draw)
    return content


def value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value, most of them unlikely where they come to lie."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind < 4:
        return draw.choice(TEXTS)
    if kind == 4:
        return draw.choice((None, True, False))
    if kind == 5:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return {draw.choice(TEXTS): value(draw, depth + 1) for _ in range(draw.randrange(3))}
    return _nested(draw.choice((50, 900)))


def split(content: bytes) -> tuple[Header, bytes] | None:
    """Header and data, None when there is no header any more."""
    if len(content) < 8:
        return None
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8:
        return None
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, content[8 + length :]) if isinstance(header, dict) else None


def joined(header: Any, data: bytes) -> bytes:
    """A file of a header and data, written as json writes it: NaN, Infinity and lone surrogates included."""
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + data


def _nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def _with_header(change: Callable[[Header, random.Random], Any]) -> Callable[[bytes, random.Random], bytes]:
    """A change of the header's table. Half of them also take the checksum away: else it is all that is ever tested."""

    def mutate(content: bytes, draw: random.Random) -> bytes:
        parts = split(content)
        if parts is None:
            return content
        header, data = parts
        metadata = header.get("__metadata__")
        if isinstance(metadata, dict) and draw.random() < 0.5:
            metadata.pop("qrlora.sha256", None)
        changed = change(header, draw)
        return joined(header if changed is None else changed, data)

    return mutate


def _entry(header: Header, draw: random.Random) -> Header:
    """One tensor's entry, or an empty table when there is none."""
    entries = [entry for key, entry in header.items() if key != "__metadata__" and isinstance(entry, dict)]
    return draw.choice(entries) if entries else {}


def _dtype(header: Header, draw: random.Random) -> None:
    _entry(header, draw)["dtype"] = draw.choice((*DTYPES, value(draw)))


def _shape(header: Header, draw: random.Random) -> None:
    entry = _entry(header, draw)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or draw.random() < 0.2:
        entry["shape"] = draw.choice(([], [0], [0, 2**40], [1, -1], [2**63, 2], value(draw)))
        return
    kind = draw.randrange(4)
    if kind == 0:
        shape.reverse()  # the length stays right
    elif kind == 1:
        shape.insert(draw.randrange(len(shape) + 1), 1)
    elif kind == 2:
        entry["shape"] = [_product(shape)]
    else:
        shape[draw.randrange(len(shape))] = draw.choice((*NUMBERS, "4", None))


def _product(numbers: list[Any]) -> int:
    result = 1
    for number in numbers:
        result *= number if isinstance(number, int) else 1
    return result


def _offsets(header: Header, draw: random.Random) -> None:
    entry = _entry(header, draw)
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or not offsets or draw.random() < 0.2:
        entry["data_offsets"] = draw.choice(([], [0], [0, 0], [0, 2**63], [-4, 4], value(draw)))
        return
    place = draw.randrange(len(offsets))
    if isinstance(offsets[place], int):
        offsets[place] += draw.choice((-4, -1, 1, 4, 64, 2**32, 2**62))


def _exchange(header: Header, draw: random.Random) -> None:
    """Two tensors change places: both whole, both under the other's name."""
    keys = [key for key in header if key != "__metadata__"]
    if len(keys) > 1:
        one, other = draw.sample(keys, 2)
        header[one], header[other] = header[other], header[one]


def _drop(header: Header, draw: random.Random) -> None:
    keys = list(header)
    if keys:
        del header[draw.choice(keys)]


def _rename(header: Header, draw: random.Random) -> None:
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return
    key = draw.choice(keys)
    entry = header.pop(key)
    kind = draw.randrange(4)
    if kind == 0:
        name = draw.choice(TEXTS)
    elif kind == 1:
        name = key.replace("transformer_blocks.0.attn.to_q", draw.choice(LAYERS))
    elif kind == 2:
        name = key + draw.choice((".x", "\0", ".weight", "." + "9" * 400))
    else:
        place = draw.randrange(len(key) + 1)
        name = key[:place] + draw.choice(TEXTS) + key[place + 1 :]
    header[name] = entry


def _double(header: Header, draw: random.Random) -> None:
    """A tensor under two names, in the same bytes."""
    keys = [key for key in header if key != "__metadata__"]
    if keys:
        header[draw.choice(("x", "transformer." + draw.choice(LAYERS) + ".alpha", "q.weight"))] = header[
            draw.choice(keys)
        ]


def _metadata(header: Header, draw: random.Random) -> None:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not metadata or draw.random() < 0.15:
        header["__metadata__"] = draw.choice((None, [], {}, {"format": "pt"}, value(draw)))
        return
    key = draw.choice(list(metadata))
    held = metadata[key]
    if isinstance(held, str) and held.startswith("{") and draw.random() < 0.7:
        metadata[key] = text(held.encode(), draw).decode("utf-8", errors="replace")  # JSON in a header
    elif draw.random() < 0.3:
        metadata.pop(key)
    else:
        metadata[key] = draw.choice((*TEXTS, value(draw)))


def _whole_header(header: Header, draw: random.Random) -> Any:
    return draw.choice((value(draw), [header], {}, {"__metadata__": header}, {"a": {"b": header}}))


def _header_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bits of the header: its length, its JSON."""
    (length,) = struct.unpack("<Q", content[:8]) if len(content) >= 8 else (0,)
    end = min(len(content), 8 + length)
    return _flip(content, draw, end) if end else content


def _deep_header(content: bytes, draw: random.Random) -> bytes:
    """JSON that is deeper than any reader's stack, at the very beginning or in a shape."""
    depth = draw.choice((100, 2_000, 60_000))
    written = b'{"x":' * depth + b"1" + b"}" * depth if draw.random() < 0.5 else b"[" * depth + b"]" * depth
    if draw.random() < 0.5:
        written = b'{"a":{"dtype":"F32","shape":' + written + b',"data_offsets":[0,4]}}'
    return struct.pack("<Q", len(written)) + written + content[-64:]


def _double_key(content: bytes, draw: random.Random) -> bytes:
    """A key twice in the header: readers that take the first and readers that take the last disagree."""
    parts = split(content)
    if parts is None or len(parts[0]) < 2:
        return content
    header, data = parts
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return content
    key = draw.choice(keys)
    other = json.dumps({key: header[draw.choice(keys)]})[1:-1]
    written = (json.dumps(header)[:-1] + "," + other + "}").encode()
    return struct.pack("<Q", len(written)) + written + data


def _flip(content: bytes, draw: random.Random, end: int = 0) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 16))):
        changed[draw.randrange(end or len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice((draw.randrange(len(content) + 1), max(0, len(content) - draw.randrange(1, 9))))]


def _append(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice((b"\0", b"\0" * 100, b"{", content[:100], draw.randbytes(8)))


def _word(content: bytes, draw: random.Random) -> bytes:
    """NaN, infinity or a huge number in the data, which the last half of a file mostly is."""
    if len(content) < 32:
        return content
    place = draw.randrange(len(content) // 2, len(content) - 4) & ~3
    word = draw.choice(WORDS)
    return content[:place] + word + content[place + len(word) :]


def _zeros(content: bytes, draw: random.Random) -> bytes:
    """A hole, as a file system leaves it behind after a power cut."""
    start = draw.randrange(len(content) + 1)
    length = draw.choice((1, 64, 512, 4096))
    return content[:start] + b"\0" * len(content[start : start + length]) + content[start + length :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.randbytes(draw.choice((1, 4, 64))) + content[place:]


def _json_value(content: bytes, draw: random.Random) -> bytes:
    """Another value somewhere in the JSON of a file or of one of its lines."""
    lines = content.split(b"\n") if content.count(b"\n{") else [content]
    place = draw.randrange(len(lines))
    try:
        table = json.loads(lines[place])
    except (ValueError, RecursionError):
        return content
    lines[place] = json.dumps(_changed(table, draw)).encode()
    return b"\n".join(lines)


def _changed(held: Any, draw: random.Random) -> Any:
    if isinstance(held, dict) and held and draw.random() < 0.85:
        key = draw.choice(list(held))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: one for name, one in held.items() if name != key}
        if kind == 1:
            return {**held, draw.choice(TEXTS): value(draw)}
        return {**held, key: _changed(held[key], draw)}
    if isinstance(held, list) and held and draw.random() < 0.85:
        place = draw.randrange(len(held))
        return [*held[:place], _changed(held[place], draw), *held[place + 1 :]]
    return value(draw)


def _deep_text(content: bytes, draw: random.Random) -> bytes:
    depth = draw.choice((1_000, 100_000))
    deep = draw.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    place = content.find(b":") if draw.random() < 0.7 else -1
    return deep if place < 0 else content[: place + 1] + deep + content[place + 1 :]


def _long_number(content: bytes, draw: random.Random) -> bytes:
    """A digit becomes very many."""
    places = [index for index, byte in enumerate(content) if 48 <= byte < 58]
    if not places:
        return content
    place = draw.choice(places)
    number = draw.choice((b"9" * 400, b"9" * 5000, b"1e999999", b"0x" + b"f" * 5000, b"1_0", b"-0", b"1e-400", b"08"))
    return content[:place] + number + content[place + 1 :]


_BYTES = (_flip, _truncate, _append, _zeros, _insert, _word)
_FILES = (
    *(
        _flip,
        _truncate,
        _append,
        _zeros,
        _insert,
        _word,
        _word,
        _header_bytes,
        _header_bytes,
        _deep_header,
        _double_key,
    ),
    *map(_with_header, (_dtype, _shape, _shape, _offsets, _exchange, _drop, _rename, _double, _metadata, _metadata)),
    _with_header(_whole_header),
)
_TEXTS = (_flip, _truncate, _insert, _json_value, _json_value, _json_value, _deep_text, _long_number)
