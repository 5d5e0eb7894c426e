"""Verbs that ask a service: what is wrong with the command line is told as that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from layerstore.cli import main
from layerstore.errors import UsageError
from layerstore.service.control import ControlServer


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    def status(_: Mapping[str, object]) -> dict[str, object]:
        return {}

    def pinned(_: Mapping[str, object]) -> dict[str, object]:
        return {"images": [{"reference": "host.example/app:1", "layers": 1, "complete": True}]}

    def start(_: Mapping[str, object]) -> dict[str, object]:
        raise UsageError("a platform is os/architecture[/variant]", subject="x")

    (tmp_path / "empty.toml").write_text("")
    server = ControlServer(tmp_path, {"status": status, "pinned": pinned, "fetch-start": start})
    yield tmp_path
    server.close()


def run(root: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        main([*arguments, "--root", str(root), "--config", str(root / "empty.toml")])
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capfd.readouterr()


@pytest.mark.parametrize("verb", ["fetch", "pin"])
def test_a_platform_that_is_none_is_a_usage_error(root: Path, capfd, verb: str):
    status, _, err = run(root, capfd, verb, "host.example/app:1", "--platform", "x")
    assert (status, err) == (2, "layerstore: x: a platform is os/architecture[/variant]\n")


def test_an_empty_name_pins_nothing_and_lists_nothing(root: Path, capfd):
    status, out, err = run(root, capfd, "pin", "")
    assert (status, out) == (2, "")
    assert "not a repository name" in err
    status, out, _ = run(root, capfd, "pin")
    assert status == 0
    assert "host.example/app:1" in out
