"""What a copy shows: plain lines, bars on a terminal, nothing."""

from __future__ import annotations

import io
import re
import threading

import pytest

from layerstore.copy import progress
from layerstore.copy.bars import Bars, amount
from layerstore.copy.progress import PlainLines, PullListener, Quiet, listener
from layerstore.image import Digest

FIRST, SECOND = Digest.of(b"first"), Digest.of(b"second")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def shown(terminal: Terminal) -> list[str]:
    """The lines as they stand in the end, without what moves the cursor about."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def tell(listener: PullListener) -> None:
    listener.message(progress.trying("docker.io/library/x:1"))
    listener.message(progress.GETTING_SIGNATURES)
    with listener.copying("blob", FIRST, 100) as item:
        item.advance(40)
        item.advance(60)
    listener.skipped(SECOND, progress.ALREADY_EXISTS)
    with listener.copying("config", SECOND, 10):
        pass
    listener.message(progress.WRITING_MANIFEST)


def test_plain_lines_are_those_of_podman_off_a_terminal() -> None:
    out = io.StringIO()
    tell(PlainLines(out))
    assert out.getvalue() == (
        "Trying to pull docker.io/library/x:1...\n"
        "Getting image source signatures\n"
        f"Copying blob {FIRST}\n"
        f"Copying blob {SECOND}\n"
        f"Copying config {SECOND}\n"
        "Writing manifest to image destination\n"
    )


def test_a_reader_that_went_away_does_not_end_the_copy() -> None:
    out = io.StringIO()
    out.close()
    tell(PlainLines(out))


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell(Quiet())
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_bars_end_with_a_word_and_stay_above_the_next_line() -> None:
    out = Terminal()
    bars = Bars(out)
    tell(bars)
    bars.close()
    assert shown(out)[-4:] == [
        f"Copying blob {FIRST.hex[:12]} done   |",
        f"Copying blob {SECOND.hex[:12]} skipped: already exists",
        f"Copying config {SECOND.hex[:12]} done   |",
        "Writing manifest to image destination",
    ]


def test_a_running_bar_shows_amounts_and_a_failed_one_says_so() -> None:
    out = Terminal()
    bars = Bars(out)
    item = bars.copying("blob", FIRST, 4 << 20)
    item.at(1 << 20, 4 << 20)
    bars.message("a line between")
    with pytest.raises(RuntimeError), item:
        raise RuntimeError
    item.done()
    bars.close()
    lines = shown(out)
    assert any("[======>-------------------] 1.0MiB / 4.0MiB |" in line for line in lines)
    assert "a line between" in lines
    assert lines[-1] == f"Copying blob {FIRST.hex[:12]} failed"


def test_bars_of_unknown_length_and_of_none() -> None:
    out = Terminal()
    bars = Bars(out)
    for total in (None, 0):
        with bars.copying("blob", FIRST, total) as item:
            item.advance(3)
            item.step("fetching")
    bars.close()
    assert shown(out)[-1].endswith("done   |")


def test_many_threads_at_once() -> None:
    out = Terminal()
    bars = Bars(out)

    def work(number: int) -> None:
        for _ in range(20):
            with bars.copying("blob", Digest.of(bytes([number])), 10) as item:
                item.advance(10)
            bars.message("between")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    bars.close()
    assert sum(line == "between" for line in shown(out)) == 120


def test_the_listener_suits_the_stream() -> None:
    with listener(stream=io.StringIO()) as plain:
        assert isinstance(plain, PlainLines)
    with listener(stream=Terminal()) as bars:
        assert isinstance(bars, Bars)
    with listener(quiet=True, stream=Terminal()) as quiet:
        assert isinstance(quiet, Quiet)


def test_amounts() -> None:
    assert [amount(each) for each in (0, 1023, 1536, 3 << 30, 5 << 50)] == [
        *("0.0b", "1023.0b", "1.5KiB", "3.0GiB"),
        "5120.0TiB",
    ]
