"""Graph roots in a temporary directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerstore.graphroot.storageconf import StorageConfig
from layerstore.graphroot.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty graph root."""
    return Store.open(StorageConfig(tmp_path / "root", tmp_path / "run"))
