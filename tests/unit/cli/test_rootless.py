"""Where a user who is not root is led: into the namespace, or to a clear refusal."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from layerstore.cli.rootless import enter_namespace
from layerstore.errors import UsageError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is started instead, by a user who is not root and has Podman."""
    found: list[list[str]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "execv", lambda _, arguments: found.append(arguments))
    return found


@pytest.mark.parametrize(
    "line", ["pull -q app:1", "--debug images", "copy docker://a/b containers-storage:b"]
)
def test_storage_is_used_inside_the_namespace(started: list[list[str]], line: str) -> None:
    enter_namespace(line.split())
    ours = [sys.executable, "-m", "layerstore.cli"]
    assert started == [["/usr/bin/podman", "--log-level=error", "unshare", *ours, *line.split()]]


@pytest.mark.parametrize(
    "line", ["", "--help", "pull --help", "serve /mnt", "status", "copy docker://a/b oci:c"]
)
def test_what_needs_no_storage_stays_outside(started: list[list[str]], line: str) -> None:
    enter_namespace(line.split())
    assert started == []


def test_root_stays_where_it_is(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    enter_namespace(["pull", "app:1"])
    assert started == []


def test_mounts_are_for_a_shell_inside(started: list[list[str]]) -> None:
    with pytest.raises(UsageError, match="podman unshare layerstore mount"):
        enter_namespace(["mount", "app:1"])
    assert started == []


def test_without_podman_the_reason_is_said(
    started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="there is no podman"):
        enter_namespace(["pull", "app:1"])
