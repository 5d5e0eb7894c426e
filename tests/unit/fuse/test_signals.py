import os
import signal
import subprocess
from pathlib import Path

import pytest

from layerstore.fuse.signals import is_deadly, is_dying


def _status(**masks: int) -> bytes:
    fields = {"SigPnd": 0, "ShdPnd": 0, "SigBlk": 0, "SigIgn": 0, "SigCgt": 0, **masks}
    tracer = fields.pop("TracerPid", 0)
    lines = [f"TracerPid:\t{tracer}", "SigQ:\t0/1234"]
    lines += [f"{key}:\t{mask:016x}" for key, mask in fields.items()]
    return "\n".join(["Name:\tSigPnd: 100", *lines, ""]).encode()


def _bit(number: int) -> int:
    return 1 << (number - 1)


@pytest.mark.parametrize("queue", ["SigPnd", "ShdPnd"])
def test_a_pending_kill_is_deadly(queue: str) -> None:
    assert is_deadly(_status(**{queue: _bit(signal.SIGKILL)}))


def test_a_signal_that_would_dump_core_is_deadly() -> None:
    assert is_deadly(_status(ShdPnd=_bit(signal.SIGQUIT)))


@pytest.mark.parametrize("how", ["SigCgt", "SigIgn", "SigBlk"])
def test_a_signal_that_is_handled_is_not(how: str) -> None:
    quit_ = _bit(signal.SIGQUIT)
    assert not is_deadly(_status(ShdPnd=quit_, **{how: quit_}))


@pytest.mark.parametrize("number", [signal.SIGURG, signal.SIGCHLD, signal.SIGTSTP, signal.SIGWINCH])
def test_a_signal_that_does_nothing_or_stops_is_not(number: int) -> None:
    assert not is_deadly(_status(SigPnd=_bit(number)))


def test_only_kill_is_deadly_under_a_debugger() -> None:
    assert not is_deadly(_status(ShdPnd=_bit(signal.SIGQUIT), TracerPid=1))
    assert is_deadly(_status(SigPnd=_bit(signal.SIGKILL), TracerPid=1))


def test_odd_status_text_is_not_deadly() -> None:
    assert not is_deadly(b"")
    assert not is_deadly(b"SigPnd: not hex\n:::\n\xff\xff")


def test_living_gone_and_unknown_processes() -> None:
    assert not is_dying(os.getpid())
    assert not is_dying(0)
    process = subprocess.Popen(["true"])
    process.wait()
    assert is_dying(process.pid)


def test_a_process_that_proc_hides_is_not_gone(tmp_path: Path) -> None:
    assert not is_dying(os.getpid(), tmp_path)
