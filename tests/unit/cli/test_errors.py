"""What a newcomer meets: one clear line for each mistake, and an exit status that scripts can use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from layerstore import __version__
from layerstore.cli import VERBS, main
from layerstore.cli.process import log_to_stderr

COMMANDS = tuple(chain.from_iterable(VERBS.values()))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(*arguments)``: exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def served(*arguments: str) -> tuple[int, str, str]:
    """The same of `serve`, which becomes another program."""
    done = subprocess.run(
        [sys.executable, "-m", "layerstore.cli", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration file."""

    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve",), "MOUNTPOINT"),
        (("serve", "/m", "--bogus"), "--bogus"),
        (("serve", "/m", "extra"), "unexpected argument: extra"),
        (("status", "extra"), "unexpected argument: extra"),
        (("status", "--root"), "--root requires an argument"),
        (("convert", "docker://a/b"), "DST"),
        (("convert", "docker://a/b", "docker://a/c", "--level", "x"), "--level"),
        (("nonsense",), '"nonsense"'),
        (("--debug=3",), "--debug"),
        (("--debug", "serve"), "MOUNTPOINT"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    run: Run, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("layerstore: ")
    assert said in err
    assert "layerstore --help" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefech = true\n", "prefech"),
        ('log_level = "loud"\n', "log_level"),
        ("= =\n", "not TOML"),
        ('root = "relative"\n', "absolute"),
        ('[registry]\nauthfile = "auth.json"\n', "registry.authfile"),
    ],
)
@pytest.mark.parametrize("serve", [False, True])
def test_a_wrong_configuration_names_its_file_and_has_status_2(
    run: Run, config: Callable[[str], str], text: str, said: str, serve: bool
) -> None:
    path = config(text)
    given = ("--config", path)
    status, _, err = served("/nowhere/store", *given) if serve else run("status", *given)
    assert status == 2
    assert err.startswith(f"layerstore: {path}: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_configuration_file_that_is_missing_is_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    status, _, err = run("status", "--config", str(path))
    assert (status, err) == (2, f"layerstore: {path}: cannot read: No such file or directory\n")


def test_status_without_a_service_says_what_to_do(run: Run, tmp_path: Path) -> None:
    status, out, err = run("status", "--root", str(tmp_path))
    assert (status, out) == (1, "")
    assert str(tmp_path / "control.sock") in err
    assert "layerstore serve" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("mountpoint", "root", "said"),
    [
        ("/proc/nowhere", "state", "/proc/nowhere: cannot create"),
        ("store", "/proc/nowhere", "/proc/nowhere: cannot create"),
        ("state/content/store", "state", "in each other's way"),
        ("state", "state", "in each other's way"),
        ("store", "taken", "lock: cannot open"),
    ],
)
def test_what_the_machine_refuses_has_status_1(
    tmp_path: Path, mountpoint: str, root: str, said: str
) -> None:
    (tmp_path / "taken/lock").mkdir(parents=True)  # a lock file that cannot be opened
    status, _, err = served(str(tmp_path / mountpoint), "--root", str(tmp_path / root))
    assert status == 1
    assert said in err
    assert err.count("\n") == 1


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layerstore.cli", "--debug", "status", "--root", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ServiceError" in done.stderr


def test_a_warning_is_a_line_too_and_debug_tells_more(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("layerstore.somewhere")
    for debug in (False, True):
        with log_to_stderr(debug=debug):
            log.debug("a step of %s", "work")
            log.warning("something is odd")
    log.warning("nobody listens any more")
    assert capsys.readouterr().err.splitlines() == [
        "layerstore: warning: something is odd",
        "layerstore: debug: a step of work",
        "layerstore: warning: something is odd",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "--authfile={}", "app:1", "quay.io/a/b:1"),
        ("copy", "--dest-authfile={}", "oci:{}", "docker://quay.io/a/b:1"),
        ("convert", "--authfile={}", "oci:{}", "docker://quay.io/a/b:1"),
    ],
)
def test_a_file_with_credentials_that_is_named_has_to_be_there(
    run: Run, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    missing = tmp_path / "auth.json"
    status, _, err = run(*(word.format(missing) for word in arguments))
    assert (status, err) == (
        2,
        f"layerstore: {missing}: the file with credentials does not exist\n",
    )


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), *((name, "--help") for name in COMMANDS)])
def test_help_fits_a_terminal_and_names_every_command(run: Run, arguments: tuple[str, ...]) -> None:
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith("Usage: layerstore ")
    assert max(map(len, out.splitlines())) <= 80
    if arguments in ((), ("--help",)):
        assert all(f"│ {name} " in out for name in COMMANDS)
    else:
        assert "--debug" in out
        assert ("--json" in out) is (arguments[0] not in ("serve", "check"))  # a group of verbs


def test_help_goes_into_a_closed_pipe_without_a_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "layerstore.cli", "--help"],
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr
