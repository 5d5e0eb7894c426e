"""Names of a layer's entries: exact bytes, cleaned the way every TOC reader cleans them.

A TOC carries the path as it stood in the tar stream (``./etc/``, ``/etc``,
``etc``); readers drop a leading ``/``, ``.`` components and a trailing ``/``, and
take the empty result as the root (stargz-snapshotter ``estargz``,
``cleanEntryName``).  Unlike Go's ``path.Clean`` a ``..`` component is refused
here: no honest builder writes one.
"""

from __future__ import annotations

import binascii
from typing import Final

from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.limits import NAME_BYTES, PATH_BYTES, PATH_DEPTH, SYMLINK_BYTES

WHITEOUT_PREFIX: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"
META_PREFIX: Final = b".wh..wh."  # AUFS bookkeeping

LANDMARK: Final = b".prefetch.landmark"
NO_LANDMARK: Final = b".no.prefetch.landmark"
TOC_NAME: Final = b"stargz.index.json"
HIDDEN_IN_ROOT: Final = frozenset((LANDMARK, NO_LANDMARK, TOC_NAME))

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_SUBJECT_CHARS: Final = 256


def subject_of(name: str) -> str:
    """``name`` short enough for a log line."""
    return name if len(name) <= _SUBJECT_CHARS else name[:_SUBJECT_CHARS] + "..."


def exact_bytes(text: str, raw: str, subject: str) -> bytes:
    """The bytes of a name: ``raw`` (base64) where given, else ``text`` in UTF-8.

    Raises UnsupportedFormat for a name whose bytes the TOC's writer lost, and
    InvalidLayer for one that cannot be decoded.
    """
    if raw:
        try:
            return binascii.a2b_base64(raw, strict_mode=True)
        except ValueError as error:
            raise InvalidLayer("the raw name is not base64", subject=subject) from error
    if _REPLACEMENT in text:
        raise UnsupportedFormat(
            "the TOC has lost the bytes of a name that is not UTF-8",
            subject=subject,
            advice="convert the image with layerstore, which keeps such names",
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidLayer("the name is not valid Unicode", subject=subject) from error


def clean_path(path: bytes, subject: str) -> bytes:
    """``path`` relative to the root, without empty and ``.`` components; ``b""`` is the root.

    Raises InvalidLayer for NUL and ``..``, LimitExceeded for a path that is too
    long or too deep.  The length of each component is the walker's to check.
    """
    if b"\0" in path:
        raise InvalidLayer("a name contains NUL", subject=subject)
    if len(path) > PATH_BYTES:
        # "./././" may be long and harmless, but no builder writes it.
        raise LimitExceeded(f"a path of more than {PATH_BYTES} bytes", subject=subject)
    if path[-1:] == b"/":
        path = path[:-1]
    if path[:1] == b"/" or path[-1:] in (b"/", b".") or b"./" in path or b"//" in path:
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise InvalidLayer("a path leaves the layer by '..'", subject=subject)
        path = b"/".join(parts)
    if path.count(b"/") >= PATH_DEPTH:
        raise LimitExceeded(f"a path of more than {PATH_DEPTH} components", subject=subject)
    return path


def check_component(name: bytes, subject: str) -> None:
    """Raise LimitExceeded for a name that no file system could hold."""
    if len(name) > NAME_BYTES:
        raise LimitExceeded(f"a name of more than {NAME_BYTES} bytes", subject=subject)


def check_symlink(target: bytes, subject: str) -> None:
    """Raise for a text that cannot be the target of a symbolic link."""
    if not target or b"\0" in target:
        raise InvalidLayer(
            "the target of the symbolic link is empty or contains NUL", subject=subject
        )
    if len(target) > SYMLINK_BYTES:
        raise LimitExceeded(f"a symbolic link of more than {SYMLINK_BYTES} bytes", subject=subject)
