"""Layer records that Podman >= 5.5 and CRI-O >= 1.33 forget: made again, and the image runs.

The damage is what those versions leave behind (als-protocol 3.6): the image, the directories of
its layers in the graph root, and no record of any layer that came from a layer store.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import images
from lab.podman import CommandError, Flavour, PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import MakeRig, Push, Pushed, Rig, graph_layers
from layerstore import limits
from layerstore.graphroot.records import LayerRecord
from layerstore.graphroot.table import Table

HELLO = "hello from small amd64: 199 files\n"


def forget_lazy_layers(env: PodmanEnv) -> list[str]:
    """Drop the records of all layers that came from a layer store; their ids."""
    table = Table(env.graph_root / "overlay-layers", "layers", LayerRecord)
    with table.lock.writing():
        records = table.load()
        lost = [
            record
            for record in records
            if (env.graph_root / "overlay" / record.id / "additionallayer").exists()
        ]
        table.save([record for record in records if record not in lost])
    return [record.id for record in lost]


def pulled(make_rig: MakeRig, flavour: Flavour, small: Pushed, config: str = "") -> tuple[Rig, str]:
    rig = make_rig(flavour, config=config)
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    return rig, image


def test_check_storage_makes_forgotten_records_again(
    flavour: Flavour, make_rig: MakeRig, small: Pushed
) -> None:
    rig, image = pulled(make_rig, flavour, small)
    before = graph_layers(rig.env)
    lost = forget_lazy_layers(rig.env)
    assert len(lost) == len(small.image.layers)
    with pytest.raises(CommandError):
        rig.env.podman("run", "--rm", "--pull=never", image)

    found = rig.env.layerstore("check", "storage", "--json", check=False)
    assert found.returncode == 1
    kinds = {one["kind"] for one in json.loads(found.stdout)["findings"]}
    assert "layer-missing" in kinds
    assert graph_layers(rig.env) == []  # looking changes nothing

    rig.env.layerstore("check", "storage", "--repair")
    after = graph_layers(rig.env)
    for key in ("id", "parent", "diff-digest", "toc-digest", "compression"):
        assert [layer.get(key) for layer in after] == [layer.get(key) for layer in before], key
    # where Podman took "unknown" from the store, we say what the image says: Debian 12 needs it
    for layer, old in zip(after, before, strict=True):
        assert layer["diff-size"] > 0
        assert old["diff-size"] in (-1, layer["diff-size"])
    assert all(layer["flags"]["expected-layer-diffid"] for layer in after)
    assert rig.env.podman("run", "--rm", "--pull=never", image).stdout == HELLO
    assert rig.env.layerstore("check", "storage", "--json").returncode == 0
    rig.env.podman("save", "-o", rig.env.tmp / "saved.tar", image)
    rig.env.podman("rmi", image)
    assert graph_layers(rig.env) == []


def test_an_image_of_an_index_is_no_worse_off(
    flavour: Flavour, make_rig: MakeRig, push: Push, registry: DebianRegistry
) -> None:
    """Podman lists such an image with the digest of its index."""
    rig = make_rig(flavour)
    plain = push(images.small_index(), "forgotten/index:1")
    lazy = "forgotten/index:lazy"
    rig.env.layerstore(
        "convert", f"docker://{registry.host}/{plain.name}", f"docker://{registry.host}/{lazy}"
    )
    image = rig.image(lazy)
    rig.env.podman("pull", image)
    assert forget_lazy_layers(rig.env)
    rig.env.layerstore("check", "storage", "--repair")
    assert rig.env.podman("run", "--rm", "--pull=never", image).stdout == HELLO


def two_forgotten(
    make_rig: MakeRig, flavour: Flavour, pushed: list[Pushed], box: int
) -> tuple[Rig, list[str]]:
    """Images whose lazy layers are forgotten, and a container ``box`` of the one of that number."""
    rig = make_rig(flavour)
    names = [rig.image(one.name) for one in pushed]
    for name in names:
        rig.env.podman("pull", name)
    rig.env.podman("create", "--name", "box", names[box])
    forget_lazy_layers(rig.env)
    return rig, names


def test_a_pull_over_forgotten_layers_harms_nothing_that_stands_on_them(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, mixed: Pushed
) -> None:
    """The mixed image has an ordinary layer, whose record stays, on a forgotten one."""
    rig, names = two_forgotten(make_rig, flavour, [mixed, small], box=1)
    dialect = ["--dialect-l"] if flavour == "debian12" else []
    rig.env.layerstore("pull", *dialect, names[0])

    assert rig.env.podman("run", "--rm", "--pull=never", names[0]).stdout == HELLO
    rig.env.layerstore("check", "storage", "--repair")  # the other one is still forgotten
    assert len(rig.env.podman("images", "--quiet").stdout.split()) == 2
    assert rig.env.podman("run", "--rm", "--pull=never", names[1]).stdout == HELLO
    assert rig.env.podman("start", "--attach", "box").stdout == HELLO


def test_lowers_that_a_pull_made_wrong_are_mended_in_one_go(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, mixed: Pushed
) -> None:
    """Podman's own pull gives forgotten layers new short names; others stand on the old ones."""
    rig, names = two_forgotten(make_rig, flavour, [mixed, small], box=0)
    rig.env.podman("pull", names[0], check=False)
    rig.env.layerstore("check", "storage", "--repair")
    for name in names:
        assert rig.env.podman("run", "--rm", "--pull=never", name).stdout == HELLO
    assert rig.env.podman("start", "--attach", "box").stdout == HELLO
    assert rig.env.layerstore("check", "storage", "--json").returncode == 0


