"""Root directories and mount points that would be in each other's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from layerstore.errors import ServiceError
from layerstore.service.places import keep_apart


@pytest.mark.parametrize(
    "mountpoint",
    ["../root", "..", "content", "content/deep", "layers", "layers/1", "other/../layers", "lock"],
)
def test_the_service_does_not_mount_over_its_own_state(tmp_path: Path, mountpoint: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    for way in (root, tmp_path / "link"):
        with pytest.raises(ServiceError, match="in each other's way"):
            keep_apart(way / mountpoint, root)


@pytest.mark.parametrize("mountpoint", ["store", "layers-of-mine", "../store", "../root2/layers"])
def test_other_places_are_taken(tmp_path: Path, mountpoint: str) -> None:
    keep_apart(tmp_path / "root" / mountpoint, tmp_path / "root")


@pytest.mark.parametrize(
    ("root", "mountpoint", "says"),
    [
        ("/", "store", "the root directory is a directory of its own, not /"),
        ("state", "state/layers", "root directory and mount point lie in each other's way"),
    ],
)
def test_serve_says_so_at_once(tmp_path: Path, root: str, mountpoint: str, says: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text("")
    done = subprocess.run(
        [
            sys.executable, "-m", "layerstore.cli", "serve", str(tmp_path / mountpoint),
            "--root", str(tmp_path / root), "--config", str(config),
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
