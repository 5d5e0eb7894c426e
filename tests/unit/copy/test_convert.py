"""Converting images: what changes, what stays, and what is refused."""

import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lab import oci, tars
from lab.simregistry import SimRegistry
from layerstore import limits
from layerstore.copy.convert import ConvertOptions, ConvertResult, convert
from layerstore.copy.convertlayer import LayerProgress
from layerstore.copy.layerform import Estargz, ExternalToc, ZstdChunked
from layerstore.errors import (
    InvalidLayer,
    InvalidManifest,
    LayerstoreError,
    NetworkError,
    NotFound,
    UnsupportedFormat,
    UsageError,
    VerificationError,
)
from layerstore.formats import (
    EstargzOptions,
    LayerStream,
    ZstdChunkedOptions,
    iter_toc,
    parse_footer,
    read_toc,
)
from layerstore.image import Digest, Platform, media_types, parse_config
from layerstore.layertree import LayerIndex, build_index
from layerstore.registry import RegistrySettings
from layerstore.registry.registriesconf import RegistriesConf

SHARED = (tars.directory(b"etc"), tars.regular(b"etc/hosts", b"localhost\n"))
SETTINGS = RegistrySettings(registries=RegistriesConf(), tls_verify=False, attempts=2)
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"


def tar(*members: tars.Member) -> bytes:
    out = io.BytesIO()
    tars.write_tar(out, members)
    return out.getvalue()


def image(layout: Path, tag: str, *layers: bytes, architecture: str = "amd64") -> oci.StoredImage:
    sources = [oci.LayerSource(layer) for layer in layers]
    config = oci.RunConfig(architecture=architecture, labels={"a": "b"})
    return oci.write_image(layout, tag, sources, config)


