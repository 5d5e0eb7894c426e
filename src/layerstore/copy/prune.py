"""``prune``: what nobody needs any more, in the graph root and of interrupted pulls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerstore import limits
from layerstore.copy import spool
from layerstore.graphroot import cleanup

if TYPE_CHECKING:
    from layerstore.graphroot.store import Store


def prune(
    store: Store,
    *,
    all_images: bool = False,
    grace_seconds: float = limits.UNUSED_LAYER_SECONDS,
    retired_seconds: float = limits.RETIRED_SECONDS,
) -> cleanup.Pruned:
    """Remove what ``cleanup.prune`` does, and the partial blobs that no pull is working on.

    What dead processes staged is removed whenever a store is opened for writing.
    """
    result = cleanup.prune(
        store,
        all_images=all_images,
        grace_seconds=grace_seconds,
        retired_seconds=retired_seconds,
    )
    partial = store.config.graph_root / spool.DIRECTORY
    before = _size(partial)
    spool.Spool(store.config.graph_root).expire(seconds=0.0)
    result.reclaimed += max(before - _size(partial), 0)
    return result


def _size(directory: Path) -> int:
    try:
        return sum(path.lstat().st_size for path in directory.iterdir())
    except OSError:
        return 0
