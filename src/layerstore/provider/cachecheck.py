"""Looking for damage in everything that the store keeps, and mending it.

Whatever is found wrong is not used any more from that moment: file contents are verified
before their next use, pieces of blobs are forgotten, indexes are opened anew, which builds a
damaged one again.  A repair does at once what the next use would do, and removes leftovers.

Until a layer is complete no digest covers the bytes of its blob outside the contents of files
(headers, padding, the TOC): they are not used before the whole blob was verified.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from layerstore import limits
from layerstore.content import ObjectStore
from layerstore.content.audit import forget_wrong_chunks, stored_files
from layerstore.errors import LayerstoreError, ServiceError, StorageError, UnknownObject
from layerstore.formats.checkpoints import Checkpoints
from layerstore.formats.members import Packing
from layerstore.image import Digest
from layerstore.layertree import LayerIndex
from layerstore.provider.layers import Layers
from layerstore.provider.loader import Loader
from layerstore.provider.misplaced import misplaced, no_files, remove
from layerstore.provider.state import LayerRecord, State

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """What a check looks through."""

    root: Path
    state: State
    objects: ObjectStore
    loader: Loader
    layers: Layers


@dataclasses.dataclass(slots=True)
class Damage:
    """``kind`` is object, partial, blob, bitmap, index, checkpoints, toc, state or leftover.

    ``repaired`` says what was done about it; it is empty where it remains.
    """

    kind: str
    subject: str
    detail: str
    repaired: str = ""


class Checks:
    """The check that was begun last; one runs at a time.  Thread-safe."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._current: tuple[str, _Check] | None = None

    def start(self, *, repair: bool) -> str:
        """Begin a check; its id.  Raises ServiceError while another one runs."""
        with self._lock:
            if self._current is not None and not self._current[1].finished.is_set():
                raise ServiceError("a check of the cache runs already")
            job = str(next(self._numbers))
            self._current = job, _Check(self._place, repair=repair)
        return job

    def status(self, job: str) -> dict[str, object]:
        """How far it is, in bytes that are read, and what was found.  Raises UnknownObject."""
        return self._check(job).status()

    def cancel(self, job: str) -> None:
        """End it soon.  Raises UnknownObject."""
        self._check(job).cancelled = True

    def close(self) -> None:
        """End what runs."""
        if self._current is not None:
            self._current[1].cancelled = True
            self._current[1].finished.wait(1.0)

    def _check(self, job: str) -> _Check:
        current = self._current
        if current is None or current[0] != job:
            raise UnknownObject("no such check", subject=job)
        return current[1]


