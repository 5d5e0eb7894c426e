"""The settings in force: read once, and the same for every server until a reload."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerstore.errors import ConfigError
from layerstore.service import settings
from layerstore.service.inforce import InForce, given, write


@pytest.fixture
def memory() -> Iterator[int]:  # closed when the keeper has no use for it any more
    in_force = InForce.empty()
    yield in_force.fd
    del in_force


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The configuration file, and registries.conf."""
    registries = tmp_path / "registries.conf"
    registries.write_text(
        'unqualified-search-registries = ["one.example"]\n'
        'credential-helpers = ["secret"]\n'
        '[[registry]]\nprefix = "*.two.example"\nblocked = true\n'
        '[[registry]]\nlocation = "three.example/a"\ninsecure = true\n'
        '[[registry.mirror]]\nlocation = "mirror.example"\npull-from-mirror = "digest-only"\n'
        '[aliases]\nshort = "four.example/long"\n'
    )
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(registries))
    config = tmp_path / "config.toml"
    config.write_text("silent_seconds = 7\n")
    return config, registries


def test_files_that_changed_mean_nothing(files: tuple[Path, Path], memory: int) -> None:
    config, registries = files
    first = settings.load(config, memory)
    assert first.config.silent_seconds == 7
    config.write_text("nonsense = 1\n")
    registries.unlink()
    second = settings.load(config, memory)
    assert second == first
    with pytest.raises(ConfigError, match="nonsense"):
        settings.load(config, None)


def test_what_makes_no_sense_is_not_in_force(files: tuple[Path, Path], memory: int) -> None:
    config, registries = files
    good = registries.read_text()
    registries.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"registries\.conf"):
        settings.load(config, memory)
    registries.write_text(good)
    config.write_text("silent_seconds = 8\n")
    assert settings.load(config, memory).config.silent_seconds == 8
    assert settings.load(config, memory).config.silent_seconds == 8


def test_what_another_release_keeps_there_stays(files: tuple[Path, Path], memory: int) -> None:
    write(memory, b'{"other": 1}')
    assert settings.load(files[0], memory).config.silent_seconds == 7
    assert os.pread(memory, 100, 0) == b'{"other": 1}'


def test_a_server_of_an_older_keeper_is_given_none() -> None:
    assert given({}) is None
