"""Layer records that a client forgot, made again as soon as its pull is over.

Podman >= 5.5 and CRI-O >= 1.33 never write the records of layers from additional layer
stores (``graphroot.repair`` has the story).  A client lets go of its lookup handles at the
end of a pull; a moment later the graph roots of the configuration are looked through, in a
thread of its own.  Where nothing is missing, that is a reading of two small files; where nothing was
written since, not even that.

What is missing is made again by a process of its own (this module, as a program), because that reads
from the store's mount.  A server must never do so: killed in the middle, it could not end before
somebody had answered it, and nobody may before it has ended.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from layerstore import limits
from layerstore.errors import LayerstoreError
from layerstore.service.child import interpreter
from layerstore.service.options import LOG_FORMAT

if TYPE_CHECKING:
    from layerstore.graphroot.store import Store

_log = logging.getLogger(__name__)


class RecordRepair:
    """Watches over ``graph_roots``; ``released`` may be called from any thread, and is quick.

    ``image_stores``: see ``graph_root_store``.
    """

    def __init__(
        self,
        graph_roots: Sequence[Path],
        image_stores: Sequence[Path] = (),
        *,
        quiet_seconds: float = limits.REPAIR_QUIET_SECONDS,
    ) -> None:
        self._roots: Final = tuple(graph_roots)
        self._stores: Final = tuple(image_stores)
        self._quiet = quiet_seconds
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._failed: dict[str, str] = {}  # image -> what was said of it already
        self.rebuilt = 0
        """Layer records made again since the start."""
        self._thread = threading.Thread(target=self._run, name="record-repair", daemon=True)
        if self._roots:
            self._thread.start()

    def released(self) -> None:
        """A client let go of a layer: perhaps the end of a pull."""
        self._wanted.set()

    def close(self) -> None:
        """Begin nothing more.  A process that is at work goes on by itself."""
        self._closed.set()
        self._wanted.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wanted.wait()
            # All handles of a pull are released one after the other.
            until = time.monotonic() + limits.REPAIR_PATIENCE_SECONDS
            while self._wanted.is_set() and time.monotonic() < until:
                self._wanted.clear()
                if self._closed.wait(self._quiet):
                    return
            for root in self._roots:
                self._look_through(root)

    def _look_through(self, root: Path) -> None:
        try:
            self.rebuilt += self._repair(root)
        except (LayerstoreError, OSError, subprocess.SubprocessError) as error:
            self._complain(str(root), str(error))
        except Exception:
            _log.exception("event=record-repair-failed subject=%s", root)

    def _repair(self, root: Path) -> int:
        # Most services never come here: their memory is not to pay for it.
        from layerstore.graphroot import repair  # noqa: PLC0415

        store = graph_root_store(root, self._stores)
        if store is None or not repair.needs_rebuilding(store.images(), store.layer_areas):
            return 0
        done = subprocess.run(
            interpreter(__name__, [str(root), *map(str, self._stores)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=limits.REPAIR_RUN_SECONDS,
            check=True,
        )
        count = 0
        for line in done.stdout.splitlines():
            image, made, error = json.loads(line)
            count += made
            if error:
                self._complain(image, error)
            elif made:
                _log.info(
                    "event=records-rebuilt graph_root=%s image=%s layers=%d", root, image, made
                )
        return count

    def _complain(self, subject: str, error: str) -> None:
        """Once for each thing that is said."""
        if self._failed.get(subject) == error:
            return
        if len(self._failed) >= limits.REPAIR_COMPLAINTS:
            self._failed.clear()
        self._failed[subject] = error
        _log.warning("event=record-repair-failed subject=%s error=%s", subject, error)


def graph_root_store(root: Path, image_stores: Sequence[Path]) -> Store | None:
    """The graph root as it is; nothing is made where none is.

    ``image_stores`` may hold layers of its images, as those of ``storage.conf`` may if the graph
    root is that file's.
    """
    from layerstore.graphroot.storageconf import StorageConfig  # noqa: PLC0415
    from layerstore.graphroot.store import Store  # noqa: PLC0415

    if not (root / "overlay-images" / "images.json").exists():
        return None
    config = StorageConfig.from_system()
    if config.graph_root != root:
        # Only the run root's mount counts are missing, and records need none.
        config = StorageConfig(graph_root=root, run_root=root / "layerstore" / "no-run-root")
    stores = tuple(dict.fromkeys((*config.additional_image_stores, *image_stores)))
    return Store(replace(config, additional_image_stores=stores))


def main() -> None:
    """``python -m layerstore.service.recordrepair GRAPHROOT [IMAGESTORE...]``: JSON lines.

    One for each image, a list: image, how many records were made again, why it failed or nothing.
    """
    from layerstore.graphroot import repair  # noqa: PLC0415

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    root, *image_stores = map(Path, sys.argv[1:])
    store = graph_root_store(root, image_stores)
    if store is None:
        return
    for image in repair.needs_rebuilding(store.images(), store.layer_areas):
        try:
            made, error = len(repair.rebuild_image(store.layer_areas, image)), ""
        except LayerstoreError as failed:
            made, error = 0, str(failed)
        print(json.dumps([image.id, made, error]))


if __name__ == "__main__":
    main()
