"""A layer that is extracted and verified, and waits to be committed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from layerstore.formats import Compression
from layerstore.image import Digest

DIFF: Final = "diff"
TAR_SPLIT: Final = "tar-split.gz"


class StagedLayer(msgspec.Struct, frozen=True):
    """One extracted, verified, not yet committed layer.

    ``directory`` holds ``diff/`` and ``tar-split.gz``.  ``diff_id`` and ``diff_size`` are those
    of the tar stream, ``blob_digest`` and ``blob_size`` those of the blob as it came; all are
    computed.  ``uids`` and ``gids`` are sorted and leave whiteouts out.  ``root_entry`` says
    that the archive itself gave the root directory owner, mode and time; otherwise ``diff`` has
    those of its making (0755, ours), and the one who commits gives it the parent's.
    """

    directory: Path
    diff_id: Digest
    diff_size: int
    blob_digest: Digest
    blob_size: int
    compression: Compression
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    root_entry: bool
