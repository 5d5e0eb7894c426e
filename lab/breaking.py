"""Breaking valid bytes at random, as `lab.fuzz` does it to layers.

Bytes are flipped, cut, repeated and exchanged; in JSON also whole values, so that what is broken
gets past the decoder; in tar archives the checksums of headers are made right again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

Mutation = Callable[[random.Random, bytes], bytes]

_NUMBERS: Final = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63)
_INTERESTING: Final[tuple[Any, ...]] = (
    None, True, -1, 0, 1, 511, 512, 1 << 31, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, 1.5,
    1e308, "", "0", "a", "..", "../..", "/", ".", "a/../../b", "a" * 300, "a/" * 3000, "\0", "\ufffd",
    "\ud800", "dir", "reg", "chunk", "hardlink", "symlink", "char", "block", "fifo", "zeros",
    ".wh.a", ".wh..wh..opq", ".wh.", ".no.prefetch.landmark", ".prefetch.landmark",
    "stargz.index.json", "\u00e9", "sha256:" + "0" * 64, "sha512:" + "0" * 128, "sha256:", "9999-12-31T23:59:59Z",
    "0000-00-00T00:00:00Z", "2024-01-02T03:04:05.123456789+14:00", "AA==", "=", [], {}, [[]],
    {"user.a": "AA=="}, {"": ""}, {"security.capability": "AQAAAg=="},
)  # fmt: skip


def break_bytes(chooser: random.Random, data: bytes) -> bytes:
    """Change some bytes, or how many there are."""
    out = bytearray(data)
    if not out:
        return chooser.randbytes(chooser.randrange(64))
    at = chooser.randrange(len(out))
    length = chooser.choice((1, 1, 2, 4, 8, 64, 512, len(out) // 2 + 1))
    match chooser.randrange(9):
        case 0:
            out[at] ^= 1 << chooser.randrange(8)
        case 1:
            out[at : at + length] = chooser.randbytes(length)
        case 2:
            del out[at : at + length]
        case 3:
            out[at:at] = out[at : at + length] * chooser.choice((1, 1, 2, 20))
        case 4:
            del out[at:]
        case 5:
            width = chooser.choice((1, 2, 4, 8))
            value = chooser.choice(_NUMBERS) & ((1 << 8 * width) - 1)
            out[at : at + width] = value.to_bytes(width, chooser.choice(("little", "big")))
        case 6:
            other = chooser.randrange(len(out))
            out[at : at + length] = out[other : other + length]
        case 7:
            out[at : at + length] = bytes([chooser.choice((0, 0x20, 0x30, 0x37, 0xFF))]) * length
        case _:
            digits = [n for n, byte in enumerate(out) if 0x30 <= byte <= 0x39]
            if digits:
                out[chooser.choice(digits)] = chooser.choice(b"0123456789-.eE \0")
    return bytes(out)


def break_json(chooser: random.Random, data: bytes) -> bytes:
    """Change values, keys and elements of a document; now and then its bytes."""
    if chooser.random() < 0.1:
        return break_bytes(chooser, data)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return break_bytes(chooser, data)
    for _ in range(chooser.choice((1, 1, 2, 5))):
        _break_value(chooser, document)
    return json.dumps(document, ensure_ascii=chooser.random() < 0.9).encode(errors="surrogatepass")


def _break_value(chooser: random.Random, document: Any) -> None:
    found = document
    while True:  # down to some container
        inner = (
            list(found.values())
            if isinstance(found, dict)
            else found
            if isinstance(found, list)
            else []
        )
        inner = [one for one in inner if isinstance(one, dict | list)]
        if not inner or chooser.random() < 0.1:
            break
        found = chooser.choice(inner)
    if isinstance(found, list):
        _break_list(chooser, found)
    elif isinstance(found, dict):
        _break_object(chooser, found)


def _break_list(chooser: random.Random, found: list[Any]) -> None:
    at = chooser.randrange(len(found) + 1)
    match chooser.randrange(4):
        case 0 if found:
            found.insert(at, deepcopy(chooser.choice(found)))
        case 1 if found:
            found.pop(min(at, len(found) - 1))
        case 2 if found:
            other = chooser.randrange(len(found))
            at = min(at, len(found) - 1)
            found[at], found[other] = found[other], found[at]
        case _:
            found.insert(at, deepcopy(chooser.choice(_INTERESTING)))


def _break_object(chooser: random.Random, found: dict[str, Any]) -> None:
    key = chooser.choice([*found, *_KEYS])
    value = found.get(key)
    match chooser.randrange(4):
        case 0:
            found.pop(key, None)
        case 1 if isinstance(value, int):
            found[key] = value + chooser.choice((-512, -1, 1, 512, value, 1 << 40))
        case 2 if isinstance(value, str):
            at = chooser.randrange(len(value) + 1)
            found[key] = (
                value[:at] + chooser.choice(("", "/", "x", "\0", "..", value)) + value[at + 1 :]
            )
        case _:
            found[key] = deepcopy(chooser.choice(_INTERESTING))


_KEYS: Final = (
    "name", "type", "size", "modtime", "linkName", "mode", "uid", "gid", "offset", "endOffset",
    "devMajor", "devMinor", "xattrs", "digest", "chunkOffset", "chunkSize", "chunkDigest",
    "chunkType", "innerOffset", "nameRaw", "linkNameRaw", "version", "entries", "tarSplitDigest",
)  # fmt: skip


def break_lines(chooser: random.Random, data: bytes) -> bytes:
    """One document a line: change one of them, or their order."""
    lines = data.split(b"\n")
    at = chooser.randrange(len(lines))
    match chooser.randrange(4):
        case 0:
            lines.insert(at, chooser.choice(lines))
        case 1:
            del lines[at]
        case _:
            lines[at] = break_json(chooser, lines[at])
    return b"\n".join(lines)


def break_tar(chooser: random.Random, data: bytes) -> bytes:
    """As ``break_bytes``, the checksums of the headers made right again most times."""
    broken = bytearray(break_bytes(chooser, data))
    if chooser.random() < 0.8:
        for at in range(0, len(broken) - 511, 512):
            if broken[at + 257 : at + 262] == b"ustar":
                broken[at + 148 : at + 156] = b" " * 8
                broken[at + 148 : at + 156] = b"%06o\0 " % sum(broken[at : at + 512])
    return bytes(broken)
