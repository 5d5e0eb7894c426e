"""How a layer's deletions are written down, in archives and in ``diff``."""

from __future__ import annotations

import enum
from typing import Final

WHITEOUT_PREFIX: Final = b".wh."
OPAQUE_MARKER: Final = b".wh..wh..opq"

_ALL_IDS: Final = ["0", "0", "4294967295"]


class WhiteoutStyle(enum.Enum):
    """How a deletion is written down in ``diff``."""

    OVERLAY = "overlay"  # character device 0:0, trusted.overlay.opaque
    USERXATTR = "userxattr"  # the same with user.overlay.opaque: rootless
    AUFS = "aufs"  # the names of the archive: .wh.NAME, for fuse-overlayfs


def in_user_namespace() -> bool:
    """Say whether this process runs in a user namespace other than the machine's first."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            return file.read().split() != _ALL_IDS
    except OSError:
        return False
