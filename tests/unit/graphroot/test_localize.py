"""A lazy layer made local: right, and one or the other after a crash anywhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import tars
from layerstore.errors import VerificationError
from layerstore.graphroot import als, atomic
from layerstore.graphroot.identity import layer_id
from layerstore.graphroot.layers import LayerEdit
from layerstore.graphroot.localize import lazy_layers, localize
from layerstore.graphroot.offers import AlsOffer
from layerstore.graphroot.overlay import Overlay
from layerstore.graphroot.storageconf import LayerStoreSpec
from layerstore.graphroot.store import Store
from layerstore.image import Digest

TOC = Digest.of(b"toc")
FILES = {b"etc/one": b"1" * 5000, b"etc/two": b"2"}


class Lazy:
    """One lazy layer of a graph root, in a store that is a plain directory."""

    def __init__(self, store: Store, place: Path) -> None:
        plain = io.BytesIO()
        tars.write_tar(plain, [tars.regular(name, data) for name, data in FILES.items()])
        self.diff_id = Digest.of(plain.getvalue())
        self.blob = gzip.compress(plain.getvalue(), mtime=0)
        self.path = place / TOC
        (self.path / "diff" / "etc").mkdir(parents=True)
        for name, data in FILES.items():
            (self.path / "diff" / name.decode()).write_bytes(data)
        (self.path / "blob").write_bytes(self.blob)
        info = {"toc-digest": TOC, "diff-size": -1, "compression": 2}
        (self.path / "info").write_text(json.dumps(info))
        found = als.LayerStores([LayerStoreSpec(place, False)]).find_by_toc(None, TOC)
        assert found is not None
        offer = AlsOffer(layer_id("", toc_digest=TOC), found, self.diff_id)
        (self.layer,) = store.put_als_layers("", [offer])


@pytest.fixture
def lazy(store: Store, tmp_path: Path) -> Lazy:
    return Lazy(store, tmp_path / "als")


def read(store: Store, layer: str) -> dict[bytes, bytes]:
    diff = store.layer(layer).diff_path
    return {name: (diff / name.decode()).read_bytes() for name in FILES}


def test_it_becomes_what_a_pull_would_have_made(store: Store, lazy: Lazy) -> None:
    seen: list[int] = []
    localize(store, lazy.layer, seen.append)
    assert sum(seen) == len(lazy.blob)
    layer = store.layer(lazy.layer.id)
    assert not layer.is_lazy
    assert not layer.diff_path.is_symlink()
    assert read(store, layer.id) == FILES
    record = layer.record
    assert record.diff_digest == lazy.diff_id
    assert record.compressed_diff_digest == Digest.of(lazy.blob)
    assert record.compressed_size == len(lazy.blob)
    assert record.toc_digest == TOC
    assert record.expected_diff_id is None
    tar = hashlib.sha256(b"".join(layer.tar())).hexdigest()
    assert tar == lazy.diff_id.hex
    assert lazy_layers(store) == []


def test_another_blob_than_the_config_announces_is_refused(store: Store, lazy: Lazy) -> None:
    other = io.BytesIO()
    tars.write_tar(other, [tars.regular(b"etc/one", b"evil")])
    (lazy.path / "blob").write_bytes(gzip.compress(other.getvalue()))
    with pytest.raises(VerificationError):
        localize(store, lazy.layer, lambda _: None)
    assert store.layer(lazy.layer.id).is_lazy
    assert read(store, lazy.layer.id) == FILES


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("point", ["tar-split", "record", "exchange", "additionallayer"])
def test_a_crash_leaves_the_one_layer_or_the_other(
    store: Store, lazy: Lazy, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if point == "tar-split":
            patch.setattr(LayerEdit, "save", killed)
        elif point == "record":
            patch.setattr(Overlay, "localize", killed)
        elif point == "exchange":
            patch.setattr(atomic, "exchange", killed)
        else:
            patch.setattr(Path, "unlink", killed_at("additionallayer", Path.unlink))
        with pytest.raises(Killed):
            localize(store, lazy.layer, lambda _: None)
    (layer,) = Store(store.config).layers()
    assert read(store, layer.id) == FILES
    assert layer.is_lazy, "additionallayer goes last"
    assert layer.diff_path.is_symlink() == (point != "additionallayer")
    localize(store, layer, lambda _: None)
    again = store.layer(layer.id)
    assert not again.is_lazy
    assert not again.diff_path.is_symlink()
    assert read(store, layer.id) == FILES


def killed_at(name: str, real: Callable[..., None]) -> Callable[..., None]:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise Killed
        real(path, missing_ok)

    return unlink