def test_the_service_makes_them_again_when_a_client_lets_go(
    flavour: Flavour, make_rig: MakeRig, small: Pushed, workspace: Path
) -> None:
    rig, image = pulled(make_rig, flavour, small, "[repair]\nenabled = false\n")
    lost = forget_lazy_layers(rig.env)
    additional = (rig.env.graph_root / "overlay" / lost[0] / "additionallayer").read_text()

    def let_go() -> None:
        """The last thing that a pull does."""
        with pytest.raises(FileNotFoundError):
            os.rmdir(additional)

    # who has switched it off is left alone
    let_go()
    time.sleep(limits.REPAIR_QUIET_SECONDS + 1)
    assert graph_layers(rig.env) == []
    rig.service.stop()
    roots = json.dumps([str(rig.env.graph_root)])
    rig.service.configure(f"[repair]\ngraph_roots = {roots}\n")
    rig.service.start()
    let_go()
    until = time.monotonic() + 30
    while rig.service.status()["records_rebuilt"] < len(lost) and time.monotonic() < until:
        time.sleep(0.1)
    assert rig.service.status()["records_rebuilt"] == len(lost)
    assert "event=records-rebuilt" in rig.service.log()
    assert rig.env.podman("run", "--rm", "--pull=never", image).stdout == HELLO


def test_the_service_finds_the_layers_of_image_stores_that_it_is_told_of(
    flavour: Flavour,
    make_rig: MakeRig,
    make_podman_env: Callable[..., PodmanEnv],
    push_lazy: Push,
    small: Pushed,
) -> None:
    """Clients may have other ones than the service's storage.conf."""
    rig = make_rig(flavour, config="[repair]\nenabled = false\n")
    second = push_lazy(images.small_image(marker="second"), "lazy/second:1")
    host = rig.image(second.name).partition("/")[0]
    shared = make_podman_env(flavour, additional_layer_store=rig.store, registries=(host,))
    shared.podman("pull", rig.image(second.name))
    rig.env.configure_storage(
        additional_layer_store=rig.store, additional_image_stores=[shared.graph_root]
    )
    image = rig.image(small.name)
    rig.env.podman("pull", image)
    (lost,) = forget_lazy_layers(rig.env)
    additional = (rig.env.graph_root / "overlay" / lost / "additionallayer").read_text()
    rig.service.stop()
    roots, stores = json.dumps([str(rig.env.graph_root)]), json.dumps([str(shared.graph_root)])
    rig.service.configure(f"[repair]\ngraph_roots = {roots}\nimage_stores = {stores}\n")
    rig.service.start()
    with pytest.raises(FileNotFoundError):
        os.rmdir(additional)
    until = time.monotonic() + 30
    while not rig.service.status()["records_rebuilt"] and time.monotonic() < until:
        time.sleep(0.1)
    assert rig.service.status()["records_rebuilt"] == 1
    assert "record-repair-failed" not in rig.service.log()
    assert rig.env.podman("run", "--rm", "--pull=never", image).stdout == HELLO


def test_a_layer_that_leads_elsewhere_is_not_believed(make_rig: MakeRig, small: Pushed) -> None:
    rig, _ = pulled(make_rig, "debian13", small)
    lost = forget_lazy_layers(rig.env)
    directory = rig.env.graph_root / "overlay" / lost[-1]
    other = (rig.env.graph_root / "overlay" / lost[0] / "additionallayer").read_text()
    (directory / "additionallayer").write_text(other)
    result = rig.env.layerstore("check", "storage", "--repair", check=False)
    assert "additionallayer leads to" in result.stdout
    assert lost[-1] not in {layer["id"] for layer in graph_layers(rig.env)}
