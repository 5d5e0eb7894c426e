"""What a copy tells whoever waits for it, in the words of Podman and Skopeo.

The texts are those of containers/image ("copy/progress_bars.go", "copy/single.go"): off a
terminal one line for each blob when its turn comes, whether it is moved or not, and on a
terminal a bar for each (``layerstore.copy.bars``).  All of it goes to standard error;
standard output is for results.

A copier calls a ``PullListener`` from several threads.  For each blob it says ``copying`` and
reports to the item that it gets back, or ``skipped`` when there is nothing to move:

    with listener.copying("blob", digest, size) as item:
        item.advance(len(piece))
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Literal, Protocol, Self, TextIO

from layerstore.image import Digest

GETTING_SIGNATURES: Final = "Getting image source signatures"
WRITING_MANIFEST: Final = "Writing manifest to image destination"
WRITING_LIST: Final = "Writing manifest list to image destination"
STORING_SIGNATURES: Final = "Storing signatures"
ALREADY_EXISTS: Final = "already exists"
FOUND_BY_TOC: Final = "already exists (found by TOC)"

Kind = Literal["blob", "config"]


def trying(reference: object) -> str:
    """The line before each candidate of a name."""
    return f"Trying to pull {reference}..."


class PullItem(Protocol):
    """One blob on its way; a context manager that ends with ``done`` or ``failed``.

    Calls after the end change nothing.
    """

    def advance(self, n: int, /) -> None:
        """``n`` more bytes have come."""

    def at(self, position: int, total: int | None, /) -> None:
        """``position`` of ``total`` bytes have come: after a retry, or in another unit."""

    def step(self, word: str, /) -> None:
        """What is being done with the blob just now, such as ``fetching``."""

    def done(self) -> None:
        """The blob is where it belongs."""

    def failed(self) -> None:
        """The blob will not come."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class PullListener(Protocol):
    """Hears of a copy; every method may be called from any thread and never raises."""

    def message(self, text: str, /) -> None:
        """A line for the reader, such as ``GETTING_SIGNATURES``."""

    def copying(self, kind: Kind, digest: Digest, total: int | None, /) -> PullItem:
        """A blob of ``total`` bytes (None: unknown) begins to move."""

    def skipped(self, digest: Digest, how: str, /) -> None:
        """A blob need not move: ``how`` is such as ``ALREADY_EXISTS``."""

    def close(self) -> None:
        """No more is to come."""


class Item:
    """An item that shows nothing, and the frame of those that do."""

    def advance(self, n: int, /) -> None:
        """Nothing to show."""

    def at(self, position: int, total: int | None, /) -> None:
        """Nothing to show."""

    def step(self, word: str, /) -> None:
        """Nothing to show."""

    def done(self) -> None:
        """Nothing to show."""

    def failed(self) -> None:
        """Nothing to show."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.done()
        else:
            self.failed()


class Quiet:
    """Tells nobody."""

    def message(self, text: str, /) -> None:
        """Nothing."""

    def copying(self, kind: Kind, digest: Digest, total: int | None, /) -> PullItem:
        """An item that shows nothing."""
        return Item()

    def skipped(self, digest: Digest, how: str, /) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainLines:
    """Podman's lines where standard error is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._lock = threading.Lock()

    def message(self, text: str, /) -> None:
        """The line itself."""
        with self._lock:
            try:
                self._stream.write(f"{text}\n")
                self._stream.flush()
            except (OSError, ValueError):  # nobody listens any more: no reason to end a pull
                return

    def copying(self, kind: Kind, digest: Digest, total: int | None, /) -> PullItem:
        """One line at the beginning, none at the end."""
        self.message(f"Copying {kind} {digest}")
        return Item()

    def skipped(self, digest: Digest, how: str, /) -> None:
        """The same line as for a blob that moves: Podman makes no difference here."""
        self.message(f"Copying blob {digest}")

    def close(self) -> None:
        """Nothing."""


@contextmanager
def listener(*, quiet: bool = False, stream: TextIO | None = None) -> Iterator[PullListener]:
    """The right listener for standard error (or ``stream``), closed at the end."""
    target = sys.stderr if stream is None else stream
    chosen: PullListener
    if quiet:
        chosen = Quiet()
    elif target.isatty():
        from layerstore.copy.bars import Bars  # noqa: PLC0415 - what draws them is large

        chosen = Bars(target)
    else:
        chosen = PlainLines(target)
    try:
        yield chosen
    finally:
        chosen.close()
