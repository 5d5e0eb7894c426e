from __future__ import annotations

import json

from layerstore.image import Digest
from layerstore.provider.info import layer_info, toc_info

BLOB, DIFF, TOC = (Digest("sha256:" + c * 64) for c in "abc")


def test_dialect_t_states_nothing_but_what_the_client_demands():
    info = json.loads(toc_info(toc_digest=TOC, diff_id=DIFF, compressed_size=77))
    assert info == {
        "compressed-size": 77,
        "compression": 2,
        "diff-size": -1,
        "flags": {"expected-layer-diffid": DIFF},
        "toc-digest": TOC,
    }


def test_dialect_l_claims_the_blob_digest_only_after_it_was_checked():
    unchecked = json.loads(
        layer_info(diff_id=DIFF, diff_size=1024, compressed_size=77, verified_digest=None)
    )
    assert unchecked == {
        "compressed-size": 77,
        "compression": 2,
        "diff-digest": DIFF,
        "diff-size": 1024,
    }
    checked = json.loads(
        layer_info(diff_id=DIFF, diff_size=1024, compressed_size=77, verified_digest=BLOB)
    )
    assert checked == {**unchecked, "compressed-diff-digest": BLOB}
