"""Verbs about images of a simulated registry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.simregistry import SimRegistry
from layerstore.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(
    registry: SimRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """``verb(*arguments)``, with a configuration of its own: exit status, output, errors."""
    registries = tmp_path / "registries.conf"
    registries.write_text(f'[[registry]]\nlocation = "{registry.host}"\ninsecure = true\n')
    config = tmp_path / "config.toml"
    config.write_text(
        f'root = "{tmp_path / "root"}"\n[registry]\nregistries_conf = "{registries}"\n'
    )

    def call(*arguments: str) -> tuple[int, str, str]:
        status = 0
        try:
            main([*arguments, "--config", str(config)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    log = logging.getLogger("layerstore")
    level = log.level
    log.setLevel(logging.NOTSET)  # `--debug serve` of another test would leave it at DEBUG
    yield call
    log.setLevel(level)
