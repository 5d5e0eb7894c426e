from __future__ import annotations

import dataclasses
import json

import pytest

from layerstore.formats.announced import Form
from layerstore.image import Descriptor, Digest, media_types
from layerstore.image.annotations import ESTARGZ_UNCOMPRESSED_SIZE
from layerstore.provider import Refusal
from layerstore.provider.info import layer_info, toc_info
from layerstore.provider.state import LayerRecord

BLOB, DIFF, TOC = (Digest("sha256:" + c * 64) for c in "abc")
RECORD = LayerRecord(1, BLOB, TOC, DIFF, 77, 70, Form.ESTARGZ)
VERIFIED = dataclasses.replace(RECORD, diff_size=2048)
DESCRIPTOR = Descriptor(
    media_type=media_types.OCI_LAYER_GZIP,
    digest=BLOB,
    size=77,
    annotations={ESTARGZ_UNCOMPRESSED_SIZE: "1024"},
)
SILENT = Descriptor(media_type=media_types.OCI_LAYER_GZIP, digest=BLOB, size=77)


def test_dialect_t_states_nothing_but_what_the_client_demands():
    assert json.loads(toc_info(RECORD, DIFF)) == {
        "compressed-size": 77,
        "compression": 2,
        "diff-size": -1,
        "flags": {"expected-layer-diffid": DIFF},
        "toc-digest": TOC,
    }


def test_dialect_t_states_what_was_found_in_the_whole_blob():
    assert json.loads(toc_info(VERIFIED, DIFF)) == {
        "compressed-diff-digest": BLOB,
        "compressed-size": 77,
        "compression": 2,
        "diff-digest": DIFF,
        "diff-size": 2048,
        "flags": {"expected-layer-diffid": DIFF},
        "toc-digest": TOC,
    }


def test_dialect_l_claims_the_blob_digest_only_after_it_was_checked():
    unchecked = json.loads(layer_info(RECORD, DIFF, DESCRIPTOR))
    assert unchecked == {
        "compressed-size": 77,
        "compression": 2,
        "diff-digest": DIFF,
        "diff-size": 1024,
    }
    checked = json.loads(layer_info(VERIFIED, DIFF, DESCRIPTOR))
    assert checked == {**unchecked, "compressed-diff-digest": BLOB, "diff-size": 2048}


def test_the_size_comes_from_what_is_known_best():
    with_split = dataclasses.replace(RECORD, tar_length=512)
    assert json.loads(layer_info(with_split, DIFF, SILENT))["diff-size"] == 512
    with pytest.raises(Refusal) as refused:
        layer_info(RECORD, DIFF, SILENT)
    assert refused.value.reason == "no-uncompressed-size"


@pytest.mark.parametrize(
    ("form", "number"),
    [
        (Form.ESTARGZ, 2),
        (Form.ZSTD_CHUNKED, 4),
        (Form.ZSTD_CHUNKED_V0, 4),
        (Form.TAR, 0),
        (Form.TAR_GZIP, 2),
        (Form.TAR_ZSTD, 4),
    ],
)
def test_the_compression_is_that_of_the_blob(form: Form, number: int):
    record = dataclasses.replace(VERIFIED, form=form)
    assert json.loads(layer_info(record, DIFF, SILENT))["compression"] == number
