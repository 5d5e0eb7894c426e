"""Graph roots of the configuration that are not where it says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lab import graphroot
from layerstore.cli import main
from layerstore.image import Digest
from layerstore.provider import names
from layerstore.service import Config
from layerstore.service.config import RepairConfig
from layerstore.service.graphneeds import needs_of


def naming(*roots: Path) -> Config:
    return Config(repair=RepairConfig(graph_roots=tuple(map(str, roots))))


def used_root(directory: Path) -> Path:
    """A graph root with an image."""
    store = graphroot.open_store(directory)
    graphroot.put_image(store, [graphroot.layer_tar()], "localhost/app:1")
    return directory / "root"


def test_no_layer_is_unreferenced_while_a_named_graph_root_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    there, typing_mistake, mount_point = used_root(tmp_path), tmp_path / "rot", tmp_path / "empty"
    mount_point.mkdir()
    assert needs_of(naming(there))().known
    assert caplog.text == ""
    for away in (typing_mistake, mount_point):
        caplog.clear()
        assert not needs_of(naming(there, away))().known
        (record,) = caplog.records
        assert f"event=graph-root-not-read graph_root={away} " in record.message
        assert "mount its disk, or correct repair.graph_roots" in record.message


def test_a_layer_that_only_a_named_image_store_links_to_is_referenced(tmp_path: Path) -> None:
    there, shared = used_root(tmp_path / "client"), used_root(tmp_path / "shared")
    layer = shared / "overlay" / ("1" * 64)
    layer.mkdir()
    digest = Digest(f"sha256:{'2' * 64}")
    (layer / "additionallayer").write_text(f"/store/{digest}")
    key = names.name_hash("", digest)  # others' graph roots are looked at, too, while in use
    assert key not in needs_of(naming(there))().referenced
    repair = RepairConfig(graph_roots=(str(there),), image_stores=(str(shared),))
    needs = needs_of(Config(repair=repair))()
    assert needs.known
    assert key in needs.referenced
    repair = RepairConfig(graph_roots=(str(there),), image_stores=(str(tmp_path / "away"),))
    assert not needs_of(Config(repair=repair))().known


def test_the_graph_root_of_storage_conf_need_not_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{tmp_path}/none"\nrunroot = "{tmp_path}/run"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    assert needs_of(Config())().known
    assert caplog.text == ""


def materialize(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], *roots: Path
) -> tuple[int, str, str]:
    config = tmp_path / "config.toml"
    config.write_text(f"[repair]\ngraph_roots = {[str(root) for root in roots]}\n")
    status = 0
    try:
        main(["materialize", "--all", "--config", str(config), "--root", str(tmp_path / "state")])
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capfd.readouterr()


def test_materialize_does_not_pass_over_a_graph_root_that_is_not_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = used_root(tmp_path)
    assert materialize(tmp_path, capfd, there) == (0, "0 layers are local now\n", "")
    status, out, err = materialize(tmp_path, capfd, there, tmp_path / "rot")
    assert (status, out) == (1, "")
    assert f"{tmp_path}/rot: no graph root is there: No such file or directory" in err


def test_materialize_tells_of_images_whose_layers_have_no_record(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    there = used_root(tmp_path)
    (there / "overlay-layers" / "layers.json").unlink()
    status, out, err = materialize(tmp_path, capfd, there)
    assert (status, out) == (1, "0 layers are local now\n")
    assert "layers of the image have no record" in err
    assert "layerstore check storage --repair" in err
