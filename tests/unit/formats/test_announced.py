"""What descriptors announce; keys and values as real tools write them (layer-formats 1, 3)."""

from __future__ import annotations

import pytest

from layerstore.errors import UnsupportedFormat
from layerstore.formats.announced import Announced, Form, Place, announced
from layerstore.image import Descriptor, Digest, media_types

TOC = Digest("sha256:" + "a" * 64)
OTHER = Digest("sha256:" + "b" * 64)
ESTARGZ = "containerd.io/snapshot/stargz/toc.digest"
NEW = "io.github.containers.zstd-chunked."
OLD = "io.containers.zstd-chunked."
GZIP, ZSTD = media_types.OCI_LAYER_GZIP, media_types.OCI_LAYER_ZSTD


def layer(media_type: str, annotations: dict[str, str], size: int = 10_000) -> Descriptor:
    return Descriptor(media_type=media_type, digest=OTHER, size=size, annotations=annotations)


@pytest.mark.parametrize("media_type", [GZIP, media_types.DOCKER_LAYER_GZIP])
def test_estargz(media_type: str):
    assert announced(layer(media_type, {ESTARGZ: TOC})) == Announced(Form.ESTARGZ, TOC)


def test_zstd_chunked():
    notes = {
        NEW + "manifest-checksum": TOC,
        NEW + "manifest-position": "9000:500:2000:1",
        NEW + "tarsplit-position": "9508:300:900",
    }
    assert announced(layer(ZSTD, notes)) == Announced(
        Form.ZSTD_CHUNKED, TOC, Place(9000, 500, 2000), Place(9508, 300, 900)
    )
    del notes[NEW + "tarsplit-position"]
    assert announced(layer(ZSTD, notes)).tar_split is None


def test_the_first_form_of_zstd_chunked_is_named_by_the_digest_clients_look_it_up_by():
    notes = {OLD + "manifest-checksum": OTHER, OLD + "manifest-position": "9000:500:2000:1"}
    assert announced(layer(ZSTD, notes)) == Announced(
        Form.ZSTD_CHUNKED_V0, OTHER, Place(9000, 500, 2000)
    )
    assert announced(layer(ZSTD, notes | {ESTARGZ: TOC})).toc_digest == TOC


@pytest.mark.parametrize(
    ("media_type", "form"),
    [
        (media_types.OCI_LAYER, Form.TAR),
        (media_types.DOCKER_LAYER, Form.TAR),
        (GZIP, Form.TAR_GZIP),
        (media_types.DOCKER_LAYER_GZIP, Form.TAR_GZIP),
        (ZSTD, Form.TAR_ZSTD),
        (media_types.DOCKER_LAYER_ZSTD, Form.TAR_ZSTD),
    ],
)
def test_ordinary_layers(media_type: str, form: Form):
    assert announced(layer(media_type, {"other": "note"})) == Announced(form)
    assert not form.lazy


@pytest.mark.parametrize(
    ("media_type", "notes"),
    [
        (GZIP, {ESTARGZ: "nonsense"}),
        (GZIP, {ESTARGZ: "sha512:" + "a" * 128}),
        (GZIP, {ESTARGZ: TOC, NEW + "manifest-checksum": TOC}),
        (GZIP, {NEW + "manifest-checksum": TOC, NEW + "manifest-position": "1:2:3:1"}),
        (media_types.OCI_LAYER, {ESTARGZ: TOC}),
        (ZSTD, {ESTARGZ: TOC}),
        (ZSTD, {NEW + "manifest-checksum": TOC}),
        (ZSTD, {NEW + "manifest-checksum": TOC, OLD + "manifest-position": "1:2:3:1"}),
        *(
            (ZSTD, {NEW + "manifest-checksum": TOC, NEW + "manifest-position": position})
            for position in (
                "", "1:2:3", "1:2:3:4:5", "1:2:3:2", "-1:2:3:1", "1:2:x:1", "9999:2:3:1",
                "1:2:" + "9" * 12 + ":1", "0x1:2:3:1", "9" * 30 + ":2:3:1",
            )
        ),
        (
            ZSTD,
            {
                NEW + "manifest-checksum": TOC,
                NEW + "manifest-position": "1:2:3:1",
                NEW + "tarsplit-position": "5:99999:3",
            },
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_an_ordinary_layer_with_a_problem(
    media_type: str, notes: dict[str, str]
):
    found = announced(layer(media_type, notes))
    assert not found.form.lazy
    assert found.toc_digest is None
    assert found.problem


@pytest.mark.parametrize(
    "media_type",
    ["", "application/json", GZIP + "+encrypted", media_types.OCI_CONFIG,
     "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"],
)  # fmt: skip
def test_what_is_no_layer_is_refused(media_type: str):
    with pytest.raises(UnsupportedFormat):
        announced(layer(media_type, {}))
