"""``layerstore diff``."""

from __future__ import annotations

import os
import sys

from layerstore.cli.common import STORAGE, Json, StorageFlags, print_json
from layerstore.errors import UsageError
from layerstore.graphroot.changes import changes
from layerstore.graphroot.describe import image_or_container
from layerstore.graphroot.images import Image

_KINDS = {"C": "changed", "A": "added", "D": "deleted"}


def diff(name: str, /, *, json: Json = False, storage: StorageFlags = STORAGE) -> None:
    """List the files that the top layer of an image, or a container, changes.

    A: added, C: changed, D: deleted.
    """
    store = storage.open(read_only=True)
    owner = image_or_container(store, name)
    top = owner.top_layer if isinstance(owner, Image) else owner.layer_id
    if not top:
        raise UsageError("the image has no layers", subject=name)
    layer = store.layer(top)
    found = changes(layer.diff_path, layer.lower_dirs, by_program=store.mounts_by_program)
    if json:
        report: dict[str, list[str]] = {kind: [] for kind in _KINDS.values()}
        for change in found:
            report[_KINDS[change.kind]].append(change.path.decode(errors="replace"))
        print_json(report)
        return
    sys.stdout.flush()
    for change in found:
        # Names need not be text.
        sys.stdout.buffer.write(b"%s %s\n" % (os.fsencode(change.kind), change.path))
    sys.stdout.buffer.flush()
