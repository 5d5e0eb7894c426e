"""The blob of a layer as a whole: read through, and wrong parts of it forgotten."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Final

from layerstore.content.blob import BlobFile
from layerstore.content.ingest import Ingester
from layerstore.content.ledger import Ledger
from layerstore.content.stats import ContentStats
from layerstore.errors import ContentError, StorageError, VerificationError
from layerstore.formats.compression import Readable

_log = logging.getLogger(__name__)

_Stored = bytes | Readable


class WholeBlob:
    """``digest`` is the announced SHA-256 (hex); ``read`` gives the stored bytes of a unit.

    ``refuse`` is told of units whose bytes are wrong, and forgets them.  ``verified`` says that
    every byte is stored and has the announced digest; ``error`` is set when the same wrong blob
    came twice.  Thread-safe.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        blob: BlobFile,
        ingester: Ingester,
        read: Callable[[int], _Stored],
        refuse: Callable[[int, _Stored, ContentError], None],
        *,
        ledger: Ledger,
        totals: ContentStats,
        verified: bool,
    ) -> None:
        self.verified = verified and blob.present.full
        self.error: VerificationError | None = None
        self._name = name
        self._digest: Final = digest
        self._blob = blob
        self._ingester = ingester
        self._read = read
        self._refuse = refuse
        self._ledger = ledger
        self._totals = totals
        self._lock = threading.Lock()
        self._wrong = ""  # the digest last seen of wrong bytes that fit the TOC
        self._again = False  # wrong bytes are being fetched once more, at once

    def verify(self) -> bool:
        """Check the digest over the whole stored blob; False if parts must be fetched again.

        Raises VerificationError if the registry has another blob than announced.
        """
        with self._lock:
            if self.verified:
                return True
            if self.error is not None:
                raise self.error
            if not self._blob.present.full:
                return False  # who looked before has found it wrong: the same bytes prove nothing
            try:
                actual = self._blob.sha256()
                if actual == self._digest:
                    self._blob.sync()  # this is remembered, even after a power failure
                    self._ledger.stamp(self._blob.file.fd)
                    self.verified = True
                    return True
            except OSError as caught:
                self._drop_unreadable()
                raise self._blob.disk.failed(caught, "cannot read", self._blob.path) from caught
            except StorageError:
                self._drop_unreadable()
                raise
            damaged = self._scrub()
            before, self._wrong = self._wrong, "" if damaged else actual
            twice = not damaged and actual == before
            again, self._again = self._again, not self._again
            if not (twice or again):
                return False
            error = VerificationError(
                f"blob has SHA-256 {actual} instead of {self._digest}",
                subject=self._name,
                advice="the registry sends another blob than the manifest names",
            )
            if not twice:
                raise error  # for this time
            self.error = error
            _log.error("event=blob-refused layer=%s error=%s", self._name, self.error)
            self._totals.failed_units += 1
            raise error

    def check(self, progress: Callable[[int], None]) -> str:
        """Read what is stored through; what is wrong, "" if nothing is.

        Pieces that are wrong are forgotten.  ``progress`` is told numbers of bytes, and may raise.
        """
        if self._blob.present.full:
            with self._lock:
                if self._blob.sha256(progress) == self._digest:
                    if not self._ledger.trusts(self._blob.file.fd):
                        self._ledger.stamp(self._blob.file.fd)
                    return ""
                self.verified = False
                self._scrub()
            return "it does not have the digest of the blob"
        wrong = self._refuse_wrong(progress)
        return f"{wrong} of its pieces are wrong" if wrong else ""

    def _scrub(self) -> bool:
        """Forget the members that do not fit the TOC, else all of the blob; whether there were any."""
        if self._refuse_wrong(lambda _: None):
            return True
        # headers, padding and members without contents: only the digest covers them
        for unit in range(self._blob.units):
            self._blob.discard(unit)
        return False

    def _refuse_wrong(self, progress: Callable[[int], None]) -> int:
        """Forget the stored members that do not fit the TOC; how many there were."""
        wrong = 0
        for unit in range(self._blob.units):
            if not self._blob.present[unit]:
                continue
            if self._blob.is_member(unit):
                data = self._read(unit)
                try:
                    self._ingester.check_member(unit - 1, data)
                except ContentError as error:
                    self._refuse(unit, data, error)
                    wrong += 1
            offset, end = self._blob.extent(unit)
            progress(end - offset)
        return wrong

    def _drop_unreadable(self) -> None:
        """The disk failed: forget what is not verifiably on it.  This is nobody else's fault."""
        for unit in range(self._blob.units):
            with contextlib.suppress(ContentError, OSError):
                if self._blob.is_member(unit):
                    self._ingester.check_member(unit - 1, self._read(unit))
                    continue
            self._blob.discard(unit)