class Layout:
    """Reading a layout by hand, as evidence."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def blob(self, digest: str) -> bytes:
        raw = (self.directory / "blobs" / digest.replace(":", "/")).read_bytes()
        assert digest == f"sha256:{hashlib.sha256(raw).hexdigest()}"
        return raw

    def json(self, digest: str) -> Any:
        return json.loads(self.blob(digest))

    def blobs(self) -> set[str]:
        return {path.name for path in (self.directory / "blobs" / "sha256").iterdir()}


def run(src: str, dst: str, **options: Any) -> ConvertResult:
    return convert(
        src,
        dst,
        ConvertOptions(source_settings=SETTINGS, destination_settings=SETTINGS, **options),
    )


def edited(layout: Path, tag: str, stored: oci.StoredImage, **changes: Any) -> None:
    """Store a changed manifest under a tag."""
    document = json.loads(stored.blob(stored.digest).read_bytes()) | changes
    oci._publish(layout, tag, document)


def check_layer(layout: Layout, descriptor: dict[str, Any], diff_id: str) -> list[str]:
    """Check everything that a client believes about a layer; give the names in its TOC."""
    blob = layout.blob(descriptor["digest"])
    assert descriptor["mediaType"] == media_types.OCI_LAYER_GZIP
    assert descriptor["size"] == len(blob)
    assert diff_id == f"sha256:{hashlib.sha256(gzip.decompress(blob)).hexdigest()}"
    footer = parse_footer(blob[-51:], len(blob))
    toc = read_toc(blob[footer.toc_offset :])
    assert descriptor["annotations"][TOC_DIGEST] == Digest.of(toc)
    index = io.BytesIO()
    build_index(iter_toc(toc), index, blob_size=len(blob), toc_offset=footer.toc_offset)
    LayerIndex.from_bytes(index.getvalue()).close()
    return [entry.name for entry in iter_toc(toc)]


def test_an_image_is_converted_and_the_rest_of_it_kept(tmp_path: Path) -> None:
    layers = tar(*SHARED), tar(tars.regular(b"f", b"x" * 9000), tars.whiteout(b"etc/hosts"))
    stored = image(tmp_path / "in", "v1", *layers)
    config_before = json.loads(
        stored.blob(Layout(tmp_path / "in").json(stored.digest)["config"]["digest"]).read_bytes()
    )
    edited(tmp_path / "in", "v1", stored, annotations={"k": "v"}, subject={"unknown": [1]})
    result = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v2")
    out = Layout(tmp_path / "out")
    manifest = out.json(result.digest)
    assert manifest["annotations"] == {"k": "v"}
    assert manifest["subject"] == {"unknown": [1]}
    config = out.json(manifest["config"]["digest"])
    names = [
        check_layer(out, layer, diff_id)
        for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)
    ]
    assert names == [
        [".no.prefetch.landmark", "etc/", "etc/hosts"],
        [".no.prefetch.landmark", "f", "etc/.wh.hosts"],
    ]
    del config["rootfs"], config_before["rootfs"]
    assert config == config_before
    (converted,) = result.images
    assert [layer.digest for layer in converted.layers] == [
        layer["digest"] for layer in manifest["layers"]
    ]
    assert not any(layer.kept for layer in converted.layers)


def test_converting_again_keeps_everything(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    first = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1")
    blobs = Layout(tmp_path / "out").blobs()
    second = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v2")
    elsewhere = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/more:v1")
    rebuilt = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v3", force=True)
    assert first.digest == second.digest == elsewhere.digest == rebuilt.digest
    assert [image.layers[0].kept for r in (first, second, rebuilt) for image in r.images] == [
        False,
        True,
        False,
    ]
    assert Layout(tmp_path / "out").blobs() == blobs
    assert Layout(tmp_path / "more").blobs() == blobs


def test_options_of_the_writer_rebuild(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    first = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1")
    options = EstargzOptions(prioritize=("/etc/hosts", "/none"))
    second = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v2", form=Estargz(options))
    assert second.digest != first.digest
    assert second.not_found == ("/none",)
    out = Layout(tmp_path / "out")
    manifest = out.json(second.digest)
    diff_id = out.json(manifest["config"]["digest"])["rootfs"]["diff_ids"][0]
    names = check_layer(out, manifest["layers"][0], diff_id)
    assert names == ["etc/", "etc/hosts", ".prefetch.landmark"]


def test_a_false_annotation_is_not_believed(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    document = json.loads(stored.blob(stored.digest).read_bytes())
    layers = [dict(document["layers"][0], annotations={TOC_DIGEST: "sha256:" + "0" * 64, "x": "y"})]
    edited(tmp_path / "in", "v2", stored, layers=layers)
    result = run(f"oci:{tmp_path}/in:v2", f"oci:{tmp_path}/out:v2")
    (layer,) = Layout(tmp_path / "out").json(result.digest)["layers"]
    assert layer["annotations"][TOC_DIGEST] == result.images[0].layers[0].toc_digest
    assert layer["annotations"]["x"] == "y"


def index_of(tmp_path: Path) -> str:
    """Two platforms that share a layer, and an attestation."""
    layout = tmp_path / "in"
    images = [
        image(
            layout, name, tar(*SHARED), tar(tars.regular(b"arch", name.encode())), architecture=name
        )
        for name in ("amd64", "arm64")
    ]
    statement = oci._store(layout, b'{"predicate":1}')
    empty = oci._store(layout, b"{}")
    attestation = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": media_types.OCI_CONFIG, "digest": empty, "size": 2},
        "layers": [{"mediaType": "application/vnd.in-toto+json", "digest": statement, "size": 15}],
    }
    raw = json.dumps(attestation).encode()
    entries = [
        {
            "mediaType": one.media_type,
            "digest": one.digest,
            "size": one.size,
            "platform": dict(one.platform),
        }
        for one in images
    ]
    entries.append(
        {
            "mediaType": media_types.OCI_MANIFEST,
            "digest": oci._store(layout, raw),
            "size": len(raw),
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        }
    )
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": entries,
        "annotations": {"i": "j"},
    }
    oci._publish(layout, "multi", document)
    return f"oci:{layout}:multi"


def test_every_platform_of_an_index_is_converted(tmp_path: Path) -> None:
    source = index_of(tmp_path)
    events: list[LayerProgress] = []
    result = convert(source, f"oci:{tmp_path}/out:v1", None, events.append)
    out = Layout(tmp_path / "out")
    index = out.json(result.digest)
    before = json.loads((tmp_path / "in/index.json").read_bytes())["manifests"][-1]["digest"]
    old = Layout(tmp_path / "in").json(before)
    assert index["annotations"] == {"i": "j"}
    assert [e["platform"] for e in index["manifests"]] == [e["platform"] for e in old["manifests"]]
    assert index["manifests"][2] == old["manifests"][2]
    attestation = out.json(index["manifests"][2]["digest"])
    assert out.blob(attestation["layers"][0]["digest"]) == b'{"predicate":1}'
    layers = []
    for entry in index["manifests"][:2]:
        manifest = out.json(entry["digest"])
        diff_ids = out.json(manifest["config"]["digest"])["rootfs"]["diff_ids"]
        for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True):
            check_layer(out, layer, diff_id)
            layers.append(layer["digest"])
    assert layers[0] == layers[2] != layers[1] != layers[3]
    done = [event.layer for event in events if event.phase == "done"]
    assert len(done) == len(set(done)) == 3
    again = convert(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v2")
    assert again.digest == result.digest


def test_only_the_platforms_asked_for(tmp_path: Path) -> None:
    source = index_of(tmp_path)
    result = run(source, f"oci:{tmp_path}/out:v1", platforms=(Platform.parse("linux/arm64"),))
    (entry,) = Layout(tmp_path / "out").json(result.digest)["manifests"]
    assert entry["platform"]["architecture"] == "arm64"
    with pytest.raises(NotFound):
        run(source, f"oci:{tmp_path}/out:v1", platforms=(Platform.parse("linux/riscv64"),))


def test_docker_manifests_become_oci(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    document = json.loads(stored.blob(stored.digest).read_bytes())
    document["config"]["mediaType"] = media_types.DOCKER_CONFIG
    document["layers"][0]["mediaType"] = media_types.DOCKER_LAYER_GZIP
    edited(tmp_path / "in", "d", stored, **document | {"mediaType": media_types.DOCKER_MANIFEST})
    result = run(f"oci:{tmp_path}/in:d", f"oci:{tmp_path}/out:v1")
    assert result.media_type == media_types.OCI_MANIFEST
    manifest = Layout(tmp_path / "out").json(result.digest)
    assert manifest["mediaType"] == media_types.OCI_MANIFEST
    assert manifest["config"]["mediaType"] == media_types.OCI_CONFIG
    assert manifest["layers"][0]["mediaType"] == media_types.OCI_LAYER_GZIP


def test_damage_on_the_way_is_told_from_a_bad_image(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED), b"no tar at all" * 50)
    with pytest.raises(InvalidLayer, match=stored.layers[1].digest):
        run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1")
    stored = image(tmp_path / "in", "v2", tar(*SHARED))
    path = stored.blob(stored.layers[0].digest)
    raw = bytearray(path.read_bytes())
    for position in (0, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(VerificationError):
            run(f"oci:{tmp_path}/in:v2", f"oci:{tmp_path}/out:v1")
    assert not (tmp_path / "out/index.json").exists()


def test_a_config_that_contradicts_the_layers(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    document = json.loads(stored.blob(stored.digest).read_bytes())
    config = json.loads(stored.blob(document["config"]["digest"]).read_bytes())
    for diff_ids, error in (
        (["sha256:" + "1" * 64], VerificationError),
        ([], InvalidManifest),
    ):
        config["rootfs"]["diff_ids"] = diff_ids
        raw = json.dumps(config).encode()
        descriptor = document["config"] | {
            "digest": oci._store(tmp_path / "in", raw),
            "size": len(raw),
        }
        edited(tmp_path / "in", "v1", stored, config=descriptor)
        with pytest.raises(error):
            run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1")


def test_what_is_no_container_image(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    document = json.loads(stored.blob(stored.digest).read_bytes())
    config = document["config"] | {"mediaType": "application/vnd.cncf.helm.config.v1+json"}
    edited(tmp_path / "in", "helm", stored, config=config)
    layers = [document["layers"][0] | {"mediaType": media_types.OCI_LAYER_GZIP + "+encrypted"}]
    edited(tmp_path / "in", "secret", stored, layers=layers)
    for tag in ("helm", "secret"):
        with pytest.raises(UnsupportedFormat):
            run(f"oci:{tmp_path}/in:{tag}", f"oci:{tmp_path}/out:v1")


@pytest.mark.parametrize("name", ["", "image", "oci", "docker:x", "dir:/x", "docker://x@sha256:1"])
def test_names_that_mean_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(LayerstoreError):
        run(name, f"oci:{tmp_path}/out:v1")


def test_a_destination_cannot_be_named_by_digest(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    with pytest.raises(UsageError):
        run(f"oci:{tmp_path}/in:v1", "docker://localhost/a@sha256:" + "0" * 64)


def test_an_image_without_layers(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1")
    result = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1")
    assert result.digest == result.source


# -- forms that leave config and diff IDs as they are -----------------------------------


def plain(blob: bytes) -> bytes:
    stream = LayerStream(io.BytesIO(blob))
    found = b""
    while data := stream.read(1 << 20):
        found += data
    return found


def test_zstd_chunked_leaves_config_and_diff_ids(tmp_path: Path) -> None:
    changes = tars.regular(b"f", b"x" * 9000), tars.directory(b"etc"), tars.whiteout(b"etc/hosts")
    layers = tar(*SHARED), tar(*changes)
    stored = image(tmp_path / "in", "v1", *layers)
    before = json.loads(stored.blob(stored.digest).read_bytes())
    result = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v2", form=ZstdChunked())
    out = Layout(tmp_path / "out")
    manifest = out.json(result.digest)
    assert manifest["config"] == before["config"]
    for old, new, content in zip(before["layers"], manifest["layers"], layers, strict=True):
        assert new["mediaType"] == media_types.OCI_LAYER_ZSTD
        assert new["digest"] != old["digest"]
        assert plain(out.blob(new["digest"])) == content
        assert set(new["annotations"]) == {
            f"io.github.containers.zstd-chunked.{name}"
            for name in ("manifest-checksum", "manifest-position", "tarsplit-position")
        }
    (converted,) = result.images
    assert [layer.diff_id for layer in converted.layers] == [Digest.of(one) for one in layers]
    assert result.toc_image is None


def test_zstd_chunked_layers_are_kept(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    first = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1", form=ZstdChunked())
    again = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/more:v2", form=ZstdChunked())
    forced = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/x:v2", form=ZstdChunked(), force=True)
    other = ZstdChunked(ZstdChunkedOptions(level=1, chunk_size=4096))
    rebuilt = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/x:v3", form=other)
    back = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/x:v4")
    assert first.digest == again.digest == forced.digest
    results = (first, again, forced, rebuilt, back)
    assert [r.images[0].layers[0].kept for r in results] == [False, True, False, False, False]
    (layer,) = Layout(tmp_path / "x").json(back.digest)["layers"]
    assert layer["mediaType"] == media_types.OCI_LAYER_GZIP
    assert set(layer["annotations"]) == {TOC_DIGEST, "io.containers.estargz.uncompressed-size"}


def test_a_false_promise_of_zstd_chunked_is_not_believed(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    first = run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1", form=ZstdChunked())
    layout = tmp_path / "out"
    document = Layout(layout).json(first.digest)
    key = "io.github.containers.zstd-chunked.manifest-checksum"
    document["layers"][0]["annotations"][key] = "sha256:" + "0" * 64
    oci._publish(layout, "false", document)
    again = run(f"oci:{layout}:false", f"oci:{layout}:true", form=ZstdChunked())
    assert (
        Layout(layout).json(again.digest)["layers"] == Layout(layout).json(first.digest)["layers"]
    )
    assert not again.images[0].layers[0].kept


def toc_of(layout: Layout, toc_image: Any, layer: dict[str, Any]) -> bytes:
    """The TOC that belongs to a layer, found as a lazy reader finds it."""
    (found,) = [
        one
        for one in toc_image["layers"]
        if one["annotations"]["containerd.io/snapshot/stargz/layer.digest"] == layer["digest"]
    ]
    assert found["mediaType"] == media_types.OCI_LAYER_GZIP
    return read_toc(layout.blob(found["digest"]))


def test_external_tocs_lie_in_an_image_for_all_platforms(tmp_path: Path) -> None:
    source = index_of(tmp_path)
    result = run(source, f"oci:{tmp_path}/out:v1", form=ExternalToc())
    assert result.toc_image == f"oci:{tmp_path}/out:v1-esgztoc"
    out = Layout(tmp_path / "out")
    tags = {
        entry["annotations"]["org.opencontainers.image.ref.name"]: entry
        for entry in json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]
    }
    assert set(tags) == {"v1", "v1-esgztoc"}
    assert tags["v1"]["digest"] == result.digest
    assert tags["v1-esgztoc"]["digest"] == result.toc_image_digest
    toc_image = out.json(tags["v1-esgztoc"]["digest"])
    assert toc_image["mediaType"] == media_types.OCI_MANIFEST
    assert out.blob(toc_image["config"]["digest"]) == b"{}"
    assert toc_image["config"]["mediaType"] == media_types.OCI_CONFIG
    assert len(toc_image["layers"]) == 3  # one is shared
    digests = [layer["digest"] for layer in toc_image["layers"]]
    assert digests == sorted(digests)
    before = json.loads((tmp_path / "in/index.json").read_bytes())["manifests"][-1]["digest"]
    sources = Layout(tmp_path / "in")
    for old, new in zip(
        sources.json(before)["manifests"][:2], out.json(result.digest)["manifests"][:2], strict=True
    ):
        manifest, was = out.json(new["digest"]), sources.json(old["digest"])
        assert manifest["config"] == was["config"]
        for layer, layer_was in zip(manifest["layers"], was["layers"], strict=True):
            blob = out.blob(layer["digest"])
            assert layer["mediaType"] == media_types.OCI_LAYER_GZIP
            assert parse_footer(blob[-51:], len(blob)).external
            assert gzip.decompress(blob) == gzip.decompress(sources.blob(layer_was["digest"]))
            toc = toc_of(out, toc_image, layer)
            assert layer["annotations"][TOC_DIGEST] == Digest.of(toc)
            index = io.BytesIO()
            end = len(blob) - 46
            build_index(iter_toc(toc), index, blob_size=len(blob), toc_offset=end)
            LayerIndex.from_bytes(index.getvalue()).close()
    again = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v2", form=ExternalToc())
    assert (again.digest, again.toc_image_digest) == (result.digest, result.toc_image_digest)


def test_external_tocs_need_a_tag_beside_the_image(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    for place in (f"oci:{tmp_path}/out", f"oci-archive:{tmp_path}/out.tar:v1"):
        with pytest.raises(UsageError):
            run(f"oci:{tmp_path}/in:v1", place, form=ExternalToc())
    with pytest.raises(UsageError):
        ExternalToc(EstargzOptions(prioritize=("etc",)))


def test_a_layer_with_an_external_toc_becomes_an_ordinary_estargz(tmp_path: Path) -> None:
    image(tmp_path / "in", "v1", tar(*SHARED))
    run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1", form=ExternalToc())
    result = run(f"oci:{tmp_path}/out:v1", f"oci:{tmp_path}/out:v2")
    out = Layout(tmp_path / "out")
    manifest = out.json(result.digest)
    diff_id = out.json(manifest["config"]["digest"])["rootfs"]["diff_ids"][0]
    assert check_layer(out, manifest["layers"][0], diff_id)[0] == ".no.prefetch.landmark"


# -- registries ---------------------------------------------------------------------


def push(registry: SimRegistry, stored: oci.StoredImage) -> str:
    manifest = stored.blob(stored.digest).read_bytes()
    for one in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
        registry.add_blob("in", stored.blob(one["digest"]).read_bytes())
    registry.add_manifest("in", manifest, "v1")
    return f"docker://{registry.host}/in:v1"


def test_between_repositories_of_a_registry(tmp_path: Path) -> None:
    stored = image(tmp_path, "v1", tar(*SHARED), tar(tars.regular(b"f", b"x" * 5000)))
    with SimRegistry() as registry:
        source = push(registry, stored)
        result = run(source, f"docker://{registry.host}/out:v1")
        raw, media_type = registry.manifests["out", "v1"]
        assert (Digest.of(raw), media_type) == (result.digest, media_types.OCI_MANIFEST)
        manifest = json.loads(raw)
        config = parse_config(registry.blobs[manifest["config"]["digest"]])
        for layer, diff_id in zip(manifest["layers"], config.diff_ids, strict=True):
            plain = gzip.decompress(registry.blobs[layer["digest"]])
            assert diff_id == Digest.of(plain)
        uploads = registry.count("PUT", "/blobs/uploads/")
        assert uploads == 3
        again = run(f"docker://{registry.host}/out:v1", f"docker://{registry.host}/out:v2")
        assert again.digest == result.digest
        assert registry.count("PUT", "/blobs/uploads/") == uploads
        mounted = run(f"docker://{registry.host}/out:v1", f"docker://{registry.host}/else:v1")
        assert mounted.digest == result.digest
        whole = [entry for entry in registry.requests("GET", "/blobs/") if entry.status == 200]
        assert len([entry for entry in whole if manifest["layers"][0]["digest"] in entry.path]) == 0


def test_external_tocs_are_pushed_before_the_image(tmp_path: Path) -> None:
    stored = image(tmp_path, "v1", tar(*SHARED))
    with SimRegistry() as registry:
        source = push(registry, stored)
        result = run(source, f"docker://{registry.host}/out:v1", form=ExternalToc())
        raw, media_type = registry.manifests["out", "v1-esgztoc"]
        assert (Digest.of(raw), media_type) == (result.toc_image_digest, media_types.OCI_MANIFEST)
        assert result.toc_image == f"docker://{registry.host}/out:v1-esgztoc"
        put = [entry.path for entry in registry.requests("PUT", "/manifests/")]
        assert put == ["/v2/out/manifests/v1-esgztoc", "/v2/out/manifests/v1"]


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    noise = hashlib.shake_256(b"noise").digest(3_000_000)
    stored = image(tmp_path / "in", "v1", tar(tars.regular(b"f", noise)))
    with SimRegistry() as registry:
        source = push(registry, stored)
        layer = stored.layers[0].digest
        fault = registry.fault("reset", match=f"GET .*{layer}", after=2_000_000, times=1)
        run(source, f"oci:{tmp_path}/out:v1")
        assert fault.hits == 1
        resumed = registry.requests("GET", layer)[-1]
        assert resumed.headers["range"].startswith("bytes=")
        assert resumed.sent < 2_000_000


def test_a_registry_that_keeps_failing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BACKOFF_FIRST_SECONDS", 0.0)
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    with SimRegistry() as registry:
        source = push(registry, stored)
        registry.fault("short", match=f"GET .*{stored.layers[0].digest}", after=10)
        with pytest.raises(NetworkError):
            run(source, f"oci:{tmp_path}/out:v1")
    assert not (tmp_path / "out/index.json").exists()


def test_other_bytes_from_a_registry_are_refused(tmp_path: Path) -> None:
    stored = image(tmp_path / "in", "v1", tar(*SHARED))
    with SimRegistry() as registry:
        source = push(registry, stored)
        size = stored.layers[0].size
        registry.fault("other", match=f"GET .*{stored.layers[0].digest}", data=b"x" * size)
        with pytest.raises(VerificationError):
            run(source, f"oci:{tmp_path}/out:v1")


def test_temporary_files_are_gone_afterwards(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    image(tmp_path / "in", "v1", tar(*SHARED))
    run(f"oci:{tmp_path}/in:v1", f"oci:{tmp_path}/out:v1", scratch=scratch)
    image(tmp_path / "in", "bad", b"bad" * 1000)
    with pytest.raises(InvalidLayer):
        run(f"oci:{tmp_path}/in:bad", f"oci:{tmp_path}/out:v1", scratch=scratch)
    assert list(scratch.iterdir()) == []
