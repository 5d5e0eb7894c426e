"""Exported layers and lists of changes, beside what Podman and containers-storage say."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lab import images
from lab.podman import FLAVOURS, PodmanEnv
from lab.torture import torture_image
from layerstore.formats.tarstream import TarEntry, TarReader
from layerstore.graphroot.changes import changes
from layerstore.graphroot.export import export_diff

pytestmark = pytest.mark.compat

SCRIPT = """
cd /torture/changes && echo new > new-file && rm links/one && rm -r opaque && mkdir opaque &&
echo inside > opaque/inside && rm -r outer && echo file > outer && chmod 711 links &&
ln new-file hard && ln -s new-file soft && mkfifo pipe && echo more >> file-directory-file &&
mkdir -p deep/er/still && echo x > deep/er/still/file && touch /bin/busybox.new &&
rm /opt/plugins/old && mv /opt/plugins/deep /opt/plugins/moved-away 2>/dev/null; true
"""


def records(env: PodmanEnv) -> list[dict[str, Any]]:
    found = []
    for name in ("layers.json", "volatile-layers.json"):
        path = env.graph_root / "overlay-layers" / name
        if path.exists():
            found += json.loads(path.read_text())
    return found


def chain(env: PodmanEnv, layer: str) -> list[Path]:
    """The diff directories of a layer and those below it, nearest first."""
    by_id = {record["id"]: record for record in records(env)}
    found = []
    while layer:
        found.append(env.graph_root / "overlay" / layer / "diff")
        layer = by_id[layer].get("parent", "")
    return found


def entries(tar: bytes) -> dict[bytes, TarEntry]:
    return {entry.name: entry for entry in TarReader(io.BytesIO(tar))}


def facts(entry: TarEntry) -> tuple[Any, ...]:
    return (
        *(entry.type, entry.link_name, entry.mode & 0o7777, entry.uid, entry.gid, entry.size),
        *(entry.dev_major, entry.dev_minor, entry.xattrs),
    )


@pytest.mark.parametrize("flavour", FLAVOURS, indirect=True)
def test_a_container_layer(flavour, make_podman_env, registry, push) -> None:
    env = make_podman_env(flavour)
    push(torture_image(), "export/torture:1")
    name = f"{registry.host}/export/torture:1"
    env.podman("pull", "--quiet", name)
    env.podman("run", "--name", "changed", "--network=none", name, "sh", "-c", SCRIPT)
    container = json.loads(env.podman("inspect", "changed").stdout)[0]["Id"]
    (layer,) = [
        record["layer"]
        for record in json.loads(
            (env.graph_root / "overlay-containers/containers.json").read_text()
        )
        if record["id"] == container
    ]
    diff, *lowers = chain(env, layer)

    ours = entries(b"".join(export_diff(diff, lowers, None)))
    archive = env.directory / "layer.tar"
    env.containers_storage("diff", "--uncompressed", "--file", archive, layer)
    theirs = entries(archive.read_bytes())
    assert list(ours) == list(theirs)
    assert {name: facts(entry) for name, entry in ours.items()} == {
        name: facts(entry) for name, entry in theirs.items()
    }
    for each, entry in ours.items():
        # the older one cuts fractions of a second off, the newer one rounds; markers have no time
        if not each.endswith(b"/.wh..wh..opq"):
            assert abs(entry.mtime_ns - theirs[each].mtime_ns) <= 10**9
    assert b"torture/changes/.wh.links" not in ours
    assert b"torture/changes/links/.wh.one" in ours

    assert [str(change) for change in changes(diff, lowers)] == (
        env.podman("diff", "changed").stdout.splitlines()
    )
    # however odd: what Podman extracted is what its archives say
    assert "0 to repair" in env.layerstore("check", "storage", "--full").stdout


@pytest.mark.parametrize("flavour", FLAVOURS, indirect=True)
def test_the_changes_of_image_layers(flavour, make_podman_env, registry, push) -> None:
    env = make_podman_env(flavour)
    push(images.small_image(), "export/small:1")
    name = f"{registry.host}/export/small:1"
    env.podman("pull", "--quiet", name)
    top = json.loads((env.graph_root / "overlay-images/images.json").read_text())[0]["layer"]
    diff, *lowers = chain(env, top)
    assert [str(change) for change in changes(diff, lowers)] == (
        env.podman("diff", name).stdout.splitlines()
    )
