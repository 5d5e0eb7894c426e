"""Names of the additional layer store's directory tree, and the node ids behind them.

``<root>/[<base64 of reference>/]<digest>/{diff,info,blob,use}``.  The reference
element is standard base64 with padding (containers/storage encodes with Go's
``base64.StdEncoding``); the digest element is the full text with the algorithm.

Node ids are computed, never handed out, so that nothing about the kernel's view
of the tree must be saved:

* ``1``: the root;
* bit 62 set: a *control node*; bits 0-1 tell which (reference directory, layer
  directory, ``info``, ``blob``), bits 2-61 are a hash of reference and name;
* else a node of a layer: entry number in bits 0-23, slot of the layer in bits
  24-43, and, for directories, the number of the view in bits 44-61.

The kernel must never see one directory node under two names, so directories
differ between the views of a layer; files are the same node in all of them,
which lets images share the kernel's cached pages.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
from typing import Final

from layerstore import limits
from layerstore.errors import InvalidDigest, InvalidReference
from layerstore.image import Digest, Reference

ROOT_NODE: Final = 1

_ENTRY_BITS: Final = limits.INDEX_ENTRY_BITS
_SLOT_BITS: Final = 20
_VIEW_BITS: Final = 18
_SLOT_SHIFT: Final = _ENTRY_BITS
_VIEW_SHIFT: Final = _ENTRY_BITS + _SLOT_BITS
_ENTRY_MASK: Final = (1 << _ENTRY_BITS) - 1
_SLOT_MASK: Final = (1 << _SLOT_BITS) - 1
_CONTROL: Final = 1 << 62
_HASH_MASK: Final = (1 << 60) - 1

SLOTS: Final = 1 << _SLOT_BITS
VIEWS: Final = 1 << _VIEW_BITS


class Control(enum.IntEnum):
    """Kinds of control nodes."""

    REFERENCE = 0
    LAYER = 1
    INFO = 2
    BLOB = 3


def reference_of(element: bytes) -> str:
    """The reference that a path element encodes, in its canonical text.

    Raises InvalidReference unless the element is exactly what a client writes.
    """
    try:
        text = base64.b64decode(element, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidReference("not the base64 of a reference") from error
    if not text or base64.b64encode(text.encode()) != element:
        raise InvalidReference("not the canonical base64 of a reference")
    if str(Reference.parse(text)) != text:
        raise InvalidReference("not a fully qualified reference", subject=text)
    return text


def element_of(reference: str) -> bytes:
    """The path element of a canonical reference text."""
    return base64.b64encode(reference.encode())


def directory_of(reference: str, name: Digest) -> str:
    """The directory of a layer, from the root on; ``reference`` is empty where names have none."""
    return f"{element_of(reference).decode()}/{name}" if reference else name


def digest_of(element: bytes) -> Digest:
    """The digest that a path element names; InvalidDigest if it names none."""
    try:
        text = element.decode("ascii")
    except UnicodeDecodeError as error:
        raise InvalidDigest("not a digest") from error
    return Digest.parse(text)


def name_hash(reference: str, name: str = "") -> int:
    """60 bits that identify a reference directory (``name`` empty) or a layer directory."""
    raw = hashlib.sha256(f"{reference}\0{name}".encode()).digest()
    return int.from_bytes(raw[:8], "big") & _HASH_MASK


def control_node(kind: Control, key: int) -> int:
    """The node id of a control node."""
    return _CONTROL | key << 2 | kind


def is_control(node: int) -> bool:
    """Whether the node is a reference or layer directory, ``info`` or ``blob``."""
    return bool(node & _CONTROL)


def control_of(node: int) -> tuple[Control, int]:
    """Kind and hash of a control node."""
    return Control(node & 3), node >> 2 & _HASH_MASK


def layer_node(slot: int, entry: int, view: int = 0) -> int:
    """The node id of an entry of a layer; ``view`` only for directories."""
    return view << _VIEW_SHIFT | slot << _SLOT_SHIFT | entry


def layer_of(node: int) -> tuple[int, int, int]:
    """Slot, entry number and view of a node in a layer."""
    return node >> _SLOT_SHIFT & _SLOT_MASK, node & _ENTRY_MASK, node >> _VIEW_SHIFT
