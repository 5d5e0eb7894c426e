"""Progress bars on a terminal, as Podman draws them.

    Copying blob 3f4ca61aafcd [=====>-------] 12.3MiB / 30.0MiB | 5.1 MiB/s
    Copying blob 8a49fdb3b6a5 skipped: already exists
    Copying blob b4a21ed6b7e8 done   |

The bars of one image stay on the screen as they ended; the next line is printed below them.
"""

from __future__ import annotations

import threading
from typing import Final, TextIO

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from layerstore.copy.progress import Item, Kind, PullItem
from layerstore.image import Digest

_UNITS: Final = ("b", "KiB", "MiB", "GiB", "TiB")
_REFRESHES_PER_SECOND: Final = 6
_BAR_CELLS: Final = 26
_DONE: Final = "done   | "


def amount(count: float) -> str:
    """Bytes as Podman writes them: ``12.3MiB``."""
    unit = 0
    while count >= 1024 and unit + 1 < len(_UNITS):
        count /= 1024
        unit += 1
    return f"{count:.1f}{_UNITS[unit]}"


class _Line(ProgressColumn):
    """A whole line: title, and either the bar or the word that ended it."""

    def render(self, task: Task) -> Text:
        word, ended = task.fields["word"], task.fields["ended"]
        parts = [task.description]
        if word:
            parts.append(word)
        if not ended:
            parts.append(_bar(task))
        return Text(" ".join(parts), no_wrap=True, overflow="crop")


def _bar(task: Task) -> str:
    total, now = task.total, task.completed
    speed = f"{amount(task.speed or 0)}/s"
    if not total:
        return f"{amount(now)} | {speed}"
    filled = min(int(_BAR_CELLS * now / total), _BAR_CELLS)
    drawn = "=" * filled + ">" * (filled < _BAR_CELLS)
    return f"[{drawn.ljust(_BAR_CELLS, '-')}] {amount(now)} / {amount(total)} | {speed}"


class Bars:
    """A listener that draws on a terminal.  ``stream`` is the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._lock = threading.RLock()
        self._drawn: Progress | None = None
        self._running: set[TaskID] = set()

    def message(self, text: str, /) -> None:
        """A line below the bars that have ended, above those that still run."""
        with self._lock:
            if not self._running:
                self._settle()
            elif self._drawn is not None:
                self._drawn.refresh()  # it is drawn again below the line, as it stands
            self._console.print(text, soft_wrap=True)

    def copying(self, kind: Kind, digest: Digest, total: int | None, /) -> PullItem:
        """A new bar."""
        with self._lock:
            progress = self._progress()
            task = progress.add_task(_title(kind, digest), total=total, word="", ended=False)
            self._running.add(task)
        return _BarItem(self, progress, task)

    def skipped(self, digest: Digest, how: str, /) -> None:
        """A line among the bars."""
        with self._lock:
            self._progress().add_task(_title("blob", digest), word=f"skipped: {how}", ended=True)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        with self._lock:
            self._running.clear()
            self._settle()

    def end(self, progress: Progress, task: TaskID, word: str) -> None:
        """A bar came to its end."""
        with self._lock:
            if task not in self._running or progress is not self._drawn:
                return
            self._running.discard(task)
            progress.update(task, word=word, ended=True)

    def _progress(self) -> Progress:
        if self._drawn is None:
            self._drawn = Progress(
                _Line(), console=self._console, refresh_per_second=_REFRESHES_PER_SECOND
            )
            self._drawn.start()
        return self._drawn

    def _settle(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None


def _title(kind: Kind, digest: Digest) -> str:
    return f"Copying {kind} {digest.hex[:12]}"


class _BarItem(Item):
    def __init__(self, bars: Bars, progress: Progress, task: TaskID) -> None:
        self._bars = bars
        self._progress = progress
        self._task = task

    def advance(self, n: int, /) -> None:
        self._progress.advance(self._task, n)

    def at(self, position: int, total: int | None, /) -> None:
        self._progress.update(self._task, completed=position, total=total)

    def step(self, word: str, /) -> None:
        self._progress.update(self._task, word=word)

    def done(self) -> None:
        self._bars.end(self._progress, self._task, _DONE)

    def failed(self) -> None:
        self._bars.end(self._progress, self._task, "failed")