class _Check:
    def __init__(self, place: Place, *, repair: bool) -> None:
        self._place = place
        self._repair = repair
        self.cancelled = False
        self.finished = threading.Event()
        self._error = ""
        self._found: list[Damage] = []
        self._more = 0
        self._layers = 0
        self._objects = 0
        self._total = 0
        self._done = 0
        threading.Thread(target=self._run, name="check", daemon=True).start()

    def status(self) -> dict[str, object]:
        return {
            "done": self.finished.is_set(),
            "error": self._error,
            "checked_bytes": self._done,
            "total_bytes": max(self._total, self._done),
            "layers": self._layers,
            "objects": self._objects,
            "findings": [dataclasses.asdict(one) for one in list(self._found)],
            "more_findings": self._more,
        }

    def _run(self) -> None:
        try:
            self._measure()
            self._check_state()
            unknown = self._partial_names()
            directories = list((self._place.root / "layers").iterdir())
            for record in self._place.state.layers():
                self._check_layer(record, unknown)
            self._check_objects()
            self._check_leftovers(unknown, directories)
        except (LayerstoreError, OSError) as error:
            self._error = str(error)
        except Exception as error:
            _log.exception("the check of the cache failed")
            self._error = f"unexpected failure, see the log: {error}"
        finally:
            self.finished.set()

    def _advance(self, size: int) -> None:
        self._done += size
        if self.cancelled:
            raise ServiceError("the check was cancelled")

    def _measure(self) -> None:
        for record in self._place.state.layers():
            blob = self._place.loader.directory(record.slot) / "blob"
            if blob.exists():
                self._total += min(record.size, blob.stat().st_blocks * 512)
        self._total += sum(file.size for file in stored_files(self._place.root / "content"))

    def _tell(self, kind: str, subject: str, detail: str, mend: Callable[[], str]) -> None:
        damage = Damage(kind, subject, detail)
        if self._repair:
            try:
                damage.repaired = mend()
            except (LayerstoreError, OSError) as error:
                damage.detail += f"; it cannot be repaired now: {error}"
        _log.info(
            "event=cache-damaged kind=%s subject=%s repaired=%s error=%s",
            kind, subject, damage.repaired or "-", damage.detail,
        )  # fmt: skip
        if len(self._found) < limits.CHECK_FINDINGS:
            self._found.append(damage)
        else:
            self._more += 1

    # -- state -----------------------------------------------------------------------

    def _check_state(self) -> None:
        state = self._place.state
        for detail in state.problems():
            self._tell("state", "state.sqlite", detail, _not_now)
        for key in state.odd_views():
            self._tell(
                "state", f"view {key}", "name, key and layer do not belong together",
                partial(self._drop_view, key),
            )  # fmt: skip
        for digest in state.wrong_documents():
            self._tell(
                "state", digest, "the stored document has another digest",
                partial(self._drop_document, digest),
            )  # fmt: skip

    def _drop_view(self, key: int) -> str:
        self._place.state.drop_odd_view(key)
        return "removed, to be looked up again"

    def _drop_document(self, digest: Digest) -> str:
        self._place.state.drop_document(digest)
        return "removed, to be fetched again"

    # -- layers ----------------------------------------------------------------------

    def _check_layer(self, record: LayerRecord, unknown: set[str]) -> None:
        if record.quarantine:
            return
        self._layers += 1
        layers = self._place.layers
        odd = list(misplaced(self._place.loader.directory(record.slot)))
        if odd:
            layers.reopen(record.slot)
            self._tell_misplaced(odd)
        if odd and not self._repair:
            unknown.clear()  # they may be its own
            return  # without its files nothing can be said about the rest
        damaged = list(self._wrong_files(record))
        if damaged:
            layers.reopen(record.slot)
        for kind, detail in damaged:
            mend = self._refetch if kind == "bitmap" else self._rebuild
            self._tell(kind, record.blob_digest, detail, partial(mend, record))
        if any(kind in ("index", "checkpoints") for kind, _ in damaged) and not self._repair:
            unknown.clear()  # they may be its own
            return  # without them nothing can be said about the rest
        try:
            layer = layers.open(record.slot)
            wrong = layers.check_blob(record.slot, self._advance)
        except StorageError as error:
            if not damaged:
                self._tell("blob", record.blob_digest, str(error), _not_now)
            unknown.clear()
            return
        if wrong:
            self._tell("blob", record.blob_digest, wrong, partial(self._refetch, record))
        for entry in range(layer.index.entries if unknown else 0):
            content = layer.index.content(entry)
            if content is None or content.plain or content.key.hex() not in unknown:
                continue
            unknown.discard(content.key.hex())
            count = forget_wrong_chunks(self._place.objects, layer.index, content)
            if count:
                self._tell(
                    "partial", content.key.hex(), f"{count} chunks are wrong",
                    lambda: "forgotten, to be made anew",
                )  # fmt: skip

    def _tell_misplaced(self, paths: Iterable[Path]) -> None:
        for path in paths:
            what = "a directory" if path.is_dir() else "no file"
            self._tell("leftover", str(path), f"it is {what}", _remover(path))

    def _rebuild(self, record: LayerRecord) -> str:
        self._place.layers.rebuild(record)
        return "built anew"

    def _refetch(self, record: LayerRecord) -> str:
        self._place.layers.complete(record.slot)
        return "forgotten, to be fetched again"

    def _wrong_files(self, record: LayerRecord) -> Iterator[tuple[str, str]]:
        directory = self._place.loader.directory(record.slot)
        try:
            with LayerIndex.open(directory / "index") as index:
                packing, units = index.packing, index.members + 2
                if (index.blob_size, index.toc_offset) != (record.size, record.toc_offset):
                    yield "index", "it is that of another layer"
                elif packing is Packing.CHECKPOINTS:
                    Checkpoints.open(directory / "checkpoints", lambda _: 0)
            if self._place.state.is_complete(record.slot):
                bits = int.from_bytes((directory / "blob.map").read_bytes()).bit_count()
                if bits < units:
                    yield "bitmap", f"{units - bits} pieces of a complete blob are missing"
        except OSError as error:
            yield "bitmap", f"the blob cannot be read: {error}"
        except StorageError as error:
            yield ("checkpoints" if "checkpoints" in str(error) else "index"), str(error)
        try:
            self._place.loader.check_stored(record)
        except LayerstoreError as error:
            yield "toc", str(error)

    # -- contents --------------------------------------------------------------------

    def _check_objects(self) -> None:
        for file in stored_files(self._place.root / "content"):
            self._objects += 1
            if file.digest is None:
                detail = "no object has such a name"
                self._tell("leftover", file.path, detail, _remover(Path(file.path)))
            elif not os.path.isfile(file.path) and os.path.lexists(file.path):
                self._tell_misplaced([Path(file.path)])
            else:
                self._check_object(file.digest)
            self._advance(file.size)

    def _check_object(self, digest: bytes) -> None:
        try:
            if self._place.objects.intact(digest):
                return
            detail = "its bytes do not have the digest that is its name"
        except OSError as error:
            detail = f"it cannot be read: {error.strerror}"
        self._tell("object", digest.hex(), detail, partial(self._discard, digest))

    def _discard(self, digest: bytes) -> str:
        self._place.objects.discard(digest)
        return "removed, to be made anew"

    def _partial_names(self) -> set[str]:
        directory = self._place.root / "content/partial"
        odd = list(no_files(directory))
        self._tell_misplaced(odd)
        names = set(os.listdir(directory)) - {path.name for path in odd}
        return {name for name in names if not name.endswith(".map")}

    def _check_leftovers(self, partials: set[str], directories: list[Path]) -> None:
        for name in sorted(partials):
            path = self._place.root / "content/partial" / name
            if path.exists():
                detail = "no known layer has such a file"
                mend = _remover(path, path.with_name(f"{name}.map"))
                self._tell("leftover", str(path), detail, mend)
        for directory in directories:
            if directory.name.startswith("new-") or not directory.exists():
                continue
            if not directory.name.isdigit() or self._place.state.layer(int(directory.name)) is None:
                detail = "no known layer has this directory"
                self._tell("leftover", str(directory), detail, _remover(directory))


def _not_now() -> str:
    return ""


def _remover(*paths: Path) -> Callable[[], str]:
    def remove_all() -> str:
        for path in paths:
            remove(path)
        return "removed"

    return remove_all
