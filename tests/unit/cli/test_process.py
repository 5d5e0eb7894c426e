"""The program and its surroundings: signals, closed and full streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OURS = f"{sys.executable} -m layerstore.cli"


@pytest.fixture
def flags(tmp_path: Path) -> str:
    return f"--root {tmp_path}/root --runroot {tmp_path}/run"


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_full_output_is_one_line_and_a_failure(flags: str) -> None:
    done = shell(f"{OURS} images {flags} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "layerstore: No space left on device\n")


@pytest.mark.parametrize("stream", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_obstacle(flags: str, stream: str) -> None:
    done = shell(f"{OURS} images --json {flags} {stream}")
    assert (done.returncode, done.stderr) == (0, "")
    if "1>" not in stream:
        assert json.loads(done.stdout) == []


def test_closed_input_has_nothing_to_load(flags: str) -> None:
    done = shell(f"{OURS} load -q {flags} <&-")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("layerstore: ")


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_signals_let_the_clean_up_happen(
    tmp_path: Path, flags: str, number: int, status: int, said: str
) -> None:
    archive, scratch = tmp_path / "endless.tar", tmp_path / "tmp"
    os.mkfifo(archive)
    scratch.mkdir()
    with (
        subprocess.Popen(
            [*OURS.split(), "load", "-q", "-i", str(archive), *flags.split()],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        ) as program,
        archive.open("wb") as feed,
    ):  # the program is reading now
        feed.write(bytes(1))
        feed.flush()
        time.sleep(0.3)
        program.send_signal(number)
        _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (status, f"layerstore: {said}\n")
    assert list(scratch.iterdir()) == []


def test_an_ignored_signal_stays_ignored(flags: str) -> None:
    done = shell(f"trap '' HUP; {OURS} images -q {flags}")
    assert (done.returncode, done.stderr) == (0, "")
