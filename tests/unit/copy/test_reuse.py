"""The rules of reuse: what was checked decides, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from layerstore.copy.reuse import (
    ImageChoice,
    KnownImage,
    WantedLayer,
    choose_image_id,
    in_place,
    in_place_by_toc,
    in_place_by_word,
    layer_ids,
    proven_diff_id,
    proven_toc,
    require_image,
    wanted_layers,
)
from layerstore.errors import InvalidManifest, UnsupportedFormat
from layerstore.graphroot.identity import image_id, layer_id, released_image_id
from layerstore.graphroot.records import LayerRecord
from layerstore.image import Descriptor, Digest, ImageConfig, Manifest, Platform, media_types
from layerstore.image.annotations import ESTARGZ_TOC_DIGEST


def digest(text: str) -> Digest:
    return Digest.of(text.encode())


TAR, BLOB, TOC = digest("tar"), digest("blob"), digest("toc")
AMD64 = Platform("linux", "amd64")
digests = st.text(max_size=3).map(digest)


def descriptor(name: str = "blob", **fields: object) -> Descriptor:
    media_type = str(fields.pop("media_type", media_types.OCI_LAYER_GZIP))
    return Descriptor(media_type=media_type, digest=digest(name), size=1, **fields)  # type: ignore[arg-type]


def manifest(*layers: Descriptor, config: str = media_types.OCI_CONFIG) -> Manifest:
    return Manifest(
        media_type=media_types.OCI_MANIFEST,
        config=descriptor("config", media_type=config),
        layers=layers,
    )


def extracted(parent: str = "", **fields: object) -> LayerRecord:
    return LayerRecord(
        id=layer_id(parent, diff_id=TAR),
        parent=parent,
        diff_digest=TAR,
        compressed_diff_digest=BLOB,
        **fields,  # type: ignore[arg-type]
    )


# -- images that are taken ---------------------------------------------------------------


def test_layers_get_their_three_names() -> None:
    layer = descriptor(annotations={ESTARGZ_TOC_DIGEST: TOC})
    config = ImageConfig(platform=AMD64, diff_ids=(TAR, digest("b")))
    first, second = wanted_layers(manifest(layer, descriptor("b")), config)
    assert first == WantedLayer(0, layer, TAR, TOC)
    assert (second.index, second.diff_id, second.toc) == (1, digest("b"), None)


@pytest.mark.parametrize("diff_ids", [(), (TAR,), (TAR, TAR, TAR)])
def test_config_and_manifest_must_list_as_many_layers(diff_ids: tuple[Digest, ...]) -> None:
    with pytest.raises(InvalidManifest, match=r"lists 2 layers"):
        wanted_layers(
            manifest(descriptor(), descriptor()), ImageConfig(platform=AMD64, diff_ids=diff_ids)
        )


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (descriptor(urls=("https://elsewhere.example/x",)), r"elsewhere\.example"),
        (descriptor(media_type="application/vnd.oci.image.layer.v1.tar+encrypted"), "encrypted"),
        (descriptor(media_type="application/vnd.docker.image.rootfs.foreign.diff.tar"), "foreign"),
        (descriptor(media_type="text/plain"), "text/plain"),
    ],
)
def test_layers_of_other_kinds_are_refused(layer: Descriptor, said: str) -> None:
    with pytest.raises(UnsupportedFormat, match=said):
        wanted_layers(manifest(layer), ImageConfig(platform=AMD64, diff_ids=(TAR,)))


def test_diff_ids_that_cannot_name_layers_are_refused() -> None:
    long = Digest("sha512:" + "0" * 128)
    with pytest.raises(UnsupportedFormat, match="sha256"):
        wanted_layers(manifest(descriptor()), ImageConfig(platform=AMD64, diff_ids=(long,)))


def test_an_artifact_is_no_image() -> None:
    require_image(manifest())
    with pytest.raises(UnsupportedFormat, match="helm"):
        require_image(manifest(config="application/vnd.cncf.helm.config.v1+json"))


# -- layers that answer --------------------------------------------------------------------


def test_an_extracted_layer_answers_for_its_diff_id() -> None:
    assert proven_diff_id(extracted(), lazy=False) == TAR
    assert in_place(extracted("p"), "p", TAR, lazy=False)
    # Its whole tar stream was checked, whatever else is known of it.
    assert proven_diff_id(extracted(toc_digest=TOC), lazy=False) == TAR


def test_a_layer_in_a_layer_store_answers_for_no_diff_id_whatever_its_record_says() -> None:
    assert proven_diff_id(extracted(), lazy=True) is None
    assert not in_place(extracted(), "", TAR, lazy=True)


def test_an_incomplete_layer_answers_for_nothing() -> None:
    record = extracted(flags={"incomplete": True})
    assert proven_diff_id(record, lazy=False) is None
    assert not in_place_by_word(record, "", WantedLayer(0, descriptor(), TAR, TOC))
    by_toc = LayerRecord(
        id=layer_id("", toc_digest=TOC), toc_digest=TOC, flags={"incomplete": True}
    )
    assert not in_place_by_toc(by_toc, "", TOC)


@given(parent=digests, toc=digests, claimed=digests, wanted=digests, lazy=st.booleans())
def test_a_toc_never_answers_for_a_diff_id(
    parent: Digest, toc: Digest, claimed: Digest, wanted: Digest, lazy: bool
) -> None:
    for below in ("", parent.hex):
        record = LayerRecord(
            id=layer_id(below, toc_digest=toc),
            parent=below,
            toc_digest=toc,
            diff_digest=claimed,
            compressed_diff_digest=claimed,
        )
        assert proven_diff_id(record, lazy=lazy) is None
        assert not in_place(record, below, wanted, lazy=lazy)
        assert not in_place_by_word(record, below, WantedLayer(0, descriptor(), claimed, None))
        assert in_place_by_toc(record, below, toc)
        assert in_place_by_toc(record, below, wanted) == (wanted == toc)


def test_a_diff_id_never_answers_for_a_toc() -> None:
    # The key alone is not enough: the record of an extracted layer may have it too.
    assert proven_toc(extracted(toc_digest=TOC)) is None
    assert not in_place_by_toc(extracted(toc_digest=TOC), "", TOC)


def test_a_layer_is_in_its_place_only_on_its_parent() -> None:
    assert not in_place(extracted("p"), "", TAR, lazy=False)
    moved = replace(extracted("p"), parent="q")  # its id does not belong there
    assert not in_place(moved, "q", TAR, lazy=False)


def test_a_layer_may_have_another_id_where_the_usual_one_is_taken() -> None:
    usual, other = layer_ids("p", TAR)
    assert usual == layer_id("p", diff_id=TAR)
    assert other not in (usual, layer_id("p", toc_digest=TAR))
    assert in_place(replace(extracted("p"), id=other), "p", TAR, lazy=False)


def test_the_word_of_a_store_is_for_one_blob_only() -> None:
    wanted = WantedLayer(0, descriptor("blob"), TAR, None)
    assert in_place_by_word(extracted(), "", wanted)
    assert not in_place_by_word(
        extracted(), "", structs.replace(wanted, descriptor=descriptor("other"))
    )


# -- ids of images -----------------------------------------------------------------------------

CONFIG, MANIFEST = digest("config"), digest("manifest")


def choose(
    tocs: tuple[Digest | None, ...], known: dict[str, KnownImage], top: str = "top"
) -> ImageChoice:
    return choose_image_id(CONFIG, MANIFEST, tocs, top, known.get)


def test_an_image_is_named_after_its_config() -> None:
    assert choose((None, None), {}) == ImageChoice(CONFIG.hex, replace=False)
    same_layers = KnownImage(digest("another manifest"), CONFIG, "top")
    assert choose((None,), {CONFIG.hex: same_layers}) == ImageChoice(CONFIG.hex, replace=True)


def test_an_image_whose_layers_are_others_keeps_its_id() -> None:
    unchecked = KnownImage(MANIFEST, CONFIG, "other top")
    chosen = choose((None,), {CONFIG.hex: unchecked})
    assert chosen.id != CONFIG.hex
    assert not chosen.replace
    ours = KnownImage(MANIFEST, CONFIG, "top")
    again = choose((None,), {CONFIG.hex: unchecked, chosen.id: ours})
    assert again == ImageChoice(chosen.id, replace=True)


def test_an_image_of_stand_in_layers_leaves_the_usual_id_to_others() -> None:
    chosen = choose_image_id(CONFIG, MANIFEST, (None,), "top", lambda _: None, usual_layers=False)
    assert chosen.id != CONFIG.hex
    mine = {chosen.id: KnownImage(MANIFEST, CONFIG, "top")}
    again = choose_image_id(CONFIG, MANIFEST, (None,), "top", mine.get, usual_layers=False)
    assert again == ImageChoice(chosen.id, replace=True)


def test_tocs_go_into_the_id_with_the_config() -> None:
    assert choose((TOC, None), {}).id == image_id(CONFIG, (TOC, None))
    other = choose_image_id(digest("c2"), MANIFEST, (TOC, None), "top", lambda _: None)
    assert other.id != image_id(CONFIG, (TOC, None))


def test_an_image_of_equal_tocs_and_another_manifest_is_another_image() -> None:
    usual = image_id(CONFIG, (TOC,))
    there = KnownImage(digest("m2"), CONFIG, "top")
    chosen = choose((TOC,), {usual: there})
    assert chosen.id != usual
    assert not chosen.replace
    mine = KnownImage(MANIFEST, CONFIG, "top")
    assert choose((TOC,), {usual: mine}) == ImageChoice(usual, replace=True)


def test_the_id_of_released_versions_is_recognised_for_this_very_image_only() -> None:
    released = released_image_id((TOC,))
    mine = KnownImage(MANIFEST, CONFIG, "top")
    assert choose((TOC,), {released: mine}) == ImageChoice(released, replace=True)
    for other in (
        structs.replace(mine, manifest=digest("m2")),
        structs.replace(mine, config=digest("c2")),
        structs.replace(mine, top_layer="elsewhere"),
    ):
        chosen = choose((TOC,), {released: other})
        assert chosen == ImageChoice(image_id(CONFIG, (TOC,)), replace=False)
